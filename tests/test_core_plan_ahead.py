"""Plans made while committed steps of the plan before still run: the core on a desk, and whole clusters."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg.core.commands import PrepareReceive, ReceiveKv, Record, RunSteps
from disagg.core.config import ExecutorConfig
from disagg.core.event_log import Frame, read_log, replay
from disagg.core.events import Cancel, Response, StepsCommitted, StepsDone, Stopped
from disagg.core.tables import RequestRow, StepRow
from disagg.policies.vocabulary import FinishReason
from tests.core_cases import Case, Trace, core_of, make_case, make_early_case, simulate
from tests.core_desk import ExecutorDesk, both, generation
from tests.core_reference import run_reference
from tests.test_core_exactness import assert_equal_lives

cases = st.randoms(use_true_random=False).map(make_case)
early_cases = st.randoms(use_true_random=False).map(make_early_case)
thorough = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# ---- the core on a desk ----------------------------------------------------------------------------------------------


def decoding(*lengths: int, **config: Any) -> ExecutorDesk:
    """A mixed executor whose requests 1, 2, … have their first tokens, of `lengths` declared, and decode."""
    desk = ExecutorDesk(**config)
    desk.give(*(both(i, 4, length) for i, length in enumerate(lengths, 1)))
    desk.end_steps(at=10)
    assert desk.run is not None
    assert desk.run.num_decodes == len(lengths)
    return desk


def commit(desk: ExecutorDesk, step: int, *stopped: Stopped, at: int, more: Any = ()) -> RunSteps:
    """The outstanding plan, which will end with `step`."""
    run = desk.run
    assert run is not None
    desk.run = None
    desk.give(*more, StepsCommitted(run.plan, run.epoch, step, stopped), at=at)
    return run


def done(run: RunSteps, step: int, *stopped: Stopped, error: str | None = None) -> StepsDone:
    return StepsDone(run.plan, run.epoch, step, stopped, error=error)


def test_the_next_plan_comes_with_the_commit_and_the_answer_with_the_end() -> None:
    desk = decoding(4, 9)
    free = desk.free
    first = commit(desk, 3, at=20)
    assert desk.run is not None
    assert (desk.run.left, desk.run.num_decodes, desk.run.first_step) == ((1,), 1, 1)
    assert desk.responses == []
    assert desk.free == free  # the steps that are left write to the blocks of request 1
    desk.give(done(first, 3), at=30)
    assert (desk.response.request_id, desk.response.finish_reason) == (1, FinishReason.LENGTH)
    assert (desk.response.num_output_tokens, desk.response.last_token) == (4, 30)
    assert desk.free > free


def test_epochs_begin_and_end_when_their_steps_do() -> None:
    desk = decoding(4, 9)
    first = commit(desk, 3, at=20)
    desk.give(done(first, 3), at=30)
    desk.end_steps(at=55)
    rows = [command.row for command in desk.history if isinstance(command, Record)]
    found = [(row.first_step, row.num_steps, row.start_ps, row.end_ps) for row in rows if isinstance(row, StepRow)]
    assert found == [(1, 1, 0, 10), (2, 3, 10, 30), (5, 5, 30, 55)]


def test_a_batch_that_nothing_has_changed_goes_on_in_its_epoch() -> None:
    desk = decoding(9, 9)
    first = commit(desk, 3, at=20)
    assert desk.run is not None
    assert (desk.run.epoch, desk.run.first_step, desk.run.last_step) == (first.epoch, 4, 8)
    desk.give(done(first, 3), at=30)
    desk.end_steps(at=80)
    (row,) = [c.row for c in desk.history if isinstance(c, Record) and isinstance(c.row, StepRow)][1:]
    assert (row.num_steps, row.start_ps, row.end_ps) == (8, 10, 80)


def test_a_stop_found_in_a_committed_step_ends_the_next_plan_and_its_tokens_after_that_are_dropped() -> None:
    desk = decoding(4, 20)
    first = commit(desk, 3, at=20)
    second = desk.run
    assert second is not None
    desk.give(done(first, 3, Stopped(2, 2)), at=30)
    assert desk.all_answers == [1]
    assert desk.asked_to_stop
    blocks = desk.core.blocks.blocks_of(2)
    commit(desk, 1, at=30)
    assert desk.core.blocks.blocks_of(2) == blocks  # one step more writes to them
    desk.give(done(second, 1), at=40)
    assert (desk.response.request_id, desk.response.finish_reason) == (2, FinishReason.STOP)
    assert desk.response.num_output_tokens == 3  # the first, and those of steps 1 and 2
    assert desk.free == 100


def test_a_stop_goes_before_max_tokens_in_a_later_committed_step() -> None:
    desk = decoding(4)
    first = commit(desk, 3, at=20)
    assert desk.run is None
    desk.give(done(first, 3, Stopped(1, 2)), at=30)
    assert (desk.response.finish_reason, desk.response.num_output_tokens) == (FinishReason.STOP, 3)


def test_several_plans_may_be_committed_and_a_late_stop_is_surplus_in_all_of_them() -> None:
    desk = decoding(3, 4, 20)
    first = commit(desk, 2, at=20)
    second = commit(desk, 1, at=20)
    assert desk.run is not None
    third = desk.run
    assert third.num_decodes == 1
    desk.give(done(first, 2, Stopped(3, 1)), at=30)
    assert desk.all_answers == [1]
    desk.give(done(second, 1), at=40)
    assert desk.all_answers == [1, 2]
    desk.end_steps(1, at=50)
    assert (desk.response.request_id, desk.response.num_output_tokens) == (3, 2)
    assert third.epoch > second.epoch > first.epoch


def test_one_cancelled_leaves_the_next_plan_and_is_answered_when_nothing_touches_its_blocks() -> None:
    desk = decoding(9, 9)
    first = commit(desk, 3, at=20, more=(Cancel(1),))
    assert desk.run is not None
    assert desk.run.left == (1,)
    assert desk.responses == []
    desk.give(done(first, 3), at=30)
    assert (desk.response.request_id, desk.response.finish_reason) == (1, FinishReason.CANCELLED)
    assert desk.response.num_output_tokens == 4


def test_a_cancel_between_commit_and_end_comes_too_late_for_one_that_ends() -> None:
    desk = decoding(4, 9)
    first = commit(desk, 3, at=20)
    desk.give(Cancel(1), at=25)
    assert desk.responses == []
    desk.give(done(first, 3), at=30)
    assert desk.response.finish_reason is FinishReason.LENGTH


def test_blocks_are_not_taken_from_a_request_that_committed_steps_still_write() -> None:
    """Request 2 must give way under max_utilization, and its steps still run: the plan is made when they have."""
    desk = decoding(9, 9, num_blocks=4, capacity="max_utilization")
    assert desk.run is not None
    assert (desk.free, desk.run.last_step) == (0, 4)
    first = commit(desk, 4, at=20)
    assert desk.run is None
    desk.give(done(first, 4), at=30)
    assert desk.run is not None
    assert desk.run.left == (2,)


def test_a_plan_with_chunks_cannot_be_committed() -> None:
    desk = ExecutorDesk()
    desk.give(both(1, 4, 9))
    with pytest.raises(ValueError, match="plan 1 was committed, but has chunks"):
        commit(desk, 1, at=5)


def test_a_committed_plan_that_fails_takes_everybody_in_it_along_and_nobody_else() -> None:
    desk = decoding(4, 20)
    desk.give(generation(7, 8, 9), at=11)
    assert desk.pull.request_id == 7
    first = commit(desk, 3, at=20)
    desk.give(done(first, 3, error="out of memory"), at=30)
    assert (desk.response.request_id, desk.response.error) == (1, "out of memory")
    desk.end_steps(1, at=40)
    assert (desk.response.request_id, desk.response.error) == (2, "out of memory")
    assert 7 in desk.core.visits


def test_a_commit_of_another_plan_is_ignored() -> None:
    desk = decoding(9)
    assert desk.run is not None
    desk.give(StepsCommitted(desk.run.plan - 1, desk.run.epoch, 3), at=20)
    assert desk.last == []
    desk.end_steps(at=30)
    assert desk.response.num_output_tokens == 9


# ---- whole clusters --------------------------------------------------------------------------------------------------


@thorough
@given(cases)
def test_with_plans_ahead_the_simulator_does_what_the_step_by_step_reference_of_depth_2_does(case: Case) -> None:
    case = replace(case, launch=(1, 2, True))
    assert_equal_lives(simulate(case), run_reference(case))


@thorough
@given(early_cases)
def test_so_does_early_binding_with_cancels(case: Case) -> None:
    case = replace(case, launch=(1, 2, True))
    assert_equal_lives(simulate(case), run_reference(case))


def test_two_hundred_seeded_cases_equal_the_reference_and_exercise_what_is_hard() -> None:
    seen: Counter[str] = Counter()
    for seed in range(100):
        for make in (make_case, make_early_case):
            case = replace(make(Random(seed)), launch=(1, 2, True))
            trace = simulate(case, check=False)
            assert_equal_lives(trace, run_reference(case))
            seen["preemptions"] += trace.num_preemptions
            seen["queued"] += trace.num_queued_steps
            seen["late stops"] += trace.num_late_stops
            seen["ties"] += trace.num_ties
    assert seen["preemptions"] > 50, seen
    assert seen["queued"] > 1000, seen
    assert seen["late stops"] > 60, seen
    assert seen["ties"] > 200, seen


@thorough
@given(cases)
def test_spans_of_any_length_change_nothing(case: Case) -> None:
    case = replace(case, launch=(1, 2, True))
    whole = simulate(case, check=False)
    assert_equal_lives(whole, simulate(case.with_executors(max_span_steps=1), check=False))
    assert_equal_lives(whole, simulate(case.with_executors(max_span_steps=3), check=False))


def test_a_depth_of_one_plans_nothing_ahead() -> None:
    for seed in range(20):
        case = make_case(Random(seed))
        assert simulate(replace(case, launch=(1, 1, True))).logs == simulate(case).logs


@pytest.mark.parametrize("launch", [(1, 2, True), (1, 3, True), (2, 2, True), (3, 4, True)])
@pytest.mark.parametrize("make", [make_case, make_early_case])
def test_each_request_ends_once_with_its_own_tokens_and_no_transfer_touches_what_steps_still_do(
    make: Any, launch: tuple[int, int, bool]
) -> None:
    """... through cancels, kills, preemptions and time-outs, and the logs replay."""
    num_transfers = 0
    for seed in range(40):
        rng = Random(seed)
        case = replace(make(rng), launch=launch)
        victims = [executor.id for executor in case.config.executors]
        if seed % 4 == 0 and len(victims) > 1:
            case = replace(case, kills=((rng.randint(1, 2000), rng.choice(victims), rng.randint(1, 50)),))
        trace = simulate(case)
        rows = [row for row in trace.rows if isinstance(row, RequestRow)]
        lengths = {r.id: (min(length, r.max_tokens), length <= r.max_tokens) for _, r, length in case.arrivals}
        assert sorted(row.request_id for row in rows) == sorted(lengths)
        for row in rows:
            if row.finish_reason in ("stop", "length"):
                assert (row.num_output_tokens, row.finish_reason == "stop") == lengths[row.request_id]
        num_transfers += _check_executors(case, trace)
    assert num_transfers > 100


def _check_executors(case: Case, trace: Trace) -> int:
    assert trace.cluster is not None
    num_transfers = 0
    for config in case.config.executors:
        log = trace.logs[config.id]
        frames = list(read_log(log)[1])
        assert replay(log) == len(frames)
        answered = [
            message.request_id
            for frame in frames
            for message in (getattr(command, "message", None) for command in frame.commands)
            if isinstance(message, Response)
        ]
        assert len(answered) == len(set(answered))
        num_transfers += check_transfers_wait_for_steps(frames, config)
        if trace.cluster.executors[config.id].is_alive:
            core = core_of(trace.cluster, config.id)
            assert core.visits == {}
            assert not core.scheduler.tails
            assert core.blocks.num_free == config.num_blocks
    return num_transfers


def check_transfers_wait_for_steps(frames: list[Frame], config: ExecutorConfig) -> int:
    """No transfer is told to write to blocks that steps which have not ended touch; the number of transfers."""
    tables: dict[int, list[int]] = {}  # of the decode batch as the last plan has it
    kv: dict[int, int] = {}
    plans: deque[tuple[RunSteps, dict[int, tuple[int, ...]], dict[int, int]]] = deque()
    certain: dict[int, int] = {}
    num_transfers = 0
    for frame in frames:
        for event in frame.events:
            if isinstance(event, StepsCommitted | StepsDone) and event.plan not in certain:
                run = next(run for run, _, _ in plans if run.plan == event.plan)
                certain[event.plan] = event.num_steps
                for request_id in kv if run.decodes else ():
                    kv[request_id] += event.num_steps - run.first_step + 1
            if isinstance(event, StepsDone):
                assert plans.popleft()[0].plan == event.plan
        for command in frame.commands:
            if isinstance(command, RunSteps):
                for request_id in command.left:
                    del tables[request_id], kv[request_id]
                for joined in command.joined:
                    tables[joined.request_id], kv[joined.request_id] = list(joined.blocks), joined.num_kv_tokens
                for request_id, blocks in command.appended:
                    del tables[request_id][-(-kv[request_id] // config.tokens_per_block) :]
                    tables[request_id] += blocks
                held = {i: tuple(blocks) for i, blocks in tables.items()} if command.decodes else {}
                held |= {chunk.request_id: chunk.blocks for chunk in command.chunks}
                plans.append((command, held, dict(kv)))
            elif isinstance(command, ReceiveKv | PrepareReceive):
                num_transfers += 1
                for run, held, kv_before in plans:
                    for request_id, table in held.items():
                        touched = table
                        if run.plan in certain and request_id in kv_before:
                            tokens = kv_before[request_id] + certain[run.plan] - run.first_step + 1
                            touched = table[: -(-tokens // config.tokens_per_block)]
                        assert not set(touched) & set(command.blocks), (frame.now, run.plan, request_id)
    return num_transfers
