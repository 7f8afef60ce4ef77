"""Executors that change roles while they serve: nothing is lost, and the naive reference does the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_

from disagg.core.commands import Record, RunSteps
from disagg.core.config import PolicySpec
from disagg.core.event_log import read_log, replay
from disagg.core.events import Arrive, Cancel, Enqueue, PeerDown, Report, Response, RoleChanged
from disagg.core.tables import DecisionRow
from disagg.policies.interfaces import PolicyError, RolePolicy
from disagg.policies.vocabulary import (
    PS_PER_MS,
    ChangeRole,
    ContextPhaseParams,
    FinishReason,
    Request,
    RequestType,
    Role,
)
from tests.core_cases import Case, core_of, make_switching_case, simulate
from tests.core_desk import LEASE, ExecutorDesk, OrchestratorDesk, context, generation
from tests.core_reference import run_reference
from tests.simulation_helpers import World, executors, named
from tests.test_core_exactness import assert_equal_lives

cases = st.randoms(use_true_random=False).map(make_switching_case)


def assert_nothing_is_lost(case: Case) -> Counter[str]:
    """Each request ends exactly once, no block leaks, replay agrees, and so does the reference. What was decided of roles."""
    trace = simulate(case)
    ends = Counter(deliver.request_id for deliver in trace.delivered if deliver.finish_reason is not None)
    assert ends == Counter(request.id for _, request, _ in case.arrivals)
    assert trace.cluster is not None
    for executor in case.config.executors:
        core = core_of(trace.cluster, executor.id)
        assert not core.visits
        assert core.blocks.num_free == executor.num_blocks
    for log in trace.logs.values():
        replay(log)
    assert_equal_lives(trace, run_reference(case))
    seen = Counter(row.answer for row in trace.rows if isinstance(row, DecisionRow) and row.stage == "role")
    for executor_id in trace.logs.keys() - {0}:
        for frame in read_log(trace.logs[executor_id])[1]:
            for event in frame.events:
                params = event.request.context_phase_params if isinstance(event, Enqueue) else None
                seen["to where its KV is"] += params is not None and params.executor == executor_id
    errors = [event.error or "" for _, event in trace.heard if isinstance(event, Response)]
    seen["stood still"] += sum("stood still" in error for error in errors)
    return seen


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_whatever_an_operator_switches_nothing_is_lost(case: Case) -> None:
    assert_nothing_is_lost(case)


def test_switchings_that_lock_pools_just_large_enough_equal_the_reference() -> None:
    seen: Counter[str] = Counter()
    for seed in (3, 57, 79, 85, 88, 97):  # of a hundred, some in which it happens: at once, or at a heartbeat
        rng = Random(seed)
        case = make_switching_case(rng)
        size = case.config.executors[0].tokens_per_block
        largest = max(-(-request.total_kv_tokens // size) for _, request, _ in case.arrivals)
        pools = [
            with_(
                executor,
                num_blocks=largest + rng.randint(0, 3),
                scheduler=with_(executor.scheduler, capacity="guaranteed_no_evict"),
                pull_reserve_blocks=0,
            )
            for executor in case.config.executors
        ]
        switches = tuple((at, who, "mixed" if rng.random() < 0.5 else role) for at, who, role in case.switches)
        arrivals = tuple((at // 8, request, length) for at, request, length in case.arrivals)
        config = with_(case.config, executors=tuple(pools))
        seen += assert_nothing_is_lost(replace(case, config=config, arrivals=arrivals, switches=switches))
    assert seen["stood still"] > 5, seen


def test_seeded_switchings_equal_the_reference_and_exercise_what_is_hard() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        seen += assert_nothing_is_lost(make_switching_case(Random(seed)))
    assert all(seen[role] > 30 for role in Role), seen
    assert seen["refused"] > 30, seen
    assert seen["drained"] > 30, seen
    assert seen["to where its KV is"] > 10, seen


# ---- the orchestrator, by hand ----------------------------------------------------------------------------------------


def arrive(id: int = 1, prompt: int = 8, max_tokens: int = 5) -> Arrive:
    return Arrive(Request(id, prompt, max_tokens))


def done(request_id: int, executor: int, prompt: int = 8) -> Response:
    """The context phase `request_id` is done at `executor`."""
    params = ContextPhaseParams(request_id, executor, prompt, (3,))
    return Response(request_id, executor, None, 1, context_phase_params=params)


def role_rows(desk: OrchestratorDesk) -> list[tuple[int | None, str]]:
    rows = [command.row for command in desk.of(Record)]
    return [(row.executor, row.answer) for row in rows if isinstance(row, DecisionRow) and row.stage == "role"]


def test_new_work_goes_by_the_new_role_at_once_and_the_old_is_finished() -> None:
    desk = OrchestratorDesk("CCGG", router="round_robin")
    desk.give(arrive(1))  # to executor 1
    desk.give(RoleChanged(1, "generation"))
    assert desk.sent(RoleChanged) == [(1, RoleChanged(1, "generation"))]
    assert role_rows(desk) == [(1, "generation")]
    assert dict(desk.core.fleet.view.draining) == {1: 1}
    desk.give(arrive(2))
    assert desk.enqueued[0] == 2  # the only one left that computes prompts
    desk.give(done(1, 1))
    assert role_rows(desk) == [(1, "drained")]
    assert not desk.core.fleet.view.draining
    executor, request = desk.enqueued
    assert executor in (1, 3, 4)
    assert request.request_type is RequestType.GENERATION_ONLY


def test_a_generation_phase_may_go_to_where_its_prompt_was_computed() -> None:
    desk = OrchestratorDesk("CCG", router="round_robin")
    desk.give(arrive(1)).give(RoleChanged(1, "generation")).give(RoleChanged(3, "context"))
    desk.give(done(1, 1))
    executor, request = desk.enqueued
    assert (executor, request.request_type) == (1, RequestType.GENERATION_ONLY)


def test_held_requests_are_asked_about_again_when_a_role_changes() -> None:
    desk = OrchestratorDesk("CG", admission=PolicySpec("hold_when_full", {"max_active": 1}))
    desk.give(arrive(1), arrive(2))
    assert [executor for executor, _ in desk.sent(Enqueue)] == [1]
    desk.give(RoleChanged(2, "mixed"))
    assert desk.sent(Enqueue) == []  # the context executor is full still, and comes before mixed ones
    desk.give(RoleChanged(1, "generation"))
    assert [executor for executor, _ in desk.sent(Enqueue)] == [2]


def test_a_generation_executor_that_was_bound_and_then_parked_is_not_used() -> None:
    desk = OrchestratorDesk("CGG", generation_binding="at_context_start", router="round_robin")
    desk.give(arrive(1))
    bound = desk.core.tasks[1]
    bound.generation_executor = 2
    desk.give(RoleChanged(2, "parked")).give(done(1, 1))
    assert desk.enqueued[0] == 3


@pytest.mark.parametrize(
    ("executor", "role", "why"),
    [
        (1, "generation", "no healthy executor would be left to compute prompts"),
        (2, "parked", "no healthy executor would be left to generate"),
        (9, "mixed", "there is no executor 9"),
        (1, "prefill", "'prefill' is no role; allowed: context, generation, mixed, parked"),
    ],
)
def test_an_order_that_cannot_be_obeyed_is_recorded_as_refused(executor: int, role: str, why: str) -> None:
    desk = OrchestratorDesk("CG").give(RoleChanged(executor, role))
    assert role_rows(desk) == [(executor, "refused")]
    assert why in str(desk.of(Record)[0].row)
    assert not desk.sent(RoleChanged)


def test_a_dead_executor_gets_no_role_and_ends_its_draining() -> None:
    desk = OrchestratorDesk("CCG").give(arrive(1)).give(RoleChanged(1, "mixed")).give(RoleChanged(1, "generation"))
    assert dict(desk.core.fleet.view.draining) == {1: 1}
    desk.give(PeerDown(1))
    assert (1, "drained") in role_rows(desk)
    assert role_rows(desk.give(RoleChanged(1, "context"))) == [(1, "refused")]


def test_a_role_that_is_there_already_changes_nothing() -> None:
    assert not OrchestratorDesk("CG").give(RoleChanged(1, "context")).last


# ---- the policy that is asked -----------------------------------------------------------------------------------------


class Once(RolePolicy):
    """Answers what it is told to, once; notes when it is asked."""

    asked: list[int]
    answer: tuple[Any, ...] = ()

    def __init__(self, *, rng: Random, interval_ps: int = 0) -> None:
        super().__init__(rng=rng)
        self.interval_ps = interval_ps
        Once.asked = []

    def change_roles(self, fleet: Any) -> Any:
        self.asked.append(fleet.now)
        answer, Once.answer = Once.answer, ()
        return answer


def asking(monkeypatch: pytest.MonkeyPatch, *answer: Any, interval_ps: int = 0, roles: str = "CCG") -> OrchestratorDesk:
    Once.answer = answer
    return OrchestratorDesk(roles, roles=named(monkeypatch, Once, "roles", interval_ps=interval_ps))


def test_a_policy_without_an_interval_is_asked_once_an_instant_with_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = asking(monkeypatch, ChangeRole(2, Role.GENERATION))
    desk.give(arrive(1), at=5)
    assert Once.asked == []
    desk.give(Report(1), Report(2), at=7)
    assert Once.asked == [7]
    assert role_rows(desk) == [(2, "generation")]


def test_a_policy_with_an_interval_is_asked_while_there_are_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = asking(monkeypatch, interval_ps=100)
    desk.give(arrive(1), at=5)
    desk.give(Report(1), at=60)
    assert (Once.asked, desk.wake_at) == ([], 105)
    desk.wake()
    assert (Once.asked, desk.wake_at) == ([105], 205)
    desk.give(Cancel(1), Response(1, 1, FinishReason.CANCELLED, 0), at=150)
    desk.wake()
    assert (Once.asked, desk.wake_at) == ([105, 205], None)  # nothing is left to ask for
    desk.give(arrive(2), at=300)
    assert desk.wake_at == 400


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (ChangeRole(7, Role.MIXED), "there is no executor 7"),
        ((1, "mixed"), "allowed: a sequence of ChangeRole"),
        (ChangeRole("1", Role.MIXED), "'1' is no whole number"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_breaks_the_rules_is_told_so(answer: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = asking(monkeypatch, answer)
    with pytest.raises(PolicyError, match=why):
        desk.give(Report(1))


def test_a_policy_that_answers_nothing_is_told_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = asking(monkeypatch)
    Once.answer = None  # type: ignore[assignment]
    with pytest.raises(PolicyError, match="Once answered None; allowed: a sequence of ChangeRole"):
        desk.give(Report(1))


def test_a_change_that_is_not_possible_any_more_is_recorded_as_refused_for_a_policy_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = asking(monkeypatch, ChangeRole(3, Role.CONTEXT))  # the last that generates
    assert role_rows(desk.give(Report(1))) == [(3, "refused")]
    changes = [{"at_s": 1e-9, "executor": 2, "role": "generation"}]
    desk = OrchestratorDesk("CCG", roles=PolicySpec("scheduled", {"changes": changes}))
    desk.give(arrive(1), PeerDown(2), at=5)
    assert role_rows(desk.wake()) == [(2, "refused")]


def test_a_policy_that_names_an_earlier_instant_is_not_asked_at_the_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 100 from when it was asked last; once, with the second arrival, 50 before that."""
    desk = asking(monkeypatch, interval_ps=100)
    next_at = [100, 50]
    monkeypatch.setattr(Once, "next_at", lambda self, now: next_at.pop(0) if next_at else now + 100)
    desk.give(arrive(1), at=0)
    desk.give(arrive(2), at=10)
    while len(Once.asked) < 4:
        desk.wake()
    assert Once.asked == [50, 150, 250, 350]


