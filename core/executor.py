"""The iteration-level scheduler of one executor: events in, commands out.

Knows no device, clock or network. It plans between steps, once for all events of an instant, and orders whole spans of
steps: a decode batch at constant membership runs until the first `max_tokens`, until its blocks run out, or until
something happens that could change it. What may touch memory decides when it is freed: after the last plan that names
it, and after the last transfer that reads or writes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, Final

from msgspec.structs import replace

from ..policies import registry
from ..policies.interfaces import BatchPolicy, PolicyError, QueueOrder
from ..policies.vocabulary import (
    BatchPlan,
    ContextPhaseParams,
    FinishReason,
    Request,
    RequestType,
    Role,
)
from .blocks import BlockManager
from .commands import (
    ORCHESTRATOR,
    Chunk,
    Drained,
    ExecutorCommand,
    Joined,
    ReceiveKv,
    Record,
    RunSteps,
    Send,
    ServeKv,
    StopAfterStep,
    WakeAt,
)
from .config import ExecutorConfig
from .decode_batch import DecodeBatch
from .events import (
    Cancel,
    Enqueue,
    ExecutorEvent,
    KvReceived,
    KvRequested,
    KvTaken,
    LeaseRenewed,
    PeerDown,
    Report,
    Response,
    Shutdown,
    StepsDone,
    Wake,
)
from .life_cycle import Cause, LifeCycleError, State
from .tables import StayRow, StepRow, TransferRow
from .timers import Timers
from .visit import Visit

CANCELLED: Final = "cancelled"
_BEFORE_DECODE: Final = (State.GENERATION_QUEUED, State.KV_IN_FLIGHT, State.KV_READY)
_NO_BATCH: Final = BatchPlan()


class _WaitingPrompts:
    """Waiting prompts in queue order, read lazily: what is looked at and not taken is put back afterwards."""

    def __init__(self, heap: list[tuple[int, Any, int, Visit]]) -> None:
        self._heap = heap
        self._seen: list[tuple[int, Any, int, Visit]] = []

    def __iter__(self) -> Iterator[Visit]:
        yield from [entry[3] for entry in self._seen]
        while self._heap:
            entry = heapq.heappop(self._heap)
            if entry[3].state is not State.QUEUED:
                continue  # cancelled meanwhile
            self._seen.append(entry)
            yield entry[3]

    def put_back(self) -> None:
        for entry in self._seen:
            if entry[3].state is State.QUEUED:
                heapq.heappush(self._heap, entry)
        self._seen.clear()

    def find(self, request_id: int) -> Visit | None:
        return next((entry[3] for entry in self._seen if entry[3].id == request_id), None)


class _BatchView:
    """What the batch policy of this executor sees; see `policies.interfaces.BatchView`."""

    def __init__(self, core: ExecutorCore, waiting: _WaitingPrompts, num_free_blocks: int, now: int) -> None:
        scheduler = core.config.scheduler
        self.now = now
        self.role = core.config.role
        self.num_decodes = len(core.batch)
        self.num_free_blocks = num_free_blocks
        self.num_free_slots = core.num_free_slots
        self.max_num_tokens = scheduler.max_num_tokens
        self.chunked = scheduler.chunked_context
        self.begun: list[Visit] = list(core.prefilling.values())
        self.waiting: Iterable[Visit] = waiting


class _Epoch:
    """The life of a batch at constant rates: what its row will say."""

    __slots__ = (
        "chunks",
        "decodes",
        "end_at",
        "first_step",
        "num_cached",
        "num_done",
        "number",
        "row_head",
        "start_at",
    )

    def __init__(self, number: int, start_at: int, first_step: int, chunks: tuple[Chunk, ...], decodes: bool) -> None:
        self.number = number
        self.start_at = start_at
        self.end_at = start_at
        self.first_step = first_step  # running count of the executor's steps
        self.num_done = 0
        self.chunks = chunks
        self.decodes = decodes
        self.row_head: tuple[int, ...] = ()
        self.num_cached = sum(chunk.start for chunk in chunks)


class ExecutorCore:
    """One executor. `handle` takes an event and gives the commands that follow from it.

    `more`: other events of the same instant follow; the one planning pass of the instant waits for the last of them.
    """

    def __init__(self, config: ExecutorConfig, policy_root: str = ".") -> None:
        self.config = config
        self.id = config.id
        scheduler = config.scheduler
        seed = f"{config.seed}/executor/{config.id}"
        self._order: QueueOrder = registry.create(
            scheduler.queue_order.name, "queue_order", scheduler.queue_order.params, seed=seed, root=policy_root
        )
        self._batching: BatchPolicy = registry.create(
            scheduler.batching.name, "batching", scheduler.batching.params, seed=seed, root=policy_root
        )
        if scheduler.capacity not in ("guaranteed_no_evict", "max_utilization"):
            raise PolicyError(f"capacity {scheduler.capacity!r}: allowed are guaranteed_no_evict and max_utilization")
        self._evicts = scheduler.capacity == "max_utilization"
        self.blocks = BlockManager(config.num_blocks)
        self.batch = DecodeBatch(config.tokens_per_block)
        self.visits: dict[int, Visit] = {}
        self.prefilling: dict[int, Visit] = {}  # begun, in order of beginning
        self._waiting: list[tuple[int, Any, int, Visit]] = []  # heap: preempted first, then the queue order
        self._num_waiting = 0
        self._queued_tokens = 0
        self._pulls: list[tuple[Any, int, Visit]] = []  # heap: generation phases whose KV is not yet asked for
        self._num_pulls = 0
        self._has_canned = False  # a generation phase whose context phase was skipped has been seen
        self._joining: list[Visit] = []  # prompts finished here, in the decode batch from the next plan on
        self._ready: dict[int, Visit] = {}  # KV is here, waiting for a place in the decode batch
        self._in_flight: dict[int, Visit] = {}  # transfers that may still write
        self._gone: set[int] = set()  # executors that will never answer again
        self._pending_kv = 0  # KV tokens of generation phases not yet in the decode batch
        self._left: list[int] = []  # delta not yet told to the driver
        self._joined: dict[int, Visit] = {}
        self._serial = 0
        self._plan_number = 0
        self._num_epochs = 0
        self._num_steps = 0
        self._epoch: _Epoch | None = None
        self._running: RunSteps | None = None  # the outstanding plan
        self._stop_asked = False
        self._grown = 0  # blocks appended to the decode batch since the epoch began (max_utilization)
        self._shown_kv = 0  # of the decode batch at its last change
        self._shown_written = 0
        self._shown_steps = 0
        self._step_time = 0
        self._seen_requests = 0
        self._seen_tokens = 0
        self._timers = Timers()
        self._dirty = False  # changed since the last report
        self._changed_batch = False
        self._report_armed = False
        self._reported_at = -config.report_interval
        self._heartbeat_armed = False
        self._responses: list[Response] = []
        self._out: list[ExecutorCommand] = []
        self._closing = False
        self._drained = False

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: ExecutorEvent | None, now: int, more: bool = False) -> list[ExecutorCommand]:
        """Take `event` (None: only the planning pass is due) at instant `now`; the commands are in order."""
        if event is not None:
            self._take(event, now)
        if not more:
            if self._running is None:
                self._plan(now)
            self._flush(now)
        out = self._out
        self._out = []
        return out

    def _take(self, event: ExecutorEvent, now: int) -> None:
        match event:
            case StepsDone():
                self._steps_done(event, now)
            case Enqueue():
                self._enqueue(event.request, now)
            case KvRequested():
                self._kv_requested(event)
            case KvReceived():
                self._kv_received(event, now)
            case KvTaken():
                self._kv_taken(event, now)
            case LeaseRenewed():
                for request_id in event.request_ids:
                    visit = self.visits.get(request_id)
                    if visit is not None:
                        visit.lease_until = now + self.config.lease
            case Cancel():
                self._give_up(self.visits.get(event.request_id), CANCELLED, now)
            case PeerDown():
                self._peer_down(event.executor, now)
            case Shutdown():
                self._closing = True
                if not event.drain:
                    for visit in list(self.visits.values()):
                        self._give_up(visit, "the executor was shut down", now)
            case Wake():
                self._timers.woken()
                for what, subject in self._timers.due(now):
                    self._fire(what, subject, now)

    def _enqueue(self, request: Request, now: int) -> None:
        self._dirty = True
        self._seen_requests += 1
        generation_only = request.request_type is RequestType.GENERATION_ONLY
        self._seen_tokens += request.num_prompt_tokens
        error = self._refusal(request)
        if error is not None:
            self._responses.append(Response(request.id, self.id, FinishReason.ERROR, 0, error))
            return
        params = request.context_phase_params
        if generation_only and params is not None and params.executor in self._gone:
            error = f"executor {params.executor}, which held the KV, is gone"
            self._responses.append(Response(request.id, self.id, FinishReason.ERROR, 0, error, recomputable=True))
            return
        self._serial += 1
        visit = Visit(
            request,
            self._serial,
            self._order.key(request, now),
            now,
            State.GENERATION_QUEUED if generation_only else State.QUEUED,
        )
        self.visits[request.id] = visit
        if generation_only:
            visit.num_generated = 1
            visit.num_blocks = self._blocks_to_admit(visit)
            self._has_canned = self._has_canned or params_of(request).executor == ORCHESTRATOR
            heapq.heappush(self._pulls, (visit.order_key, visit.serial, visit))
            self._num_pulls += 1
            self._pending_kv += request.num_prompt_tokens
            self._timers.set(now + self.config.pull_timeout, "pull", visit.id)
            if not self._heartbeat_armed:
                self._heartbeat_armed = True
                self._timers.set(now + self.config.lease // 3, "heartbeat")
            if visit.num_blocks <= self.blocks.num_free + self._grown:
                self._ask_to_stop()
        else:
            self._queue(visit, 1)
            if self.num_free_slots > 0 and visit.num_blocks <= self.blocks.num_free + self._grown:
                self._ask_to_stop()

    def _refusal(self, request: Request) -> str | None:
        """Why the request can never be served here, or None."""
        scheduler = self.config.scheduler
        if self._closing:
            return "the executor is shutting down"
        params = request.context_phase_params
        if params is not None and params.executor == self.id:
            return "the KV is held by this executor itself; a request cannot be handed over to where it is"
        if request.id in self.visits:
            return f"request id {request.id} is in use here"
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            return f"{request.num_prompt_tokens} prompt tokens and max_tokens {request.max_tokens}: both must be at least 1"
        if request.sampling is not None and request.sampling.beam_width != 1:
            return f"beam width {request.sampling.beam_width} is not supported: only 1 is"
        if request.request_type is RequestType.GENERATION_ONLY and params is None:
            return "a generation-only request needs context_phase_params"
        if request.request_type is RequestType.GENERATION_ONLY and request.max_tokens == 1:
            return "max_tokens 1 was reached by the context phase: there is no generation phase"
        generates = request.request_type is not RequestType.CONTEXT_ONLY
        num_tokens = request.total_kv_tokens if generates else request.num_prompt_tokens
        if self._blocks_for(num_tokens) > self.config.num_blocks:
            capacity = self.config.num_blocks * self.config.tokens_per_block
            return f"the request needs KV for {num_tokens} tokens, this executor can hold {capacity} in all"
        if scheduler.chunked_context:
            return None
        prefills = request.request_type is not RequestType.GENERATION_ONLY
        if prefills and request.num_prompt_tokens > scheduler.max_num_tokens:
            return (
                f"a prompt of {request.num_prompt_tokens} tokens is over max_num_tokens {scheduler.max_num_tokens}"
                " and chunked context is off"
            )
        if generates and self._evicts and num_tokens > scheduler.max_num_tokens:
            return (
                f"the request may be preempted and then needs {num_tokens} tokens recomputed at once: max_num_tokens is"
                f" {scheduler.max_num_tokens} and chunked context is off"
            )
        return None

    def _steps_done(self, event: StepsDone, now: int) -> None:
        run, epoch = self._running, self._epoch
        if run is None or epoch is None or event.plan != run.plan:
            return  # it closes its own plan only
        self._running = None
        self._stop_asked = False
        steps = event.num_steps - epoch.num_done
        epoch.num_done = event.num_steps
        epoch.end_at = now
        self._num_steps += steps
        if run.decodes and self.batch.members:
            self.batch.advance(steps)
            if self._evicts and event.num_steps < run.last_step:
                self._give_back_unwritten(run)
        if event.error is not None:
            self._fail_plan(run, event.error, now)
            return
        stopped = {stop.request_id: stop for stop in event.stopped}
        ended: list[Visit] = []
        for stop in event.stopped:
            visit = self.batch.members.get(stop.request_id)
            if visit is not None:
                ended.append(visit)
        for visit in self.batch.pop_finished():
            if visit.id not in stopped:
                ended.append(visit)
        for visit in sorted(ended, key=lambda v: v.serial):
            self._leave_batch(visit)
            end = stopped.get(visit.id)
            if end is not None:  # tokens of steps launched after the stop are discarded
                visit.num_generated -= event.num_steps - end.step
                self._finish(visit, end.reason, now, self._num_steps - (event.num_steps - end.step))
            else:
                self._finish(visit, FinishReason.LENGTH, now, self._num_steps)
        tokens = dict(event.first_tokens)
        for chunk in run.chunks:
            self._chunk_done(chunk, stopped.get(chunk.request_id) is not None, tokens.get(chunk.request_id), now)

    def _chunk_done(self, chunk: Chunk, stopped: bool, token: int | None, now: int) -> None:
        visit = self.prefilling[chunk.request_id]
        visit.num_kv_tokens += chunk.length
        if not chunk.is_last:
            return
        del self.prefilling[visit.id]
        visit.num_generated += 1
        if visit.first_step is None:
            visit.first_step = self._num_steps
        if stopped or visit.num_generated >= visit.request.max_tokens:
            self._finish(visit, FinishReason.STOP if stopped else FinishReason.LENGTH, now, self._num_steps)
        elif visit.request.request_type is RequestType.CONTEXT_ONLY and visit.doom is None:
            visit.advance(Cause.CONTEXT_ENDS)
            self.blocks.hold(visit.id)
            visit.lease_until = now + self.config.lease
            self._timers.set(visit.lease_until, "lease", visit.id)
            params = ContextPhaseParams(
                visit.id, self.id, visit.request.num_prompt_tokens, () if token is None else (token,)
            )
            self._responses.append(
                Response(
                    visit.id,
                    self.id,
                    None,
                    1,
                    context_phase_params=params,
                    context_start=visit.started_at,
                    last_token=now,
                )
            )
            self._record_stay(visit, now, self._num_steps)
        else:
            visit.advance(Cause.GENERATE_HERE)
            self._joining.append(visit)

    def _kv_requested(self, event: KvRequested) -> None:
        visit = self.visits.get(event.request_id)
        error = None
        if visit is None or visit.state is not State.CONTEXT_DONE or visit.doom is not None:
            error = (
                f"the KV of request {event.request_id} is not held here: its lease ran out, or it was cancelled or read"
            )
        elif visit.pinned_by is not None:
            error = f"the KV of request {event.request_id} is being read by executor {visit.pinned_by[0]}"
        elif event.reader in self._gone:
            error = f"executor {event.reader} is gone"
        if visit is None or error is not None:
            self._out.append(ServeKv(event.request_id, event.reader, event.reader_id, 0, (), False, error))
            return
        visit.pinned_by = (event.reader, event.reader_id)
        blocks = self.blocks.blocks_of(visit.id)
        self._out.append(ServeKv(visit.id, event.reader, event.reader_id, visit.num_kv_tokens, blocks, True))

    def _kv_taken(self, event: KvTaken, now: int) -> None:
        visit = self.visits.get(event.request_id)
        if visit is None or visit.pinned_by is None:
            return
        self.blocks.free(visit.id)
        del self.visits[visit.id]
        self._dirty = True
        if visit.doom is None:
            visit.advance(Cause.FINISH if event.ok else Cause.FAIL)
        self._blocks_came_free()

    def _kv_received(self, event: KvReceived, now: int) -> None:
        visit = self._in_flight.pop(event.request_id, None)
        if visit is None:
            return
        self._dirty = True
        self._record_transfer(visit, now, event.ok and visit.doom is None, event.error or visit.doom)
        if visit.doom is not None:  # answered when it was given up; now nothing writes there any more
            self.blocks.free(visit.id)
            del self.visits[visit.id]
            self._blocks_came_free()
        elif event.ok:
            self._arrived(visit, now)
            if self.num_free_slots > 0:
                self._ask_to_stop()
        else:
            self._fail(visit, event.error or "the KV transfer failed", now, recomputable=True)

    def _arrived(self, visit: Visit, now: int) -> None:
        visit.advance(Cause.KV_ARRIVES)
        visit.kv_usable_at = now
        visit.num_kv_tokens = visit.request.num_prompt_tokens
        self._ready[visit.id] = visit

    def _peer_down(self, executor: int, now: int) -> None:
        self._dirty = True
        self._gone.add(executor)  # what it sent before may still come, and would wait for it for ever
        for visit in list(self.visits.values()):
            params = visit.request.context_phase_params
            if visit.pinned_by is not None and visit.pinned_by[0] == executor:
                self._kv_taken(KvTaken(visit.id, ok=False), now)
            elif visit.id in self._in_flight and params is not None and params.executor == executor:
                self._kv_received(KvReceived(visit.id, False, f"executor {executor}, which held the KV, is gone"), now)
            elif visit.state is State.GENERATION_QUEUED and params is not None and params.executor == executor:
                self._fail(visit, f"executor {executor}, which held the KV, is gone", now, recomputable=True)

    def _fire(self, what: str, subject: int, now: int) -> None:
        visit = self.visits.get(subject)
        if what == "lease":
            if visit is None or visit.state is not State.CONTEXT_DONE or visit.doom is not None:
                return
            if visit.lease_until > now:
                self._timers.set(visit.lease_until, "lease", subject)
            else:
                self._give_up(visit, "its lease ran out", now)
        elif what == "transfer":
            if visit is not None and visit.id in self._in_flight and visit.doom is None:
                limit = (now - (visit.transfer_start_at or now)) // 10**9
                self._give_up(visit, f"the KV transfer took over {limit} ms", now, recomputable=True)
        elif what == "pull":
            if visit is not None and visit.state is State.GENERATION_QUEUED:
                limit = self.config.pull_timeout // 10**9
                self._give_up(visit, f"no blocks came free for its KV in {limit} ms", now, recomputable=True)
        elif what == "heartbeat":
            self._heartbeat(now)
        elif what == "report":
            self._report_armed = False  # sent at the end of this instant, if nothing else carries one
        elif what == "batch":
            self._ask_to_stop()

    def _heartbeat(self, now: int) -> None:
        """One renewal per executor whose KV this one still means to read."""
        self._heartbeat_armed = False
        wanted: dict[int, list[int]] = {}
        for _, _, visit in sorted(self._pulls, key=lambda entry: entry[1]):
            params = visit.request.context_phase_params
            if visit.state is State.GENERATION_QUEUED and params is not None and params.executor != ORCHESTRATOR:
                wanted.setdefault(params.executor, []).append(params.req_id)
        for executor, ids in wanted.items():
            self._out.append(Send(executor, LeaseRenewed(tuple(ids))))
        if wanted:
            self._heartbeat_armed = True
            self._timers.set(now + self.config.lease // 3, "heartbeat")

    # ---- the end of a visit -----------------------------------------------------------------------------------------

    def _give_up(self, visit: Visit | None, why: str, now: int, recomputable: bool = False) -> None:
        """Cancel or fail a visit in any state: at once where nothing touches its blocks, else marked until then."""
        if visit is None or visit.doom is not None:
            return
        self._dirty = True
        match visit.state:
            case State.CONTEXT_DONE:  # answered already
                visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
                if visit.pinned_by is not None:
                    visit.doom = why
                    self.blocks.quarantine(visit.id)
                else:
                    self.blocks.free(visit.id)
                    del self.visits[visit.id]
                    self._blocks_came_free()
            case State.KV_IN_FLIGHT:
                visit.doom = why
                visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
                self.blocks.quarantine(visit.id)
                self._pending_kv -= visit.request.num_prompt_tokens
                self._answer_failure(visit, why, now, recomputable)
            case State.CONTEXT_RUNNING | State.GENERATION_RUNNING if self._is_in_plan(visit):
                visit.doom = why
                self._ask_to_stop()
            case _:
                self._fail(visit, why, now, recomputable)

    def _is_in_plan(self, visit: Visit) -> bool:
        run = self._running
        if run is None:
            return False
        return visit.id in self.batch.members or any(chunk.request_id == visit.id for chunk in run.chunks)

    def _fail(self, visit: Visit, why: str, now: int, recomputable: bool = False) -> None:
        """End a visit that no plan and no transfer touches."""
        self._dirty = True
        state = visit.state
        if state is State.QUEUED:
            self._num_waiting -= 1
            self._queued_tokens -= visit.num_tokens_left
        elif state is State.GENERATION_QUEUED:
            self._num_pulls -= 1
        if state in _BEFORE_DECODE:
            self._pending_kv -= visit.request.num_prompt_tokens
        if visit.id in self.batch.members:
            self._leave_batch(visit)
        elif visit in self._joining:
            self._joining.remove(visit)
        self.prefilling.pop(visit.id, None)
        self._ready.pop(visit.id, None)
        if state in (State.GENERATION_QUEUED,) and visit.request.context_phase_params is not None:
            # whoever holds the KV need not wait for its lease to run out
            params = visit.request.context_phase_params
            if params.executor not in (self.id, ORCHESTRATOR):
                self._out.append(Send(params.executor, Cancel(params.req_id)))
        visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
        del self.visits[visit.id]
        if self.blocks.free(visit.id) or state in (State.QUEUED, State.GENERATION_QUEUED):
            self._blocks_came_free()  # or it was at the head of a line, and whoever is next needs fewer
        self._answer_failure(visit, why, now, recomputable)

    def _answer_failure(self, visit: Visit, why: str, now: int, recomputable: bool) -> None:
        cancelled = why is CANCELLED
        self._responses.append(
            Response(
                visit.id,
                self.id,
                FinishReason.CANCELLED if cancelled else FinishReason.ERROR,
                visit.num_generated,
                error=None if cancelled else why,
                recomputable=recomputable,
                context_start=visit.started_at,
                transfer_start=visit.transfer_start_at,
                kv_usable=visit.kv_usable_at,
            )
        )
        self._record_stay(visit, now, self._num_steps)

    def _finish(self, visit: Visit, reason: FinishReason, now: int, last_step: int) -> None:
        """A visit's last token is out; it is out of the batch, and its blocks are quiet."""
        self._dirty = True
        visit.advance(Cause.FINISH)
        self.blocks.free(visit.id)
        del self.visits[visit.id]
        self._responses.append(
            Response(
                visit.id,
                self.id,
                reason,
                visit.num_generated,
                context_start=visit.started_at,
                transfer_start=visit.transfer_start_at,
                kv_usable=visit.kv_usable_at,
                last_token=now,
            )
        )
        self._record_stay(visit, now, last_step)

    def _fail_plan(self, run: RunSteps, error: str, now: int) -> None:
        for chunk in run.chunks:
            self._fail(self.visits[chunk.request_id], error, now)
        if run.decodes:
            for visit in list(self.batch.members.values()):
                self._fail(visit, error, now)

    def _record_stay(self, visit: Visit, now: int, last_step: int) -> None:
        request_type = visit.request.request_type
        stage = ("mixed", "context", "generation")[request_type]
        generated = visit.num_generated - (request_type is RequestType.GENERATION_ONLY)
        self._out.append(
            Record(
                StayRow(
                    self.id,
                    visit.id,
                    stage,
                    generated,
                    visit.first_step,
                    last_step if visit.first_step is not None else None,
                    visit.num_preemptions,
                    visit.enqueued_at,
                    visit.started_at if visit.started_at is not None else visit.kv_usable_at,
                    now,
                    visit.request.client_id,
                )
            )
        )

    def _record_transfer(self, visit: Visit, now: int, ok: bool, error: str | None) -> None:
        params = visit.request.context_phase_params
        tokens = visit.request.num_prompt_tokens
        self._out.append(
            Record(
                TransferRow(
                    visit.id,
                    params.executor if params is not None else 0,
                    self.id,
                    tokens,
                    self._blocks_for(tokens),
                    visit.transfer_start_at or 0,
                    now,
                    ok,
                    error,
                    visit.request.client_id,
                )
            )
        )

    # ---- planning ---------------------------------------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        taken = len(self.batch) + len(self.prefilling) + len(self._joining)
        return self.config.scheduler.max_batch_size - taken

    def _plan(self, now: int) -> None:
        """The one planning pass of an instant, between two plans."""
        for visit in [v for v in self.batch.members.values() if v.doom is not None]:
            self._fail(visit, visit.doom or "", now)
        for visit in [v for v in (*self._joining, *self.prefilling.values()) if v.doom is not None]:
            self._fail(visit, visit.doom or "", now)
        self._fill_places(now)
        while self._evicts and self._preempt():
            self._fill_places(now)  # those that came free: a later plan, at a boundary of chance, would do it otherwise
        waiting = _WaitingPrompts(self._waiting)
        plan = _NO_BATCH
        if self._num_waiting or self.prefilling:
            plan = self._ask_policy(waiting, now)
        chunks = self._begin(plan, waiting, now)
        waiting.put_back()
        self._pull(now)
        if chunks or (self.batch.members and plan.decodes):
            self._run(chunks, plan.decodes, now)
        else:
            self._close_epoch()
            if self.batch.members and plan.ask_again_at is None:
                raise PolicyError(f"{type(self._batching).__name__} stood the decode batch still and ran nothing else")
        if plan.ask_again_at is not None:
            self._timers.set(max(plan.ask_again_at, now + 1), "batch")

    def _fill_places(self, now: int) -> None:
        if self._has_canned:  # where no KV travels, what is pulled can join at once; nothing would wake us for it later
            self._pull(now)
        self._join()

    def _join(self) -> None:
        for visit in self._joining:
            self._enter_batch(visit)
        self._joining.clear()
        while self._ready and self.num_free_slots > 0:
            visit = self._ready.pop(next(iter(self._ready)))
            visit.advance(Cause.JOIN)
            self._pending_kv -= visit.request.num_prompt_tokens
            visit.first_step = self._num_steps + 1
            self._enter_batch(visit)

    def _enter_batch(self, visit: Visit) -> None:
        self.batch.join(visit)
        self._joined[visit.id] = visit

    def _leave_batch(self, visit: Visit) -> None:
        self.batch.leave(visit)
        if self._joined.pop(visit.id, None) is None:
            self._left.append(visit.id)

    def _preempt(self) -> bool:
        """Take blocks from the youngest until every decode can write its next token; whether any were taken."""
        preempted = False
        while self.batch.members and self.batch.blocks_for(1) > self.blocks.num_free:
            victims = (*self.batch.members.values(), *self.prefilling.values())
            victim = max(victims, key=lambda v: v.serial)
            if victim.id in self.batch.members:
                self._leave_batch(victim)
            else:
                del self.prefilling[victim.id]
            self.blocks.free(victim.id)
            victim.advance(Cause.PREEMPT)
            victim.num_preemptions += 1
            victim.num_kv_tokens = 0
            victim.num_to_compute = victim.request.num_prompt_tokens + victim.num_generated
            self._queue(victim, 0)
            preempted = True
        return preempted

    def _queue(self, visit: Visit, rank: int) -> None:
        visit.num_blocks = self._blocks_to_admit(visit)
        heapq.heappush(self._waiting, (rank, visit.order_key, visit.serial, visit))
        self._num_waiting += 1
        self._queued_tokens += visit.num_tokens_left

    def _ask_policy(self, waiting: _WaitingPrompts, now: int) -> BatchPlan:
        free = self.blocks.num_free
        if self._evicts and self.batch.members:
            free -= self.batch.blocks_for(1)
        view = _BatchView(self, waiting, free, now)
        plan = self._batching.plan(view)
        budget = self.config.scheduler.max_num_tokens - (len(self.batch) if plan.decodes else 0)
        if sum(chunk.num_tokens for chunk in plan.chunks) > budget and plan.chunks:
            total = sum(chunk.num_tokens for chunk in plan.chunks)
            raise PolicyError(
                f"{type(self._batching).__name__} planned {total} prompt tokens; at most {budget} are allowed"
            )
        return plan

    def _begin(self, plan: BatchPlan, waiting: _WaitingPrompts, now: int) -> tuple[Chunk, ...]:
        """Check the policy's chunks, admit the prompts that are new, and say what each chunk computes."""
        chunks = []
        seen = set()
        for chosen in plan.chunks:
            visit = self.prefilling.get(chosen.request_id) or waiting.find(chosen.request_id)
            if visit is None or chosen.request_id in seen or not 0 < chosen.num_tokens <= visit.num_tokens_left:
                raise PolicyError(
                    f"{type(self._batching).__name__} planned {chosen}, which is not there to compute: a plan names each"
                    " prompt once, one that has begun or that was read from `waiting` in this call, and tokens it has left"
                )
            seen.add(chosen.request_id)
            if visit.state is State.QUEUED:
                if self.num_free_slots <= 0 or visit.num_blocks > self.blocks.num_free:
                    raise PolicyError(
                        f"{type(self._batching).__name__} planned {chosen}, which takes a slot and {visit.num_blocks}"
                        f" blocks; free are {self.num_free_slots} slots and {self.blocks.num_free} blocks"
                    )
                self.blocks.allocate(visit.id, visit.num_blocks)
                visit.num_blocks = 0
                visit.advance(Cause.START)
                self._num_waiting -= 1
                self._queued_tokens -= visit.num_tokens_left
                self.prefilling[visit.id] = visit
                if visit.started_at is None:
                    visit.started_at = now
            is_last = chosen.num_tokens == visit.num_tokens_left
            table = self.blocks.blocks_of(visit.id)
            chunks.append(Chunk(visit.id, visit.num_kv_tokens, chosen.num_tokens, is_last, table))
        return tuple(chunks)

    def _pull(self, now: int) -> None:
        """Reserve blocks for generation phases, in order, and ask for their KV."""
        while self._pulls:
            visit = self._pulls[0][2]
            if visit.state is not State.GENERATION_QUEUED:
                heapq.heappop(self._pulls)
                continue
            needed_by_decodes = self.batch.blocks_for(1) if self._evicts and self.batch.members else 0
            # an executor that holds nothing has nothing to reserve for, and a large request must fit at last
            reserve = self.config.pull_reserve_blocks if self.blocks.num_free < self.blocks.num_blocks else 0
            if visit.num_blocks > self.blocks.num_free - needed_by_decodes - reserve:
                return
            heapq.heappop(self._pulls)
            self._num_pulls -= 1
            blocks = self.blocks.allocate(visit.id, visit.num_blocks)
            visit.num_blocks = 0
            visit.advance(Cause.PULL)
            visit.transfer_start_at = now
            self._in_flight[visit.id] = visit
            self._dirty = True
            params = params_of(visit.request)
            if params.executor == ORCHESTRATOR:
                del self._in_flight[visit.id]
                self._arrived(visit, now)
                continue
            tokens = params.num_kv_tokens
            config = self.config
            limit = config.transfer_timeout_base + config.transfer_timeout_per_token * tokens
            self._timers.set(now + limit, "transfer", visit.id)
            used = blocks[: self._blocks_for(tokens)]
            self._out.append(ReceiveKv(visit.id, params.executor, params.req_id, tokens, used))

    def _run(self, chunks: tuple[Chunk, ...], decodes: bool, now: int) -> None:
        batch, epoch = self.batch, self._epoch
        continues = (
            epoch is not None
            and not (chunks or self._left or self._joined or epoch.chunks)
            and epoch.decodes == decodes
            and epoch.end_at == now
        )
        if not continues or epoch is None:
            self._close_epoch()
            self._num_epochs += 1
            epoch = self._epoch = _Epoch(self._num_epochs, now, self._num_steps + 1, chunks, decodes)
            self._grown = 0
            self._shown_kv = batch.num_kv_tokens
            self._shown_written = batch.num_blocks_written
            self._shown_steps = self._num_steps
            self._dirty = self._changed_batch = True
        running = len(batch) if decodes else 0
        num_steps = 1
        if not chunks:
            num_steps = min(batch.steps_until_max_tokens(), self.config.max_span_steps)
            if self._evicts:
                num_steps = batch.steps_until_out_of_blocks(self.blocks.num_free, num_steps)
        joined = tuple(Joined(v.id, v.num_kv_tokens, self.blocks.blocks_of(v.id)) for v in self._joined.values())
        appended = self._grow(num_steps) if self._evicts and running else ()
        self._plan_number += 1
        kv = self._shown_kv
        done = epoch.num_done
        self._running = RunSteps(
            self._plan_number,
            epoch.number,
            done + 1,
            done + num_steps,
            tuple(self._left),
            joined,
            chunks,
            appended,
            running,
            kv if running else 0,
            decodes,
        )
        if not continues:
            epoch.row_head = (running, kv if running else 0, *self._block_counts())
        self._left.clear()
        self._joined.clear()
        self._out.append(self._running)

    def _grow(self, num_steps: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Give each decode the blocks that it writes to in the next steps (max_utilization)."""
        appended = []
        for visit in self.batch.members.values():
            tokens = visit.num_kv_tokens + self.batch.step - visit.joined_step
            missing = self._blocks_for(tokens + num_steps) - len(self.blocks.blocks_of(visit.id))
            if missing > 0:
                appended.append((visit.id, self.blocks.extend(visit.id, missing)))
                self._grown += missing
        return tuple(appended)

    def _give_back_unwritten(self, run: RunSteps) -> None:
        """A span cut short: blocks appended for steps that were not run are free again."""
        for request_id, _ in run.appended:
            visit = self.batch.members[request_id]
            tokens = visit.num_kv_tokens + self.batch.step - visit.joined_step
            self._grown -= self.blocks.trim(request_id, self._blocks_for(tokens))

    def _close_epoch(self) -> None:
        epoch = self._epoch
        if epoch is None:
            return
        self._epoch = None
        self._shown_kv = self.batch.num_kv_tokens
        self._shown_written = self.batch.num_blocks_written
        self._shown_steps = self._num_steps
        self._grown = 0
        if not self.batch.members:
            self._changed_batch = True
        if not epoch.num_done:
            return
        self._step_time = (epoch.end_at - epoch.start_at) // epoch.num_done
        num_decodes, num_kv, *counts = epoch.row_head
        self._out.append(
            Record(
                StepRow(
                    self.id,
                    epoch.number,
                    epoch.first_step,
                    epoch.num_done,
                    num_decodes,
                    num_kv,
                    len(epoch.chunks),
                    sum(chunk.length for chunk in epoch.chunks),
                    epoch.num_cached,
                    epoch.start_at,
                    epoch.end_at,
                    *counts,
                )
            )
        )

    def _ask_to_stop(self) -> None:
        """Something could change the batch: end the span at the next boundary."""
        run = self._running
        if run is not None and not self._stop_asked and run.last_step > run.first_step:
            self._stop_asked = True
            self._out.append(StopAfterStep(run.epoch))

    def _blocks_came_free(self) -> None:
        if self._num_pulls or (self._num_waiting and self.num_free_slots > 0):
            self._ask_to_stop()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.tokens_per_block)

    def _blocks_to_admit(self, visit: Visit) -> int:
        """Blocks taken at admission: everything it can ever need, or, under max_utilization, what it is about to write."""
        request = visit.request
        if request.request_type is RequestType.CONTEXT_ONLY or self._evicts:
            return self._blocks_for(visit.num_to_compute)
        return self._blocks_for(request.total_kv_tokens)

    # ---- what the orchestrator is told ------------------------------------------------------------------------------

    def _block_counts(self) -> tuple[int, int, int, int, int]:
        """free, reserved, used, held, quarantined, as of the last change of batch."""
        size = self.config.tokens_per_block
        written = self._shown_written if self._epoch is not None else self.batch.num_blocks_written
        for group in (self.prefilling.values(), self._joining, self._ready.values()):
            written += sum(-(-visit.num_kv_tokens // size) for visit in group)
        blocks = self.blocks
        free = blocks.num_free + self._grown
        held, quarantined = blocks.num_held, blocks.num_quarantined
        return free, blocks.num_blocks - free - held - quarantined - written, written, held, quarantined

    def report(self) -> Report:
        free, reserved, used, held, quarantined = self._block_counts()
        limit = self.config.quarantine_max_blocks
        return Report(
            self.id,
            self._seen_requests,
            self._seen_tokens,
            self._num_waiting + self._num_pulls + len(self._in_flight) + len(self._ready),
            len(self.prefilling) + len(self._joining) + len(self.batch),
            self._queued_tokens,
            sum(visit.num_tokens_left for visit in self.prefilling.values()),
            self._shown_kv + self._pending_kv,
            free,
            reserved,
            used,
            held,
            quarantined,
            self._shown_steps,
            self._step_time,
            limit is None or quarantined <= limit,
        )

    def _flush(self, now: int) -> None:
        """The end of an instant: answers, the report that rides on the last of them, and the next wake-up."""
        if self._responses:
            *first, last = self._responses
            for response in first:
                self._out.append(Send(ORCHESTRATOR, response))
            self._reported(now)
            self._out.append(Send(ORCHESTRATOR, replace(last, report=self.report())))
            self._responses.clear()
        elif self._changed_batch and self.config.report_on_batch_change:
            self._send_report(now)
        if self._dirty and not self._report_armed:
            due = self._reported_at + self.config.report_interval
            if due <= now:
                self._send_report(now)
            else:
                self._report_armed = True
                self._timers.set(due, "report")
        if self._closing and not self._drained and not self.visits and self._running is None:
            self._drained = True
            self._close_epoch()
            self._out.append(Drained())
        at = self._timers.wake_up()
        if at is not None:
            self._out.append(WakeAt(at))

    def _send_report(self, now: int) -> None:
        self._reported(now)
        self._out.append(Send(ORCHESTRATOR, self.report()))

    def _reported(self, now: int) -> None:
        self._reported_at = now
        self._dirty = self._changed_batch = False

    # ---- invariants, for tests and for drivers that want to be sure -------------------------------------------------

    def check(self) -> None:
        """Raise unless every block and every visit is accounted for."""
        self.blocks.check()
        counts = self._block_counts()
        if sum(counts) != self.config.num_blocks or min(counts) < 0:
            raise RuntimeError(f"executor {self.id}: block counts {counts} of {self.config.num_blocks}")
        for visit in self.visits.values():
            places = (
                visit.state is State.QUEUED,
                visit.state is State.GENERATION_QUEUED,
                visit.id in self.prefilling,
                visit in self._joining,
                visit.id in self._ready,
                visit.id in self._in_flight,
                visit.id in self.batch.members,
                visit.state is State.CONTEXT_DONE or (visit.doom is not None and visit.pinned_by is not None),
            )
            if sum(places) != 1:
                raise RuntimeError(f"executor {self.id}: request {visit.id} ({visit.state.value}) is in {places}")


def params_of(request: Request) -> ContextPhaseParams:
    """The parameters of a generation-only request; one without was refused when it came."""
    if request.context_phase_params is None:
        raise LifeCycleError(f"request {request.id} has no context_phase_params")
    return request.context_phase_params


def role_serves(role: Role, request_type: RequestType) -> bool:
    """Whether an executor of this role is sent requests of this type."""
    if role is Role.MIXED:
        return True
    return request_type is (RequestType.CONTEXT_ONLY if role is Role.CONTEXT else RequestType.GENERATION_ONLY)
