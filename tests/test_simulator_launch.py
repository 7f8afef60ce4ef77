"""Steps launched ahead: a stop takes effect at the end of the last grant, and what was computed after it is discarded."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.core.commands import RunSteps, StopAfterStep
from disagg.core.cost import ConstantCost
from disagg.core.events import StepsCommitted, StepsDone
from disagg.core.grants import granted_through, grants_out
from tests.simulation_helpers import World, executors

STEP = 1000  # picoseconds, whatever is in the batch
LATENCY = 100
START = LATENCY  # the request is sent at 0 and its prompt is step 1 of the first epoch


def world(launch: tuple[int, int] | tuple[int, int, bool] | None, **settings: Any) -> World:
    return World(executors("m", **settings), cost=ConstantCost(STEP), latency=LATENCY, launch=launch)


def ends(w: World) -> list[tuple[int, int]]:
    """(request, instant at which its end reached the orchestrator) in order."""
    return [(row.request_id, row.end_ps) for row in w.table("Request")]


@pytest.mark.parametrize(
    ("launch", "length", "last_step"),
    [
        # the decode epoch begins after the prompt's step; token n comes at its step n - 1
        ((1, 1), 6, 5),
        ((1, 2), 6, 6),  # one step is always launched ahead
        ((1, 3), 6, 7),
        ((4, 1), 6, 8),  # step 5 is in the second grant, which runs to 8
        ((4, 1), 5, 4),  # the last step of a grant: nothing was launched behind it
        ((4, 1), 9, 8),
        ((4, 1), 10, 12),
        ((4, 2), 6, 12),  # steps 5-8 and 9-12 are out when step 5 is reported
        ((4, 2), 5, 8),  # when step 4 is reported, steps 5-8 are out too
        ((4, 2), 2, 8),
        ((100, 1), 6, 63),  # max_tokens 64 bounds every span
    ],
)
def test_a_stop_takes_effect_at_the_end_of_the_last_grant(launch: tuple[int, int], length: int, last_step: int) -> None:
    w = world(launch)
    w.submit(1, 0, 10, length)
    w.run()
    (row,) = w.table("Request")
    assert row.num_output_tokens == length
    assert row.finish_reason == "stop"
    assert row.end_ps == START + STEP + last_step * STEP + LATENCY
    (stay,) = w.table("Stay")
    assert (stay.num_tokens, stay.first_step, stay.last_step) == (length, 1, length)
    assert [(row.first_step, row.num_steps) for row in w.table("Step")] == [(1, 1), (2, last_step)]


def test_a_request_that_ends_by_its_declared_bound_wastes_no_step() -> None:
    for launch in [(1, 1), (4, 2), (100, 3)]:
        w = world(launch)
        w.submit(1, 0, 10, 1000, max_tokens=7)
        w.run()
        assert ends(w) == [(1, START + STEP + 6 * STEP + LATENCY)]


@pytest.mark.parametrize(
    ("launch", "boundary"),
    [((1, 1), 4), ((1, 2), 5), ((4, 1), 4), ((4, 2), 8), ((3, 1), 6), ((3, 2), 9)],
)
def test_an_arrival_cuts_a_span_short_at_the_end_of_the_last_grant(launch: tuple[int, int], boundary: int) -> None:
    w = world(launch)
    w.submit(1, 0, 10, 40)
    # it reaches the executor in the middle of step 4 of the decode epoch
    w.submit(2, STEP + 3 * STEP + STEP // 2, 10, 2)
    w.run()
    commands = [(frame.now, c) for frame in w.frames(1) for c in frame.commands]
    ((asked_at, stop),) = [(at, c) for at, c in commands if isinstance(c, StopAfterStep)][:1]
    assert asked_at == START + STEP + 3 * STEP + STEP // 2
    done = [e for frame in w.frames(1) for e in frame.events if isinstance(e, StepsDone) and e.epoch == stop.epoch]
    assert [event.num_steps for event in done] == [boundary]
    second_prompt = [c for _, c in commands if isinstance(c, RunSteps) and c.chunks][1]
    assert [chunk.request_id for chunk in second_prompt.chunks] == [2]
    began = next(at for at, c in commands if c is second_prompt)
    assert began == START + STEP + boundary * STEP


def test_an_arrival_exactly_on_a_boundary_joins_at_that_boundary() -> None:
    w = world(None)
    w.submit(1, 0, 10, 40)
    w.submit(2, STEP + 4 * STEP, 10, 2)
    w.run()
    rows = [(row.first_step, row.num_steps, row.num_decodes, row.num_chunks) for row in w.table("Step")]
    assert rows[:3] == [(1, 1, 0, 1), (2, 4, 1, 0), (6, 1, 1, 1)]


def test_a_request_that_stops_while_launched_ahead_keeps_its_blocks_until_those_steps_are_done() -> None:
    w = world((4, 2), num_blocks=5)  # 10 + 64 - 1 tokens in blocks of 16: all five
    w.submit(1, 0, 10, 6)
    w.submit(2, 0, 10, 1)
    w.run()
    freed_at = START + STEP + 12 * STEP
    assert ends(w) == [(1, freed_at + LATENCY), (2, freed_at + STEP + LATENCY)]


def test_tokens_are_the_same_however_far_steps_are_launched_ahead() -> None:
    def counts(launch: Any) -> dict[int, tuple[int, str]]:
        w = world(launch, max_batch_size=4)
        for i in range(1, 30):
            w.submit(i, i * 2700, 10 + i, 1 + i * 7 % 40)
        w.run()
        return {row.request_id: (row.num_output_tokens, row.finish_reason) for row in w.table("Request")}

    expected = {i: (1 + i * 7 % 40, "stop") for i in range(1, 30)}
    for launch in (None, (1, 2), (4, 1), (4, 3), (64, 2), (1, 2, True), (1, 4, True), (4, 3, True), (64, 2, True)):
        assert counts(launch) == expected


def test_the_rule_of_grants_is_that_of_both_worlds() -> None:
    # 3 steps a grant, 2 outstanding, span 11-30: grants end at 13, 16, 19 …
    assert [granted_through(done, 11, 30, 3, 2) for done in range(10, 17)] == [16, 16, 16, 19, 19, 19, 22]
    assert granted_through(29, 11, 30, 3, 2) == 30
    # when step 13 is reported, all of a grant is; a last grant may be shorter
    assert [grants_out(done, 11, 19, 3) for done in range(10, 20)] == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0]
    assert grants_out(16, 11, 18, 3) == 1


# ---- plans made ahead ------------------------------------------------------------------------------------------------


def plans(w: World) -> list[tuple[int, int, int]]:
    """Of each decode plan: the instants at which it was ordered and certain to end, and at which it ended."""
    ordered = {c.plan: f.now for f in w.frames(1) for c in f.commands if isinstance(c, RunSteps) and not c.chunks}
    events = [(f.now, e) for f in w.frames(1) for e in f.events]
    certain = {e.plan: at for at, e in events if isinstance(e, StepsCommitted)}
    ended = {e.plan: at for at, e in events if isinstance(e, StepsDone)}
    return [(at, certain.get(plan, ended[plan]), ended[plan]) for plan, at in ordered.items()]


def test_a_plan_is_certain_to_end_when_the_grants_that_are_out_leave_room_and_the_next_is_ordered_then() -> None:
    """Tokens 2 to 7 of the first and 2 to 12 of the second: six steps, then five of the second alone."""
    for launch, certain_by in (((1, 2, True), 5), ((1, 3, True), 4), ((2, 2, True), 4), ((4, 2, True), 4)):
        w = world(launch)
        w.submit(1, 0, 10, 1000, max_tokens=7)
        w.submit(2, 0, 10, 1000, max_tokens=12)
        w.run()
        first, second = plans(w)[:2]
        began = START + STEP
        assert first == (began, began + certain_by * STEP, began + 6 * STEP), launch
        assert second[0] == first[1]
        assert [(row.start_ps, row.end_ps) for row in w.table("Step")[1:]] == [
            (began, began + 6 * STEP),
            (began + 6 * STEP, began + 11 * STEP),
        ]


def test_without_plans_ahead_the_next_is_ordered_when_the_last_step_has_ended() -> None:
    w = world((1, 2, False))
    w.submit(1, 0, 10, 1000, max_tokens=7)
    w.submit(2, 0, 10, 1000, max_tokens=12)
    w.run()
    first, second = plans(w)
    assert first[1] == first[2] == second[0]


def test_a_stop_in_a_committed_step_costs_no_more_steps_than_one_that_is_found_earlier() -> None:
    """Depth 2: one step of launch-ahead, whether the step after the stop is the same plan's or the next one's."""
    for length in range(2, 12):
        w = world((1, 2, True))
        w.submit(1, 0, 10, 1000, max_tokens=7)
        w.submit(2, 0, 10, length, max_tokens=40)
        w.run()
        (row,) = [row for row in w.table("Request") if row.request_id == 2]
        (stay,) = [stay for stay in w.table("Stay") if stay.executor_request_id == 2]
        assert (row.num_output_tokens, stay.last_step) == (length, length)
        assert row.end_ps == START + (length + 1) * STEP + LATENCY, length


def test_prompts_are_planned_behind_decodes_and_nothing_behind_prompts() -> None:
    w = world((1, 2, True), max_num_tokens=8)
    w.submit(1, 0, 8, 1000, max_tokens=40)
    w.submit(2, STEP + 3 * STEP + STEP // 2, 14, 5)
    w.run()
    ordered = {c.plan: (f.now, bool(c.chunks)) for f in w.frames(1) for c in f.commands if isinstance(c, RunSteps)}
    ended = {e.plan: f.now for f in w.frames(1) for e in f.events if isinstance(e, StepsDone)}
    chunks = [plan for plan, (_, has_chunks) in ordered.items() if has_chunks]
    assert len(chunks) == 3  # the second prompt takes two steps beside the decode
    assert ordered[chunks[1]][0] == ended[chunks[1] - 1] - STEP
    assert ordered[chunks[2]][0] == ended[chunks[1]]
    assert ordered[chunks[2] + 1][0] == ended[chunks[2]]
