"""What a GPU must have is asked before anything is loaded, and the answer says what to change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disagg.core.model_shapes import PRESETS
from disagg.policies.vocabulary import Role
from disagg.runtime import engine_build
from disagg.runtime.collectives import SingleRank
from disagg.runtime.devices import check_weights_fit
from disagg.runtime.executor_spec import DeviceError, ModelSource, check_spec
from disagg.runtime.machine import check_machine
from disagg.runtime.model_place import Place
from disagg.runtime.weights import needed_weight_bytes
from tests.core_desk import executor_config
from tests.runtime_programs.clusters import cluster, context, generation, mixed
from tests.tiny_models import SHAPES

MODEL = ModelSource(SHAPES["llama"])


def test_two_ranks_of_one_executor_cannot_share_a_gpu() -> None:
    roster = check_spec(cluster(MODEL, [mixed(tp=2)], device="cuda", num_devices=1))
    with pytest.raises(DeviceError, match=r"executor 1 has device_ids \[0, 0\] for 2 ranks; allowed: a GPU of its own"):
        check_machine(roster)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_executors_may_share_one_and_are_then_refused_only_for_want_of_it() -> None:
    roster = check_spec(cluster(MODEL, [context(), generation()], device="cuda", num_devices=1))
    with pytest.raises(DeviceError, match="cuda cannot be had"):
        check_machine(roster)


def test_weights_that_do_not_fit_are_refused_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(PRESETS["llama-3.1-70b"], 2)
    needed = needed_weight_bytes(place)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 80 << 30))
    with pytest.raises(DeviceError, match=rf"need {needed >> 20} MiB on each rank .*raise tensor_parallel_size"):
        check_weights_fit(place, "cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 80 << 30))
    check_weights_fit(place, "cuda:0")
    check_weights_fit(place, "cpu")


@pytest.mark.parametrize(
    ("fraction", "told"),
    [
        (None, r"weights take 14 MiB, the KV pool 3 MiB; lower .*kv_cache\.max_tokens \(now 4000\)"),
        (0.9, r"weights take 14 MiB; lower .*kv_cache\.free_gpu_memory_fraction \(now 0\.9\)"),
    ],
)
def test_a_device_that_runs_full_is_told_with_how_much_is_needed_and_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, fraction: float | None, told: str
) -> None:
    def full(*args: Any) -> None:
        words = "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which"
        raise torch.cuda.OutOfMemoryError(words)

    monkeypatch.setattr(engine_build, "_on_gpu", full)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))
    config = executor_config(Role.MIXED, 1000)
    place = Place.of(SHAPES["llama"])
    weights: Any = SimpleNamespace(nbytes=14 << 20)
    needs = r"cuda:0 has no memory left .*3072 MiB of 81920 MiB are free, and 20\.50 GiB is needed at once"
    with pytest.raises(DeviceError, match=f"{needs}; {told}"):
        engine_build.build_stepper(place, weights, config, SingleRank(), None, "cuda:0", fraction, False)
