"""What is sent and when: statistics of arrivals and lengths, common random numbers, phases and closed loops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagg.experiments.arrivals import arrival_offsets, scaled
from disagg.experiments.config import Experiment
from disagg.experiments.config_workload import ConstantPhase, GammaPhase, PoissonPhase
from disagg.experiments.errors import ConfigError
from disagg.experiments.lengths import draw
from disagg.experiments.load_source import LoadSource
from disagg.experiments.streams import repeat_seed, stream
from disagg.experiments.workload import PlannedRequest, Workload, declared_max_tokens

PS = 10**12


def experiment(
    phases: list[dict[str, Any]],
    dataset: dict[str, Any] | None = None,
    max_tokens: Any = 64,
    seed: int = 1,
    root: Path = Path("."),
) -> Experiment:
    config = Experiment.model_validate(
        {
            "schema_version": 1,
            "name": "test",
            "seed": seed,
            "model": {"id": "tiny-llama"},
            "cluster": {"profile": "spec:cpu-2core", "mixed_servers": {"kv_cache": {"tokens_per_block": 16}}},
            "policy": {"mixed_router": "round_robin"},
            "workload": {
                "dataset": dataset or {"type": "synthetic", "isl": {"mean": 100, "stddev": 20}, "osl": 10},
                "max_tokens": max_tokens,
                "phases": phases,
            },
        }
    )
    config._root = root
    return config


def poisson(name: str = "profiling", rate: float = 8.0, requests: int = 100, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "poisson", "rate": rate, "requests": requests, **more}


def gaps(offsets: Iterator[int], number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.diff(np.array(list(islice(offsets, number)), dtype=np.float64), prepend=0.0) / PS


def test_poisson_gaps_have_the_mean_and_variation_of_an_exponential() -> None:
    drawn = gaps(arrival_offsets(PoissonPhase(**poisson(rate=4.0)), stream(7, "a")), 40_000)
    assert drawn.mean() == pytest.approx(0.25, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_a_squared_variation_of_one_over_burstiness(burstiness: float) -> None:
    phase = GammaPhase(name="p", type="gamma", rate=4.0, requests=1, burstiness=burstiness)
    drawn = gaps(arrival_offsets(phase, stream(7, "a")), 60_000)
    assert drawn.mean() == pytest.approx(0.25, rel=0.03)
    assert (drawn.std() / drawn.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.06)


def test_constant_arrivals_do_not_drift() -> None:
    phase = ConstantPhase(name="p", type="constant", rate=3.0, requests=1)
    offsets = list(islice(arrival_offsets(phase, stream(0, "a")), 3_000_001))
    assert offsets[0] == 0
    assert offsets[3_000_000] == 1_000_000 * PS


def test_schedules_of_other_rates_are_scaled_copies() -> None:
    slow = list(islice(arrival_offsets(PoissonPhase(**poisson(rate=2.0)), stream(7, "a")), 100))
    fast = list(islice(arrival_offsets(PoissonPhase(**poisson(rate=4.0)), stream(7, "a")), 100))
    assert np.allclose(slow, 2 * np.array(fast, dtype=np.float64), rtol=1e-9)


def test_a_speed_up_divides_a_trace_exactly() -> None:
    assert scaled(10**15, 2.0) == 5 * 10**14
    assert scaled(3 * 10**17 + 1, 1.0) == 3 * 10**17 + 1


@pytest.mark.parametrize(
    ("keys", "mean", "deviation"),
    [
        ({"mean": 1000, "stddev": 100}, 1000, 100),
        ({"type": "lognormal", "mean": 1000, "stddev": 1500}, 1000, 1500),
        ({"min": 100, "max": 300}, 200, 58.0),
        ({"type": "exponential", "mean": 10_000}, 10_000, 10_000),
        ({"values": [10, 20], "weights": [1, 3]}, 17.5, 4.33),
        (77, 77, 0),
    ],
)
def test_lengths_have_the_moments_that_were_asked_for(keys: Any, mean: float, deviation: float) -> None:
    config = experiment([poisson()], {"type": "synthetic", "isl": keys, "osl": 1})
    drawn = draw(config.workload.dataset.isl, stream(3, "isl"), 200_000)  # type: ignore[union-attr]
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert drawn.std() == pytest.approx(deviation, rel=0.06, abs=1e-9)
    assert drawn.min() >= 1


def test_lengths_are_clamped() -> None:
    keys = {"type": "lognormal", "mean": 100, "stddev": 300, "min": 50, "max": 200}
    config = experiment([poisson()], {"type": "synthetic", "isl": keys, "osl": 1})
    drawn = draw(config.workload.dataset.isl, stream(3, "isl"), 10_000)  # type: ignore[union-attr]
    assert (drawn.min(), drawn.max()) == (50, 200)


def test_equal_seeds_give_equal_workloads_and_other_seeds_others() -> None:
    one = list(Workload(experiment([poisson()])))
    assert list(Workload(experiment([poisson()]))) == one
    assert list(Workload(experiment([poisson()], seed=repeat_seed(1, 1)))) != one


def test_a_longer_warm_up_does_not_change_what_is_measured() -> None:
    short = [poisson("warmup", requests=5), poisson()]
    long = [poisson("warmup", requests=50), poisson()]

    def measured(phases: list[dict[str, Any]]) -> list[tuple[int | None, int, int]]:
        requests = Workload(experiment(phases))
        return [(r.offset, r.num_prompt_tokens, r.num_output_tokens) for r in requests if r.phase == "profiling"]

    assert measured(short) == measured(long)


def test_ids_count_over_all_phases_and_flags_follow_the_phase() -> None:
    phases = [poisson("warmup", requests=3, exclude_from_results=True), poisson(requests=2, traffic_class="chat")]
    requests = list(Workload(experiment(phases)))
    assert [request.id for request in requests] == [0, 1, 2, 3, 4]
    assert [request.excluded for request in requests] == [True, True, True, False, False]
    assert requests[4].traffic_class == "chat"


def test_longer_outputs_are_cut_and_counted() -> None:
    dataset = {"type": "synthetic", "isl": 10, "osl": {"values": [5, 50]}}
    source = LoadSource(Workload(experiment([poisson(requests=200)], dataset, max_tokens=20)))
    requests = source.take(10**18)
    assert {request.num_output_tokens for request in requests} == {5, 20}
    assert source.num_cut == sum(request.num_output_tokens == 20 for request in requests) > 50


def test_a_quantile_bound_is_one_number_for_every_seed() -> None:
    dataset = {"type": "synthetic", "isl": 10, "osl": {"min": 1, "max": 1000}}
    bounds = {declared_max_tokens(experiment([poisson()], dataset, {"quantile": 0.9}, seed)) for seed in range(3)}
    assert len(bounds) == 1
    assert bounds.pop() == pytest.approx(900, abs=10)


def test_token_ids_come_from_the_vocabulary_by_seed() -> None:
    config = experiment([poisson(requests=3)])
    one = list(Workload(config, vocab_size=50))
    assert one == list(Workload(config, vocab_size=50))
    for request in one:
        ids = request.input_token_ids
        assert ids is not None
        assert len(ids) == request.num_prompt_tokens
        assert all(0 <= token < 50 for token in ids)
    assert one[0].input_token_ids != one[1].input_token_ids
    assert next(iter(Workload(config))).input_token_ids is None


def trace(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "t.jsonl").write_text(
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
        '{"timestamp": 3000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 3]}\n'
        '{"timestamp": 3000, "input_length": 100, "output_length": 500, "hash_ids": [4]}\n'
        '{"timestamp": 4000, "input_length": 100, "output_length": 7, "hash_ids": [5]}\n'
    )
    return {"type": "mooncake", "path": "t.jsonl"}


def test_a_trace_plays_at_its_own_times_over_the_speed_up(tmp_path: Path) -> None:
    config = experiment([{"name": "p", "type": "trace", "speedup": 2.0}], trace(tmp_path), root=tmp_path)
    assert [request.offset for request in Workload(config)] == [0, PS, PS, 3 * PS // 2]


def test_equal_hash_blocks_have_equal_tokens_and_equal_hashes(tmp_path: Path) -> None:
    config = experiment([{"name": "p", "type": "trace"}], trace(tmp_path), root=tmp_path)
    first, second, *_ = Workload(config, vocab_size=1000)
    one, other = first.input_token_ids or (), second.input_token_ids or ()
    assert one[:1024] == other[:1024]
    assert one[1024:] != other[1024:]
    assert first.block_hashes[:64] == second.block_hashes[:64]
    assert not set(first.block_hashes[64:]) & set(second.block_hashes[64:])
    assert len(first.block_hashes) == 1100 // 16


def test_phases_share_one_trace_in_order(tmp_path: Path) -> None:
    phases = [poisson("warmup", requests=1), {"name": "p", "type": "trace"}]
    requests = list(Workload(experiment(phases, trace(tmp_path), root=tmp_path)))
    assert [request.num_output_tokens for request in requests] == [5, 50, 64, 7]
    assert [request.offset for request in requests[1:]] == [0, 0, PS]


def test_a_trace_that_is_too_short_is_refused(tmp_path: Path) -> None:
    config = experiment([poisson(requests=5)], trace(tmp_path), root=tmp_path)
    with pytest.raises(ConfigError, match="phase 'profiling' wants 5 requests and the trace has 4"):
        Workload(config)


def test_a_trace_begins_after_the_rows_that_are_skipped(tmp_path: Path) -> None:
    config = experiment([{"name": "p", "type": "trace"}], trace(tmp_path) | {"skip": 3}, root=tmp_path)
    assert [(request.num_output_tokens, request.offset) for request in Workload(config)] == [(7, 0)]
    config = experiment([poisson(requests=2)], trace(tmp_path) | {"skip": 3}, root=tmp_path)
    with pytest.raises(ConfigError, match="the trace has 1 left of 4 after 3 that are skipped"):
        Workload(config)


def test_the_quantile_of_a_trace_is_one_of_its_outputs(tmp_path: Path) -> None:
    config = experiment([poisson(requests=1)], trace(tmp_path), {"quantile": 0.75}, root=tmp_path)
    assert declared_max_tokens(config) == 50


# ---- the load source ------------------------------------------------------------------------------------------------


def play(source: LoadSource, service: int) -> list[tuple[int, PlannedRequest]]:
    """Serve every request in `service` picoseconds; what was sent, with the time of sending."""
    now = 0
    ends: list[int] = []
    sent: list[tuple[int, PlannedRequest]] = []
    while not source.finished:
        at = source.next_send()
        if ends and (at is None or ends[0] <= at):
            now = ends.pop(0)
            source.ended()
        elif at is not None:
            now = max(now, at)
        for request in source.take(now):
            sent.append((now, request))
            ends.append(now + service)
    return sent


def test_an_open_loop_keeps_its_schedule_whatever_the_service() -> None:
    config = experiment([poisson(requests=50)])
    fast = play(LoadSource(Workload(config)), 1)
    slow = play(LoadSource(Workload(config)), 100 * PS)
    assert [at for at, _ in fast] == [at for at, _ in slow]
    assert all(request.offset == at for at, request in fast)


def test_a_closed_loop_keeps_its_concurrency() -> None:
    config = experiment([{"name": "p", "type": "concurrency", "concurrency": 3, "requests": 9}])
    sent = play(LoadSource(Workload(config)), PS)
    assert [at for at, _ in sent] == [0, 0, 0, PS, PS, PS, 2 * PS, 2 * PS, 2 * PS]
    assert [request.excluded for _, request in sent] == [True] * 3 + [False] * 6


def test_a_closed_loop_of_one_burst_is_measured() -> None:
    config = experiment([{"name": "p", "type": "concurrency", "concurrency": 3, "requests": 3}])
    assert [request.excluded for _, request in play(LoadSource(Workload(config)), PS)] == [False] * 3


def test_a_hand_over_neither_drains_nor_bursts() -> None:
    phases = [
        {"name": "warmup", "type": "concurrency", "concurrency": 2, "requests": 4, "exclude_from_results": True},
        {"name": "p", "type": "concurrency", "concurrency": 2, "requests": 4},
    ]
    sent = play(LoadSource(Workload(experiment(phases))), PS)
    assert [at for at, _ in sent] == [0, 0, PS, PS, 2 * PS, 2 * PS, 3 * PS, 3 * PS]
    assert [request.excluded for _, request in sent] == [True] * 4 + [False] * 4


def test_an_open_phase_begins_when_the_last_request_before_it_was_sent() -> None:
    phases = [poisson("warmup", requests=3), {"name": "p", "type": "constant", "rate": 1.0, "requests": 2}]
    sent = [at for at, _ in play(LoadSource(Workload(experiment(phases))), 50 * PS)]
    assert sent[3:] == [sent[2], sent[2] + PS]


def test_a_million_requests_are_not_held_at_once() -> None:
    requests = iter(Workload(experiment([poisson(requests=1_000_000)])))
    assert next(requests).id == 0
    assert sum(1 for _ in islice(requests, 5000)) == 5000
