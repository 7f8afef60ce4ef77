"""One executor as a state machine: events in, commands out.

Knows no device, clock or network. It takes requests in, has the scheduler batch them, hands finished context phases over
under a lease, pulls the KV of generation phases, and answers for each visit exactly once. What may touch memory decides
when it is freed: after the last plan that names it, and after the last transfer that reads or writes it.
"""

from __future__ import annotations

import heapq
from typing import Any, Final

from msgspec.structs import replace

from ..policies import registry
from ..policies.interfaces import BatchPolicy, QueueOrder
from ..policies.vocabulary import (
    ContextPhaseParams,
    FinishReason,
    Request,
    RequestType,
    Role,
)
from .commands import (
    ORCHESTRATOR,
    Chunk,
    Drained,
    ExecutorCommand,
    PrepareReceive,
    ReceiveKv,
    Record,
    RunSteps,
    Send,
)
from .config import ExecutorConfig
from .errors import LifeCycleError
from .events import (
    Cancel,
    ContextStarted,
    Enqueue,
    ExecutorEvent,
    FirstTokenOut,
    FirstTokens,
    KvReceived,
    KvRequested,
    KvTaken,
    KvWithdrawn,
    LeaseRenewed,
    MoveOut,
    PeerDown,
    Report,
    Response,
    RoleChanged,
    Shutdown,
    StepsCommitted,
    StepsDone,
    Wake,
)
from .kv_source import KvSource
from .life_cycle import FINAL, Cause, State
from .local_kv import LocalKv
from .prefix_cache import PrefixCache
from .refusal import refusal
from .scheduler import Scheduler
from .timers import Timers
from .visit import Visit
from .visit_rows import stay_row, transfer_row

