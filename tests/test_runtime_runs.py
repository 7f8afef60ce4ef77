"""Runs of real clusters: spans and grants, scripted stops, preemption, leases, and executors that are killed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import RunSteps, ServeKv, StopAfterStep
from disagg.core.config import ExecutorConfig, PolicySpec, SchedulerConfig
from disagg.core.event_log import Frame, ReplayDifference, read_log, replay, replay_frames
from disagg.core.events import Enqueue, KvReceived, PeerDown, Report, StepsDone
from disagg.core.executor import ExecutorCore
from disagg.core.grants import granted_through
from disagg.core.orchestrator import OrchestratorCore
from disagg.core.tables import RequestRow, StayRow
from disagg.policies.vocabulary import PS_PER_MS, Request
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import Fault, HardwareResult, LoadPhase, PlannedSubmission, SendRow
from tests.run_until_shown import run_until_shown
from tests.runtime_programs.clusters import NUM_BLOCKS, Layout, cluster, context, generation, mixed, submissions
from tests.tiny_models import SHAPES, Script, make_engine, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
SHAPE = SHAPES["llama"]
MODEL = ModelSource(SHAPE, seed=3)
PROMPTS = prompts(SHAPE, [5, 19, 12, 7, 23, 9, 14, 6], seed=5)


@functools.cache
def expected(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """What one engine alone says."""
    return tuple(Script([make_engine(SHAPE)]).generate(0, prompt, num_tokens))


def run(layouts: Sequence[Layout], phases: tuple[LoadPhase, ...], faults: Sequence[Fault] = (), **spec: Any) -> Any:
    values: dict[str, Any] = {"verify_kv": False, "record_margins": False}
    warm_up = spec.pop("warm_up", True)
    made = cluster(MODEL, layouts, **(values | spec))
    result = run_cluster(made, phases, faults=faults, timeout_s=120, warm_up=warm_up)
    assert isinstance(result, HardwareResult)
    return result


def frames(result: HardwareResult, core: int) -> list[Frame]:
    return list(read_log(result.logs[core])[1])


def events(result: HardwareResult, core: int, kind: type) -> list[Any]:
    return [event for frame in frames(result, core) for event in frame.events if isinstance(event, kind)]


def commands(result: HardwareResult, core: int, kind: type) -> list[Any]:
    return [command for frame in frames(result, core) for command in frame.commands if isinstance(command, kind)]


def requests(result: HardwareResult) -> dict[int, RequestRow]:
    return {row.request_id: row for row in result.rows if isinstance(row, RequestRow)}


def check_all_blocks_are_free(result: HardwareResult, executors: Sequence[int]) -> None:
    """A fresh core that lives through the log ends without a visit and with every block free."""
    for executor in executors:
        header, logged = read_log(result.logs[executor])
        assert isinstance(header.executor, ExecutorConfig)
        core = ExecutorCore(header.executor, header.policy_root)
        assert replay_frames(core, logged) > 0
        core.check()
        assert core.visits == {}
        assert core.blocks.num_free == header.executor.num_blocks


def check_ends_of_spans(result: HardwareResult, core: int, steps_per_grant: int, depth: int) -> int:
    """Each span ended with the last step that was granted when it was stopped; the number of spans cut short.

    The boundary of a stop is the first step that ends at or after it, as in the simulator.
    """
    ends = {(epoch, step): at for epoch, step, at in result.step_ends[core]}
    plan: RunSteps | None = None
    boundaries: list[int] = []
    num_cut = 0
    for frame in frames(result, core):
        stops = [command for command in frame.commands if isinstance(command, StopAfterStep)]
        if plan is not None and stops:
            steps = range(plan.first_step, plan.last_step + 1)
            boundaries.append(next(step for step in steps if ends[plan.epoch, step] >= frame.now))
        for event in frame.events:
            if isinstance(event, StepsDone):
                assert plan is not None
                assert event.plan == plan.plan
                boundaries += [stop.step for stop in event.stopped]
                through = plan.last_step
                if boundaries:
                    first, last = plan.first_step, plan.last_step
                    through = granted_through(min(boundaries) - 1, first, last, steps_per_grant, depth)
                assert event.num_steps == through
                num_cut += through < plan.last_step
        for command in frame.commands:
            if isinstance(command, RunSteps):
                plan, boundaries = command, []
    return num_cut


@pytest.mark.parametrize(("steps_per_grant", "depth"), [(1, 1), (4, 1), (1, 3), (3, 2)])
def test_an_arrival_cuts_a_span_short_at_the_last_step_granted(steps_per_grant: int, depth: int) -> None:
    phases = submissions(PROMPTS[:5], 40, every_ms=8)

    def one_run() -> HardwareResult:
        done: HardwareResult = run([mixed()], phases, steps_per_grant=steps_per_grant, pipeline_depth=depth)
        assert [row.token_ids for row in done.sends] == [expected(p, 40) for p in PROMPTS[:5]]
        return done

    def is_cut(done: HardwareResult) -> bool:
        num_cut = check_ends_of_spans(done, 1, steps_per_grant, depth)
        cut = [
            frame
            for frame in frames(done, 1)
            if any(isinstance(event, Enqueue) for event in frame.events)
            and any(isinstance(command, StopAfterStep) for command in frame.commands)
        ]
        return num_cut > 0 and bool(cut)

    result = run_until_shown(one_run, is_cut, "did an arrival cut a span: all came at once")
    spans = commands(result, 1, RunSteps)
    assert any(span.last_step > span.first_step for span in spans)
    assert replay(result.logs[1]) == len(frames(result, 1))
    check_all_blocks_are_free(result, [1])


@pytest.mark.parametrize(("steps_per_grant", "depth"), [(1, 1), (3, 2)])
def test_a_scripted_length_ends_a_sequence_and_tokens_launched_after_it_are_dropped(
    steps_per_grant: int, depth: int
) -> None:
    lengths = [1, 3, 9, 20, 2]
    phase = LoadPhase(
        tuple(
            PlannedSubmission(Request(i, len(p), 30, input_token_ids=p), i * PS_PER_MS, length)
            for i, (p, length) in enumerate(zip(PROMPTS, lengths), 1)
        )
    )
    layouts = [context(), generation()]
    result = run(layouts, (phase,), steps_per_grant=steps_per_grant, pipeline_depth=depth)
    assert [row.token_ids for row in result.sends] == [expected(p, 30)[:n] for p, n in zip(PROMPTS, lengths)]
    rows = requests(result)
    assert {row.finish_reason for row in rows.values()} == {"stop"}
    assert [rows[i].num_output_tokens for i in range(1, 6)] == lengths
    assert rows[1].generation_executor is None  # the context phase ended it
    check_ends_of_spans(result, 2, steps_per_grant, depth)
    check_all_blocks_are_free(result, [1, 2])


def test_an_end_id_ends_a_sequence_in_either_phase() -> None:
    long = expected(PROMPTS[0], 30)
    stop = next(token for i, token in enumerate(long) if i > 4 and token not in long[:i])
    phase = LoadPhase(
        (
            PlannedSubmission(Request(1, len(PROMPTS[0]), 30, input_token_ids=PROMPTS[0], end_id=stop), 0),
            PlannedSubmission(Request(2, len(PROMPTS[0]), 30, input_token_ids=PROMPTS[0], end_id=long[0]), 0),
        )
    )
    result = run([context(), generation()], (phase,))
    first, second = result.sends
    assert first.token_ids == long[: long.index(stop) + 1]
    assert second.token_ids == long[:1]


def test_requests_preempted_for_want_of_blocks_are_recomputed_to_the_same_tokens() -> None:
    scheduler = SchedulerConfig(capacity="max_utilization", max_batch_size=8, max_num_tokens=16)
    layouts = [mixed(num_blocks=18, scheduler=scheduler)]
    result = run(layouts, submissions(PROMPTS[:5], 24, every_ms=1))
    assert [row.token_ids for row in result.sends] == [expected(p, 24) for p in PROMPTS[:5]]
    assert sum(row.num_preemptions for row in result.rows if isinstance(row, StayRow)) > 0
    check_all_blocks_are_free(result, [1])


def test_a_closed_loop_keeps_its_concurrency_and_phases_follow_each_other() -> None:
    first = submissions(PROMPTS[:2], 6)[0]
    rest = tuple(PlannedSubmission(Request(i, len(p), 6, input_token_ids=p)) for i, p in enumerate(PROMPTS[2:], 3))
    result = run([mixed()], (first, LoadPhase(rest, concurrency=2)))
    rows: list[SendRow] = result.sends
    assert [row.token_ids for row in rows] == [expected(p, 6) for p in PROMPTS]
    for row in rows[2:]:
        out = [r for r in rows if r.intended_ps < row.intended_ps < (r.end_ps or 0)]
        assert len(out) < 2
    assert all(row.actual_ps >= row.intended_ps for row in rows)
    assert [row.phase for row in rows] == [0, 0] + [1] * 6


@pytest.mark.parametrize("participant", [0, 1])
def test_a_killed_generation_executor_is_survived_and_its_requests_are_recomputed(participant: int) -> None:
    victim = generation(tp=2, num_blocks=400) if participant else generation(num_blocks=400)
    layouts = [context(), generation(num_blocks=400), victim]
    faults = [Fault(3, 250 * PS_PER_MS, participant)]
    result = run(layouts, submissions(PROMPTS, 180, every_ms=30), faults)
    assert [row.token_ids for row in result.sends] == [expected(p, 180) for p in PROMPTS]
    rows = requests(result)
    assert any(row.num_attempts > 1 for row in rows.values())
    assert all(row.error is None for row in rows.values())
    assert events(result, 0, PeerDown) == events(result, 1, PeerDown) == events(result, 2, PeerDown) == [PeerDown(3)]
    check_all_blocks_are_free(result, [1, 2])
    assert result.logs[3] == b""


def test_a_killed_context_executor_is_survived_and_its_requests_are_recomputed() -> None:
    faults = [Fault(1, 60 * PS_PER_MS)]
    result = run([context(), context(), generation()], submissions(PROMPTS, 20, every_ms=15), faults)
    assert [row.token_ids for row in result.sends] == [expected(p, 20) for p in PROMPTS]
    assert events(result, 3, PeerDown) == [PeerDown(1)]
    assert all(row.context_executor == 2 for i, row in requests(result).items() if i > 6)
    check_all_blocks_are_free(result, [2, 3])


def test_without_any_executor_left_requests_fail_and_the_run_ends() -> None:
    result = run([mixed()], submissions(PROMPTS[:3], 200, every_ms=1), [Fault(1, 100 * PS_PER_MS)])
    assert all("no healthy executor" in (row.error or "") for row in result.sends)


@pytest.mark.parametrize(("on_failure", "attempts"), [("recompute", 3), ("fail", 1)])
def test_a_reader_that_comes_after_the_lease_is_refused(on_failure: str, attempts: int) -> None:
    lease = 1000  # picoseconds: over before any reader can ask
    layouts = [context(lease=lease), generation()]  # over which no warm-up could go either
    result = run(layouts, submissions(PROMPTS[:2], 8), on_failure=on_failure, warm_up=False)
    for row in requests(result).values():
        assert "lease ran out" in (row.error or "")
        assert row.num_attempts == attempts
    assert [command.ok for command in commands(result, 1, ServeKv)] == [False] * 2 * attempts
    assert [event.ok for event in events(result, 2, KvReceived)] == [False] * 2 * attempts
    check_all_blocks_are_free(result, [1, 2])


def test_requests_that_cannot_be_served_fail_alone() -> None:
    bad = [
        Request(1, 3, 8, input_token_ids=(1, 2, SHAPE.vocab_size)),
        Request(2, 3, 8, input_token_ids=(1, 2)),
        Request(3, 3, 8),
        Request(4, 300, 8, input_token_ids=(1,) * 300),
    ]
    good = Request(5, len(PROMPTS[0]), 8, input_token_ids=PROMPTS[0])
    phase = LoadPhase(tuple(PlannedSubmission(request, 0) for request in (*bad, good)))
    result = run([context(), generation()], (phase,))
    errors = [row.error or "" for row in result.sends]
    assert "token id outside" in errors[0]
    assert "2 input_token_ids for 3" in errors[1]
    assert "no input_token_ids" in errors[2]
    assert f"this executor can hold {NUM_BLOCKS * 4}" in errors[3]
    assert errors[4] == ""
    assert result.sends[4].token_ids == expected(PROMPTS[0], 8)


TIES = """
from disagg.policies.interfaces import SelectingPolicy

