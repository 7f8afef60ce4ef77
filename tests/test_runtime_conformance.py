"""Conformance on real MPI runs: the simulator, given a hardware run's times, makes the hardware run's decisions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from disagg.core.config import PolicySpec, SchedulerConfig
from disagg.policies.vocabulary import PS_PER_MS, Request
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import HardwareResult, LoadPhase, PlannedSubmission
from disagg.simulator.recorded import ConformanceDifference, Recording, conform
from tests.runtime_programs.clusters import cluster, context, generation, num_instants
from tests.tiny_models import SHAPES, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
SHAPE = SHAPES["llama"]
LENGTHS = (1, 3, 9, 20, 2, 14, 6, 11, 17, 5, 8, 12)
GRANTS, DEPTH = 3, 2
LAUNCH = dict.fromkeys((1, 2, 3), (GRANTS, DEPTH))


def step_ends(result: HardwareResult) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for executor, ends in result.step_ends.items():
        for epoch, _, at in sorted(ends):
            found.setdefault((executor, epoch), []).append(at)
    return found


@pytest.fixture(scope="module")
def result() -> HardwareResult:
    """Two context executors and a generation executor that runs out of blocks, launched ahead, with scripted stops."""
    tight = SchedulerConfig(max_batch_size=8, max_num_tokens=16, capacity="max_utilization")
    layouts = [context(), context(), generation(scheduler=tight, num_blocks=20)]
    texts: Sequence[tuple[int, ...]] = prompts(SHAPE, [5, 19, 12, 7, 23, 9, 14, 6, 11, 16, 8, 13], seed=5)
    phase = LoadPhase(
        tuple(
            PlannedSubmission(Request(i, len(text), 24, input_token_ids=text), i * 6 * PS_PER_MS, length)
            for i, (text, length) in enumerate(zip(texts, LENGTHS, strict=True), 1)
        )
    )
    spec = cluster(ModelSource(SHAPE, seed=3), layouts, steps_per_grant=GRANTS, pipeline_depth=DEPTH)
    done = run_cluster(replace(spec, verify_kv=False, record_margins=False), (phase,), timeout_s=120)
    assert isinstance(done, HardwareResult)
    return done


def test_the_simulator_on_the_hardware_s_times_makes_the_hardware_s_decisions(result: HardwareResult) -> None:
    recording = Recording(result.logs, step_ends(result))
    assert sorted(recording.true_lengths.values()) == sorted(LENGTHS)
    assert conform(recording, LAUNCH) == num_instants(result.logs)


def test_a_simulator_told_of_another_launch_depth_is_caught(result: HardwareResult) -> None:
    with pytest.raises(ConformanceDifference, match="hardware"):
        conform(Recording(result.logs, step_ends(result)), {})


def test_a_simulator_with_another_router_is_caught_at_its_routes(result: HardwareResult) -> None:
    recording = Recording(result.logs, step_ends(result))
    recording.config = replace(recording.config, context_router=PolicySpec("random"), seed=7)
    with pytest.raises(ConformanceDifference, match="core 0"):
        conform(recording, LAUNCH)


def test_step_times_of_another_run_are_caught(result: HardwareResult) -> None:
    shifted = {
        key: [end + PS_PER_MS for end in ends] if key[0] == 3 else list(ends) for key, ends in step_ends(result).items()
    }
    with pytest.raises(ConformanceDifference, match="core 3"):
        conform(Recording(result.logs, shifted), LAUNCH)
