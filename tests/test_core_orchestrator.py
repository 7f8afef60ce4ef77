"""The orchestrator's core by hand: routes, hand-over, ids, leases, time-outs, cancels, retries, and each request's one end."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.core.commands import Deliver, Drained, Record, Send
from disagg.core.config import PolicySpec, RetryConfig
from disagg.core.decisions import decision_row
from disagg.core.events import Arrive, Cancel, Enqueue, LeaseRenewed, PeerDown, Report, Response, Shutdown
from disagg.core.tables import DecisionRow, RequestRow
from disagg.policies.interfaces import AdmissionPolicy, PolicyError, RoutingPolicy
from disagg.policies.registry import register
from disagg.policies.vocabulary import (
    Admit,
    ContextPhaseParams,
    FinishReason,
    Hold,
    Reject,
    Request,
    RequestType,
    Route,
    RouteMixed,
)
from tests.core_desk import LEASE, OrchestratorDesk


def arrive(id: int = 500, prompt: int = 8, max_tokens: int = 5, **fields: Any) -> Arrive:
    return Arrive(Request(id, prompt, max_tokens, **fields))


def context_done(id: int, executor: int, prompt: int = 8) -> Response:
    return Response(id, executor, None, 1, context_phase_params=ContextPhaseParams(id, executor, prompt))


def done(id: int, executor: int, tokens: int = 5) -> Response:
    return Response(id, executor, FinishReason.LENGTH, tokens)


def failed(id: int, executor: int, recomputable: bool = True) -> Response:
    return Response(id, executor, FinishReason.ERROR, 1, error="it broke", recomputable=recomputable)


def ends(desk: OrchestratorDesk, request_id: int = 500) -> list[FinishReason]:
    """How the request ended, from the first event on: exactly one end is right."""
    return [
        command.finish_reason
        for command in desk.history
        if isinstance(command, Deliver) and command.request_id == request_id and command.finish_reason is not None
    ]


def first_tokens(desk: OrchestratorDesk, request_id: int = 500) -> int:
    return sum(
        isinstance(command, Deliver) and command.request_id == request_id and command.finish_reason is None
        for command in desk.history
    )


def until_generation(desk: OrchestratorDesk, **fields: Any) -> tuple[int, int]:
    """A request whose generation phase was just dispatched: (context id, generation id)."""
    desk.give(arrive(**fields))
    executor, request = desk.enqueued
    desk.give(context_done(request.id, executor))
    return request.id, desk.enqueued[1].id


# ---- the way of a request ------------------------------------------------------------------------------------------


def test_a_request_goes_to_a_context_executor_then_with_its_params_to_a_generation_executor() -> None:
    desk = OrchestratorDesk().give(arrive())
    executor, request = desk.enqueued
    assert executor == 1
    assert request.request_type is RequestType.CONTEXT_ONLY
    desk.give(context_done(request.id, 1))
    generation_executor, second = desk.enqueued
    assert generation_executor == 3
    assert second.request_type is RequestType.GENERATION_ONLY
    assert second.context_phase_params == ContextPhaseParams(request.id, 1, 8)
    desk.give(done(second.id, 3))
    assert ends(desk) == [FinishReason.LENGTH]
    (row,) = [r.row for r in desk.of(Record) if isinstance(r.row, RequestRow)]
    assert (row.context_executor, row.generation_executor, row.num_output_tokens) == (1, 3, 5)


def test_ids_are_issued_per_phase_and_attempt() -> None:
    desk = OrchestratorDesk()
    first, second = until_generation(desk)
    desk.give(failed(second, 3))
    third = desk.enqueued[1].id
    assert len({first, second, third}) == 3


def test_the_first_token_is_delivered_once_although_both_responses_carry_it() -> None:
    desk = OrchestratorDesk()
    _, second = until_generation(desk)
    assert first_tokens(desk) == 1
    desk.give(done(second, 3))
    assert first_tokens(desk) == 1


def test_the_first_token_is_delivered_once_although_the_request_was_run_again() -> None:
    desk = OrchestratorDesk()
    _, second = until_generation(desk)
    desk.give(failed(second, 3))
    executor, again = desk.enqueued
    desk.give(context_done(again.id, executor))
    assert first_tokens(desk) == 1


def test_a_context_phase_that_ended_the_request_has_no_generation_phase() -> None:
    desk = OrchestratorDesk().give(arrive())
    desk.give(Response(desk.enqueued[1].id, 1, FinishReason.STOP, 1))
    assert desk.sent(Enqueue) == []
    assert (first_tokens(desk), ends(desk)) == (1, [FinishReason.STOP])


def test_a_mixed_cluster_runs_both_phases_in_one_place() -> None:
    desk = OrchestratorDesk("MM").give(arrive())
    executor, request = desk.enqueued
    assert request.request_type is RequestType.CONTEXT_AND_GENERATION
    desk.give(done(request.id, executor))
    assert ends(desk) == [FinishReason.LENGTH]


def test_the_first_token_reaches_nobody_twice_from_an_answer_from_before_a_retry() -> None:
    desk = OrchestratorDesk().give(arrive())
    old = desk.enqueued[1].id
    desk.give(PeerDown(1))
    new = desk.enqueued[1].id
    desk.give(context_done(old, 1))
    assert desk.sent(Enqueue) == []
    desk.give(context_done(new, 2))
    assert desk.enqueued[1].context_phase_params == ContextPhaseParams(new, 2, 8)


def test_early_binding_names_the_generation_executor_at_arrival() -> None:
    desk = OrchestratorDesk(generation_binding="at_arrival").give(arrive())
    decided = [r.row for r in desk.of(Record) if isinstance(r.row, DecisionRow)]
    assert [(row.stage, row.executor) for row in decided] == [("context", 1), ("generation", 3)]
    desk.give(PeerDown(3))
    desk.give(context_done(desk.enqueued[1].id if desk.sent(Enqueue) else 1, 1))
    assert desk.enqueued[0] == 4


def test_an_answer_of_a_class_derived_by_a_policy_is_recorded_as_what_it_is() -> None:
    class Reasoned(Route, frozen=True, gc=False, tag=True):
        why: str = "it was its turn"

    row = decision_row(1, "context", Reasoned(context=2, generation=3), None, 5)
    assert (row.answer, row.executor, row.generation_executor) == ("route", 2, 3)
    assert decision_row(1, "context", "executor 2", None, 5).answer == "?"


def test_a_skipped_context_phase_is_generation_alone() -> None:
    desk = OrchestratorDesk("G", skip_context_phase=True).give(arrive())
    executor, request = desk.enqueued
    assert (executor, request.request_type) == (1, RequestType.GENERATION_ONLY)
    assert first_tokens(desk) == 1
    desk.give(done(request.id, 1))
    assert ends(desk) == [FinishReason.LENGTH]


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_lost_transfer_is_recomputed_from_the_prompt_and_the_source_lets_go() -> None:
    desk = OrchestratorDesk()
    first, second = until_generation(desk)
    desk.give(failed(second, 3))
    assert Send(1, Cancel(first)) in desk.last
    executor, request = desk.enqueued
    assert (executor, request.request_type) == (2, RequestType.CONTEXT_ONLY)
    assert ends(desk) == []


def test_a_lost_transfer_fails_the_request_where_that_is_asked_for() -> None:
    desk = OrchestratorDesk(retry=RetryConfig("fail"))
    first, second = until_generation(desk)
    desk.give(failed(second, 3))
    assert Send(1, Cancel(first)) in desk.last
    assert ends(desk) == [FinishReason.ERROR]
    (deliver,) = desk.of(Deliver)
    assert deliver.error == "it broke"


def test_retries_are_bounded() -> None:
    desk = OrchestratorDesk(retry=RetryConfig("recompute", 3)).give(arrive())
    attempts = 0
    while desk.sent(Enqueue):
        attempts += 1
        executor, request = desk.enqueued
        desk.give(failed(request.id, executor))
    assert attempts == 3
    assert ends(desk) == [FinishReason.ERROR]


def test_an_error_of_the_request_itself_is_not_tried_again_and_its_held_kv_is_freed() -> None:
    desk = OrchestratorDesk()
    first, second = until_generation(desk)
    desk.give(failed(second, 3, recomputable=False))
    assert desk.sent(Enqueue) == []
    assert Send(1, Cancel(first)) in desk.last
    assert ends(desk) == [FinishReason.ERROR]


@pytest.mark.parametrize("phase", ["context", "generation"])
def test_a_dead_executor_s_requests_are_run_again_elsewhere(phase: str) -> None:
    desk = OrchestratorDesk()
    if phase == "context":
        desk.give(arrive())
    else:
        until_generation(desk)
    dead = desk.enqueued[0]
    desk.give(PeerDown(dead))
    executor, request = desk.enqueued
    assert executor not in (dead, 3, 4)
    desk.give(context_done(request.id, executor))
    assert desk.enqueued[0] != dead
    desk.give(done(desk.enqueued[1].id, desk.enqueued[0]))
    assert ends(desk) == [FinishReason.LENGTH]


def test_without_a_healthy_executor_a_request_fails_with_an_error_that_says_so() -> None:
    desk = OrchestratorDesk("CG").give(PeerDown(1))
    desk.give(arrive())
    assert ends(desk) == [FinishReason.ERROR]
    assert "no healthy executor" in str(desk.of(Deliver)[0].error)
    desk = OrchestratorDesk("CG").give(arrive())
    desk.give(PeerDown(2))
    desk.give(context_done(1, 1))
    assert ends(desk) == [FinishReason.ERROR]
    assert Send(1, Cancel(1)) in desk.last


def test_a_late_report_of_a_dead_executor_does_not_revive_it() -> None:
    desk = OrchestratorDesk().give(PeerDown(1))
    desk.give(Report(1, healthy=True))
    assert [desk.give(arrive(i)).enqueued[0] for i in range(600, 604)] == [2, 2, 2, 2]


def test_an_unhealthy_executor_is_not_routed_to_until_it_has_recovered() -> None:
    desk = OrchestratorDesk().give(Report(1, healthy=False))
    assert [desk.give(arrive(i)).enqueued[0] for i in (600, 601)] == [2, 2]
    desk.give(Report(1, healthy=True))
    assert {desk.give(arrive(i)).enqueued[0] for i in (602, 603)} == {1, 2}


# ---- cancel, time-out, shutdown -------------------------------------------------------------------------------------


def test_a_cancel_ends_a_request_with_the_answer_of_the_executor_that_works_on_it() -> None:
    desk = OrchestratorDesk().give(arrive())
    _, request = desk.enqueued
    desk.give(Cancel(500))
    assert Send(1, Cancel(request.id)) in desk.last
    assert ends(desk) == []
    desk.give(Response(request.id, 1, FinishReason.CANCELLED, 0))
    assert ends(desk) == [FinishReason.CANCELLED]
    desk.give(Cancel(500))
    assert ends(desk) == [FinishReason.CANCELLED]


def test_a_cancel_in_the_generation_phase_tells_the_holder_of_the_kv_too() -> None:
    desk = OrchestratorDesk()
    first, second = until_generation(desk)
    desk.give(Cancel(500))
    assert {(c.to, c.message) for c in desk.of(Send)} == {(3, Cancel(second)), (1, Cancel(first))}


def test_a_cancel_that_crosses_the_end_of_the_context_phase_starts_no_generation_phase() -> None:
    desk = OrchestratorDesk().give(arrive())
    _, request = desk.enqueued
    desk.give(Cancel(500))
    desk.give(context_done(request.id, 1))
    assert desk.sent(Enqueue) == []
    assert ends(desk) == [FinishReason.CANCELLED]


def test_a_cancelled_request_whose_executor_dies_is_not_run_again() -> None:
    desk = OrchestratorDesk().give(arrive())
    desk.give(Cancel(500))
    desk.give(PeerDown(1))
    assert desk.sent(Enqueue) == []
    assert ends(desk) == [FinishReason.CANCELLED]


def test_an_allotted_time_runs_out_with_nothing_else_happening() -> None:
    desk = OrchestratorDesk()
    first, second = until_generation(desk, allotted_time=7_000_000_000)
    desk.wake()
    assert desk.now == 7_000_000_000
    assert ends(desk) == [FinishReason.ERROR]
    assert "7 ms" in str(desk.of(Deliver)[0].error)
    assert {(c.to, c.message) for c in desk.of(Send)} == {(3, Cancel(second)), (1, Cancel(first))}
    desk.give(done(second, 3))
    assert ends(desk) == [FinishReason.ERROR]


def test_a_drain_answers_all_and_refuses_what_comes_later() -> None:
    desk = OrchestratorDesk("MM").give(arrive())
    _, request = desk.enqueued
    desk.give(Shutdown(drain=True), arrive(501))
    assert ends(desk, 501) == [FinishReason.ERROR]
    assert desk.of(Drained) == []
    desk.give(done(request.id, 1))
    assert desk.of(Drained) == [Drained()]


def test_a_shutdown_without_drain_ends_every_request_once() -> None:
    desk = OrchestratorDesk().give(arrive(500), arrive(501))
    desk.give(Shutdown(drain=False))
    assert (ends(desk, 500), ends(desk, 501)) == ([FinishReason.ERROR], [FinishReason.ERROR])
    assert desk.of(Drained) == [Drained()]


def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    desk = OrchestratorDesk("MM").give(arrive())
    executor, request = desk.enqueued
    desk.give(arrive())
    assert "in use" in str(desk.of(Deliver)[0].error)
    desk.give(done(request.id, executor))
    assert ends(desk)[-1] is FinishReason.LENGTH


# ---- held requests -------------------------------------------------------------------------------------------------


@register("test_script", kind="routing", source="tests")
class Script(RoutingPolicy):
    """Answers from two lists, the last of each for ever."""

    context: list[Any]
    generation: list[Any]

    def route_context(self, request: Request, fleet: Any) -> Any:
        return Script.context.pop(0) if len(Script.context) > 1 else Script.context[0]

    def route_generation(self, request: Request, fleet: Any) -> Any:
        return Script.generation.pop(0) if len(Script.generation) > 1 else Script.generation[0]


def _scripted(context: list[Any], generation: list[Any], roles: str = "CCGG") -> OrchestratorDesk:
    Script.context, Script.generation = context, generation
    return OrchestratorDesk(roles, "test_script")


def test_a_held_request_is_tried_again_when_a_report_comes() -> None:
    desk = _scripted([Hold(), Route(context=2)], [Route(generation=4)]).give(arrive())
    assert desk.sent(Enqueue) == []
    desk.give(Report(1))
    assert desk.enqueued[0] == 2


def test_a_held_request_is_tried_again_at_its_time_with_nothing_else_happening() -> None:
    desk = _scripted([Hold(until=70), Route(context=2)], [Route(generation=4)]).give(arrive())
    desk.wake()
    assert (desk.now, desk.enqueued[0]) == (70, 2)


def test_a_later_request_does_not_overtake_a_held_one() -> None:
    desk = _scripted([Hold(), Hold(), Route(context=1)], [Route(generation=4)]).give(arrive(500))
    desk.give(arrive(501))
    assert desk.sent(Enqueue) == []
    desk.give(Report(1))
    assert desk.sent(Enqueue) == []
    desk.give(Report(1))
    order = [command.request_id for command in desk.last if hasattr(command, "executor_request")]
    assert order == [500, 501]


def test_a_held_request_can_be_cancelled_and_is_forgotten() -> None:
    desk = _scripted([Hold(), Route(context=1)], [Route(generation=4)]).give(arrive())
    desk.give(Cancel(500))
    assert ends(desk) == [FinishReason.CANCELLED]
    desk.give(Report(1))
    assert desk.sent(Enqueue) == []


def test_the_orchestrator_renews_the_lease_while_no_generation_executor_is_bound() -> None:
    desk = _scripted([Route(context=1)], [Hold()]).give(arrive())
    desk.give(context_done(1, 1), at=100)
    desk.wake()
    assert desk.now == 100 + LEASE // 3
    assert desk.sent(LeaseRenewed) == [(1, LeaseRenewed((1,)))]
    desk.wake()
    assert desk.now == 100 + 2 * (LEASE // 3)


def test_a_generation_phase_that_is_rejected_frees_the_held_kv() -> None:
    desk = _scripted([Route(context=1)], [Reject("no")]).give(arrive())
    desk.give(context_done(1, 1))
    assert Send(1, Cancel(1)) in desk.last
    assert ends(desk) == [FinishReason.REJECTED]


def test_a_request_held_for_generation_is_run_again_when_the_holder_of_its_kv_dies() -> None:
    desk = _scripted([Route(context=1), Route(context=2)], [Hold(), Route(generation=3)]).give(arrive())
    desk.give(context_done(1, 1))
    desk.give(PeerDown(1))
    executor, request = desk.enqueued
    assert (executor, request.request_type) == (2, RequestType.CONTEXT_ONLY)
    desk.give(context_done(2, 2))
    desk.give(done(desk.enqueued[1].id, 3))
    assert ends(desk) == [FinishReason.LENGTH]


def test_a_request_held_for_generation_survives_two_deaths() -> None:
    desk = _scripted([Route(context=1), Route(context=2), Route(context=3)], [Hold()], "CCCG").give(arrive())
    desk.give(context_done(1, 1))
    desk.give(PeerDown(1))
    desk.give(PeerDown(2))
    assert desk.enqueued[0] == 3
    assert ends(desk) == []


# ---- policies that answer what they may not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [Route(context=3), Route(context=99), Route(), RouteMixed(1), Admit(), Route(context=1, generation=2), None],
)
def test_an_answer_that_a_policy_may_not_give_is_an_error_that_names_it(answer: Any) -> None:
    desk = _scripted([answer], [Route(generation=4)])
    with pytest.raises(PolicyError):
        desk.give(arrive())


def test_a_route_to_a_dead_executor_is_an_error() -> None:
    desk = _scripted([Route(context=1)], [Route(generation=4)]).give(PeerDown(1))
    with pytest.raises(PolicyError, match=r"executor 1 .*unhealthy.*allowed here: \[2\]"):
        desk.give(arrive())


def test_a_policy_sees_no_token_ids() -> None:
    seen: list[Request] = []

    desk = _scripted([Route(context=1)], [Route(generation=4)])
    router = next(iter(desk.core.routers.by_stage.values()))
    original = router.route_context
    router.route_context = lambda request, fleet: (seen.append(request), original(request, fleet))[1]  # type: ignore[method-assign]
    desk.give(arrive(input_token_ids=(5, 6, 7, 8, 9, 10, 11, 12)))
    assert [request.input_token_ids for request in seen] == [None]
    assert desk.enqueued[1].input_token_ids == (5, 6, 7, 8, 9, 10, 11, 12)


@register("test_counting", kind="routing", source="tests")
class Counting(RoutingPolicy):
    """Counts what it is told: requests under way, by executor."""

    under_way: dict[int, int]

    def route_context(self, request: Request, fleet: Any) -> Any:
        return Route(context=1)

    def route_generation(self, request: Request, fleet: Any) -> Any:
        return Route(generation=3)

    def on_dispatched(self, request: Request, stage: Any, executor: int, fleet: Any) -> None:
        Counting.under_way[executor] = Counting.under_way.get(executor, 0) + 1

    def on_finished(self, request: Request, stage: Any, executor: int, ok: bool, fleet: Any) -> None:
        Counting.under_way[executor] -= 1


def counting(**fields: Any) -> OrchestratorDesk:
    Counting.under_way = {}
    desk = OrchestratorDesk(router="test_counting")
    until_generation(desk, **fields)
    assert Counting.under_way == {1: 0, 3: 1}
    return desk


@pytest.mark.parametrize(
    "end", [done(2, 3), failed(2, 3, recomputable=False), PeerDown(3)], ids=["done", "error", "dead"]
)
def test_a_stateful_policy_is_told_of_every_end(end: Any) -> None:
    counting().give(end)
    assert Counting.under_way[3] == 0


def test_a_stateful_policy_is_told_of_a_time_out() -> None:
    counting(allotted_time=1000).wake()
    assert Counting.under_way == {1: 0, 3: 0}


@register("test_turnstile", kind="admission", source="tests")
class Turnstile(AdmissionPolicy):
    """Nobody before the instant 100; long prompts never."""

    def admit(self, request: Request, fleet: Any) -> Any:
        if request.num_prompt_tokens > 1000:
            return Reject("too long")
        return Admit() if fleet.now >= 100 else Hold(until=100)


def test_admission_rejects_and_holds() -> None:
    desk = OrchestratorDesk(admission=PolicySpec("test_turnstile")).give(arrive(500, prompt=2000))
    assert ends(desk, 500) == [FinishReason.REJECTED]
    desk.give(arrive(501), at=10)
    assert desk.sent(Enqueue) == []
    desk.wake()
    assert (desk.now, desk.enqueued[0]) == (100, 1)
