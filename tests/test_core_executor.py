"""The executor's core by hand: one scenario per rule of the executor semantics, and per known bug of the field."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import Drained, ReceiveKv, RunSteps, Send, ServeKv
from disagg.core.config import PolicySpec
from disagg.core.events import (
    Cancel,
    Enqueue,
    KvReceived,
    KvTaken,
    LeaseRenewed,
    PeerDown,
    Shutdown,
    StepsDone,
    Stopped,
    Wake,
)
from disagg.core.life_cycle import State
from disagg.policies.interfaces import BatchPolicy, BatchView
from disagg.policies.registry import register
from disagg.policies.vocabulary import (
    BatchPlan,
    ChunkPlan,
    ContextPhaseParams,
    FinishReason,
    Request,
    RequestType,
    Role,
    SamplingConfig,
)
from tests.core_desk import LEASE, TIMEOUT, ExecutorDesk, asks, both, context, generation

# ---- the phases ----------------------------------------------------------------------------------------------------


def test_a_context_phase_answers_at_the_end_of_compute_before_its_kv_is_sent() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    response = desk.until_context_done(prompt=8)
    assert response.finish_reason is None
    assert response.num_output_tokens == 1
    assert response.context_phase_params == ContextPhaseParams(1, 2, 8)
    assert not desk.of(ServeKv)


def test_the_first_token_travels_in_the_context_response() -> None:
    desk = ExecutorDesk(Role.CONTEXT).give(context())
    assert desk.run is not None
    desk.give(StepsDone(desk.run.plan, desk.run.epoch, 1, (), ((1, 4711),)))
    assert desk.response.context_phase_params is not None
    assert desk.response.context_phase_params.first_gen_tokens == (4711,)


def test_the_blocks_of_a_context_phase_outlive_its_response_until_they_were_read() -> None:
    desk = ExecutorDesk(Role.CONTEXT, num_blocks=10)
    desk.until_context_done(prompt=8)
    assert (desk.free, desk.report.blocks_held) == (8, 2)
    desk.give(asks())
    assert (desk.served.ok, desk.served.num_tokens, len(desk.served.blocks)) == (True, 8, 2)
    assert desk.free == 8
    desk.give(KvTaken(1))
    assert (desk.free, desk.report.blocks_held) == (10, 0)


def test_a_context_only_request_reserves_its_prompt_and_no_more() -> None:
    assert ExecutorDesk(Role.CONTEXT, num_blocks=10).give(context(prompt=9, max_tokens=1000)).free == 7


def test_a_whole_request_reserves_prompt_and_max_tokens_less_the_last_which_is_never_written() -> None:
    assert ExecutorDesk(num_blocks=10).give(both(prompt=8, max_tokens=5)).free == 7
    assert ExecutorDesk(num_blocks=10).give(both(prompt=8, max_tokens=6)).free == 6


def test_a_generation_phase_is_not_prefilled_and_counts_the_first_token_as_its_own() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    run = desk.until_decoding(prompt=8, max_tokens=5)
    assert run.chunks == ()
    assert [(joined.request_id, joined.num_kv_tokens) for joined in run.joined] == [(1, 8)]
    assert run.last_step == 4
    desk.end_steps()
    assert (desk.response.finish_reason, desk.response.num_output_tokens) == (FinishReason.LENGTH, 5)
    assert desk.free == 100


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_context_phase_that_ends_the_request_frees_its_blocks(max_tokens: int) -> None:
    desk = ExecutorDesk(Role.CONTEXT).give(context(max_tokens=max_tokens))
    desk.end_steps(1, *([Stopped(1, 1)] if max_tokens > 1 else []))
    assert desk.response.finish_reason is (FinishReason.STOP if max_tokens > 1 else FinishReason.LENGTH)
    assert desk.response.context_phase_params is None
    assert desk.free == 100
    desk.give(asks())
    assert not desk.served.ok


def test_one_executor_serves_all_three_types_in_one_batch() -> None:
    desk = ExecutorDesk()
    desk.until_in_flight(1)
    desk.give(KvReceived(1, True), both(2), context(3))
    assert desk.run is not None
    assert [chunk.request_id for chunk in desk.run.chunks] == [2, 3]
    assert [joined.request_id for joined in desk.run.joined] == [1]
    desk.end_steps()
    assert desk.response.request_id == 3
    assert desk.run is not None
    assert desk.run.num_decodes == 2


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_on_a_context_executor_too() -> None:
    desk = ExecutorDesk(Role.CONTEXT, max_num_tokens=4).give(context(prompt=10))
    chunks = []
    while desk.run is not None:
        chunks += [(chunk.start, chunk.length, chunk.is_last) for chunk in desk.run.chunks]
        desk.end_steps()
    assert chunks == [(0, 4, False), (4, 4, False), (8, 2, True)]


def test_all_arrivals_of_an_instant_are_planned_together() -> None:
    desk = ExecutorDesk(num_blocks=200).give(*(both(i, prompt=1) for i in range(64)))
    assert desk.run is not None
    assert len(desk.run.chunks) == 64


def test_decodes_go_first_and_prompts_share_what_is_left_of_the_budget() -> None:
    desk = ExecutorDesk(max_num_tokens=10)
    desk.until_decoding(1)
    desk.give(both(2, prompt=30))
    desk.end_steps(1)
    assert desk.run is not None
    assert desk.run.num_decodes == 1
    assert [chunk.length for chunk in desk.run.chunks] == [9]


def test_under_prefill_first_the_decodes_stand_still() -> None:
    desk = ExecutorDesk(batching="prefill_first", max_num_tokens=10)
    desk.until_decoding(1)
    desk.give(both(2, prompt=30))
    desk.end_steps(1)
    assert desk.run is not None
    assert (desk.run.decodes, desk.run.num_decodes) == (False, 0)
    assert [chunk.length for chunk in desk.run.chunks] == [10]


def test_a_span_runs_to_the_first_max_tokens() -> None:
    desk = ExecutorDesk().give(both(1, max_tokens=9), both(2, max_tokens=4))
    desk.end_steps()
    assert desk.run is not None
    assert (desk.run.first_step, desk.run.last_step) == (1, 3)
    desk.end_steps()
    assert [r.request_id for r in desk.responses] == [2]
    assert desk.run is not None
    assert desk.run.left == (2,)
    assert desk.run.last_step == 5


def test_the_head_of_the_line_blocks_what_is_behind_it() -> None:
    desk = ExecutorDesk(Role.CONTEXT, num_blocks=10)
    desk.until_context_done(1, prompt=20)
    desk.give(context(2, prompt=24), context(3, prompt=4))
    assert desk.run is None
    desk.give(asks(), KvTaken(1))
    assert desk.run is not None
    assert [chunk.request_id for chunk in desk.run.chunks] == [2, 3]


def test_an_arrival_that_fits_ends_the_span_and_is_not_admitted_inside_it() -> None:
    desk = ExecutorDesk()
    run = desk.until_decoding(1, max_tokens=50)
    free = desk.free
    desk.give(both(2))
    assert desk.asked_to_stop
    assert desk.free == free
    assert not desk.of(RunSteps)
    desk.end_steps(7)
    assert desk.run is not None
    assert desk.run.epoch == run.epoch + 1
    assert [chunk.request_id for chunk in desk.run.chunks] == [2]


def test_an_arrival_without_a_place_leaves_the_span_alone() -> None:
    desk = ExecutorDesk(max_batch_size=1)
    desk.until_decoding(1, max_tokens=50)
    desk.give(both(2))
    assert not desk.asked_to_stop


def test_a_spurious_stop_continues_the_epoch() -> None:
    desk = ExecutorDesk()
    run = desk.until_decoding(1, max_tokens=50)
    desk.end_steps(7)
    (after,) = desk.of(RunSteps)
    assert (after.epoch, after.first_step, after.last_step) == (run.epoch, 8, 49)
    assert (after.left, after.joined, after.chunks) == ((), (), ())


def test_steps_done_closes_its_own_plan_only() -> None:
    desk = ExecutorDesk()
    run = desk.until_decoding(1, max_tokens=5)
    desk.give(StepsDone(run.plan - 1, run.epoch, 4))
    assert desk.responses == []
    assert desk.core.visits[1].state is State.GENERATION_RUNNING


def test_tokens_launched_after_a_stop_are_discarded() -> None:
    desk = ExecutorDesk()
    desk.until_decoding(1, max_tokens=50)
    desk.end_steps(9, Stopped(1, 6))
    assert (desk.response.finish_reason, desk.response.num_output_tokens) == (FinishReason.STOP, 7)


def test_a_failed_step_fails_what_was_in_it_and_nothing_else() -> None:
    desk = ExecutorDesk(max_batch_size=1).give(both(1), both(2))
    assert desk.run is not None
    desk.give(StepsDone(desk.run.plan, desk.run.epoch, 1, error="the device is out of memory"))
    assert [(r.request_id, r.error) for r in desk.responses] == [(1, "the device is out of memory")]
    assert [chunk.request_id for run in desk.of(RunSteps) for chunk in run.chunks] == [2]


# ---- preemption ----------------------------------------------------------------------------------------------------


def test_who_is_promised_all_blocks_waits_where_who_takes_them_as_it_writes_begins() -> None:
    """Five blocks of four tokens; each request may come to 18 tokens, five blocks, and its prompt takes two."""
    for capacity, begun in (("guaranteed_no_evict", [1]), ("max_utilization", [1, 2])):
        desk = ExecutorDesk(num_blocks=5, capacity=capacity)
        desk.give(both(1, prompt=7, max_tokens=12), both(2, prompt=7, max_tokens=12))
        assert desk.run is not None
        assert [chunk.request_id for chunk in desk.run.chunks] == begun


def test_the_youngest_is_preempted_and_recomputed_with_what_it_had_generated() -> None:
    desk = ExecutorDesk(num_blocks=5, capacity="max_utilization")
    desk.give(both(1, prompt=7, max_tokens=12), both(2, prompt=7, max_tokens=12))
    desk.end_steps()
    # 4 of 5 blocks are taken; each has room for one more token, after which only one of the two can have a new block
    assert desk.run is not None
    assert desk.run.last_step == 1
    desk.end_steps()
    assert desk.run is not None
    assert desk.run.left == (2,)
    assert desk.core.visits[2].state is State.QUEUED
    assert desk.core.visits[2].num_preemptions == 1
    while 1 in desk.core.visits:
        desk.end_steps()
    assert [(c.request_id, c.start, c.length) for c in desk.run.chunks] == [(2, 0, 9)]
    while desk.run is not None and 2 in desk.core.visits:
        desk.end_steps()
    assert desk.response.num_output_tokens == 12
    assert desk.all_answers == [1, 2]
    assert desk.free == 5


def test_a_span_cut_short_gives_back_the_blocks_of_steps_that_were_not_run() -> None:
    desk = ExecutorDesk(num_blocks=20, capacity="max_utilization")
    run = desk.until_decoding(1, prompt=8, max_tokens=41)
    assert run.last_step == 40
    assert desk.free == 8
    desk.give(both(2, prompt=4))
    desk.end_steps(2)
    assert desk.core.blocks.blocks_of(1) == (*run.joined[0].blocks, run.appended[0][1][0])
    assert desk.report.blocks_used == 3


def test_no_prompt_takes_the_block_that_a_decode_needs_next() -> None:
    desk = ExecutorDesk(num_blocks=4, capacity="max_utilization")
    desk.until_decoding(1, prompt=8, max_tokens=9)  # its next token starts a block
    desk.give(both(2, prompt=8, max_tokens=2))
    desk.end_steps(1)
    assert desk.core.visits[2].state is State.QUEUED
    assert desk.core.visits[1].num_preemptions == 0


def test_a_place_that_preemption_frees_is_filled_in_the_same_plan() -> None:
    """Otherwise a later plan would fill it, at a boundary that depends on how long spans are."""
    desk = ExecutorDesk(num_blocks=6, capacity="max_utilization", max_batch_size=2)
    desk.give(*(generation(i, prompt=4, max_tokens=21) for i in (1, 2, 3)))
    desk.give(*(KvReceived(i, True) for i in (1, 2, 3)))
    assert desk.run is not None
    assert desk.run.last_step == 4
    desk.end_steps()  # both have filled two blocks, one of six is free, and each wants another
    assert desk.run is not None
    assert desk.run.left == (2,)
    assert [joined.request_id for joined in desk.run.joined] == [3]


def test_one_that_was_recomputed_cannot_be_too_long_for_one_step_with_chunking_off() -> None:
    desk = ExecutorDesk(capacity="max_utilization", chunked_context=False, max_num_tokens=16)
    desk.give(both(1, prompt=10, max_tokens=8))
    assert "recomputed at once" in str(desk.response.error)
    desk.give(both(2, prompt=10, max_tokens=7))
    assert desk.run is not None


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(1, 500, 5), "needs KV for 504 tokens, this executor can hold 400"),
        (Request(1, 0, 5), "at least 1"),
        (Request(1, 5, 0), "at least 1"),
        (Request(1, 5, 5, sampling=SamplingConfig(beam_width=4)), "beam width 4"),
        (Request(1, 5, 5, RequestType.GENERATION_ONLY), "context_phase_params"),
        (
            Request(
                1, 5, 5, RequestType.GENERATION_ONLY, context_phase_params=ContextPhaseParams(9, 2, 5, is_promised=True)
            ),
            "this executor's own",
        ),
        (
            Request(1, 5, 1, RequestType.GENERATION_ONLY, context_phase_params=ContextPhaseParams(9, 1, 5)),
            "there is no generation phase",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_at_enqueue_and_takes_nobody_with_it(request_: Request, says: str) -> None:
    desk = ExecutorDesk().give(both(7), Enqueue(request_))
    assert says in str(desk.response.error)
    assert not desk.response.recomputable
    assert list(desk.core.visits) == [7]
    assert desk.run is not None


def test_a_prompt_over_the_budget_is_refused_with_chunking_off() -> None:
    desk = ExecutorDesk(Role.CONTEXT, chunked_context=False, max_num_tokens=16).give(context(prompt=17))
    assert "chunked context is off" in str(desk.response.error)


def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    desk = ExecutorDesk().give(both(1), both(1, prompt=3))
    assert "in use" in str(desk.response.error)
    assert desk.core.visits[1].request.num_prompt_tokens == 8


# ---- the KV in flight -----------------------------------------------------------------------------------------------


def test_a_pull_is_asked_for_when_its_blocks_fit_and_names_them_in_order() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=6)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, 12, 5, source=1, source_id=33))
    assert desk.of(ReceiveKv) == []
    desk.end_steps()
    assert (desk.pull.source, desk.pull.source_id, desk.pull.num_tokens, len(desk.pull.blocks)) == (1, 33, 12, 3)
    assert desk.free == 2


def test_a_large_pull_is_served_at_last_although_a_reserve_is_kept() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=6, pull_reserve_blocks=2)
    desk.give(generation(1, 20, 2), generation(2, 20, 2))
    assert desk.pull.request_id == 1


def test_a_reserve_keeps_blocks_free_of_pulls() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=6, pull_reserve_blocks=2)
    desk.give(generation(1, 8, 2), generation(2, 8, 2))
    assert desk.pull.request_id == 1
    assert desk.free == 3


def test_ready_requests_join_in_order_as_places_come_free() -> None:
    desk = ExecutorDesk(Role.GENERATION, max_batch_size=1)
    desk.give(generation(1), generation(2), generation(3))
    desk.give(KvReceived(3, True), KvReceived(1, True), KvReceived(2, True))
    order = []
    while desk.run is not None and desk.core.visits:
        order += [joined.request_id for joined in desk.run.joined]
        desk.end_steps()
    assert order == [3, 1, 2]


def test_a_cancelled_head_of_the_line_lets_the_next_in() -> None:
    """Which fits where the first did not, though nothing came free."""
    desk = ExecutorDesk(Role.GENERATION, num_blocks=6)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, 16, 5), generation(3, 4, 2))
    desk.end_steps(1)
    assert desk.of(ReceiveKv) == []
    desk.give(Cancel(2))
    assert desk.pull.request_id == 3


def test_a_pull_takes_free_blocks_while_steps_run_and_does_not_end_their_span() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, 8, 5))
    assert desk.pull.request_id == 2
    assert not desk.asked_to_stop


def test_a_pull_waits_for_the_end_of_a_step_where_running_steps_take_blocks() -> None:
    desk = ExecutorDesk(Role.GENERATION, capacity="max_utilization")
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, 8, 5))
    assert desk.of(ReceiveKv) == []
    assert desk.asked_to_stop
    desk.end_steps(1)
    assert desk.pull.request_id == 2


def test_a_pull_waits_for_the_end_of_a_step_behind_a_prompt_that_needs_blocks() -> None:
    desk = ExecutorDesk(Role.MIXED, num_blocks=8)
    desk.give(both(1, prompt=8, max_tokens=9))
    desk.end_steps()
    desk.give(both(2, prompt=8, max_tokens=17))  # needs six, and four are free
    desk.give(generation(3, 4, 5))
    assert desk.of(ReceiveKv) == []
    assert desk.asked_to_stop


def test_a_transfer_time_out_is_honoured_with_no_other_event_and_only_marks_the_blocks() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_in_flight(1)
    desk.now = 1
    while not desk.responses:
        desk.wake()
    assert desk.now == TIMEOUT
    assert "took over" in str(desk.response.error)
    assert desk.response.recomputable
    assert (desk.free, desk.report.blocks_quarantined) == (97, 3)
    desk.give(KvReceived(1, True), at=desk.now + 500)
    assert (desk.free, desk.report.blocks_quarantined) == (100, 0)
    assert desk.all_answers == [1]


def test_a_generation_phase_waits_for_blocks_no_longer_than_it_may() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=4, pull_timeout=700)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, source=1, source_id=33))
    while not desk.responses:
        desk.wake()
    assert desk.now == 700
    assert "no blocks came free" in str(desk.response.error)
    assert desk.response.recomputable
    assert Send(1, Cancel(33)) in desk.last


def test_a_time_out_grows_with_the_length_of_the_prompt() -> None:
    desk = ExecutorDesk(Role.GENERATION, transfer_timeout_per_token=7)
    desk.until_in_flight(1, prompt=100)
    while not desk.responses:
        desk.wake()
    assert desk.now == TIMEOUT + 700


def test_a_cancelled_pull_is_answered_at_once_and_keeps_its_blocks_until_the_transfer_is_over() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_in_flight(1)
    desk.give(Cancel(1))
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert desk.report.blocks_quarantined == 3
    desk.give(KvReceived(1, False, "refused"))
    assert desk.free == 100
    assert desk.all_answers == [1]


def test_a_request_cancelled_before_its_pull_frees_the_kv_at_its_source() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=4)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, source=1, source_id=33))
    desk.give(Cancel(2))
    assert Send(1, Cancel(33)) in desk.last
    assert desk.response.finish_reason is FinishReason.CANCELLED


def test_a_transfer_that_was_refused_can_be_run_again_elsewhere() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_in_flight(1)
    desk.give(KvReceived(1, False, "its lease ran out"))
    assert (desk.response.error, desk.response.recomputable) == ("its lease ran out", True)
    assert desk.free == 100


# ---- leases --------------------------------------------------------------------------------------------------------


def test_a_lease_runs_out_with_no_work_arriving_and_frees_the_blocks() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    done_at = desk.now
    while desk.core.visits:
        desk.wake()
    assert desk.now == done_at + LEASE
    assert desk.free == 100
    assert desk.all_answers == [1]


def test_a_late_reader_is_refused_clearly() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    while desk.core.visits:
        desk.wake()
    desk.give(asks())
    assert not desk.served.ok
    assert "lease ran out" in str(desk.served.error)
    assert desk.served.blocks == ()


def test_a_renewal_starts_the_lease_anew() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(LeaseRenewed((1, 99)), at=2000)
    while desk.core.visits:
        desk.wake()
    assert desk.now == 2000 + LEASE


def test_expiry_while_a_reader_reads_quarantines_the_blocks_until_it_is_done() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(asks(), at=2900)
    desk.give(Wake(), at=5000)
    assert (desk.free, desk.report.blocks_held, desk.report.blocks_quarantined) == (98, 0, 2)
    desk.give(KvTaken(1), at=9000)
    assert desk.free == 100


def test_cancel_while_a_reader_reads_quarantines_too() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(asks())
    desk.give(Cancel(1))
    assert (desk.free, desk.report.blocks_quarantined) == (98, 2)
    desk.give(KvTaken(1))
    assert desk.free == 100


def test_a_second_reader_is_refused_while_the_first_reads() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(asks(reader=8))
    desk.give(asks(reader=9))
    assert "being read by executor 8" in str(desk.served.error)


def test_too_much_quarantine_makes_an_executor_report_itself_unhealthy() -> None:
    desk = ExecutorDesk(Role.CONTEXT, quarantine_max_blocks=1)
    desk.until_context_done()
    desk.give(asks())
    assert desk.report.healthy
    desk.give(Cancel(1))
    assert not desk.report.healthy
    desk.give(KvTaken(1))
    assert desk.report.healthy


def test_waiting_requests_renew_their_leases_in_one_heartbeat_per_source() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=4)
    desk.until_decoding(1, prompt=8, max_tokens=9)
    desk.give(generation(2, source=1, source_id=21), generation(3, source=7, source_id=31))
    desk.give(generation(4, source=1, source_id=41))
    while not (renewals := [c for c in desk.of(Send) if isinstance(c.message, LeaseRenewed)]):
        desk.wake()
    assert desk.now == LEASE // 3
    assert renewals == [Send(1, LeaseRenewed((21, 41))), Send(7, LeaseRenewed((31,)))]


def test_no_heartbeat_goes_on_when_nobody_waits() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_decoding(1)
    desk.end_steps()
    while desk.wake_at is not None and desk.wake_at < 10**9:
        desk.wake()
    assert not [c for c in desk.history if isinstance(c, Send) and isinstance(c.message, LeaseRenewed)]


# ---- peers that die ------------------------------------------------------------------------------------------------


def test_a_dead_reader_gives_back_what_it_was_reading() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(asks(reader=9))
    desk.give(PeerDown(8))
    assert desk.free == 98
    desk.give(PeerDown(9))
    assert desk.free == 100


def test_a_dead_source_fails_what_was_to_come_from_it() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=8)
    desk.give(generation(1, 8, 9, source=1), generation(2, 12, 5, source=1), generation(3, 4, 2, source=5))
    desk.give(PeerDown(1))
    assert [(r.request_id, r.recomputable) for r in desk.responses] == [(1, True), (2, True)]
    assert all("executor 1" in str(r.error) and "gone" in str(r.error) for r in desk.responses)
    assert list(desk.core.visits) == [3]


def test_blocks_given_up_in_mid_transfer_come_back_when_the_source_is_gone() -> None:
    desk = ExecutorDesk(Role.GENERATION)
    desk.until_in_flight(1)
    desk.give(Cancel(1))
    assert desk.free == 97
    desk.give(PeerDown(1))
    assert desk.free == 100
    assert desk.all_answers == [1]


def test_a_request_on_the_wire_when_its_source_died_is_not_pulled_for_ever() -> None:
    desk = ExecutorDesk(Role.GENERATION).give(PeerDown(1))
    desk.give(generation(1, source=1))
    assert desk.of(ReceiveKv) == []
    assert desk.response.recomputable
    assert desk.free == 100


def test_a_reader_that_is_gone_is_not_waited_for() -> None:
    desk = ExecutorDesk(Role.CONTEXT)
    desk.until_context_done()
    desk.give(PeerDown(9))
    desk.give(asks(reader=9))
    assert not desk.served.ok
    assert desk.report.blocks_quarantined == 0


# ---- cancel and shutdown -------------------------------------------------------------------------------------------


def test_a_running_request_is_cancelled_after_the_plan_that_may_touch_it() -> None:
    desk = ExecutorDesk()
    desk.until_decoding(1, max_tokens=50)
    desk.give(Cancel(1))
    assert desk.asked_to_stop
    assert desk.responses == []
    assert desk.free < 100
    desk.end_steps(3)
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert desk.free == 100


def test_a_waiting_prompt_is_cancelled_at_once() -> None:
    desk = ExecutorDesk(max_batch_size=1).give(both(1), both(2))
    desk.give(Cancel(2), Cancel(99))
    assert desk.response.request_id == 2
    assert desk.report.queued_prefill_tokens == 0


def test_a_context_phase_cancelled_in_its_last_step_holds_nothing() -> None:
    desk = ExecutorDesk(Role.CONTEXT).give(context())
    desk.give(Cancel(1))
    desk.end_steps()
    assert desk.response.finish_reason is FinishReason.CANCELLED
    assert desk.free == 100


def test_a_request_that_ends_in_the_very_step_in_which_it_is_cancelled_ends_once() -> None:
    desk = ExecutorDesk()
    desk.until_decoding(1, max_tokens=5)
    desk.end_steps(more=(Cancel(1),))
    assert desk.all_answers == [1]
    assert desk.free == 100


def test_a_drain_finishes_what_is_there_and_takes_no_more() -> None:
    desk = ExecutorDesk()
    desk.until_decoding(1, max_tokens=5)
    desk.give(Shutdown(drain=True))
    desk.give(both(2))
    assert "shutting down" in str(desk.response.error)
    desk.end_steps()
    assert desk.response.finish_reason is FinishReason.LENGTH
    assert desk.of(Drained) == [Drained()]


def test_a_shutdown_without_drain_fails_everything_held_kv_included() -> None:
    desk = ExecutorDesk()
    desk.until_context_done(1)
    desk.until_in_flight(2)
    desk.give(both(3, max_tokens=50))
    desk.give(Shutdown(drain=False))
    assert [r.request_id for r in desk.responses] == [2]
    assert desk.of(Drained) == []
    desk.end_steps(1)
    assert [r.request_id for r in desk.responses] == [3]
    assert desk.of(Drained) == []
    desk.give(KvReceived(2, True))
    assert desk.of(Drained) == [Drained()]
    assert desk.free == 100


# ---- generation alone ----------------------------------------------------------------------------------------------


def canned(id: int, max_tokens: int = 5) -> Any:
    return generation(id, 8, max_tokens, source=0, source_id=0)


def test_a_canned_generation_phase_starts_by_itself() -> None:
    desk = ExecutorDesk(Role.GENERATION).give(canned(1))
    assert desk.of(ReceiveKv) == []
    assert desk.run is not None
    assert [joined.request_id for joined in desk.run.joined] == [1]
    desk.end_steps()
    assert desk.response.num_output_tokens == 5


def test_a_canned_generation_phase_joins_at_the_first_boundary_after_it_came() -> None:
    desk = ExecutorDesk(Role.GENERATION).give(canned(1, max_tokens=50))
    desk.give(canned(2))
    assert desk.asked_to_stop
    desk.end_steps(3)
    assert desk.run is not None
    assert [joined.request_id for joined in desk.run.joined] == [2]


def test_nobody_holds_a_lease_for_canned_kv() -> None:
    desk = ExecutorDesk(Role.GENERATION, num_blocks=4)
    desk.give(canned(1, max_tokens=9), canned(2))
    while desk.wake_at is not None and desk.wake_at < 3 * LEASE:
        desk.wake()
    assert not [c for c in desk.history if isinstance(c, Send) and isinstance(c.message, LeaseRenewed)]


# ---- a policy that waits -------------------------------------------------------------------------------------------


@register("test_stand_still", kind="batching", source="tests")
class StandStill(BatchPolicy):
    """Runs prompts, then lets the decodes wait until the instant 500."""

    def plan(self, batch: BatchView) -> BatchPlan:
        prompts = [*batch.begun, *batch.waiting]
        if prompts:
            return BatchPlan(tuple(ChunkPlan(p.request_id, p.num_tokens_left) for p in prompts), decodes=False)
        return BatchPlan()


def test_blocks_are_counted_right_while_a_policy_lets_the_decodes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = ExecutorDesk(num_blocks=20, capacity="max_utilization", batching="test_stand_still")
    desk.until_decoding(1, prompt=8, max_tokens=41)
    desk.end_steps(20)
    desk.core.scheduler.prefilling.clear()
    monkeypatch.setattr(StandStill, "plan", lambda self, batch: BatchPlan(decodes=False, ask_again_at=500))
    desk.give(both(2, prompt=40))
    desk.end_steps(24)
    assert desk.run is None
    assert sum(desk.core.scheduler.block_counts()) == 20
    assert desk.report.blocks_used == 8
    assert desk.report.blocks_free == desk.free


def test_a_class_that_was_away_catches_up_on_nothing_in_an_executor_s_queue() -> None:
    """Rounds of 8 tokens. Class a's prompts are of the rounds 0 to 3; when those of 0 to 2 have begun class b joins round 2."""

    def of_class(id: int, name: str) -> Enqueue:
        return Enqueue(replace(context(id).request, traffic_class=name))

    order = PolicySpec("deficit_round_robin", {"quantum": 8})
    desk = ExecutorDesk(Role.CONTEXT, max_batch_size=1, max_num_tokens=8, queue_order=order)
    desk.give(*(of_class(i, "a") for i in range(1, 5)))
    begun = []
    for number in range(6):
        if number == 2:
            desk.give(of_class(5, "b"), of_class(6, "b"))
        assert desk.run is not None
        begun += [chunk.request_id for chunk in desk.run.chunks]
        desk.end_steps(at=desk.now + 10)
    assert begun == [1, 2, 3, 5, 4, 6]
