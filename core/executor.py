"""One executor as a state machine: events in, commands out.

Knows no device, clock or network. It takes requests in, has the scheduler batch them, hands finished context phases over
under a lease, pulls the KV of generation phases, and answers for each visit exactly once. What may touch memory decides
when it is freed: after the last plan that names it, and after the last transfer that reads or writes it.

Here events are taken and the planning pass of an instant is made; `kv_source.py` and `kv_reader.py` hand KV over,
`visit_ends.py` ends visits, `executor_reports.py` tells the orchestrator.
"""

from __future__ import annotations

from typing import Final

from ..policies import registry
from ..policies.interfaces import BatchPolicy, QueueOrder
from ..policies.vocabulary import FinishReason, Request, RequestType, Role, plain_integer
from .agenda import CANCELLED, Agenda
from .commands import ORCHESTRATOR, Chunk, Drained, ExecutorCommand, Send
from .config import ExecutorConfig
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
    RoleChanged,
    Shutdown,
    StepsCommitted,
    StepsDone,
    Wake,
)
from .executor_reports import ExecutorReports
from .kv_reader import KvReader
from .kv_source import KvSource
from .life_cycle import FINAL, Cause, State
from .queue_orders import hears_of_served, key_in
from .refusal import refusal
from .scheduler import Scheduler
from .tails import Prefilled
from .timers import Timers
from .visit import Visit
from .visit_ends import VisitEnds

