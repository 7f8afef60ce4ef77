"""The leader of an executor: obeys its core. It grants steps, orders KV, keeps tokens, and decides nothing.

One thread owns a session. It takes everything that has arrived, stamps it with one instant, gives it to the core in the
order of the tie key, and lets the core plan once for the instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ..core.commands import (
    ORCHESTRATOR,
    AbortKv,
    Drained,
    PrepareReceive,
    ReceiveKv,
    Record,
    RunSteps,
    Send,
    ServeKv,
    StopAfterStep,
    WakeAt,
)
from ..core.event_log import FORMAT, LoggedCore, LogHeader
from ..core.events import (
    Cancel,
    Enqueue,
    ExecutorEvent,
    FirstTokenOut,
    FirstTokens,
    KvReceived,
    KvRequested,
    KvWithdrawn,
    LeaseRenewed,
    MoveOut,
    PeerDown,
    Report,
    Response,
    RoleChanged,
    Shutdown,
    Wake,
)
from ..core.executor import ExecutorCore
from ..core.grants import Launch
from ..policies.vocabulary import FinishReason
from .clock import Clock
from .executor_answers import PROMISED
from .executor_engine import EngineThread
from .executor_inbox import MESSAGE, Arrived, Asked, RankDown, StepReport, Submitted
from .executor_kv import ExecutorTransfers, KvOrder, RankTransfers
from .executor_spec import Roster
from .executor_steps import Span, Spans, merged
from .executor_tokens import Sequences, TokenError, check_tokens
from .model_batch import PlanFeed
from .rank_record import ExecutorBrokenError
from .wire import (
    AbortKvOrder,
    Body,
    HiddenStop,
    KvAnswer,
    KvAsk,
    KvPart,
    KvWrittenOrder,
    PlanGrant,
    ReceiveKvOrder,
    ServeKvOrder,
    TokenChunk,
    TokenChunks,
)

ToUser = Response | Report | TokenChunk | TokenChunks
_WAKE: Final = Wake()
_CORE_MESSAGES: Final = (Cancel, FirstTokens, KvWithdrawn, LeaseRenewed, MoveOut, RoleChanged, Shutdown)
_encoder: Final = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class ExecutorRecord:
    """What one executor's session leaves behind."""

    log: list[bytes] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    step_ends: list[tuple[int, int, int]] = field(default_factory=list)  # (epoch, step, instant)
    parts: list[tuple[int, KvPart]] = field(default_factory=list)  # (rank, its part of a transfer)