class First(SelectingPolicy):
    def select(self, request, pool):
        return min(pool.healthy_rows, key=lambda row: row.active_requests)

class Last(SelectingPolicy):
    def select(self, request, pool):
        return min(reversed(pool.healthy_rows), key=lambda row: row.active_requests)
"""


def test_a_mutated_event_a_changed_tie_break_and_a_dropped_report_each_make_replay_fail(tmp_path: Path) -> None:
    """... of a real run, whose own logs replay; the policy is a file outside the repository."""
    (tmp_path / "ties.py").write_text(TIES)
    spec = cluster(MODEL, [context(), generation(), generation()])
    first, last = (PolicySpec(f"{tmp_path / 'ties.py'}:{name}") for name in ("First", "Last"))
    spec = replace(spec, orchestrator=replace(spec.orchestrator, generation_router=first))
    result = run_cluster(spec, submissions(PROMPTS, 8, every_ms=3), timeout_s=120)
    assert result is not None
    assert all(replay(log) == len(frames(result, core)) for core, log in result.logs.items())

    def replayed_fails(core: int, changed: list[Frame], fresh: Any) -> None:
        assert len(changed) == len(frames(result, core))
        with pytest.raises(ReplayDifference):
            replay_frames(fresh, iter(changed))

    config = spec.orchestrator
    mutated = list(frames(result, 2))
    at = next(i for i, frame in enumerate(mutated) if any(isinstance(event, Enqueue) for event in frame.events))
    (enqueue,) = [event for event in mutated[at].events if isinstance(event, Enqueue)]
    longer = Enqueue(replace(enqueue.request, max_tokens=enqueue.request.max_tokens + 1))
    others = tuple(event for event in mutated[at].events if event is not enqueue)
    mutated[at] = replace(mutated[at], events=(longer, *others))
    replayed_fails(2, mutated, ExecutorCore(config.executors[1]))

    replayed_fails(0, frames(result, 0), OrchestratorCore(replace(config, generation_router=last)))

    dropped = list(frames(result, 0))
    at = next(i for i, frame in enumerate(dropped) if any(isinstance(event, Report) for event in frame.events))
    dropped[at] = replace(dropped[at], events=tuple(e for e in dropped[at].events if not isinstance(e, Report)))
    replayed_fails(0, dropped, OrchestratorCore(config))
