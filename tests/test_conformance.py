"""Conformance of the simulator's driver, shown on simulated runs; real MPI runs are in test_runtime_conformance.py.

A simulated run's logs are given back as if they were hardware's. What is under test is the pairing of messages, the
drivers' rules for ties and launches, and that a difference is seen.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from disagg.core.commands import PrepareReceive, RunSteps, ServeKv
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.cost import ConstantCost
from disagg.core.event_log import read_log
from disagg.core.overheads import MessageLatency
from disagg.policies.vocabulary import Request, Role
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.recorded import ConformanceDifference, Recording, conform
from disagg.simulator.timing import ModelTiming

NUM_EXECUTORS = 4


class _NotingTiming(ModelTiming):
    """Keeps the end of every step, as a hardware driver does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step_ends: dict[tuple[int, int], list[int]] = {}

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        super().begin(executor, run, now)
        ends = [self.end_of_step(executor, k) for k in range(1, run.last_step + 64)]
        self.step_ends[executor, run.epoch] = ends


def _run(
    seed: int,
    launch: dict[int, Any] | None = None,
    binding: str = "at_context_done",
    cancels: bool = False,
    prompt_token: int = 0,
) -> tuple[dict[int, bytes], dict[tuple[int, int], list[int]]]:
    chance = Random(seed)
    scheduler = SchedulerConfig(
        max_batch_size=4,
        capacity=chance.choice(["guaranteed_no_evict", "max_utilization"]),
        max_num_tokens=chance.choice([8, 64]),
    )
    executors = tuple(
        ExecutorConfig(
            id=i,
            role=Role.CONTEXT if i < 3 else Role.GENERATION,
            num_blocks=chance.randint(30, 60),
            tokens_per_block=4,
            scheduler=scheduler,
            report_interval=3000,
            layerwise=seed % 3 > 0,
        )
        for i in range(1, NUM_EXECUTORS + 1)
    )
    config = OrchestratorConfig(
        executors,
        context_router=PolicySpec("least_tokens"),
        generation_router=PolicySpec("power_of_two"),
        generation_binding=binding,
        seed=seed,
    )
    timing = _NotingTiming(
        {e.id: ConstantCost(1000, 10, 1, 5) for e in executors}, MessageLatency(100, 100, 100, prompt_token)
    )
    logs: dict[int, list[bytes]] = {core: [] for core in range(NUM_EXECUTORS + 1)}
    cluster = SimulatedCluster(
        config,
        timing,
        kv_bytes_per_token=1000,
        link_bytes_per_s=1e12,
        link_latency=20,
        launch=launch,
        log_sink=lambda core: logs[core].append,
    )
    at = 0
    for i in range(60):
        at += chance.randint(0, 8000)
        prompt, output = chance.randint(1, 40), chance.randint(1, 40)
        cluster.submit_at(at, Request(i + 1, prompt, 30, arrival=at), output)
        if i % 4 == 0 and cancels:
            later = cluster.env.timeout(at + chance.randint(100, 9000))
            later.callbacks.append(lambda _, request_id=i + 1: cluster.cancel(request_id))
    cluster.run()
    return {core: b"".join(parts) for core, parts in logs.items()}, timing.step_ends


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ahead", [(1, 1), (3, 2), (1, 2, True), (4, 3, True)])
def test_a_run_given_its_own_times_makes_its_own_decisions(seed: int, ahead: Any) -> None:
    launch = dict.fromkeys(range(1, NUM_EXECUTORS + 1), ahead)
    logs, step_ends = _run(seed, launch)
    assert conform(Recording(logs, step_ends), launch) > 300


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("binding", ["at_arrival", "at_context_start"])
@pytest.mark.parametrize("ahead", [(3, 2), (1, 3, True)])
def test_a_run_with_early_binding_given_its_own_times_makes_its_own_decisions(
    seed: int, binding: str, ahead: Any
) -> None:
    """Cancels among them: transfers end early and their ends are the world's."""
    launch = dict.fromkeys(range(1, NUM_EXECUTORS + 1), ahead)
    logs, step_ends = _run(seed, launch, binding, cancels=True)
    found = [c for log in logs.values() for frame in read_log(log)[1] for c in frame.commands]
    assert any(isinstance(command, PrepareReceive) for command in found)
    assert any(isinstance(command, ServeKv) and command.is_early for command in found) is (seed % 3 > 0)
    assert conform(Recording(logs, step_ends), launch) > 300


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("binding", ["at_context_done", "at_arrival"])
def test_a_run_whose_messages_waited_for_prompts_before_them_makes_its_own_decisions(seed: int, binding: str) -> None:
    logs, step_ends = _run(seed, binding=binding, cancels=True, prompt_token=150)
    assert conform(Recording(logs, step_ends)) > 300


def test_a_step_that_ended_later_than_recorded_is_seen() -> None:
    logs, step_ends = _run(1)
    executor, epoch = next((key for key, ends in step_ends.items() if key[0] == 3 and key[1] > 5))
    step_ends[executor, epoch] = [end + 1 for end in step_ends[executor, epoch]]
    with pytest.raises(ConformanceDifference, match="core 3"):
        conform(Recording(logs, step_ends))


def test_a_run_launched_further_ahead_than_the_simulator_is_told_is_seen() -> None:
    launch = dict.fromkeys(range(1, NUM_EXECUTORS + 1), (3, 2))
    logs, step_ends = _run(2, launch)
    with pytest.raises(ConformanceDifference, match="hardware"):
        conform(Recording(logs, step_ends))


def test_a_run_whose_plans_were_made_ahead_is_told_from_one_whose_were_not() -> None:
    launch = dict.fromkeys(range(1, NUM_EXECUTORS + 1), (3, 2, True))
    logs, step_ends = _run(2, launch)
    with pytest.raises(ConformanceDifference, match="StepsCommitted"):
        conform(Recording(logs, step_ends), dict.fromkeys(launch, (3, 2)))


def test_another_policy_than_the_recorded_one_is_seen() -> None:
    logs, step_ends = _run(3)
    recording = Recording(logs, step_ends)
    recording.config = OrchestratorConfig(
        recording.config.executors, context_router=PolicySpec("random"), generation_router=PolicySpec("random")
    )
    with pytest.raises(ConformanceDifference, match="core 0"):
        conform(recording)