class LeaderSession:
    """One core's life. `send(rank, body)` posts to an MPI rank, `to_user(body)` speaks to whoever asked for requests.

    `on_record` sees each finished row. With `log` the core's event log is kept in `record`.
    """

    def __init__(
        self,
        roster: Roster,
        executor: int,
        clock: Clock,
        engine: EngineThread,
        transfers: RankTransfers,
        send: Callable[[int, Body], object],
        to_user: Callable[[ToUser], None],
        *,
        log: bool = True,
        on_record: Callable[[Any], None] | None = None,
    ) -> None:
        self.id = executor
        self.record = ExecutorRecord()
        self.is_drained = False
        self._roster = roster
        self._clock = clock
        self._engine = engine
        self._rank_transfers = transfers
        self._send = send
        self._to_user = to_user
        self._on_record = on_record
        placement = roster.placements[executor]
        self._rank = placement.participant_ids[0]
        self._followers = placement.participant_ids[1:]
        config, root = roster.configs[executor], roster.spec.orchestrator.policy_root
        self._core: Any = ExecutorCore(config, root)
        if log:
            self._core = LoggedCore(
                self._core, LogHeader(FORMAT, executor=config, policy_root=root), self.record.log.append
            )
        names_blocks = config.enable_block_reuse and not roster.spec.workload_names_blocks
        self._sequences = Sequences(config.tokens_per_block if names_blocks else None)
        self._transfers = ExecutorTransfers(roster, executor, self._order)
        self._spans = Spans(Launch(placement.steps_per_grant, placement.pipeline_depth, placement.plan_ahead))
        self._refused: RunSteps | None = None
        self._wake_at: int | None = None
        self._gone: set[int] = set()  # executors
        self._going: dict[int, None] = {}  # executors that are gone, while transfers with them are not yet over
        self._events: list[tuple[int, int, ExecutorEvent]] = []  # of this instant: (class, sender, event)
        self._reports: list[StepReport] = []
        self._to_stream: list[int] = []  # requests with tokens of this instant
        self._unsaid: list[ToUser] = []  # of this instant: said once the next steps are granted, for which a GPU waits

    # ---- one instant -------------------------------------------------------------------------------------------------

    def timeout_s(self) -> float | None:
        """How long nothing is due."""
        if self._events:
            return 0.0
        return None if self._wake_at is None else self._clock.seconds_until(self._wake_at)

    def wake(self, items: list[Any]) -> None:
        """Take in everything that has arrived, as one instant. Raises ExecutorBrokenError."""
        try:
            self._take_in(items, self._clock.now())
        finally:  # what had been decided when something broke is said all the same: nobody else knows it
            self._speak()

    def _take_in(self, items: list[Any], now: int) -> None:
        for item in items:
            self._sort(item)
        if self._wake_at is not None and now >= self._wake_at:
            self._wake_at = None
            self._events.append((MESSAGE, self.id, _WAKE))
        if not self._events and not self._reports:
            return
        events, self._events = sorted(self._events, key=lambda event: event[:2]), []
        reports, self._reports = self._reports, []
        is_new = False
        for _, _, event in events:
            is_new = True
            self._obey(self._core.handle(event, now, True))
        for report in reports:
            for event in self._step_ended(report, now):
                is_new = True
                self._obey(self._core.handle(event, now, True))
        if is_new:
            self._obey(self._core.handle(None, now))
        while (span := self._spans.to_commit()) is not None:
            self._obey(self._core.handle(span.commit(), now, True))
            self._obey(self._core.handle(None, now))
        got, self._to_stream = self._to_stream, []
        self._stream(got)

    def _speak(self) -> None:
        unsaid, self._unsaid = self._unsaid, []
        for body in unsaid:
            self._to_user(body)

    def _sort(self, item: Any) -> None:
        """Turn an item into an event of this instant, or into what concerns the driver alone."""
        if isinstance(item, StepReport):
            self._reports.append(item)
        elif isinstance(item, Arrived):
            self._message(item.rank, item.body)
        elif isinstance(item, Submitted):
            if item.output_length is not None:
                self._sequences.script(item.request.id, item.output_length)
            self._enqueue(Enqueue(item.request), ORCHESTRATOR, is_users=True)
        elif isinstance(item, Asked):
            self._events.append((MESSAGE, item.sender, item.event))
        elif isinstance(item, RankDown):
            self._rank_down(item)

    def _message(self, rank: int, body: Body) -> None:
        sender = self._roster.core_of(rank)
        if sender in self._gone:
            return
        if isinstance(body, Enqueue):
            self._enqueue(body, sender)
        elif isinstance(body, _CORE_MESSAGES):
            if isinstance(body, FirstTokens):
                self._sequences.first(body.request_id, body.tokens)
            self._events.append((MESSAGE, sender, body))
        elif isinstance(body, HiddenStop):
            self._sequences.script(body.request_id, body.output_length)
        elif isinstance(body, KvAsk):
            asked = KvRequested(body.request_id, sender, body.reader_id, body.num_present)
            self._events.append((MESSAGE, sender, asked))
        elif isinstance(body, KvAnswer):
            if not body.ok:
                self._transfers.abort(False, body.reader_id, body.error or "the source refused")
        elif isinstance(body, KvPart):
            self._part_done(rank, body)

    def _enqueue(self, enqueue: Enqueue, sender: int, is_users: bool = False) -> None:
        request = enqueue.request
        try:
            if is_users and request.context_phase_params is not None and request.context_phase_params.is_promised:
                raise TokenError(f"request {request.id}: {PROMISED}")
            if request.id in self._sequences:
                raise TokenError(f"request id {request.id} is in use on executor {self.id}")
            check_tokens(request, self._roster.shape.vocab_size)
        except TokenError as error:  # the core sees no tokens: what is wrong with them is the world's to refuse
            self._unsaid.append(Response(request.id, self.id, FinishReason.ERROR, 0, str(error)))
            return
        self._sequences.enter(request)
        self._events.append((MESSAGE, sender, enqueue))

    def _part_done(self, rank: int, part: KvPart) -> None:
        self.record.parts.append((rank, part))
        over = self._transfers.part_done(rank, part)
        if over is not None:
            event, sender = over
            self._events.append((MESSAGE, sender, event))
            if isinstance(event, KvReceived) and event.ok:
                self._stream([event.request_id])  # its first output came with the KV
        self._say_goodbye()

    def _rank_down(self, item: RankDown) -> None:
        executor = self._roster.core_of(item.rank)
        if executor == self.id or (executor == ORCHESTRATOR and not self._roster.spec.leader_mode):
            raise ExecutorBrokenError(f"executor {self.id} ends: rank {item.rank} is down")
        if executor in self._gone:
            return
        self._gone.add(executor)
        self._going[executor] = None
        self._transfers.abort_with(executor, f"executor {executor} is gone")
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Tell the core of executors that are gone, once no transfer with them touches memory any more."""
        for executor in [e for e in self._going if not self._transfers.any_with(e)]:
            del self._going[executor]
            self._events.append((MESSAGE, executor, PeerDown(executor)))

    # ---- obeying -----------------------------------------------------------------------------------------------------

    def _obey(self, commands: list[Any]) -> None:
        for command in commands:
            match command:
                case RunSteps():
                    self._start(command)
                case StopAfterStep():
                    if self._spans.open is not None:
                        self._spans.open.stop()
                case Send():
                    self._say(command.to, command.message)
                case Record():
                    self.record.rows.append(command.row)
                    if self._on_record is not None:
                        self._on_record(command.row)
                case WakeAt():
                    self._wake_at = command.first
                case ReceiveKv() | PrepareReceive():
                    self._receive_kv(command)
                case ServeKv():
                    self._serve_kv(command)
                case AbortKv():
                    self._transfers.abort(True, command.request_id, command.reason)
                case Drained():
                    self.is_drained = True

    def _say(self, to: int, message: Any) -> None:
        if to != ORCHESTRATOR:
            if to not in self._gone:
                self._send(self._roster.leader_of(to), message)
            return
        if isinstance(message, Response):
            sequence = self._sequences.forget(message.request_id)
            if sequence is not None and sequence.num_sent < len(sequence.generated) and message.error is None:
                tokens = tuple(sequence.generated[sequence.num_sent :])
                self._unsaid.append(TokenChunk(message.request_id, sequence.num_sent, tokens))
            params = message.context_phase_params
            if sequence is not None and params is not None and not params.first_gen_tokens:  # it goes on elsewhere
                tokens = tuple(sequence.generated[: params.num_generated])
                params = msgspec.structs.replace(params, first_gen_tokens=tokens)
                message = msgspec.structs.replace(message, context_phase_params=params)
        if not isinstance(message, FirstTokenOut) or not self._roster.spec.leader_mode:  # there its token says as much
            self._unsaid.append(message)

    def _receive_kv(self, command: ReceiveKv | PrepareReceive) -> None:
        if command.source in self._gone:
            gone = KvReceived(command.request_id, False, f"executor {command.source}, which held the KV, is gone")
            self._events.append((MESSAGE, command.source, gone))  # of the next instant, which is due at once
            return
        self._transfers.receive(command)
        present = command.num_present if isinstance(command, ReceiveKv) else 0
        ask = KvAsk(command.source_id, self.id, command.request_id, present)
        self._send(self._roster.leader_of(command.source), ask)

    def _serve_kv(self, command: ServeKv) -> None:
        if command.ok:
            self._transfers.serve(command)
        elif command.reader not in self._gone:
            answer = KvAnswer(command.reader_id, False, command.error)
            self._send(self._roster.leader_of(command.reader), answer)

    def _order(self, rank: int, order: KvOrder) -> None:
        if rank != self._rank:
            self._send(rank, order)
        else:
            obey_kv_order(self._rank_transfers, order)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _start(self, run: RunSteps) -> None:
        """Open a span. What an earlier plan should have told the engine, but did not, goes with this one."""
        if self._refused is not None:
            run, self._refused = merged(self._refused, run), None
        self._spans.begin(run)
        self._grant(self._sequences.feed(run))

    def _grant(self, feed: PlanFeed | None = None) -> None:
        for span, first, last in self._spans.due():
            run = span.run if feed is not None else None
            grant = PlanGrant(span.run.plan, span.run.epoch, first, last, run)
            if self._followers:
                told = grant if feed is None else msgspec.structs.replace(grant, feed=_encoder.encode(feed))
                for rank in self._followers:
                    self._send(rank, told)
            self._engine.grant(grant, feed)
            feed = None

    def _step_ended(self, report: StepReport, now: int) -> Iterator[ExecutorEvent]:
        """Note the step's tokens, grant what may follow, and say what that means to the core, which is told at once."""
        span = self._spans.of_plan(report.plan)
        if span is None:
            return
        if report.error is not None:
            self._step_failed(span, report)
        else:
            self.record.step_ends.append((span.run.epoch, report.step, now))
            got, ended = self._sequences.add(report.tokens)
            self._to_stream += got
            span.report(report.step, report.tokens, ended)
            span.block_hashes += self._sequences.names(got)
            for request_id in sorted(span.last_chunks):
                self._transfers.written(request_id)
        if not span.is_committed:
            self._grant()
        while (over := self._spans.pop_over()) is not None:
            yield over.result()
        self._grant()
        if (span := self._spans.to_commit()) is not None:
            yield span.commit()

    def _step_failed(self, span: Span, report: StepReport) -> None:
        text = report.error or ""
        if report.applied and self._followers:
            raise ExecutorBrokenError(f"executor {self.id}: a step failed half-way: {text}")
        if not report.applied and self._spans.is_followed(span):
            raise ExecutorBrokenError(
                f"executor {self.id}: plan {report.plan} was refused, and the next was on its way: {text}"
            )
        span.error = text
        span.stop()
        if not report.applied:
            self._refused = span.run

    def _stream(self, request_ids: list[int]) -> None:
        chunks = []
        for request_id in request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.request.streaming and sequence.num_sent < len(sequence.generated):
                tokens = tuple(sequence.generated[sequence.num_sent :])
                chunks.append(TokenChunk(request_id, sequence.num_sent, tokens))
                sequence.num_sent = len(sequence.generated)
        if chunks:
            self._unsaid.append(TokenChunks(tuple(chunks)))


def obey_kv_order(transfers: RankTransfers, order: Body) -> bool:
    """Carry out a leader's order about KV on this rank; False if it is none."""
    if isinstance(order, ServeKvOrder):
        transfers.serve(order)
    elif isinstance(order, KvWrittenOrder):
        transfers.written(order)
    elif isinstance(order, ReceiveKvOrder):
        transfers.receive(order)
    elif isinstance(order, AbortKvOrder):
        transfers.abort(order)
    else:
        return False
    return True
