"""What a GPU must have is asked before anything is loaded, and the answer says what to change."""

from __future__ import annotations

import pytest
import torch

from disagg.core.model_shapes import PRESETS
from disagg.runtime.devices import check_machine, check_weights_fit
from disagg.runtime.executor_spec import DeviceError, ModelSource, check_spec
from disagg.runtime.model_place import Place
from disagg.runtime.weights import needed_weight_bytes
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
