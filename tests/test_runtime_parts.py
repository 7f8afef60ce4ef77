"""The parts of the drivers that need no MPI: spans and grants, tokens, transfers of an executor, answers, load."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.core.commands import Chunk, Joined, ReceiveKv, RunSteps, ServeKv
from disagg.core.events import Enqueue, KvReceived, KvTaken, Stopped
from disagg.core.grants import Launch, granted_through
from disagg.core.prefix_names import token_hashes
from disagg.policies.vocabulary import PS_PER_MS, ContextPhaseParams, FinishReason, Request, RequestType
from disagg.runtime.clock import Clock, monotonic_ns
from disagg.runtime.executor_answers import Answers, UnknownRequestError
from disagg.runtime.executor_inbox import Arrived, Inbox, RankDown, Submitted
from disagg.runtime.executor_kv import ExecutorTransfers
from disagg.runtime.executor_leader import LeaderSession
from disagg.runtime.executor_spec import ModelSource, SpecError, check_spec
from disagg.runtime.executor_steps import Span, merged
from disagg.runtime.executor_tokens import Sequences, TokenError, check_tokens
from disagg.runtime.orchestrator_job import Job, decode_job, encode
from disagg.runtime.orchestrator_load import LoadDriver, LoadPhase, PlannedSubmission
from disagg.runtime.rank_record import ExecutorBrokenError, SessionConfig, session_of
from disagg.runtime.wire import PROTOCOL_VERSION, AbortKvOrder, Hello, KvPart, ReceiveKvOrder, ServeKvOrder
from tests.runtime_programs.clusters import BLOCK, cluster, context, generation
from tests.tiny_models import SHAPES

# ---- clock and inbox -------------------------------------------------------------------------------------------------


def test_a_cores_instants_rise_strictly_and_count_from_the_origin() -> None:
    clock = Clock(monotonic_ns())
    instants = [clock.now() for _ in range(1000)]
    assert all(a < b for a, b in itertools.pairwise(instants))
    assert 0 <= instants[0] <= instants[-1] < 60 * 10**12
    assert clock.seconds_until(instants[0]) == 0.0
    assert 0.9 < clock.seconds_until(clock.read() + 10**12) <= 1.0


def test_an_inbox_gives_all_there_is_and_wakes_whoever_waits() -> None:
    inbox = Inbox()
    assert inbox.take(0) == []
    inbox.put(1)
    inbox.put(2)
    assert inbox.take(None) == [1, 2]
    taken: list[Any] = []
    waiter = threading.Thread(target=lambda: taken.extend(inbox.take(None)))
    waiter.start()
    inbox.put(3)
    waiter.join(10)
    assert taken == [3]


def test_a_rank_is_not_greeted_in_another_version_of_the_messages() -> None:
    config = msgspec.msgpack.encode(SessionConfig(5, seed=7))
    assert session_of(Hello(PROTOCOL_VERSION, 1, config)) == SessionConfig(5, seed=7)
    with pytest.raises(ExecutorBrokenError, match=f"greeted in version {PROTOCOL_VERSION - 1}"):
        session_of(Hello(PROTOCOL_VERSION - 1, 1, config))


# ---- spans -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_no_step_is_run_ungranted_and_a_stopped_span_ends_with_the_last_grant(data: st.DataObject) -> None:
    first, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    per_grant, depth = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    stop_in = data.draw(st.integers(first, first + size))  # a message during this step, or never
    ends_at = data.draw(st.integers(first, first + size))  # a sequence's last step, or never
    run = RunSteps(1, 1, first, first + size - 1, num_decodes=1)
    span = Span(run, Launch(per_grant, depth))
    granted = [step for a, b in span.grants(depth) for step in range(a, b + 1)]
    ran: list[int] = []
    while not span.is_over:
        step = ran[-1] + 1 if ran else first
        if step == stop_in:
            span.stop()
        assert step in granted
        ran.append(step)
        span.report(step, ((7, 1),), [7] if step == ends_at else [])
        granted += [s for a, b in span.grants(depth) for s in range(a, b + 1)]
    assert ran == granted == list(range(first, first + len(ran)))
    boundary = min(stop_in, ends_at)
    expected = run.last_step
    if boundary <= run.last_step:
        expected = granted_through(boundary - 1, first, run.last_step, per_grant, depth)
    result = span.result()
    assert result.num_steps == expected
    assert result.stopped == ((Stopped(7, ends_at),) if ends_at <= expected else ())


def test_only_last_chunks_give_first_tokens() -> None:
    chunks = (Chunk(1, 0, 4, True, (0,)), Chunk(2, 0, 4, False, (1,)))
    span = Span(RunSteps(3, 2, 1, 1, chunks=chunks, num_decodes=1), Launch())
    assert list(span.grants(1)) == [(1, 1)]
    span.report(1, ((9, 50), (1, 51)), [])
    assert span.result().first_tokens == ((1, 51),)


def test_the_delta_of_a_plan_that_no_engine_applied_goes_with_the_next() -> None:
    refused = RunSteps(1, 1, 1, 1, left=(1, 2), joined=(Joined(3, 4, (0,)), Joined(1, 4, (1,))), appended=((5, (9,)),))
    run = RunSteps(2, 2, 1, 1, left=(3, 5), joined=(Joined(6, 4, (2,)),), num_decodes=4)
    both = merged(refused, run)
    assert both.left == (1, 2, 5)
    assert both.joined == (Joined(1, 4, (1,)), Joined(6, 4, (2,)))
    assert both.appended == ()
    assert (both.plan, both.num_decodes) == (2, 4)


# ---- tokens ----------------------------------------------------------------------------------------------------------

PROMPT = Request(1, 4, 9, input_token_ids=(10, 11, 12, 13))


def test_feeds_slice_prompt_and_generated_tokens_so_that_a_recompute_works() -> None:
    sequences = Sequences()
    sequences.enter(PROMPT)
    for token in (20, 21, 22):
        assert sequences.add([(1, token)]) == ([1], [])
    run = RunSteps(1, 1, 1, 1, chunks=(Chunk(1, 2, 5, True, (0, 1)),))
    assert sequences.feed(run).chunks[0].token_ids == (12, 13, 20, 21, 22)
    joined = RunSteps(2, 2, 1, 1, joined=(Joined(1, 6, (0, 1)),))
    assert sequences.feed(joined).joined[0].next_token == 22


def test_blocks_are_named_by_their_tokens_whatever_a_request_claims_unless_its_workload_names_them() -> None:
    tokens = tuple(range(10))
    request = Request(1, 10, 4, input_token_ids=tokens, block_hashes=(1, 2))
    spec = cluster(ModelSource(SHAPES["llama"]), [context(enable_block_reuse=True), generation()])
    assert check_spec(spec).named(request).block_hashes == token_hashes(tokens, BLOCK) != (1, 2)
    assert check_spec(replace(spec, workload_names_blocks=True)).named(request) == request
    assert check_spec(cluster(ModelSource(SHAPES["llama"]), [context(), generation()])).named(request) == request


def test_executors_that_reuse_blocks_have_blocks_of_one_size() -> None:
    spec = cluster(ModelSource(SHAPES["llama"]), [context(enable_block_reuse=True), generation(tokens_per_block=8)])
    with pytest.raises(SpecError, match=r"enable_block_reuse with tokens_per_block \[4, 8\]"):
        check_spec(spec)


def test_what_was_generated_is_named_when_it_ends_without_the_last_token_as_a_longer_prompt_would_name_it() -> None:
    """Blocks of 4: a prompt of 6, and 7 tokens generated, are 12 tokens written: blocks 2 and 3 are named at the end."""
    sequences = Sequences(BLOCK)
    prompt = (9, 8, 7, 6, 5, 4)
    sequences.enter(Request(1, 6, 7, input_token_ids=prompt, block_hashes=token_hashes(prompt, BLOCK)))
    for token in range(6):
        sequences.add([(1, token)])
        assert sequences.names([1]) == []
    sequences.add([(1, 99)])
    assert sequences.names([1]) == [(1, token_hashes((*prompt, *range(6)), BLOCK)[1:])]
    assert Sequences().names([1]) == []


def test_a_pulled_request_begins_with_its_first_token() -> None:
    sequences = Sequences()
    params = ContextPhaseParams(5, 1, 4, (40,))
    sequences.enter(replace(PROMPT, request_type=RequestType.GENERATION_ONLY, context_phase_params=params))
    joined = RunSteps(1, 1, 1, 1, joined=(Joined(1, 4, (0,)),))
    assert sequences.feed(joined).joined[0].next_token == 40


def test_a_sequence_ends_at_its_end_id_or_scripted_length_and_takes_no_token_after_it() -> None:
    sequences = Sequences()
    sequences.script(1, 2)
    sequences.enter(PROMPT)
    sequences.enter(replace(PROMPT, id=2, end_id=7))
    assert sequences.add([(1, 5), (2, 5)]) == ([1, 2], [])
    assert sequences.add([(1, 5), (2, 7), (3, 1)]) == ([1, 2], [1, 2])
    assert sequences.add([(1, 5), (2, 5)]) == ([], [])
    answered = sequences.forget(1)
    assert answered is not None
    assert answered.generated == [5, 5]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"input_token_ids": None}, "no input_token_ids"),
        ({"num_prompt_tokens": 5}, "4 input_token_ids for 5"),
        ({"input_token_ids": (1, 2, 3, 99)}, "outside 0 to 49"),
        (
            {"request_type": RequestType.GENERATION_ONLY, "context_phase_params": ContextPhaseParams(1, 1, 4)},
            "0 tokens",
        ),
        (
            {"request_type": RequestType.GENERATION_ONLY, "context_phase_params": ContextPhaseParams(1, 1, 3, (1,))},
            "KV of 3",
        ),
    ],
)
def test_tokens_that_an_engine_could_not_take_are_refused_at_the_door(change: dict[str, Any], why: str) -> None:
    with pytest.raises(TokenError, match=why):
        check_tokens(replace(PROMPT, **change), 50)


# ---- transfers -------------------------------------------------------------------------------------------------------

ROSTER = check_spec(cluster(ModelSource(SHAPES["llama"]), [context(tp=2), generation(pp=2)]))  # ranks 1, 2 and 3, 4


def test_a_request_is_received_when_every_rank_has_its_part() -> None:
    orders: list[tuple[int, Any]] = []
    transfers = ExecutorTransfers(ROSTER, 2, lambda rank, order: orders.append((rank, order)))
    transfers.receive(ReceiveKv(8, 1, 7, 6, (3, 4)))
    assert orders == [(rank, ReceiveKvOrder(8, 1, 7, 6, (3, 4))) for rank in (3, 4)]
    assert transfers.any_with(1)
    assert transfers.part_done(4, KvPart(8, False, True)) is None
    assert transfers.part_done(3, KvPart(8, False, True)) == (KvReceived(8, True), 1)
    assert len(transfers) == 0
    assert transfers.part_done(3, KvPart(8, False, True)) is None


def test_a_part_that_fails_gives_up_the_others_and_the_transfer_waits_for_them() -> None:
    orders: list[tuple[int, Any]] = []
    transfers = ExecutorTransfers(ROSTER, 1, lambda rank, order: orders.append((rank, order)))
    transfers.serve(ServeKv(7, 2, 8, 6, (0, 1), True))
    assert [order for _, order in orders] == [ServeKvOrder(7, 2, 8, 6, (0, 1))] * 2
    assert transfers.part_done(1, KvPart(7, True, False, error="lost")) is None
    assert orders[2:] == [(2, AbortKvOrder(7, "lost"))]
    assert transfers.part_done(2, KvPart(7, True, False, error="given up")) == (KvTaken(7, False), 1)


def test_a_refusal_and_a_dead_source_give_the_reader_their_reason() -> None:
    orders: list[tuple[int, Any]] = []
    transfers = ExecutorTransfers(ROSTER, 2, lambda rank, order: orders.append((rank, order)))
    for request_id, give_up in ((8, transfers.abort), (9, None)):
        transfers.receive(ReceiveKv(request_id, 1, 7, 6, (3, 4)))
        if give_up is not None:
            give_up(False, request_id, "its lease ran out")
        else:
            transfers.abort_with(1, "its lease ran out")
        assert transfers.part_done(3, KvPart(request_id, False, False, error="aborted")) is None
        done = transfers.part_done(4, KvPart(request_id, False, True))
        assert done == (KvReceived(request_id, False, "its lease ran out"), 1)
    assert not transfers.any_with(1)


# ---- a leader's instant ----------------------------------------------------------------------------------------------


def test_what_was_decided_before_an_executor_broke_is_said_all_the_same() -> None:
    said: list[Any] = []
    engine, kv = SimpleNamespace(grant=lambda *args: None), SimpleNamespace()
    session = LeaderSession(
        ROSTER,
        1,
        Clock(monotonic_ns()),
        engine,  # type: ignore[arg-type]
        kv,  # type: ignore[arg-type]
        lambda rank, body: None,
        said.append,
    )
    with pytest.raises(ExecutorBrokenError, match="rank 2 is down"):
        session.wake([Arrived(0, Enqueue(replace(PROMPT, input_token_ids=(99999,)))), RankDown(2)])
    assert [(response.request_id, response.finish_reason) for response in said] == [(PROMPT.id, FinishReason.ERROR)]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_repeated_tokens_are_dropped_and_streaming_gives_each_once() -> None:
    answers = Answers()
    answers.expect(1, streaming=True)
    answers.tokens(1, 0, (5,))
    assert [r.result.output_token_ids for r in answers.await_responses(1) if r.result] == [(5,)]
    answers.tokens(1, 0, (5, 6))  # the generation's copy of the first
    answers.tokens(1, 0, (5,))  # a retry
    answers.tokens(1, 9, (1,))  # nothing was lost before: it cannot be ours
    answers.ended(1, FinishReason.LENGTH, None, None)
    (last,) = answers.await_responses(1)
    assert last.result is not None
    assert (last.result.output_token_ids, last.result.is_final, last.result.decoding_iter) == ((6,), True, 2)
    with pytest.raises(UnknownRequestError, match="taken already"):
        answers.await_responses(1)


def test_without_streaming_there_is_one_response_and_a_breakdown_answers_all() -> None:
    answers = Answers()
    for request_id in (1, 2):
        answers.expect(request_id, streaming=False)
    answers.tokens(1, 0, (5,))
    assert answers.await_responses([1, 2], timeout=0) == [[], []]
    assert answers.await_responses(timeout=0) == []
    answers.ended(1, FinishReason.STOP, None, None)
    assert answers.num_ready() == 1
    answers.broken("gone")
    (good,), (bad,) = answers.await_responses([1, 2])
    assert good.result is not None
    assert good.result.output_token_ids == (5,)
    assert (bad.has_error, bad.error_msg) == (True, "gone")
    assert answers.await_responses() == []


# ---- load ------------------------------------------------------------------------------------------------------------


class InstantCluster:
    """Ends each request as soon as it is sent, or later when told."""

    def __init__(self, load: LoadDriver, hold: int = 0) -> None:
        self.load = load
        self.hold = hold
        self.out: list[Request] = []
        self.most_out = 0

    def submit(self, submitted: Submitted) -> None:
        self.out.append(submitted.request)
        self.most_out = max(self.most_out, len(self.out))
        while len(self.out) > self.hold or (self.out and submitted.request.id == 9):
            request = self.out.pop(0)
            self.load.tokens(request.id, 0, (request.id,))
            self.load.ended(request.id, FinishReason.LENGTH, None, None)


def test_an_open_loop_sends_at_absolute_instants_of_each_phase() -> None:
    planned = [PlannedSubmission(replace(PROMPT, id=i), i * 3 * PS_PER_MS) for i in range(3)]
    later = [PlannedSubmission(replace(PROMPT, id=9), 2 * PS_PER_MS)]
    load = LoadDriver((LoadPhase(tuple(planned)), LoadPhase(tuple(later))))
    rows = load.run(Clock(monotonic_ns()), InstantCluster(load).submit)
    start = rows[0].intended_ps
    assert [row.intended_ps - start for row in rows] == [0, 3 * PS_PER_MS, 6 * PS_PER_MS, 8 * PS_PER_MS]
    assert all(row.actual_ps >= row.intended_ps for row in rows)
    assert [row.token_ids for row in rows] == [(0,), (1,), (2,), (9,)]


def test_a_closed_loop_counts_what_is_out_and_marks_its_burst() -> None:
    planned = tuple(PlannedSubmission(replace(PROMPT, id=i)) for i in range(10))
    load = LoadDriver((LoadPhase(planned, concurrency=3),))
    world = InstantCluster(load, hold=2)
    rows = load.run(Clock(monotonic_ns()), world.submit)
    assert world.most_out == 3
    assert len(rows) == 10
    assert [row.in_burst for row in rows][:2] == [True, True]


def test_a_broken_cluster_ends_the_load() -> None:
    planned = tuple(PlannedSubmission(replace(PROMPT, id=i), 0) for i in range(3))
    load = LoadDriver((LoadPhase(planned),))
    assert len(load.run(Clock(monotonic_ns()), lambda submitted: load.broken("gone"))) == 1


def test_a_job_survives_its_file() -> None:
    job = Job(ROSTER.spec, (LoadPhase((PlannedSubmission(PROMPT, 5, 3),), None, "profiling"),))
    assert decode_job(encode(job)) == job