def test_a_scheduled_switch_is_done_at_its_time() -> None:
    changes = [{"at_s": 2e-9, "executor": 2, "role": "parked"}, {"at_s": 1e-9, "executor": 2, "role": "generation"}]
    desk = OrchestratorDesk("CCG", roles=PolicySpec("scheduled", {"changes": changes}))
    desk.give(arrive(1), at=5)
    assert desk.wake_at == 1000
    assert role_rows(desk.wake()) == [(2, "generation")]
    assert role_rows(desk.wake()) == [(2, "parked")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ("soon", "must list mappings"),
        ([{"at_s": -1, "executor": 1, "role": "mixed"}], "at_s must be a number of at least 0"),
        ([{"executor": 1, "role": "prefill"}], "role must be one of context, generation, mixed, parked"),
        ([{"executor": 1, "role": "mixed", "when": 3}], "have no 'when'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(changes: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        OrchestratorDesk("CG", roles=PolicySpec("scheduled", {"changes": changes}))


# ---- the executor, by hand ---------------------------------------------------------------------------------------------


def test_kv_that_is_here_is_taken_over_without_a_transfer() -> None:
    """Blocks of 4 tokens: 8 prompt tokens are held in 2; with 4 more tokens to write (5 less the last) 3 are needed."""
    desk = ExecutorDesk(num_blocks=10)
    response = desk.until_context_done(1, prompt=8)
    held = desk.core.blocks.blocks_of(1)
    assert (len(held), desk.free) == (2, 8)
    desk.give(generation(5, prompt=8, max_tokens=5, source=2, source_id=1))
    assert desk.core.visits.keys() == {5}
    (run,) = desk.of(RunSteps)
    assert [(each.request_id, each.num_kv_tokens, each.blocks[:2]) for each in run.joined] == [(5, 8, held)]
    assert (len(run.joined[0].blocks), desk.free) == (3, 7)
    desk.end_steps()
    assert (desk.response.request_id, desk.response.num_output_tokens, desk.free) == (5, 5, 10)
    assert response.executor == 2


def test_kv_that_is_not_here_any_more_is_computed_again_elsewhere() -> None:
    desk = ExecutorDesk(num_blocks=10)
    desk.give(generation(5, source=2, source_id=1))
    assert (desk.response.recomputable, desk.free) == (True, 10)


def test_one_that_waits_for_blocks_keeps_its_kv_and_gives_it_up_when_it_is_cancelled() -> None:
    desk = ExecutorDesk(num_blocks=4, max_batch_size=4)
    desk.until_context_done(1, prompt=8)
    desk.give(context(2, prompt=8))  # the other two blocks
    desk.give(generation(5, prompt=8, max_tokens=5, source=2, source_id=1))
    assert (desk.free, sorted(desk.core.visits)) == (0, [1, 2, 5])
    desk.give(Cancel(5))
    assert (desk.free, sorted(desk.core.visits)) == (2, [2])


def test_phases_that_hold_what_the_others_wait_for_do_not_wait_for_ever() -> None:
    """Two prompts fill the pool, and to go on each needs a block of the other: the younger is given up at once."""
    desk = ExecutorDesk(num_blocks=4, max_batch_size=4)
    desk.until_context_done(1, prompt=8)
    desk.until_context_done(2, prompt=8)
    desk.give(*(generation(4 + i, prompt=8, max_tokens=5, source=2, source_id=i) for i in (1, 2)))
    assert (desk.response.request_id, desk.response.recomputable) == (6, True)
    (run,) = desk.of(RunSteps)
    assert [each.request_id for each in run.joined] == [5]
    assert (desk.free, sorted(desk.core.visits)) == (1, [5])


def test_kv_that_others_may_ask_for_is_waited_for_until_a_heartbeat_and_no_longer() -> None:
    """5 lacks a block; 2 and 3 are held for readers elsewhere, of whom nothing is heard for a third of a lease."""
    desk = ExecutorDesk(num_blocks=6, max_batch_size=4)
    for request_id in (1, 2, 3):
        desk.until_context_done(request_id, prompt=8)
    began = desk.now
    desk.give(generation(5, prompt=8, max_tokens=5, source=2, source_id=1))
    assert not desk.responses
    desk.wake()
    assert desk.now == began + LEASE // 3
    assert (desk.response.request_id, desk.response.recomputable, desk.free) == (5, True, 2)


def test_while_a_phase_whose_kv_is_here_waits_no_prompt_takes_a_block() -> None:
    """Of 6 blocks 2 are held for 5, which needs two more, and 3 are those of prompt 3; prompt 4 could have the last one."""
    desk = ExecutorDesk(num_blocks=6, max_batch_size=4, max_num_tokens=8)
    desk.until_context_done(1, prompt=8)
    desk.give(context(3, prompt=10))  # in two chunks
    desk.give(generation(5, prompt=8, max_tokens=9, source=2, source_id=1), context(4, prompt=4))
    desk.end_steps()
    assert desk.run is not None
    assert [chunk.request_id for chunk in desk.run.chunks] == [3]
    desk.give(Cancel(3))
    desk.end_steps()
    assert [each.request_id for each in desk.run.joined] == [5]
    assert [chunk.request_id for chunk in desk.run.chunks] == [4]


def test_a_batch_policy_sees_the_new_role() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.give(RoleChanged(2, "mixed"))
    assert desk.core.scheduler.role is Role.MIXED


# ---- both together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fleet", "orders"),
    [
        ("cg", [(1, "mixed"), (2, "parked")]),
        ("cg", [(2, "mixed"), (1, "generation"), (2, "context")]),
        ("ccg", [(1, "generation"), (3, "context")]),
    ],
)
def test_a_switch_in_a_burst_that_fills_every_pool_locks_nobody_out(fleet: str, orders: list[tuple[int, str]]) -> None:
    """24 prompts of 10 blocks, pools of 40, and 4 more blocks for each answer: nobody waits until a pull times out."""
    made = World(executors(fleet, num_blocks=40), generation_router=PolicySpec("least_kv"))
    for i in range(1, 25):
        made.submit(i, i, 160, 40)

    def operator() -> Any:
        yield made.cluster.sleep(0.00006)
        for executor, role in orders:
            made.cluster.change_role(executor, role)

    made.cluster.env.process(operator())
    made.run()
    assert {row.finish_reason for row in made.table("Request")} == {"stop"}
    assert max(row.end_ps for row in made.table("Request")) < 2 * PS_PER_MS


def test_a_switch_under_load_in_simulation_loses_nothing_and_serves_with_the_new_role() -> None:
    made = World(executors("ccg"), router=PolicySpec("least_requests"))
    for i in range(1, 41):
        made.submit(i, i * 20_000_000, 60, 12)
    cluster = made.cluster

    def operator() -> Any:
        yield cluster.sleep(0.0004)
        cluster.change_role(2, "generation")

    cluster.env.process(operator())
    made.run()
    assert {row.finish_reason for row in made.table("Request")} == {"stop"}
    roles = [(row.executor, row.answer) for row in made.table("Decision") if row.stage == "role"]
    assert roles == [(2, "generation"), (2, "drained")]
    stages = {(row.executor, row.stage) for row in made.table("Stay")}
    assert {(2, "context"), (2, "generation")} <= stages
