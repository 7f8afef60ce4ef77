"""The same seed gives the same run, byte for byte; and no command depends on what the world has not yet shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.event_log import replay
from disagg.policies import BatchPlan, BatchView
from disagg.policies.batching import ChunkedPrefill
from disagg.policies.vocabulary import PS_PER_MS, PS_PER_S, PS_PER_US
from tests.simulation_helpers import ROOT, World, executors, named, random_world

NUM_SEEDS = 200


def test_seeds_give_byte_identical_event_logs_in_two_processes_with_other_hash_seeds() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulation_helpers", "0", str(NUM_SEEDS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "4242")
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert [line.split()[0] for line in outputs[0]] == list(map(str, range(NUM_SEEDS)))
    assert len({line.split()[1] for line in outputs[0]}) == NUM_SEEDS


def test_random_runs_are_of_every_kind_and_end_each_request_once() -> None:
    """What the tests beside this one stand on: preemptions, retries, cancels, failures, early stops, spans cut short."""
    seen = set()
    for seed in range(60):
        world = random_world(seed).run()
        rows = world.table("Request")
        assert sorted(row.request_id for row in rows) == list(range(1, 21))
        seen |= {row.finish_reason for row in rows}
        seen |= {"retry" for row in rows if row.num_attempts > 1 and row.finish_reason == "stop"}
        seen |= {"preemption" for row in world.table("Stay") if row.num_preemptions}
        seen |= {"transfer" for row in world.table("Transfer") if row.ok}
        seen |= {"long span" for row in world.table("Step") if row.num_steps > 1}
        for core in world.logs:
            for frame in world.frames(core):
                seen |= {type(command).__name__ for command in frame.commands}
    assert seen >= {"stop", "cancelled", "error", "retry", "preemption", "transfer", "long span"}
    assert seen >= {"StopAfterStep", "RunSteps", "ReceiveKv", "ServeKv", "Dispatched", "Deliver", "WakeAt"}


@pytest.mark.parametrize("seed", range(30))
def test_the_log_of_every_core_replays_into_a_fresh_one(seed: int) -> None:
    world = random_world(seed).run()
    for core in world.logs:
        assert replay(b"".join(world.logs[core])) == len(world.frames(core))


# ---- the world alone knows true lengths -----------------------------------------------------------------------------


def tokens_before(world: World, t: int) -> dict[int, tuple[int, bool, bool]]:
    """Of each request: tokens generated before the instant t, whether it had then ended, whether it was ever preempted.

    From the records of the run: a request's tokens come at the ends of steps, which are equally long within an epoch.
    """
    step_ends: dict[int, dict[int, tuple[int, bool]]] = {}
    for row in world.table("Step"):
        each = (row.end_ps - row.start_ps) // row.num_steps
        for k in range(row.num_steps):
            end = row.start_ps + (k + 1) * each
            step_ends.setdefault(row.executor, {})[row.first_step + k] = (end, row.num_decodes > 0)
    users = world.users_of()
    known: dict[int, tuple[int, bool, bool]] = {}
    for stay in world.table("Stay"):
        user = users[stay.executor_request_id]
        tokens, ended, preempted = known.get(user, (0, False, False))
        if stay.first_step is not None and stay.last_step is not None:
            for step in range(stay.first_step, stay.last_step + 1):
                end, decodes = step_ends[stay.executor].get(step, (t, True))
                tokens += end < t and (step == stay.first_step or decodes)
        ended |= stay.ended_ps < t
        known[user] = (tokens, ended and stay.stage != "context", preempted or stay.num_preemptions > 0)
    return known


def commands_before(world: World, t: int) -> Mapping[int, list[object]]:
    return {core: [frame for frame in world.frames(core) if frame.now < t] for core in world.logs}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), when=st.floats(0.02, 0.98))
def test_output_lengths_hidden_after_an_instant_change_no_command_before_it(seed: int, when: float) -> None:
    draw = Random(seed)
    truth = {i: draw.randint(1, 40) for i in range(1, 21)}
    world = random_world(seed, truth, faults=False).run()
    t = round(when * max(frame.now for core in world.logs for frame in world.frames(core)))
    known = tokens_before(world, t)
    other = {}
    for i, length in truth.items():
        tokens, ended, preempted = known.get(i, (0, False, False))
        if ended or tokens >= length:
            other[i] = length  # its end has shown itself, or the step of its last token is over
        elif preempted:
            other[i] = length + draw.randint(0, 20)  # tokens before a preemption are not in the records
        else:
            other[i] = draw.randint(tokens + 1, 60)
    again = random_world(seed, other, faults=False).run()
    assert commands_before(again, t) == commands_before(world, t)


def test_cores_do_and_log_the_same_whether_they_hear_late_or_in_time() -> None:
    """Of random clusters with kills and cancels: what nobody waits for may be given later, at its own instant."""
    saved = 0
    for seed in range(30):
        late, in_time = (random_world(seed, is_late=is_late).run() for is_late in (True, False))
        unlogged = random_world(seed, is_late=True, is_logged=False).run()
        assert unlogged.rows == late.rows, seed  # though several reports of an executor are read as one
        for core in late.logs:
            for one, other in zip(late.frames(core), in_time.frames(core)):
                assert one == other, f"seed {seed}, core {core}"
        assert late.digest() == in_time.digest(), seed
        assert late.rows_in_order() == in_time.rows_in_order()
        assert late.cluster.env.now == in_time.cluster.env.now, seed  # no call for nothing prolongs the run
        saved += in_time.cluster.count_events() - late.cluster.count_events()
    assert saved > 1000, saved  # else nothing was late


@pytest.mark.parametrize("lease", [PS_PER_MS, 8 * PS_PER_MS, 10 * PS_PER_S])
def test_a_run_that_ends_and_goes_on_is_the_same_whether_cores_hear_late_or_in_time(lease: int) -> None:
    """Leases that run out once nothing else happens, an executor told of another role: the last news are reports."""

    def phases(is_late: bool) -> World:
        world = World(executors("cgm", lease=lease), is_late=is_late)
        for i in range(1, 4):
            world.submit(i, i * PS_PER_US, 100, 5)
        world.run()
        world.cluster.change_role(3, "generation")
        world.run()
        for i in range(4, 7):
            world.submit(i, world.cluster.env.now + i * PS_PER_US, 100, 5)
        return world.run()

    late, in_time = phases(True), phases(False)
    assert late.cluster.env.now == in_time.cluster.env.now
    for core in late.logs:
        assert late.frames(core) == in_time.frames(core), core
    assert late.rows_in_order() == in_time.rows_in_order()


def test_a_policy_that_goes_by_the_time_is_asked_at_the_same_instants_whether_reports_are_late_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class AfterAWhile(ChunkedPrefill):
        """Is to be asked at 5 ms, and would begin prompts from 2 ms on."""

        def plan(self, batch: BatchView) -> BatchPlan:
            return super().plan(batch) if batch.now >= 2 * PS_PER_MS else BatchPlan(ask_again_at=5 * PS_PER_MS)

    def steps(is_late: bool) -> list[tuple[int, int, int]]:
        batching = named(monkeypatch, AfterAWhile, "batching")
        world = World(executors("cg", report_interval=5 * PS_PER_MS // 2, batching=batching), is_late=is_late)
        world.submit(1, 0, 100, 5)
        world.submit(2, 60 * PS_PER_US, 100, 5)
        world.run()
        return [(row.executor, row.start_ps, row.end_ps) for row in world.table("Step")]

    assert steps(True) == steps(False)
    assert steps(True)[0][1] == 5 * PS_PER_MS


def test_hidden_lengths_do_change_what_comes_after() -> None:
    truth = dict.fromkeys(range(1, 21), 10)
    digests = {random_world(5, {**truth, i: 11}, faults=False).run().digest() for i in range(1, 21)}
    assert len(digests) == 20