CANCELLED: Final = "cancelled"
_BEFORE_DECODE: Final = (State.GENERATION_QUEUED, State.KV_IN_FLIGHT, State.KV_EARLY, State.KV_READY)
# what a timer of a visit limits: how long it is in that state
_LIMITS: Final = {"lease": State.CONTEXT_DONE, "transfer": State.KV_IN_FLIGHT, "pull": State.GENERATION_QUEUED}


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
        batching: BatchPolicy = registry.create(
            scheduler.batching.name, "batching", scheduler.batching.params, seed=seed, root=policy_root
        )
        self._out: list[ExecutorCommand] = []
        self.scheduler = Scheduler(config, batching, self._emit)
        self.blocks = self.scheduler.blocks
        self.batch = self.scheduler.batch
        self.visits: dict[int, Visit] = {}
        # heap of generation phases whose KV is not yet asked for: those whose context phase is done go first
        self._pulls: list[tuple[bool, Any, int, Visit]] = []
        self._num_pulls = 0
        self._local = LocalKv(self.blocks, self.visits)  # generation phases whose KV is here: no pulls
        self._pull_reserve = max(config.pull_reserve_blocks, batching.pull_reserve_blocks)
        self._has_canned = False  # a generation phase whose context phase was skipped has been seen
        self._in_flight: dict[int, Visit] = {}  # transfers that may still write
        self._gone: set[int] = set()  # executors that will never answer again
        self._source = KvSource(self.blocks, self._gone, self._emit, config.layerwise, config.tokens_per_block)
        self._pending_kv = 0  # KV tokens of generation phases not yet in the decode batch
        self._serial = 0
        self._seen_requests = 0
        self._seen_tokens = 0
        self._timers = Timers(self._timer_matters)
        self._dirty = False  # changed since the last report
        self._is_impatient = False  # in this instant: waits for no reader elsewhere
        self._must_plan = False  # something has happened since the last planning pass
        self._reported_at = -config.report_interval
        self._heartbeat_armed = False
        self._responses: list[Response] = []
        self._closing = False
        self._drained = False

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: ExecutorEvent | None, now: int, more: bool = False) -> list[ExecutorCommand]:
        """Take `event` (None: only the planning pass is due) at instant `now`; the commands are in order."""
        if event is not None:
            if type(event) is Wake:
                self._woken(now)
            else:
                self._must_plan = True
                self._take(event, now)
        if not more:
            if self._must_plan:
                self._must_plan = False
                if self.scheduler.running is None:
                    self._plan(now)
                elif self._num_pulls and self._pulls_at_once:
                    self._pull(now)
                self._is_impatient = False
            self._flush(now)
        out = self._out
        self._out = []
        return out

    @property
    def is_end_quiet(self) -> bool:
        """Whether the end of the only committed plan, if no stop comes with it, would bring about nothing here.

        Nothing but rows, a report, and answers to who ended in it. A driver of virtual time may then give it after its
        instant, with that instant, before whatever it gives next.
        """
        return not (self._num_pulls or self._local or self._closing) and self.scheduler.is_end_quiet

    @property
    def is_end_awaited(self) -> bool:
        """Whether there are such answers."""
        return bool(self.scheduler.tails[0].leaving)

    def _emit(self, command: ExecutorCommand) -> None:
        self._out.append(command)

    def _take(self, event: ExecutorEvent, now: int) -> None:
        # exact types, the most frequent first: a class pattern costs a compiled core a call of the metaclass each
        if type(event) is StepsDone:
            self._steps_done(event, now)
        elif type(event) is StepsCommitted:
            self.scheduler.steps_committed(event)
        elif type(event) is Enqueue:
            self._enqueue(event, now)
        elif type(event) is KvRequested:
            self._source.requested(event, self.visits.get(event.request_id), now)
        elif type(event) is KvReceived:
            self._kv_received(event, now)
        elif type(event) is KvTaken:
            self._kv_taken(event, now)
        elif type(event) is LeaseRenewed:
            for request_id in event.request_ids:
                visit = self.visits.get(request_id)
                if visit is not None:
                    visit.lease_until = now + self.config.lease
        elif type(event) is FirstTokens:
            self._first_token(self.visits.get(event.request_id), now)
        elif type(event) is KvWithdrawn:
            self._source.withdrawn(event, self.visits.get(event.request_id))
        elif type(event) is Cancel:
            self._give_up(self.visits.get(event.request_id), CANCELLED, now)
        elif type(event) is MoveOut:
            self._move_out(self.visits.get(event.request_id))
        elif type(event) is PeerDown:
            self._peer_down(event.executor, now)
        elif type(event) is RoleChanged:
            self.scheduler.role = Role(event.role)
            self._dirty = True
            self.scheduler.ask_to_stop()  # for a batch policy that goes by it
        elif type(event) is Shutdown:
            self._closing = True
            if not event.drain:
                for visit in list(self.visits.values()):
                    self._give_up(visit, "the executor was shut down", now)

    def _woken(self, now: int) -> None:
        """Timers fire. Unless one of them has an effect nothing is planned: a wake-up for a report asks no policy."""
        self._timers.woken()
        for what, subject in self._timers.due(now):
            self._fire(what, subject, now)

    def _enqueue(self, event: Enqueue, now: int) -> None:
        request = event.request
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
            params = params_of(request)
            visit.num_generated = params.num_generated
            visit.num_to_compute = params.num_kv_tokens  # what it brings; once preempted, what it must compute again
            visit.num_blocks = self.scheduler.blocks_to_admit(visit)
            self._has_canned = self._has_canned or params.executor == ORCHESTRATOR
            visit.awaits_token = params.is_promised
            self._queue_pull(visit, now)
            self._num_pulls += 1
            self._pending_kv += request.num_prompt_tokens
            if not self._heartbeat_armed:
                self._heartbeat_armed = True
                self._timers.set(now + self.config.lease // 3, "heartbeat")
        else:
            visit.announces_start = event.announces_start
            self.scheduler.queue(visit)
            if self.scheduler.num_free_slots > 0 and visit.num_blocks <= self.scheduler.num_free_blocks:
                self.scheduler.ask_to_stop()

    def _queue_pull(self, visit: Visit, now: int) -> None:
        """It waits for blocks to receive its KV into; no longer than it may, once its context phase is done."""
        is_local = params_of(visit.request).executor == self.id
        if is_local:
            self._local.put(visit)
        else:
            heapq.heappush(self._pulls, (visit.awaits_token, visit.order_key, visit.serial, visit))
            if self.scheduler.cache is not None:
                self._look(visit, self.scheduler.cache)
        if not visit.awaits_token:
            self._timers.set(now + self.config.pull_timeout, "pull", visit.id)
        if (is_local or not self._pulls_at_once) and visit.num_blocks <= self.scheduler.num_free_blocks:
            self.scheduler.ask_to_stop()

    @property
    def _pulls_at_once(self) -> bool:
        """Whether free blocks are nobody else's: running steps take none of them, and no prompt waits for them here."""
        return not self.scheduler.evicts and not self.scheduler.num_waiting

    def _refusal(self, request: Request) -> str | None:
        """Why the request can never be served here, or None."""
        if self._closing:
            return "the executor is shutting down"
        if request.id in self.visits:
            return f"request id {request.id} is in use here"
        return refusal(request, self.config)

    def _steps_done(self, event: StepsDone, now: int) -> None:
        is_open = self.scheduler.running is not None and event.plan == self.scheduler.running.plan
        over = self.scheduler.steps_done(event, now)
        if over is None:
            return
        if event.error is not None and is_open:
            self._fail_plan(over.run, event.error, now)
            return
        for request_id, hashes in event.block_hashes:
            if request_id in self.visits:
                self.visits[request_id].output_hashes = hashes
        for end in over.ended:
            self._finish(end.visit, end.reason, now, end.last_step)
        if over.ended:
            self._blocks_came_free()  # while the next plan may run already
        for visit in over.given_up:
            if visit.is_moving and visit.doom is None:
                self._move(visit, now)
            else:
                self._fail(visit, event.error or visit.doom or "", now)
        tokens = dict(event.first_tokens)
        for prefilled in over.prefilled:
            visit, stopped = prefilled.visit, prefilled.stopped
            if stopped or visit.num_generated >= visit.request.max_tokens:
                reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                self._finish(visit, reason, now, self.scheduler.num_steps)
            elif visit.request.request_type is RequestType.CONTEXT_ONLY and visit.doom is None:
                self._context_done(visit, tokens.get(visit.id), now)
            else:
                visit.advance(Cause.GENERATE_HERE)
                self.scheduler.joining.append(visit)
                whole = visit.request.request_type is RequestType.CONTEXT_AND_GENERATION
                if whole and visit.request.streaming and visit.num_generated == 1 and visit.doom is None:
                    self._out.append(Send(ORCHESTRATOR, FirstTokenOut(visit.id, visit.started_at)))

    def _context_done(self, visit: Visit, token: int | None, now: int) -> None:
        """Answer with the first token, and hold the KV under a lease, unless it has all been read already."""
        visit.advance(Cause.CONTEXT_ENDS)
        if visit.is_read:
            visit.advance(Cause.FINISH)
            self.blocks.free(visit.id)
            del self.visits[visit.id]
        else:
            self.blocks.hold(visit.id)
            visit.lease_until = now + self.config.lease
            self._timers.set(visit.lease_until, "lease", visit.id)
            self._source.serve(visit)
        overlap = None if visit.served_at is None else now - visit.served_at
        first_tokens = () if token is None else (token,)
        params = ContextPhaseParams(visit.id, self.id, visit.request.num_prompt_tokens, first_tokens)
        self._respond(visit, None, 1, context_phase_params=params, last_token=now, kv_overlap=overlap)
        self._record_stay(visit, now, self.scheduler.num_steps)

    def _move_out(self, visit: Visit | None) -> None:
        """It goes on elsewhere, from the next boundary at which it runs; what does not run here stays."""
        if visit is None or visit.state is not State.GENERATION_RUNNING or visit.doom is not None or visit.is_moving:
            return
        visit.is_moving = self.scheduler.has_doomed = True
        self.scheduler.ask_to_stop()

    def _move(self, visit: Visit, now: int) -> None:
        """No plan names it any more: its KV waits for the executor where it goes on, as that of a context phase does."""
        self._dirty = True
        self.scheduler.remove(visit, visit.state)
        visit.advance(Cause.MOVE)
        self.blocks.trim(visit.id, self.scheduler.blocks_for(visit.num_kv_tokens))
        self.blocks.hold(visit.id)
        visit.lease_until = now + self.config.lease
        self._timers.set(visit.lease_until, "lease", visit.id)
        params = ContextPhaseParams(visit.id, self.id, visit.num_kv_tokens, num_generated=visit.num_generated)
        self._respond(visit, None, visit.num_generated, context_phase_params=params, last_token=now)
        self._record_stay(visit, now, self.scheduler.num_steps if visit.left_at is None else visit.left_at)
        self._blocks_came_free()

    def _kv_taken(self, event: KvTaken, now: int) -> None:
        visit = self.visits.get(event.request_id)
        if visit is None or visit.pinned_by is None:
            return
        self._dirty = True
        if visit.state not in FINAL and visit.state is not State.CONTEXT_DONE:  # read, or given up, before its end
            visit.pinned_by = None
            visit.is_read = event.ok
            visit.served_at = visit.served_at if event.ok else None
            return
        self.blocks.free(visit.id)
        del self.visits[visit.id]
        if visit.state is State.CONTEXT_DONE:
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
            if self.scheduler.num_free_slots > 0:
                self.scheduler.ask_to_stop()
        else:
            self._fail(visit, event.error or "the KV transfer failed", now, recomputable=True)

    def _arrived(self, visit: Visit, now: int) -> None:
        visit.num_kv_tokens = params_of(visit.request).num_kv_tokens
        cache = self.scheduler.cache
        if cache is not None and not _is_canned(visit.request):
            cache.arrived(visit.id)
            self.scheduler.note_written(visit)
            self._blocks_came_free()  # or whoever waits finds more here, and needs fewer
        if visit.awaits_token:
            visit.advance(Cause.KV_COMES_FIRST)
            self.scheduler.early[visit.id] = visit
        else:
            visit.advance(Cause.KV_ARRIVES)
            visit.kv_usable_at = now
            self.scheduler.ready[visit.id] = visit

    def _first_token(self, visit: Visit | None, now: int) -> None:
        """The context phase of one that was bound early is done: from now on it may only take so long."""
        if visit is None or not visit.awaits_token:
            return
        self._dirty = True
        visit.awaits_token = False
        visit.first_token_at = now
        if visit.state is State.GENERATION_QUEUED:
            self._queue_pull(visit, now)
        elif visit.state is State.KV_IN_FLIGHT:
            self._limit_transfer(visit, now)
        elif visit.state is State.KV_EARLY:
            del self.scheduler.early[visit.id]
            visit.advance(Cause.FIRST_TOKEN)
            visit.kv_usable_at = now
            self.scheduler.ready[visit.id] = visit
            if self.scheduler.num_free_slots > 0:
                self.scheduler.ask_to_stop()

    def _limit_transfer(self, visit: Visit, now: int) -> None:
        config, tokens = self.config, params_of(visit.request).num_kv_tokens
        limit = config.transfer_timeout_base + config.transfer_timeout_per_token * tokens
        self._timers.set(now + limit, "transfer", visit.id)

    def _peer_down(self, executor: int, now: int) -> None:
        self._dirty = True
        self._gone.add(executor)  # what it sent before may still come, and would wait for it for ever
        for visit in list(self.visits.values()):
            params = visit.request.context_phase_params
            if visit.reader is not None and visit.reader[0] == executor:
                visit.reader = None
            if visit.pinned_by is not None and visit.pinned_by[0] == executor:
                self._kv_taken(KvTaken(visit.id, ok=False), now)
            elif visit.id in self._in_flight and params is not None and params.executor == executor:
                self._kv_received(KvReceived(visit.id, False, f"executor {executor}, which held the KV, is gone"), now)
            elif visit.state is State.GENERATION_QUEUED and params is not None and params.executor == executor:
                self._fail(visit, f"executor {executor}, which held the KV, is gone", now, recomputable=True)

    def _timer_matters(self, what: str, subject: int) -> bool:
        """False for one of a visit that has gone past what it limits."""
        if what not in _LIMITS:
            return True
        visit = self.visits.get(subject)
        return visit is not None and visit.doom is None and visit.state is _LIMITS[what]

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
                limit = (now - (visit.first_token_at or visit.transfer_start_at or now)) // 10**9
                self._give_up(visit, f"the KV transfer took over {limit} ms", now, recomputable=True)
        elif what == "pull":
            if visit is not None and visit.state is State.GENERATION_QUEUED:  # its context phase is done by now
                limit = self.config.pull_timeout // 10**9
                self._give_up(visit, f"no blocks came free for its KV in {limit} ms", now, recomputable=True)
        elif what == "heartbeat":
            self._heartbeat(now)
        elif what == "batch":
            self._must_plan = True
            self.scheduler.ask_to_stop()

    def _heartbeat(self, now: int) -> None:
        """One renewal per executor whose KV this one still means to read."""
        self._heartbeat_armed = False
        if self._local.first() is not None:
            self._is_impatient = self._must_plan = True
        wanted: dict[int, list[int]] = {}
        for is_promise, _, _, visit in sorted(self._pulls, key=lambda entry: entry[2]):
            params = visit.request.context_phase_params
            if visit.state is not State.GENERATION_QUEUED or is_promise != visit.awaits_token:
                continue  # a stale entry
            if params is not None and params.executor != ORCHESTRATOR:
                wanted.setdefault(params.executor, []).append(params.req_id)
        for executor, ids in wanted.items():
            self._out.append(Send(executor, LeaseRenewed(tuple(ids))))
        if self._local.renew(now + self.config.lease) or wanted:
            self._heartbeat_armed = True
            self._timers.set(now + self.config.lease // 3, "heartbeat")

    # ---- the end of a visit -----------------------------------------------------------------------------------------

    def _give_up(self, visit: Visit | None, why: str, now: int, recomputable: bool = False) -> None:
        """Cancel or fail a visit in any state: at once where nothing touches its blocks, else marked until then."""
        if visit is None or visit.doom is not None or visit.state in FINAL:
            return
        self._dirty = self._must_plan = True
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
            case State.CONTEXT_RUNNING | State.GENERATION_RUNNING if self.scheduler.is_in_plan(visit):
                visit.doom = why
                self.scheduler.has_doomed = True
                self.scheduler.ask_to_stop()
            case _:
                self._fail(visit, why, now, recomputable)

    def _fail(self, visit: Visit, why: str, now: int, recomputable: bool = False) -> None:
        """End a visit that no plan and no transfer touches."""
        self._dirty = True
        state = visit.state
        self.scheduler.remove(visit, state)
        if state in _BEFORE_DECODE:
            self._pending_kv -= visit.request.num_prompt_tokens
        if state is State.GENERATION_QUEUED:
            self._num_pulls -= 1
            params = params_of(visit.request)
            if params.executor == self.id:
                self._give_up(self._local.source_of(visit), why, now)
            elif params.executor != ORCHESTRATOR and not visit.awaits_token:
                # whoever holds the KV need not wait for its lease to run out
                self._out.append(Send(params.executor, Cancel(params.req_id)))
        visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
        self._source.turn_away(visit, f"the context phase of request {visit.id} was given up: {why}")
        if visit.pinned_by is not None:  # an early reader is at its blocks
            visit.doom = why
            self.blocks.quarantine(visit.id)
            self._source.abort(visit, f"the context phase of request {visit.id} was given up: {why}")
            self._blocks_came_free()  # not they, but its place in the batch
        else:
            del self.visits[visit.id]
            if self.blocks.free(visit.id) or state in (State.QUEUED, State.GENERATION_QUEUED):
                self._blocks_came_free()  # or it was at the head of a line, and whoever is next needs fewer
        self._answer_failure(visit, why, now, recomputable)

    def _answer_failure(self, visit: Visit, why: str, now: int, recomputable: bool) -> None:
        cancelled = why is CANCELLED
        reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
        error = None if cancelled else why
        self._respond(visit, reason, visit.num_generated, error=error, recomputable=recomputable)
        self._record_stay(visit, now, self.scheduler.num_steps if visit.left_at is None else visit.left_at)

    def _finish(self, visit: Visit, reason: FinishReason, now: int, last_step: int) -> None:
        """A visit's last token is out; it is out of the batch, and its blocks are quiet unless an early reader is there."""
        self._dirty = True
        visit.advance(Cause.FINISH)
        if visit.output_hashes and not _is_canned(visit.request):
            self.scheduler.note_generated(visit)
        self._source.turn_away(visit, f"request {visit.id} ended with its first token")
        if visit.pinned_by is not None:
            self.blocks.quarantine(visit.id)
        else:
            self.blocks.free(visit.id)
            del self.visits[visit.id]
        self._respond(visit, reason, visit.num_generated, last_token=now)
        self._record_stay(visit, now, last_step)

    def _respond(self, visit: Visit, reason: FinishReason | None, num_tokens: int, **fields: Any) -> None:
        """The one answer to a visit, with the instants that its row wants."""
        response = Response(
            visit.id,
            self.id,
            reason,
            num_tokens,
            context_start=visit.started_at,
            transfer_start=visit.transfer_start_at,
            kv_usable=visit.kv_usable_at,
            num_cached_tokens=visit.num_cached_tokens,
            **fields,
        )
        self._responses.append(response)

    def _fail_plan(self, run: RunSteps, error: str, now: int) -> None:
        for chunk in run.chunks:
            self._fail(self.visits[chunk.request_id], error, now)
        if run.decodes:
            for visit in list(self.batch.members.values()):
                self._fail(visit, error, now)

    def _record_stay(self, visit: Visit, now: int, last_step: int) -> None:
        self._out.append(Record(stay_row(self.id, visit, now, last_step)))

    def _record_transfer(self, visit: Visit, now: int, ok: bool, error: str | None) -> None:
        num_blocks = self.scheduler.blocks_for(params_of(visit.request).num_kv_tokens - visit.num_cached_tokens)
        self._out.append(Record(transfer_row(self.id, visit, num_blocks, now, ok, error)))

    # ---- planning ---------------------------------------------------------------------------------------------------

    def _plan(self, now: int) -> None:
        """The planning pass of an instant, between two plans, or behind one whose last steps still run."""
        scheduler = self.scheduler
        if scheduler.is_idle and not self._pulls and not self._local:
            return
        leaving = scheduler.doomed()
        for visit in leaving:
            if visit.doom is not None:
                self._fail(visit, visit.doom, now)
        for visit in leaving:
            if visit.doom is None:
                self._move(visit, now)
        self._fill_places(now)
        if scheduler.must_wait():
            scheduler.close_epoch()
            return
        while scheduler.preempt():
            self._fill_places(now)  # those that came free: a later plan, at a boundary of chance, would do it otherwise
        plan, chunks = scheduler.choose(now, may_admit=self._local.first() is None)
        self._begin(chunks, now)
        self._pull(now)
        scheduler.run(plan, chunks, now)
        if scheduler.running is None and not scheduler.tails:
            self._withdraw()
        if plan.ask_again_at is not None:
            self._timers.set(max(plan.ask_again_at, now + 1), "batch")

    def _begin(self, chunks: tuple[Chunk, ...], now: int) -> None:
        """Context phases whose blocks have just become their own: tell whoever waits for that."""
        for chunk in chunks:
            visit = self.visits[chunk.request_id]
            if visit.started_at == now:  # its first, whatever comes of it
                self._order.on_served(visit.request, visit.order_key, now)
            if visit.announces_start:
                visit.announces_start = False
                self._out.append(Send(ORCHESTRATOR, ContextStarted(visit.id)))
            self._source.begun(visit, now)

    def _withdraw(self) -> None:
        """Nothing runs, and something that could lacks blocks: take early reservations back.

        An early reservation waits for a context phase that may wait, elsewhere, for blocks that what is stuck here holds:
        without this the two might wait for each other.
        """
        is_stuck = self.scheduler.num_waiting or (self._pulls and not self._pulls[0][0]) or self._local
        if not is_stuck:
            return
        for visit in self._in_flight.values():
            if visit.awaits_token and not visit.is_withdrawn and visit.doom is None:
                visit.is_withdrawn = True
                params = params_of(visit.request)
                self._out.append(Send(params.executor, KvWithdrawn(params.req_id, self.id, visit.id)))

    def _fill_places(self, now: int) -> None:
        if self._has_canned:  # where no KV travels, what is pulled can join at once; nothing would wake us for it later
            self._pull(now)
        if self._local:
            self._take_over(now)
        for visit in self.scheduler.fill_places():
            self._pending_kv -= visit.request.num_prompt_tokens

    def _pull(self, now: int) -> None:
        """Reserve blocks for generation phases, in order, and ask for their KV; none while one waits whose KV is here."""
        cache = self.scheduler.cache
        if self._local and self._local.first() is not None:
            return
        while self._pulls:
            is_promise, _, _, visit = self._pulls[0]
            if visit.state is not State.GENERATION_QUEUED or is_promise != visit.awaits_token:
                heapq.heappop(self._pulls)
                continue
            # an executor that holds nothing has nothing to reserve for, and a large request must fit at last
            reserve = self._pull_reserve if self.blocks.num_free < self.blocks.num_blocks else 0
            if cache is not None:
                self._look(visit, cache)
            if visit.num_blocks > self.scheduler.num_spare_blocks - reserve:
                return
            if cache is not None and visit.num_kv_tokens:
                if not cache.confirm(visit, self.scheduler.blocks_to_admit(visit)):
                    continue
            heapq.heappop(self._pulls)
            self._num_pulls -= 1
            self._order.on_served(visit.request, visit.order_key, now)
            if cache is not None:
                cache.share(visit, self.scheduler.blocks_to_admit(visit), is_arriving=True)
                visit.num_cached_tokens = visit.num_kv_tokens
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
                if self.scheduler.num_free_slots > 0:
                    self.scheduler.ask_to_stop()
                continue
            used = blocks[: self.scheduler.blocks_for(params.num_kv_tokens)]
            if visit.num_cached_tokens:
                self._out.append(self._receive_rest(visit, params, used))
            else:
                ask = PrepareReceive if visit.awaits_token else ReceiveKv
                self._out.append(ask(visit.id, params.executor, params.req_id, params.num_kv_tokens, used))
            if not visit.awaits_token:
                self._limit_transfer(visit, now)

    def _take_over(self, now: int) -> None:
        """Let generation phases whose KV is here have it, in order.

        Each keeps the blocks of its prompt while it waits for more. Where nothing else will give any back they would wait for
        each other for ever; then the youngest is given up, until the first can run.
        """
        while (visit := self._local.first()) is not None:
            source = self._local.source_of(visit)
            if source is None:
                self._local.drop_first()
                self._fail(visit, "its KV is not held here any more", now, recomputable=True)
                continue
            if visit.num_blocks > max(self.scheduler.num_spare_blocks, 0):
                if not self._stands_still():
                    return
                why = "the executor stood still: generation phases waited for blocks that others of them held"
                self._fail(self._local.last(), why, now, recomputable=True)
                continue
            self._order.on_served(visit.request, visit.order_key, now)
            self._local.take_over(visit, source)
            self._num_pulls -= 1
            visit.advance(Cause.PULL)
            visit.transfer_start_at = now
            self._dirty = True
            self._arrived(visit, now)

    def _stands_still(self) -> bool:
        """Whether nothing here will give blocks back by itself: nothing runs or can, and nothing is read or written.

        KV that a reader elsewhere may still ask for is waited for, but not past a heartbeat: it may wait for this one too.
        """
        scheduler = self.scheduler
        if scheduler.running is not None or scheduler.has_begun or self._in_flight or scheduler.early:
            return False
        held = [visit for visit in self.visits.values() if visit.state is State.CONTEXT_DONE]
        if any(visit.pinned_by is not None for visit in self.visits.values()):
            return False
        wanted_here = self._local.sources()
        return self._is_impatient or all(visit.id in wanted_here for visit in held)

    def _look(self, visit: Visit, cache: PrefixCache) -> None:
        """What of the KV that it is about to receive is here already, and how many blocks it takes besides.

        Only of KV that is whole: what is sent while it is computed is sent from its beginning.
        """
        visit.num_blocks = self.scheduler.blocks_to_admit(visit)
        if not visit.awaits_token and params_of(visit.request).executor != ORCHESTRATOR:
            cache.look(visit, visit.num_blocks)

    def _receive_rest(self, visit: Visit, params: ContextPhaseParams, blocks: tuple[int, ...]) -> ReceiveKv:
        present = visit.num_cached_tokens
        missing = blocks[present // self.config.tokens_per_block :]
        return ReceiveKv(visit.id, params.executor, params.req_id, params.num_kv_tokens - present, missing, present)

    def _blocks_came_free(self) -> None:
        pulls_wait = self._local or (self._num_pulls and not self._pulls_at_once)
        if pulls_wait or (self.scheduler.num_waiting and self.scheduler.num_free_slots > 0):
            self.scheduler.ask_to_stop()

    # ---- what the orchestrator is told ------------------------------------------------------------------------------

    def report(self) -> Report:
        """What would be told now; nothing is changed by asking."""
        free, reserved, used, held, quarantined, cached = self.scheduler.block_counts()
        cache = self.scheduler.cache
        limit = self.config.quarantine_max_blocks
        return Report(
            self.id,
            self._seen_requests,
            self._seen_tokens,
            self._num_coming() + self.scheduler.num_waiting,
            len(self.scheduler.prefilling) + len(self.scheduler.joining) + len(self.batch),
            self.scheduler.num_queued_tokens,
            sum(visit.num_tokens_left for visit in self.scheduler.prefilling.values()),
            self.scheduler.shown_kv + self._pending_kv,
            free,
            reserved,
            used,
            held,
            quarantined,
            self.scheduler.shown_steps,
            self.scheduler.step_time,
            limit is None or quarantined <= limit,
            () if cache is None else cache.news(),
            cached,
        )

    def _num_coming(self) -> int:
        """Generation phases that are not in the decode batch yet."""
        scheduler = self.scheduler
        return self._num_pulls + len(self._in_flight) + len(scheduler.early) + len(scheduler.ready)

    def _flush(self, now: int) -> None:
        """The end of an instant: answers, the report that rides on the last of them, and the next wake-up."""
        self._dirty = self._dirty or self.scheduler.has_changed
        if self._responses:
            *first, last = self._responses
            for response in first:
                self._out.append(Send(ORCHESTRATOR, response))
            self._out.append(Send(ORCHESTRATOR, replace(last, report=self.report())))
            self._reported(now)
            self._responses.clear()
        elif self.scheduler.has_changed and self.config.report_on_batch_change:
            self._send_report(now)
        report_at = None
        if self._dirty:
            report_at = self._reported_at + self.config.report_interval
            if report_at <= now:
                self._send_report(now)
                report_at = None
        is_idle = self.scheduler.running is None and not self.scheduler.tails
        if self._closing and not self._drained and not self.visits and is_idle:
            self._drained = True
            self.scheduler.close_epoch()
            self._out.append(Drained())
        wake_up = self._timers.wake_up(report_at)
        if wake_up is not None:
            self._out.append(wake_up)

    def _send_report(self, now: int) -> None:
        self._out.append(Send(ORCHESTRATOR, self.report()))
        self._reported(now)

    def _reported(self, now: int) -> None:
        if self.scheduler.cache is not None:
            self.scheduler.cache.forget_news()
        self._reported_at = now
        self._dirty = self.scheduler.has_changed = False

    # ---- invariants, for tests and for drivers that want to be sure -------------------------------------------------

    def check(self) -> None:
        """Raise unless every block and every visit is accounted for."""
        self.blocks.check()
        counts = self.scheduler.block_counts()
        if sum(counts) != self.config.num_blocks or min(counts) < 0:
            raise RuntimeError(f"executor {self.id}: block counts {counts} of {self.config.num_blocks}")
        for visit in self.visits.values():
            places = (
                visit.state is State.QUEUED,
                visit.state is State.GENERATION_QUEUED,
                visit.id in self.scheduler.prefilling,
                visit in self.scheduler.joining,
                visit.id in self.scheduler.ready,
                visit.id in self.scheduler.early,
                visit.id in self._in_flight,
                visit.id in self.batch.members,
                self.scheduler.is_leaving(visit),
                visit.state is State.CONTEXT_DONE or (visit.state in FINAL and visit.pinned_by is not None),
            )
            if sum(places) != 1:
                raise RuntimeError(f"executor {self.id}: request {visit.id} ({visit.state.value}) is in {places}")


def _is_canned(request: Request) -> bool:
    """Whether its context phase was skipped: it goes on from KV of nothing, which must not become anybody else's."""
    params = request.context_phase_params
    return params is not None and params.executor == ORCHESTRATOR


def params_of(request: Request) -> ContextPhaseParams:
    """The parameters of a generation-only request; one without was refused when it came."""
    if request.context_phase_params is None:
        raise LifeCycleError(f"request {request.id} has no context_phase_params")
    return request.context_phase_params