# what a timer of a visit limits: how long it is in that state
_LIMITS: Final = {"lease": State.CONTEXT_DONE, "transfer": State.KV_IN_FLIGHT, "pull": State.GENERATION_QUEUED}
_NO_TOKENS: Final[dict[int, int]] = {}  # of a simulation


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
        self._tells_order = hears_of_served(self._order)
        batching: BatchPolicy = registry.create(
            scheduler.batching.name, "batching", scheduler.batching.params, seed=seed, root=policy_root
        )
        self._agenda = Agenda()
        self.scheduler = Scheduler(config, batching, self._agenda.emit)
        self.blocks = self.scheduler.blocks
        self.batch = self.scheduler.batch
        self.visits: dict[int, Visit] = {}
        self._timers = Timers(self.visits, _LIMITS)
        self._gone: set[int] = set()  # executors that will never answer again
        self._source = KvSource(self.blocks, self._gone, self._agenda.emit, config.layerwise, config.tokens_per_block)
        reserve = max(config.pull_reserve_blocks, batching.pull_reserve_blocks)
        self._reader = KvReader(config, self.scheduler, self.visits, self._order, self._timers, self._agenda, reserve)
        self._ends = VisitEnds(
            config, self.scheduler, self.visits, self._source, self._reader, self._timers, self._agenda
        )
        self._reports = ExecutorReports(config, self.scheduler, self._reader, self._agenda)
        self._serial = 0
        self._overlaps = config.overlap
        self._asked_at = -1  # without overlap: how many steps had run when KV was last asked for
        self._closing = False
        self._drained = False

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: ExecutorEvent | None, now: int, more: bool = False) -> list[ExecutorCommand]:
        """Take `event` (None: only the planning pass is due) at instant `now`; the commands are in order."""
        agenda = self._agenda
        if event is not None:
            if type(event) is Wake:
                self._woken(now)
            else:
                agenda.must_plan = True
                self._take(event, now)
        if not more:
            if agenda.must_plan:
                agenda.must_plan = False
                if self.scheduler.running is None:
                    self._plan(now)
                elif self._reader.num_pulls and self._reader.pulls_at_once:
                    self._reader.pull(now)
                agenda.is_impatient = False
            self._flush(now)
        return agenda.take()

    @property
    def is_end_quiet(self) -> bool:
        """Whether the end of the only committed plan, if no stop comes with it, would bring about nothing here.

        Nothing but rows, a report, and answers to who ended in it. A driver of virtual time may then give it after its
        instant, with that instant, before whatever it gives next.
        """
        return not (self._reader.num_pulls or self._reader.local or self._closing) and self.scheduler.is_end_quiet

    @property
    def is_end_awaited(self) -> bool:
        """Whether there are such answers."""
        return bool(self.scheduler.tails[0].leaving)

    def report(self) -> Report:
        """What would be told now; nothing is changed by asking."""
        return self._reports.report()

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
            if not self._overlaps:
                self.scheduler.ask_to_stop()
        elif type(event) is KvReceived:
            self._ends.kv_received(event, now)
        elif type(event) is KvTaken:
            self._ends.kv_taken(event)
        elif type(event) is LeaseRenewed:
            for request_id in event.request_ids:
                visit = self.visits.get(request_id)
                if visit is not None:
                    visit.lease_until = now + self.config.lease
        elif type(event) is FirstTokens:
            self._reader.first_token(self.visits.get(event.request_id), now)
        elif type(event) is KvWithdrawn:
            self._source.withdrawn(event, self.visits.get(event.request_id))
        elif type(event) is Cancel:
            self._ends.give_up(self.visits.get(event.request_id), CANCELLED, now)
        elif type(event) is MoveOut:
            self._move_out(self.visits.get(event.request_id))
        elif type(event) is PeerDown:
            self._peer_down(event.executor, now)
        elif type(event) is RoleChanged:
            self.scheduler.role = Role(event.role)
            self._agenda.has_news = True
            self.scheduler.ask_to_stop()  # for a batch policy that goes by it
        elif type(event) is Shutdown:
            self._closing = True
            if not event.drain:
                for visit in list(self.visits.values()):
                    self._ends.give_up(visit, "the executor was shut down", now)

    def _enqueue(self, event: Enqueue, now: int) -> None:
        request = event.request
        self._reports.seen(request)
        generation_only = request.request_type is RequestType.GENERATION_ONLY
        error = self._refusal(request)
        if error is not None:
            self._ends.refuse(request.id, error)
            return
        params = request.context_phase_params
        if generation_only and params is not None and params.executor in self._gone:
            error = f"executor {params.executor}, which held the KV, is gone"
            self._ends.refuse(request.id, error, recomputable=True)
            return
        self._serial += 1
        visit = Visit(
            request,
            self._serial,
            key_in(self._order, request, now),
            now,
            State.GENERATION_QUEUED if generation_only else State.QUEUED,
        )
        self.visits[request.id] = visit
        if generation_only:
            self._reader.enqueue(visit, now)
        else:
            visit.announces_start = event.announces_start
            self.scheduler.prompts.queue(visit)
            if self.scheduler.num_free_slots > 0 and visit.num_blocks <= self.scheduler.num_free_blocks:
                self.scheduler.ask_to_stop()

    def _refusal(self, request: Request) -> str | None:
        """Why the request can never be served here, or None."""
        if self._closing:
            return "the executor is shutting down"
        if request.id in self.visits:
            return f"request id {request.id} is in use here"
        return refusal(request, self.config)

    def _steps_done(self, event: StepsDone, now: int) -> None:
        ends = self._ends
        is_open = self.scheduler.running is not None and event.plan == self.scheduler.running.plan
        over = self.scheduler.steps_done(event, now)
        if over is None:
            return
        if event.error is not None and is_open:
            ends.fail_plan(over.run, event.error, now)
            return
        for request_id, hashes in event.block_hashes:
            if request_id in self.visits:
                self.visits[request_id].output_hashes = hashes
        for end in over.ended:
            ends.finish(end.visit, end.reason, now, end.last_step)
        if over.ended:
            self._reader.blocks_came_free()  # while the next plan may run already
        for visit in over.given_up:
            if visit.is_moving and visit.doom is None:
                ends.move(visit, now)
            else:
                ends.fail(visit, event.error or visit.doom or "", now)
        tokens = dict(event.first_tokens) if event.first_tokens else _NO_TOKENS
        for prefilled in over.prefilled:
            self._prefilled(prefilled, tokens.get(prefilled.visit.id), now)

    def _prefilled(self, prefilled: Prefilled, token: int | None, now: int) -> None:
        """A prompt is computed: that was all, or its KV waits for a reader, or it generates here."""
        visit, stopped = prefilled.visit, prefilled.stopped
        request = visit.request
        if stopped or visit.num_generated >= request.max_tokens:
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            self._ends.finish(visit, reason, now, self.scheduler.num_steps)
        elif request.request_type is RequestType.CONTEXT_ONLY and visit.doom is None:
            self._ends.context_done(visit, token, now)
        else:
            visit.advance(Cause.GENERATE_HERE)
            self.scheduler.joining.append(visit)
            whole = request.request_type is RequestType.CONTEXT_AND_GENERATION
            if whole and request.streaming and visit.num_generated == 1 and visit.doom is None:
                self._agenda.out.append(Send(ORCHESTRATOR, FirstTokenOut(visit.id, visit.started_at)))

    def _move_out(self, visit: Visit | None) -> None:
        """It goes on elsewhere, from the next boundary at which it runs; what does not run here stays."""
        if visit is None or visit.state is not State.GENERATION_RUNNING or visit.doom is not None or visit.is_moving:
            return
        visit.is_moving = self.scheduler.has_doomed = True
        self.scheduler.ask_to_stop()

    def _peer_down(self, executor: int, now: int) -> None:
        self._agenda.has_news = True
        self._gone.add(executor)  # what it sent before may still come, and would wait for it for ever
        gone = f"executor {executor}, which held the KV, is gone"
        for visit in list(self.visits.values()):
            params = visit.request.context_phase_params
            if visit.reader is not None and visit.reader[0] == executor:
                visit.reader = None
            if visit.pinned_by is not None and visit.pinned_by[0] == executor:
                self._ends.kv_taken(KvTaken(visit.id, ok=False))
            elif visit.id in self._reader.in_flight and params is not None and params.executor == executor:
                self._ends.kv_received(KvReceived(visit.id, False, gone), now)
            elif visit.state is State.GENERATION_QUEUED and params is not None and params.executor == executor:
                self._ends.fail(visit, gone, now, recomputable=True)

    # ---- timers -----------------------------------------------------------------------------------------------------

    def _woken(self, now: int) -> None:
        """Timers fire. Unless one of them has an effect nothing is planned: a wake-up for a report asks no policy."""
        self._timers.woken()
        for what, subject in self._timers.due(now):
            self._fire(what, subject, now)

    def _fire(self, what: str, subject: int, now: int) -> None:
        visit = self.visits.get(subject)
        if what == "lease":
            if visit is None or visit.state is not State.CONTEXT_DONE or visit.doom is not None:
                return
            if visit.lease_until > now:
                self._timers.set(visit.lease_until, "lease", subject)
            else:
                self._ends.give_up(visit, "its lease ran out", now)
        elif what == "transfer":
            if visit is not None and visit.id in self._reader.in_flight and visit.doom is None:
                limit = (now - (visit.first_token_at or visit.transfer_start_at or now)) // 10**9
                self._ends.give_up(visit, f"the KV transfer took over {limit} ms", now, recomputable=True)
        elif what == "pull":
            if visit is not None and visit.state is State.GENERATION_QUEUED:  # its context phase is done by now
                limit = self.config.pull_timeout // 10**9
                self._ends.give_up(visit, f"no blocks came free for its KV in {limit} ms", now, recomputable=True)
        elif what == "heartbeat":
            self._reader.heartbeat(now)
        elif what == "batch":
            self._agenda.must_plan = True
            self.scheduler.ask_to_stop()

    # ---- the end of an instant --------------------------------------------------------------------------------------

    def _plan(self, now: int) -> None:
        """The planning pass of an instant, between two plans, or behind one whose last steps still run."""
        scheduler = self.scheduler
        if scheduler.is_idle and not self._reader.has_queued:
            return
        if scheduler.has_doomed:
            leaving = scheduler.doomed()
            for visit in leaving:
                if visit.doom is not None:
                    self._ends.fail(visit, visit.doom, now)
            for visit in leaving:
                if visit.doom is None:
                    self._ends.move(visit, now)
        self._fill_places(now)
        if scheduler.must_wait():
            scheduler.close_epoch()
            return
        while scheduler.preempt():
            self._fill_places(now)  # those that came free: a later plan, at a boundary of chance, would do it otherwise
        if not self._overlaps and self._stands_aside(now):
            scheduler.close_epoch()
            return
        plan, chunks = scheduler.choose(now, may_admit=self._reader.local.first() is None)
        self._begin(chunks, now)
        if self._overlaps:
            self._reader.pull(now)
        scheduler.run(plan, chunks, now)
        if scheduler.running is None and not scheduler.tails:
            self._reader.withdraw()
        if plan.ask_again_at is not None:
            self._timers.set(max(plain_integer(plan.ask_again_at, plan), now + 1), "batch")

    def _stands_aside(self, now: int) -> bool:
        """Without overlap: ask for KV where no step runs, once between two steps, and say whether the next must wait.

        For what comes, and for what is read here: of a context phase that is done, since its own steps are what early
        readers wait for. KV of a request that was given up is not waited for, so that one transfer holds up nobody else.
        """
        reader, scheduler = self._reader, self.scheduler
        if not scheduler.tails and (scheduler.num_steps != self._asked_at or not scheduler.has_begun):
            self._asked_at = scheduler.num_steps
            reader.pull(now)
        if scheduler.tails and reader.num_pulls:
            return True
        return reader.is_receiving or any(
            visit.pinned_by is not None and visit.state is State.CONTEXT_DONE and visit.doom is None
            for visit in self.visits.values()
        )

    def _begin(self, chunks: tuple[Chunk, ...], now: int) -> None:
        """Context phases whose blocks have just become their own: tell whoever waits for that."""
        for chunk in chunks:
            visit = self.visits[chunk.request_id]
            if visit.started_at == now and self._tells_order:  # its first, whatever comes of it
                self._order.on_served(visit.request, visit.order_key, now)
            if visit.announces_start:
                visit.announces_start = False
                self._agenda.out.append(Send(ORCHESTRATOR, ContextStarted(visit.id)))
            self._source.begun(visit, now)

    def _fill_places(self, now: int) -> None:
        if self._reader.has_canned:  # where no KV travels, what is pulled can join at once; nothing would wake us later
            self._reader.pull(now)
        if self._reader.local:
            while (hopeless := self._reader.take_over(now)) is not None:
                visit, why = hopeless
                self._ends.fail(visit, why, now, recomputable=True)
        if self.scheduler.joining or self.scheduler.ready:
            for visit in self.scheduler.fill_places():
                self._reader.joined(visit)

    def _flush(self, now: int) -> None:
        """Answers and reports, whether all is done, and the next wake-up."""
        report_at = self._reports.flush(now)
        is_idle = self.scheduler.running is None and not self.scheduler.tails
        if self._closing and not self._drained and not self.visits and is_idle:
            self._drained = True
            self.scheduler.close_epoch()
            self._agenda.out.append(Drained())
        wake_up = self._timers.wake_up(report_at)
        if wake_up is not None:
            self._agenda.out.append(wake_up)

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
                visit.id in self._reader.in_flight,
                visit.id in self.batch.members,
                self.scheduler.is_leaving(visit),
                visit.state is State.CONTEXT_DONE or (visit.state in FINAL and visit.pinned_by is not None),
            )
            if sum(places) != 1:
                raise RuntimeError(f"executor {self.id}: request {visit.id} ({visit.state.value}) is in {places}")
