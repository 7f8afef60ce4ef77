"""Rate matching is the arithmetic that it says it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from disagg.core.cost import ConstantCost
from disagg.experiments.cluster import cluster_of
from disagg.experiments.config import Experiment
from disagg.experiments.plan_arithmetic import Arithmetic, Lengths, arithmetic, batch_that_fits, full_step
from disagg.experiments.plan_space import Candidate, Group, Shape, candidate_of
from disagg.policies.vocabulary import PS_PER_MS
from tests.test_plan_search import load

LENGTHS = Lengths(prompt=1000.0, output=11.0, max_tokens=24)
# a step: 2 ms, 0.1 ms a decode, 0.001 ms a prompt token
COST = ConstantCost(2 * PS_PER_MS, PS_PER_MS // 10, 0, PS_PER_MS // 1000)


def of(shape: Shape, tmp_path: Path, *more: str) -> tuple[Arithmetic, Experiment]:
    data, base = load(tmp_path, *(f"slo.{item}" for item in more))
    candidate = candidate_of(data, base.root, shape, {"router": {"name": "round_robin"}})
    assert isinstance(candidate, Candidate)
    ids = range(1, 10)
    return arithmetic(candidate.experiment, dict.fromkeys(ids, COST), LENGTHS), candidate.experiment


def test_rates_of_executors_follow_from_their_steps_and_the_cluster_is_as_fast_as_its_slower_side(
    tmp_path: Path,
) -> None:
    found, _ = of(Shape(Group(2, 1, 1), Group(1, 2, 1)), tmp_path, "ttft_ms=100", "tpot_ms=5")
    # context: 8 prompts fill 8192 tokens: 8 / (2 + 8) ms; generation: 30 decodes take 5 ms, of 10 steps a request
    assert found.context_rate == pytest.approx(800)
    assert found.generation_rate == pytest.approx(30 / (10 * 0.005))
    assert found.limited_by == "generation"
    assert found.matched_rate == pytest.approx(600)
    assert found.matched_rate_per_gpu == pytest.approx(150)
    # TensorRT-LLM: output tok/s / (context GPUs x generation rate / context rate + generation GPUs)
    assert found.matched_ratio == pytest.approx(600 / 800)
    assert found.matched_throughput_per_gpu == pytest.approx(600 * 11 / (1 * 600 / 800 + 2))


def test_an_objective_that_one_request_alone_misses_leaves_no_rate(tmp_path: Path) -> None:
    found, _ = of(Shape(Group(1, 1, 1), Group(1, 1, 1)), tmp_path, "ttft_ms=2.9", "tpot_ms=5")
    assert found.context_rate == 0
    found, _ = of(Shape(Group(1, 1, 1), Group(1, 1, 1)), tmp_path, "ttft_ms=3.1", "tpot_ms=2")
    assert found.context_rate == pytest.approx(1 / 0.003)
    assert found.generation_rate == 0


def test_a_mixed_executor_pays_for_prompts_in_the_steps_of_its_decodes(tmp_path: Path) -> None:
    found, _ = of(Shape(mixed=Group(1, 1, 1), mixed_max_num_tokens=2048), tmp_path, "ttft_ms=100", "tpot_ms=5")
    # b decodes bring b / 10 prompts of 1000 tokens a step: 2 + 0.1 b + 0.1 b <= 5 ms, hence b = 15, if it is tried
    assert found.mixed_rate is not None
    assert 0.9 * 1.5 / 0.005 < found.mixed_rate <= 1.5 / 0.005


def test_kv_bounds_a_batch(tmp_path: Path) -> None:
    _, experiment = of(Shape(Group(1, 1, 1), Group(1, 1, 1)), tmp_path)
    executor = cluster_of(experiment).executors[1]
    assert batch_that_fits(executor, LENGTHS) == 64
    small = msgspec.structs.replace(executor, num_blocks=10 * 32 + 5)  # 1024 tokens are 32 blocks
    assert batch_that_fits(small, LENGTHS) == 10


def test_the_fullest_step_of_a_mixed_executor_is_as_long_as_its_prompts_make_it(tmp_path: Path) -> None:
    _, experiment = of(Shape(mixed=Group(1, 1, 1), mixed_max_num_tokens=512), tmp_path)
    tokens, seconds, is_beyond = full_step(cluster_of(experiment).executors[0], COST, LENGTHS)
    assert tokens == 511
    assert not is_beyond
    assert seconds == pytest.approx(0.002 + 0.0001 + 0.000511)
