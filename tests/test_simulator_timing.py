"""Step times: noise that is seeded, keyed, and the same in whatever order executors run."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from disagg.core.commands import Chunk, RunSteps
from disagg.core.cost import ConstantCost
from disagg.core.events import Report
from disagg.simulator import ModelTiming
from tests.simulation_helpers import World, random_world

COST = ConstantCost(a=10**6, b=1000, c=10, d=100)


def epoch_end(timing: ModelTiming, executor: int, epoch: int) -> int:
    timing.begin(executor, RunSteps(1, epoch, 1, 8, num_decodes=4, num_kv_tokens=1000), 5000)
    return timing.end_of_step(executor, 8)


def test_without_noise_a_step_ends_as_its_features_say() -> None:
    timing = ModelTiming({1: COST}, 50)
    timing.begin(1, RunSteps(1, 1, 1, 3, num_decodes=4, num_kv_tokens=1000), 5000)
    assert [timing.end_of_step(1, k) - 5000 for k in (1, 2, 3)] == [1_014_000, 2_028_040, 3_042_120]
    chunks = (Chunk(7, 64, 32, False, ()), Chunk(8, 0, 16, True, ()))
    timing.begin(1, RunSteps(2, 2, 1, 1, chunks=chunks), 0)
    assert timing.end_of_step(1, 1) == 10**6 + 48 * 100


def test_the_first_step_at_or_after_an_instant_is_found_on_the_same_function() -> None:
    timing = ModelTiming({1: COST}, 50, jitter=0.1, seed=3)
    timing.begin(1, RunSteps(1, 1, 1, 500, num_decodes=4, num_kv_tokens=1000), 5000)
    for k in (1, 2, 77, 499):
        end = timing.end_of_step(1, k)
        assert timing.step_by(1, 0, end, 500) == k
        assert timing.step_by(1, 0, end + 1, 500) == k + 1
        assert timing.step_by(1, 0, end - 1, 500) == k
    assert timing.step_by(1, 77, 0, 500) == 78
    assert timing.step_by(1, 77, 10**12, 500) == 500


def test_noise_does_not_depend_on_the_order_in_which_executors_run() -> None:
    one = ModelTiming({1: COST, 2: COST}, 50, jitter=0.2, seed=3)
    other = ModelTiming({1: COST, 2: COST}, 50, jitter=0.2, seed=3)
    ends = {(e, n): epoch_end(one, e, n) for e in (1, 2) for n in range(1, 50)}
    assert ends == {(e, n): epoch_end(other, e, n) for n in range(49, 0, -1) for e in (2, 1)}
    assert len(set(ends.values())) == len(ends)


def test_noise_has_the_seed_that_it_was_given_and_the_spread_that_was_asked_for() -> None:
    exact = epoch_end(ModelTiming({1: COST}, 50), 1, 1) - 5000

    def factors(seed: int, jitter: float) -> list[float]:
        timing = ModelTiming({1: COST}, 50, jitter, seed)
        return [(epoch_end(timing, 1, n) - 5000) / exact for n in range(1, 2001)]

    assert factors(1, 0.1) == factors(1, 0.1)
    assert factors(1, 0.1) != factors(2, 0.1)
    assert fmean(factors(1, 0.1)) == pytest.approx(1, abs=0.01)
    assert pstdev(factors(1, 0.1)) == pytest.approx(0.1, rel=0.05)
    assert set(factors(1, 0.0)) == {1.0}


def chunk_end(timing: ModelTiming, executor: int, epoch: int) -> int:
    timing.begin(executor, RunSteps(1, epoch, 1, 1, chunks=(Chunk(7, 0, 64, True, ()),)), 5000)
    return timing.end_of_step(executor, 1)


def test_the_noise_of_each_epoch_is_what_it_has_always_been() -> None:
    timing = ModelTiming({1: COST}, 50, jitter=0.1, seed=3)
    assert [epoch_end(timing, 1, n) for n in (1, 2, 3)] == [8_300_170, 6_961_142, 7_391_264]


def test_an_error_is_the_same_through_a_run_for_each_executor_and_kind_of_step() -> None:
    timing = ModelTiming({1: COST, 2: COST}, 50, seed=3, error=0.1)
    ends = [(kind, e, kind(timing, e, n)) for n in range(1, 30) for e in (2, 1) for kind in (chunk_end, epoch_end)]
    found = {(kind, executor): {end for k, e, end in ends if (k, e) == (kind, executor)} for kind, executor, _ in ends}
    assert [len(each) for each in found.values()] == [1, 1, 1, 1]
    exact = ModelTiming({1: COST}, 50)
    factors = sorted((min(found[k, e]) - 5000) / (k(exact, 1, 1) - 5000) for k, e in found)
    assert min(b - a for a, b in pairwise(factors)) > 1e-3, "each has its own"


def test_an_error_has_the_spread_that_was_asked_for_over_seeds() -> None:
    exact = epoch_end(ModelTiming({1: COST}, 50), 1, 1) - 5000
    factors = [
        (epoch_end(ModelTiming({1: COST}, 50, 0.0, seed, error=0.1), 1, 1) - 5000) / exact for seed in range(2000)
    ]
    assert fmean(factors) == pytest.approx(1, abs=0.01)
    assert pstdev(factors) == pytest.approx(0.1, rel=0.05)


def test_an_error_and_the_noise_of_an_epoch_multiply() -> None:
    def end(jitter: float, error: float) -> int:
        return epoch_end(ModelTiming({1: COST}, 50, jitter, 3, error=error), 1, 5) - 5000

    assert len({end(0.0, 0.0), end(0.1, 0.0), end(0.0, 0.1), end(0.1, 0.1)}) == 4
    assert end(0.1, 0.1) * end(0.0, 0.0) == pytest.approx(end(0.1, 0.0) * end(0.0, 0.1), rel=1e-5)


def test_a_message_takes_at_least_a_picosecond() -> None:
    assert ModelTiming({}, 0).message_arrives(2, 0, 100, Report(2))[0] == 101
    assert ModelTiming({}, 70).message_arrives(2, 0, 100, Report(2))[0] == 170


def test_a_noisy_run_repeats_and_differs_from_a_quiet_one() -> None:
    def run(jitter: float) -> World:
        world = World("cg", jitter=jitter)
        for i in range(1, 9):
            world.submit(i, i * 1000, 50, 10)
        return world.run()

    assert run(0.05).digest() == run(0.05).digest()
    assert run(0.05).digest() != run(0.0).digest()
    assert {row.num_output_tokens for row in run(0.3).table("Request")} == {10}


def test_runs_of_one_seed_do_not_share_anything() -> None:
    first = random_world(3)
    second = random_world(3)
    assert second.run().digest() == first.run().digest()
