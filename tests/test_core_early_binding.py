"""Early binding in each core by itself: what is reserved, asked, served, pinned and given back, event by event."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import AbortKv, Deliver, PrepareReceive, ReceiveKv, RunSteps, Send
from disagg.core.events import (
    Cancel,
    ContextStarted,
    Enqueue,
    FirstTokens,
    KvReceived,
    KvRequested,
    KvTaken,
    KvWithdrawn,
    LeaseRenewed,
    PeerDown,
    Response,
    StepsDone,
    Stopped,
)
from disagg.core.tables import RequestRow, TransferRow
from disagg.policies.vocabulary import FinishReason, RequestType, Role
from tests.core_desk import ExecutorDesk, OrchestratorDesk, asks, both, context, generation
from tests.test_core_orchestrator import arrive, context_done, done, ends, failed


def promise(id: int = 1, prompt: int = 8, max_tokens: int = 5, source: int = 1, source_id: int = 77) -> Enqueue:
    event = generation(id, prompt, max_tokens, source, source_id)
    params = event.request.context_phase_params
    assert params is not None
    return Enqueue(replace(event.request, context_phase_params=replace(params, is_promised=True)))


def told(desk: ExecutorDesk, kind: type) -> list[tuple[int, Any]]:
    """(receiver, message) of each message of this kind from the last instant."""
    return [(c.to, c.message) for c in desk.of(Send) if isinstance(c.message, kind)]


# ---- the context phase: whose KV is read while it is computed --------------------------------------------------------


def source(**config: Any) -> ExecutorDesk:
    """8 tokens a step: a prompt of 20 takes three."""
    return ExecutorDesk(Role.CONTEXT, max_num_tokens=8, **config)


def test_a_reader_that_asks_while_the_prompt_is_queued_is_served_with_its_first_chunk() -> None:
    desk = source().give(context(1, 8), context(2, 20))
    desk.give(asks(2), at=3)
    assert not desk.last
    desk.end_steps(at=10)
    assert (desk.served.request_id, desk.served.num_tokens, desk.served.num_written) == (2, 20, 0)
    assert len(desk.served.blocks) == 5
    serve, run = (
        next(i for i, c in enumerate(desk.last) if isinstance(c, kind)) for kind in (type(desk.served), RunSteps)
    )
    assert serve < run  # the driver knows of the reader before a layer is computed


def test_a_reader_that_asks_between_chunks_is_served_at_once_and_told_how_much_is_written() -> None:
    desk = source().give(context(1, 20))
    desk.end_steps(at=10)
    desk.give(asks(1), at=13)
    assert desk.served.is_early
    assert desk.served.num_written == 8


def test_without_layer_wise_sending_a_noted_reader_is_served_when_the_context_phase_is_done() -> None:
    desk = source(layerwise=False).give(context(1, 8), asks(1))
    assert not [c for c in desk.last if hasattr(c, "reader_id")]
    desk.end_steps(at=10)
    assert not desk.served.is_early
    assert desk.served.num_tokens == 8
    assert desk.response.kv_overlap is None


def test_the_overlap_is_counted_from_the_serving_to_the_end_of_the_context_phase() -> None:
    desk = source().give(context(1, 20))
    desk.end_steps(at=10)
    desk.give(asks(1), at=13)
    desk.end_steps(at=20)
    desk.end_steps(at=30)
    assert desk.response.kv_overlap == 17
    desk.give(KvTaken(1), at=35)
    assert desk.free == 100


def test_kv_that_is_taken_before_its_context_phase_is_reported_done_is_not_held() -> None:
    desk = source().give(context(1, 8), asks(1))
    desk.give(KvTaken(1), at=9)
    assert desk.free == 98
    assert not desk.give(asks(1, 8, 60)).served.ok  # it will not be kept for another
    desk.end_steps(at=10)
    assert desk.response.context_phase_params is not None
    assert desk.free == 100
    assert desk.core.visits == {}
    assert not desk.give(asks(1, 9, 51)).served.ok


def test_a_context_phase_that_is_cancelled_under_its_reader_keeps_its_blocks_until_they_are_quiet() -> None:
    desk = source().give(context(1, 20), asks(1))
    desk.give(Cancel(1), at=3)
    desk.end_steps(at=10)
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert [command.request_id for command in desk.of(AbortKv)] == [1]
    assert desk.report.blocks_quarantined == 5
    desk.give(Cancel(1), at=11)  # once more, to no effect
    desk.give(KvTaken(1, ok=False), at=12)
    assert desk.free == 100
    assert desk.core.visits == {}


def test_a_context_phase_whose_step_fails_under_its_reader_ends_the_sending_too() -> None:
    desk = source().give(context(1, 20), asks(1))
    run = desk.run
    assert run is not None
    desk.give(StepsDone(run.plan, run.epoch, 1, error="out of memory"), at=10)
    assert desk.response.error == "out of memory"
    assert desk.of(AbortKv)
    assert desk.report.blocks_quarantined == 5


def test_a_first_token_that_ends_the_request_lets_the_reader_finish() -> None:
    desk = source().give(context(1, 8), asks(1))
    desk.end_steps(1, Stopped(1, 1), at=10)
    assert desk.response.finish_reason is FinishReason.STOP
    assert not desk.of(AbortKv)  # all of it is written: it ends by itself
    assert desk.report.blocks_quarantined == 2
    desk.give(Cancel(1), at=11)
    desk.give(KvTaken(1), at=12)
    assert desk.free == 100
    assert desk.all_answers == [1]


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_reader_that_waits_for_a_context_phase_that_is_given_up_is_turned_away(layerwise: bool) -> None:
    desk = source(layerwise=layerwise).give(context(1, 8), context(2, 8), asks(2))
    desk.give(Cancel(2), at=3)
    assert not desk.served.ok
    assert "given up" in (desk.served.error or "")
    assert desk.response.finish_reason is FinishReason.CANCELLED


def test_without_layer_wise_sending_a_first_token_that_ends_the_request_turns_the_reader_away() -> None:
    desk = source(layerwise=False).give(context(1, 8), asks(1))
    desk.end_steps(1, Stopped(1, 1), at=10)
    assert not desk.served.ok
    assert desk.free == 100


def test_the_death_of_an_early_reader_leaves_the_context_phase_alone_and_its_kv_for_another() -> None:
    desk = source().give(context(1, 20), asks(1))
    desk.give(PeerDown(9), at=3)
    for at in (10, 20, 30):
        desk.end_steps(at=at)
    assert desk.response.kv_overlap is None
    assert desk.report.blocks_held == 5
    assert desk.give(asks(1, 8, 60), at=31).served.ok
    assert not desk.served.is_early


def test_the_death_of_a_reader_that_only_asked_is_forgotten() -> None:
    desk = source().give(context(1, 8), context(2, 8), asks(2))
    desk.give(PeerDown(9), at=3)
    desk.end_steps(at=10)
    assert not [c for c in desk.last if hasattr(c, "reader_id")]
    assert desk.give(asks(2, 8, 60), at=11).served.ok


def test_a_second_early_reader_is_refused() -> None:
    desk = source().give(context(1, 8), context(2, 8), asks(2))
    assert "read by executor 9" in (desk.give(asks(2, 8, 60)).served.error or "")
    desk.end_steps(at=10)
    assert "read by executor 9" in (desk.give(asks(2, 8, 60)).served.error or "")


def test_a_question_that_is_withdrawn_before_it_is_served_is_answered_and_forgotten() -> None:
    desk = source().give(context(1, 8), context(2, 8), asks(2))
    desk.give(KvWithdrawn(2, 9, 50), at=3)
    assert "withdrawn" in (desk.served.error or "")
    desk.end_steps(at=10)
    assert not [c for c in desk.last if hasattr(c, "reader_id")]


def test_a_question_that_is_served_cannot_be_withdrawn() -> None:
    desk = source().give(context(1, 20), asks(1))
    assert not desk.give(KvWithdrawn(1, 9, 50), at=3).last
    assert not desk.give(KvWithdrawn(7, 9, 50), at=3).last


def test_a_whole_request_has_no_kv_to_give_away() -> None:
    desk = ExecutorDesk(Role.MIXED).give(both(1, 8))
    assert not desk.give(asks(1)).served.ok


def test_blocks_that_an_early_reader_is_at_are_never_preempted() -> None:
    """The decode needs a block; the prompt that came last has them all, and keeps them."""
    desk = ExecutorDesk(Role.MIXED, num_blocks=7, capacity="max_utilization", max_num_tokens=4)
    desk.give(both(1, 4, 20), context(2, 20), asks(2))
    while desk.core.visits[1].num_preemptions == 0:
        desk.end_steps(at=desk.now + 10)
    assert 0 < desk.core.visits[2].num_kv_tokens < 20
    assert desk.core.visits[2].num_preemptions == 0
    assert len(desk.core.blocks.blocks_of(2)) == 5


def test_the_start_of_a_context_phase_is_announced_once_to_those_who_asked() -> None:
    desk = source()
    desk.give(context(1, 20), Enqueue(context(2, 8).request, announces_start=True))
    assert not told(desk, ContextStarted)
    desk.end_steps(at=10)
    desk.end_steps(at=20)
    assert told(desk, ContextStarted) == [(0, ContextStarted(2))]
    desk.end_steps(at=30)
    assert not told(desk, ContextStarted)


# ---- the generation phase: what is promised to it --------------------------------------------------------------------


def reader(**config: Any) -> ExecutorDesk:
    return ExecutorDesk(Role.GENERATION, **config)


@pytest.mark.parametrize("token_first", [True, False])
def test_a_promised_phase_decodes_once_it_has_both_its_kv_and_its_first_token(token_first: bool) -> None:
    desk = reader().give(promise(1, 8))
    (asked,) = desk.of(PrepareReceive)
    assert (asked.source, asked.source_id, asked.num_tokens, len(asked.blocks)) == (1, 77, 8, 2)
    assert desk.free == 97
    first, second = KvReceived(1, True), FirstTokens(1, (5,))
    if token_first:
        first, second = second, first  # type: ignore[assignment]
    desk.give(first, at=50)
    assert desk.run is None
    assert desk.report.queued_requests == 1
    desk.give(second, at=60)
    assert desk.run is not None
    assert desk.run.joined[0].num_kv_tokens == 8
    desk.end_steps(at=100)
    assert desk.response.kv_usable == 60
    assert desk.response.transfer_start == 0
    (row,) = [c.row for c in desk.history if isinstance(getattr(c, "row", None), TransferRow)]
    assert (row.start_ps, row.end_ps, row.overlap_ps) == (0, 60 if token_first else 50, 50)


def test_the_time_outs_of_a_promised_phase_run_from_its_first_token() -> None:
    desk = reader(num_blocks=3).give(promise(1, 8), promise(2, 8))
    desk.give(FirstTokens(1), at=5000)
    while desk.wake_at is not None and desk.wake_at <= 6000:
        desk.wake()
    assert desk.now == 6000
    assert "took over" in (desk.response.error or "")
    assert desk.all_answers == [1]


def test_a_promised_phase_that_waits_for_blocks_may_do_so_until_its_token_comes() -> None:
    desk = reader(num_blocks=3, pull_timeout=500).give(promise(1, 8), promise(2, 8))
    desk.give(FirstTokens(2), at=5000)
    while desk.wake_at is not None and desk.wake_at <= 5500:
        desk.wake()
    assert desk.all_answers == [2]
    assert "no blocks came free" in (desk.response.error or "")
    assert told(desk, Cancel) == [(1, Cancel(77))]  # its KV is held and nobody else will fetch it


def test_promises_queue_behind_phases_that_can_begin() -> None:
    desk = reader(num_blocks=4).give(generation(1, 12), promise(2, 8), generation(3, 8, source_id=78))
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [1]
    desk.give(Cancel(1), KvReceived(1, False), at=10)
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [3]
    assert not desk.of(PrepareReceive)


def test_a_promise_whose_first_token_comes_moves_up_in_the_queue() -> None:
    desk = reader(num_blocks=4).give(generation(1, 12), promise(2, 8, source_id=78), promise(3, 8, source_id=79))
    desk.give(FirstTokens(3), at=5)
    desk.give(Cancel(1), KvReceived(1, False), at=10)
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [3]


def test_an_executor_that_stands_still_takes_its_early_reservations_back() -> None:
    desk = reader(num_blocks=4).give(promise(1, 8))
    desk.give(generation(2, 8, source_id=78), at=10)
    assert told(desk, KvWithdrawn) == [(1, KvWithdrawn(77, 2, 1))]
    assert not desk.give(LeaseRenewed((5,)), at=11).of(Send)  # asked once
    desk.give(KvReceived(1, False, "it was withdrawn"), at=20)
    assert desk.response.recomputable
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [2]


def test_an_executor_that_decodes_waits_for_the_blocks_of_its_decodes() -> None:
    desk = reader(num_blocks=6).give(generation(1, 8, 5))
    desk.give(KvReceived(1, True), promise(2, 8, source_id=78), at=5)
    desk.give(generation(3, 8, source_id=79), at=10)
    assert not told(desk, KvWithdrawn)
    desk.end_steps(at=50)
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [3]


def test_a_prompt_that_lacks_blocks_on_an_executor_that_stands_still_takes_reservations_back_too() -> None:
    desk = ExecutorDesk(Role.MIXED, num_blocks=4).give(promise(1, 8))
    desk.give(context(2, 12), at=10)
    assert told(desk, KvWithdrawn) == [(1, KvWithdrawn(77, 2, 1))]
    desk.give(KvReceived(1, False, "it was withdrawn"), at=20)
    assert desk.run is not None
    assert desk.run.chunks[0].request_id == 2


def test_a_promised_phase_cancelled_in_its_queue_leaves_the_context_phase_to_the_orchestrator() -> None:
    desk = reader(num_blocks=3).give(promise(1, 8), promise(2, 8))
    desk.give(Cancel(2), at=5)
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert not told(desk, Cancel)


def test_a_promised_phase_cancelled_after_it_asked_keeps_its_blocks_until_the_source_has_answered() -> None:
    desk = reader().give(promise(1, 8))
    desk.give(Cancel(1), at=5)
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert desk.report.blocks_quarantined == 3
    desk.give(FirstTokens(1), at=6)  # crossed the cancel
    desk.give(KvReceived(1, False, "given up"), at=7)
    assert desk.free == 100


def test_kv_that_came_before_its_token_is_given_up_at_once_when_cancelled() -> None:
    desk = reader().give(promise(1, 8))
    desk.give(KvReceived(1, True), at=5)
    desk.give(Cancel(1), at=6)
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert desk.free == 100
    assert desk.report.decode_kv_tokens == 0


@pytest.mark.parametrize("in_flight", [True, False])
def test_the_death_of_the_source_ends_what_it_was_to_send(in_flight: bool) -> None:
    desk = reader(num_blocks=100 if in_flight else 3).give(promise(9, 8, source=2), promise(1, 8))
    desk.give(PeerDown(1), at=5)
    assert desk.responses[0].request_id == 1
    assert desk.responses[0].recomputable


def test_kv_that_is_all_here_survives_the_death_of_its_source() -> None:
    desk = reader().give(promise(1, 8))
    desk.give(KvReceived(1, True), at=5)
    desk.give(PeerDown(1), at=6)
    assert not desk.responses
    assert desk.give(FirstTokens(1), at=7).run is not None


def test_early_reservations_count_in_the_report() -> None:
    report = reader(num_blocks=4).give(promise(1, 8), promise(2, 8)).report
    assert (report.queued_requests, report.blocks_free, report.blocks_reserved) == (2, 1, 3)
    assert (report.seen_requests, report.seen_tokens, report.decode_kv_tokens) == (2, 16, 16)


# ---- the orchestrator: two answers owed for one request --------------------------------------------------------------


def bound(binding: str = "at_arrival", **config: Any) -> tuple[OrchestratorDesk, int, int]:
    """A request on context executor 1, promised to generation executor 3; the ids of its two visits."""
    desk = OrchestratorDesk(generation_binding=binding, **config).give(arrive())
    if binding == "at_context_start":
        _, request = desk.enqueued
        desk.give(ContextStarted(request.id), at=5)
        return desk, request.id, desk.enqueued[1].id
    (_, first), (_, second) = desk.sent(Enqueue)
    return desk, first.request.id, second.request.id


def test_at_arrival_both_phases_are_sent_off_and_the_token_follows() -> None:
    desk, context_id, generation_id = bound()
    (to_context, first), (to_generation, second) = desk.sent(Enqueue)
    assert (to_context, to_generation) == (1, 3)
    assert not first.announces_start
    assert second.request.request_type is RequestType.GENERATION_ONLY
    params = second.request.context_phase_params
    assert params is not None
    assert (params.req_id, params.executor, params.num_kv_tokens, params.is_promised) == (context_id, 1, 8, True)
    assert desk.core.fleet.view.executor(3).wire_requests == 1
    answer = context_done(context_id, 1)
    given = answer.context_phase_params
    assert given is not None
    desk.give(replace(answer, context_phase_params=replace(given, first_gen_tokens=(5,)), kv_overlap=9), at=50)
    assert desk.sent(FirstTokens) == [(3, FirstTokens(generation_id, (5,)))]
    assert not desk.sent(Enqueue)
    desk.give(done(generation_id, 3), at=90)
    assert ends(desk) == [FinishReason.LENGTH]
    (row,) = [c.row for c in desk.last if isinstance(getattr(c, "row", None), RequestRow)]
    assert row.kv_transfer_overlap_ps == 9
    assert not desk.sent(Cancel)


def test_at_context_start_the_executor_says_when() -> None:
    desk = OrchestratorDesk(generation_binding="at_context_start").give(arrive())
    ((_, message),) = desk.sent(Enqueue)
    assert message.announces_start
    desk.give(ContextStarted(message.request.id), at=5)
    executor, request = desk.enqueued
    assert executor == 3
    assert request.context_phase_params is not None
    assert request.context_phase_params.is_promised
    assert not desk.give(ContextStarted(message.request.id), at=6).sent(Enqueue)  # once
    desk.give(context_done(message.request.id, 1), at=50)
    assert desk.sent(FirstTokens)


def test_a_start_that_is_overtaken_by_the_end_changes_nothing() -> None:
    desk = OrchestratorDesk(generation_binding="at_context_start").give(arrive())
    _, request = desk.enqueued
    desk.give(context_done(request.id, 1), at=5)
    assert desk.enqueued[0] == 3
    assert not desk.give(ContextStarted(request.id), at=6).last


@pytest.mark.parametrize("binding", ["at_arrival", "at_context_start"])
def test_a_request_for_one_token_is_not_bound_early(binding: str) -> None:
    desk = OrchestratorDesk(generation_binding=binding).give(arrive(max_tokens=1))
    ((_, message),) = desk.sent(Enqueue)
    assert not message.announces_start


def test_a_first_token_that_ends_the_request_cancels_the_promise_and_is_answered_once() -> None:
    desk, context_id, generation_id = bound()
    desk.give(Response(context_id, 1, FinishReason.STOP, 1), at=50)
    assert desk.sent(Cancel) == [(3, Cancel(generation_id))]
    assert ends(desk) == [FinishReason.STOP]
    desk.give(Response(generation_id, 3, FinishReason.CANCELLED, 1), at=60)
    assert not desk.of(Deliver)
    assert desk.core.fleet.view.executor(3).active_requests == 0


@pytest.mark.parametrize("lost", ["refused", "died"])
def test_a_promise_that_comes_to_nothing_costs_only_the_early_binding(lost: str) -> None:
    desk, context_id, generation_id = bound()
    desk.give(failed(generation_id, 3) if lost == "refused" else PeerDown(3), at=20)
    assert not desk.sent(Cancel)
    assert not desk.sent(Enqueue)
    desk.give(context_done(context_id, 1), at=50)
    executor, request = desk.enqueued
    assert executor == 4
    assert request.context_phase_params is not None
    assert not request.context_phase_params.is_promised
    desk.give(done(request.id, 4), at=90)
    assert ends(desk) == [FinishReason.LENGTH]
    (row,) = [c.row for c in desk.last if isinstance(getattr(c, "row", None), RequestRow)]
    assert row.num_attempts == 1


def test_a_promise_that_can_never_be_served_fails_the_request_and_stops_its_context_phase() -> None:
    desk, context_id, generation_id = bound()
    desk.give(failed(generation_id, 3, recomputable=False), at=20)
    assert ends(desk) == [FinishReason.ERROR]
    assert desk.sent(Cancel) == [(1, Cancel(context_id))]
    assert not desk.give(Response(context_id, 1, FinishReason.CANCELLED, 0), at=30).of(Deliver)


def test_the_death_of_the_context_executor_cancels_the_promise_and_runs_the_request_again() -> None:
    desk, _, generation_id = bound()
    desk.give(PeerDown(1), at=20)
    assert desk.sent(Cancel) == [(3, Cancel(generation_id))]
    (to_context, _), (to_generation, again) = desk.sent(Enqueue)
    assert (to_context, to_generation) == (2, 4)
    assert again.request.id > generation_id
    desk.give(failed(generation_id, 3), at=30)  # of the attempt before: nobody's any more
    assert not desk.of(Send)


def test_a_user_s_cancel_reaches_both_executors_and_ends_the_request_once() -> None:
    desk, context_id, generation_id = bound()
    desk.give(Cancel(500), at=20)
    assert sorted(desk.sent(Cancel)) == [(1, Cancel(context_id)), (3, Cancel(generation_id))]
    desk.give(Response(generation_id, 3, FinishReason.CANCELLED, 1), at=30)
    desk.give(Response(context_id, 1, FinishReason.CANCELLED, 0), at=31)
    assert ends(desk) == [FinishReason.CANCELLED]


def test_a_failure_after_the_token_was_sent_is_a_failure_of_the_request() -> None:
    desk, context_id, generation_id = bound()
    desk.give(context_done(context_id, 1), at=50)
    desk.give(failed(generation_id, 3), at=60)
    assert desk.sent(Cancel) == [(1, Cancel(context_id))]
    assert len(desk.sent(Enqueue)) == 2  # from its prompt, bound early again


def test_kv_requested_of_a_context_phase_that_is_not_there_is_refused() -> None:
    assert not source().give(KvRequested(5, 9, 50)).served.ok
