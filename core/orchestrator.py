"""The orchestrator of a cluster: it admits, routes, hands over from context to generation, and answers for each request.

Sees messages only. Policies are asked in `routers.py`, `roles.py` and `moves.py`; what executors owe an answer for is in
`dispatches.py`; the KV of a finished context phase is kept alive until a generation executor is bound (`unbound_kv.py`).
"""

from __future__ import annotations

from typing import Any, Final

from ..policies.interfaces import AdmissionPolicy, MigrationPolicy, PolicyError, QueueOrder, RolePolicy
from ..policies.views import ExecutorPool
from ..policies.vocabulary import (
    Admit,
    ContextPhaseParams,
    FinishReason,
    Hold,
    MoveRequest,
    Reject,
    Request,
    Role,
    Route,
    RouteMixed,
    Stage,
    plain_integer,
)
from .commands import ORCHESTRATOR, Deliver, Drained, OrchestratorCommand, Record, Send
from .config import OrchestratorConfig
from .decisions import decision_row
from .dispatches import Dispatches
from .events import (
    Arrive,
    Cancel,
    ContextStarted,
    FirstTokenOut,
    MoveOut,
    OrchestratorEvent,
    PeerDown,
    Report,
    Response,
    RoleChanged,
    Shutdown,
    Wake,
)
from .fleet import Fleet
from .held_tasks import HeldTasks
from .life_cycle import Cause, State, advance
from .links import Links
from .moves import TIMER as MOVES
from .moves import Moves
from .prediction import TablePredictor
from .queue_orders import hears_of_served, key_in
from .roles import TIMER as ROLES
from .roles import Roles
from .routers import Routers, make_policy
from .task import Task
from .timers import Timers
from .unbound_kv import TIMER as RENEW
from .unbound_kv import UnboundKv

AT_ARRIVAL: Final = "at_arrival"
AT_CONTEXT_START: Final = "at_context_start"
AT_CONTEXT_DONE: Final = "at_context_done"
_SERVED: Final[tuple[FinishReason, ...]] = (FinishReason.STOP, FinishReason.LENGTH)
_COMPUTING: Final[tuple[Role, ...]] = (Role.CONTEXT, Role.MIXED)
_GENERATING: Final[tuple[Role, ...]] = (Role.GENERATION, Role.MIXED)


class OrchestratorCore:
    """Routes every request of a cluster. `handle` takes an event and gives the commands that follow from it."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self._binds_at_arrival = config.generation_binding == AT_ARRIVAL
        predictor = links = None
        if config.prediction is not None:
            predictor = TablePredictor(config.prediction, [e.id for e in config.executors])
            links = Links(config.prediction, config.executors) if config.prediction.links else None
        self.fleet = Fleet(config.executors, 0, predictor, links)
        self.routers = Routers(config, self.fleet)
        self._admission: AdmissionPolicy = make_policy(config, config.admission, "admission", "admission")
        self._order: QueueOrder = make_policy(config, config.queue_order, "queue_order", "queue")
        self._tells_order = hears_of_served(self._order)
        self.tasks: dict[int, Task] = {}
        announces = config.generation_binding == AT_CONTEXT_START
        self._dispatches = Dispatches(config, self.fleet, self.routers, announces, self._emit)
        self._held = HeldTasks()
        self._num_changes = 0  # of what policies see: a held request is asked about again once this has grown
        self._serial = 0
        self._timers = Timers()
        self._unbound = UnboundKv(min((e.lease for e in config.executors), default=0), self._timers, self._emit)
        self._closing = False
        self._drained = False
        self._out: list[OrchestratorCommand] = []
        roles: RolePolicy | None = None
        if config.roles is not None:
            roles = make_policy(config, config.roles, "roles", "roles")
        self._roles = Roles(
            roles, self.fleet, self._timers, self._dispatches.stages_at, self.routers.by_stage, self._emit
        )
        moving: MigrationPolicy | None = None
        if config.migration is not None:
            moving = make_policy(config, config.migration, "migration", "migration")
        self._moves = Moves(moving, self.fleet, self._timers, self._dispatches.movable)

    def _emit(self, command: OrchestratorCommand) -> None:
        self._out.append(command)

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: OrchestratorEvent | None, now: int, more: bool = False) -> list[OrchestratorCommand]:
        """Take `event` (None: only held requests are due) at instant `now`; held requests are tried once an instant."""
        if event is not None:
            self._take(event, now)
        if not more:
            if self._roles.policy is not None and self._roles.ask(now, bool(self.tasks)):
                self._num_changes += 1
            if self._moves.policy is not None:
                for move in self._moves.ask(now, bool(self.tasks)):
                    self._move(move, now)
            if len(self._held):
                self._try_held(now)
            if self._closing and not self._drained and not self.tasks:
                self._drained = True
                self._out.append(Drained())
            wake_up = self._timers.wake_up()
            if wake_up is not None:
                self._out.append(wake_up)
        out = self._out
        self._out = []
        return out

    @property
    def is_holding(self) -> bool:
        """Whether any message may have consequences: requests are held back, a policy changes roles, or this is the end."""
        return len(self._held) > 0 or self._roles.policy is not None or self._closing

    def can_wait(self, message: OrchestratorEvent) -> bool:
        """Whether nothing is sent to an executor upon `message`, as long as nothing is held back.

        A driver of virtual time may then give it after its instant, with that instant, before whatever it gives next.
        """
        if type(message) is Report:
            return True
        return type(message) is Response and message.finish_reason in _SERVED and self.can_wait_for_ends

    @property
    def can_wait_for_ends(self) -> bool:
        """`can_wait` of the answers to requests that ended by themselves."""
        return self.config.generation_binding == AT_CONTEXT_DONE and not self._closing

    @property
    def only_notes_reports(self) -> bool:
        """Whether a report by itself changes nothing but the view: no policy is told of it, and nothing is held back."""
        return not self.routers.hear_reports and not self.is_holding

    def note(self, report: Report, now: int) -> None:
        """`handle` of a report where that is so, and the instant is not logged: no command follows."""
        self._reported(report, now)

    def _take(self, event: OrchestratorEvent, now: int) -> None:
        # exact types, the most frequent first: a class pattern costs a compiled core a call of the metaclass each
        if type(event) is Report:
            self._reported(event, now)
        elif type(event) is Response:
            self._answered(event, now)
        elif type(event) is ContextStarted:
            self._context_started(event, now)
        elif type(event) is FirstTokenOut:
            self._first_token_out(event, now)
        elif type(event) is Arrive:
            self._arrive(event.request, now)
        elif type(event) is Cancel:
            self._cancel(event.request_id, now)
        elif type(event) is PeerDown:
            self._peer_down(event.executor, now)
        elif type(event) is RoleChanged:
            if self._roles.order(event, now):
                self._num_changes += 1
        elif type(event) is Shutdown:
            self._closing = True
            self._roles.policy = self._moves.policy = None
            if not event.drain:
                for task in list(self.tasks.values()):
                    self._abandon(task, "the orchestrator was shut down", now)
        elif type(event) is Wake:
            self._timers.woken()
            for what, subject in self._timers.due(now):
                self._fire(what, subject, now)

    def _arrive(self, request: Request, now: int) -> None:
        self._serial += 1
        task = Task(request, self._serial, key_in(self._order, request, now), now)
        if self._closing or request.id in self.tasks:
            why = "the orchestrator is shutting down" if self._closing else f"request id {request.id} is in use"
            self._out.append(Deliver(request.id, FinishReason.ERROR, 0, error=why))
            return
        self.tasks[request.id] = task
        if self._roles.policy is not None:
            self._roles.arrived(task.shown, now)
        if self._moves.policy is not None:
            self._moves.arrived(now)
        if request.allotted_time is not None:
            self._timers.set(now + request.allotted_time, "allotted", request.id)
        first = self._held.first(Stage.CONTEXT)
        if first is not None and task.order_key >= first.order_key:
            self._hold(task, Stage.CONTEXT, None, now)  # whoever came first is still waiting
        else:
            self._start(task, now)

    def _reported(self, report: Report, now: int) -> None:
        self.fleet.reported(report, now)
        self._num_changes += 1
        self._roles.reported()
        self.routers.reported(report, now)

    def _answered(self, response: Response, now: int) -> None:
        if response.report is not None:
            self._reported(response.report, now)
        self._num_changes += 1
        known = self._dispatches.pop(response.request_id)
        if known is None:
            return  # from before a retry
        task, stage, executor = known
        if stage is Stage.GENERATION and response.recomputable and self._dispatches.is_promise(task):
            self._unbind(response.request_id, task, executor, now)
            return
        ok = response.error is None and response.finish_reason is not FinishReason.CANCELLED
        self._visit_over(response.request_id, task, stage, executor, ok, now)
        task.note(response, stage)
        if response.finish_reason is None and stage is not Stage.CONTEXT:
            self._moved(task, response, now)
        elif response.finish_reason is None:
            task.kv_overlap = response.kv_overlap
            self._context_done(task, response, now)
        elif response.finish_reason is FinishReason.CANCELLED:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif response.error is not None:
            self._failed(task, response.error, response.recomputable, now)
        else:
            task.num_tokens = response.num_output_tokens
            if self._dispatches.is_owed(task.generation_id):  # a promise not kept: the first token was the last
                self._dispatches.release(task)
            if task.first_token_at is None:
                self._first_token(task, executor, response, now)
            self._end(task, Cause.FINISH, response.finish_reason, None, now, executor, response.request_id)

    def _visit_over(self, request_id: int, task: Task, stage: Stage, executor: int, ok: bool, now: int) -> None:
        """An executor owes no answer for this id any more."""
        self._dispatches.closed(request_id, executor)
        if executor in self._roles.draining:
            self._roles.answered(executor, stage, now)
        self.routers.finished(task, stage, executor, ok, now)

    def _context_done(self, task: Task, response: Response, now: int) -> None:
        task.params = response.context_phase_params
        task.num_tokens = 1
        task.state = advance(task.state, Cause.CONTEXT_ENDS)
        self._first_token(task, response.executor, response, now)
        if task.cancelled:  # the executor got the cancel after it had answered, and has freed the KV
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif self._dispatches.is_owed(task.generation_id):
            self._dispatches.keep_promise(task, now)
        elif task.generation_executor is not None and self._dispatches.may_generate(task.generation_executor):
            self._send_generation(task, task.generation_executor, now)
        else:
            self._route_generation(task, now)

    # ---- moves: generation phases that go on at another executor -----------------------------------------------------

    def _move(self, move: MoveRequest, now: int) -> None:
        task = self.tasks[move.request_id]
        request_id = task.context_id if task.generation_id is None else task.generation_id
        if request_id is None or task.generation_executor is None:
            return
        task.moves_to = move.executor
        self._decided(task, "migration", Route(generation=move.executor), None, now)
        self._out.append(Send(task.generation_executor, MoveOut(request_id)))

    def _moved(self, task: Task, response: Response, now: int) -> None:
        """Its executor holds the KV that it has so far, as a context phase's would; it goes on where it was to, or may."""
        task.goes_on_from(response)
        self._first_token(task, response.executor, response, now)
        target, task.moves_to = task.moves_to, None
        if task.cancelled:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif target is not None and self._dispatches.may_generate(target):
            self._send_generation(task, target, now)
        else:
            self._route_generation(task, now)

    def _first_token(self, task: Task, executor: int, response: Response, now: int) -> None:
        if task.first_token_at is None:
            task.first_token_at = now
            self._out.append(Deliver(task.request.id, None, 1, executor, response.request_id))

    def _failed(self, task: Task, error: str, recomputable: bool, now: int) -> None:
        retry = self.config.retry
        if task.cancelled:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif recomputable and retry.on_failure == "recompute" and task.attempts < retry.max_attempts:
            self._retry(task, now)
        else:
            self._dispatches.release(task)
            self._end(task, Cause.FAIL, FinishReason.ERROR, error, now)

    def _retry(self, task: Task, now: int) -> None:
        """Run it again from its prompt; what an executor may still hold for it is given up."""
        if task.state is State.CONTEXT_DONE:
            task.state = advance(task.state, Cause.ROUTE_GENERATION)
        self._dispatches.release(task)
        self._forget_visits(task, now)
        task.held_for = None
        self._unbound.discard(task)
        task.state = advance(task.state, Cause.RETRY)
        task.forget_attempt()
        self._start(task, now)

    def _cancel(self, request_id: int, now: int) -> None:
        """Give a request up. Where an executor works on it, the end comes with that executor's answer."""
        task = self.tasks.get(request_id)
        if task is None:
            return
        if self._dispatches.release(task):
            task.cancelled = True
        else:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)

    def _peer_down(self, executor: int, now: int) -> None:
        self.fleet.lost(executor)
        self._num_changes += 1
        for request_id in self._dispatches.owed_by(executor):
            known = self._dispatches.pop(request_id)
            if known is None:
                continue
            task, stage, _ = known
            if stage is Stage.GENERATION and self._dispatches.is_promise(task):
                self._unbind(request_id, task, executor, now)
                continue
            self._visit_over(request_id, task, stage, executor, False, now)
            self._failed(task, f"executor {executor} is gone", True, now)
        for task in self._unbound.held_by(executor):
            self._failed(task, f"executor {executor}, which held the KV, is gone", True, now)

    def _fire(self, what: str, subject: int, now: int) -> None:
        if what == "held":
            self._num_changes += 1  # a Hold's `until` has come: ask again at the end of this instant
        elif what == "allotted":
            task = self.tasks.get(subject)
            if task is not None:
                limit = (task.request.allotted_time or 0) // 10**9
                self._abandon(task, f"the allotted {limit} ms ran out", now)
        elif what == RENEW:
            self._unbound.renew(now)
        elif what == ROLES:
            self._roles.woken(subject)
        elif what == MOVES:
            self._moves.woken()

    def _abandon(self, task: Task, error: str, now: int) -> None:
        """Fail a task at once, without waiting for the answers of executors that work on it."""
        self._dispatches.release(task)
        self._end(task, Cause.FAIL, FinishReason.ERROR, error, now)

    def _forget_visits(self, task: Task, now: int) -> None:
        """Answers that executors still owe for this task are not waited for."""
        for request_id in (task.context_id, task.generation_id):
            known = self._dispatches.pop(request_id) if request_id is not None else None
            if known is not None and request_id is not None:
                self._visit_over(request_id, *known, ok=False, now=now)

    # ---- routing ----------------------------------------------------------------------------------------------------

    def _start(self, task: Task, now: int) -> None:
        """Admit the request if it is not yet, and route its context phase."""
        fleet = self.fleet.at(now)
        if not task.admitted:
            admission = self._admission.admit(task.shown, fleet)
            if type(admission) is not Admit and not isinstance(admission, Admit):
                if not isinstance(admission, (Hold, Reject)):
                    who = type(self._admission).__name__
                    raise PolicyError(f"{who} answered {admission!r}; allowed: Admit(), Hold or Reject")
                self._decided(task, "admission", admission, None, now)
                if isinstance(admission, Hold):
                    until = None if admission.until is None else plain_integer(admission.until, admission)
                    self._hold(task, Stage.CONTEXT, until, now)
                else:
                    self._end(task, Cause.FAIL, FinishReason.REJECTED, admission.reason, now)
                return
            task.admitted = True
        if self.config.skip_context_phase:
            self._skip_context(task, now)
            return
        pool = fleet.context
        if pool.num_healthy <= 0:
            pool = fleet.mixed
        if not pool.num_healthy:
            self._end(task, Cause.FAIL, FinishReason.ERROR, "no healthy executor is left to run its context phase", now)
            return
        answer = self.routers.route_context(task, fleet)
        self._decided(task, "context", answer, pool, now)
        if (
            type(answer) is Route
            and answer.context is not None
            and answer.generation is None
            and not self._binds_at_arrival
        ):
            self._send_context(task, Stage.CONTEXT, self.routers.checked(answer.context, _COMPUTING, answer), now)
            return  # as below; a class pattern costs a call of the metaclass
        match answer:
            case Route(context=context, generation=generation) if context is not None:
                executor = self.routers.checked(context, _COMPUTING, answer)
                binds = self._binds_at_arrival and task.request.max_tokens > 1
                if generation is not None:
                    task.generation_executor = self.routers.checked(generation, _GENERATING, answer)
                elif binds:
                    self._bind_early(task, executor, now)
                self._send_context(task, Stage.CONTEXT, executor, now)
                if binds:
                    self._dispatches.promise(task, now)
            case RouteMixed(executor=mixed):
                self._send_context(task, Stage.MIXED, self.routers.checked(mixed, (Role.MIXED,), answer), now)
            case Hold(until=until):
                self._hold(task, Stage.CONTEXT, until, now)
            case Reject(reason=reason):
                self._end(task, Cause.FAIL, FinishReason.REJECTED, reason, now)
            case _:
                raise PolicyError(f"a context phase cannot be routed by {answer!r}")

    def _skip_context(self, task: Task, now: int) -> None:
        """A canned first token and KV left as it is: the generation phase alone, for benchmarks of it."""
        task.attempts += 1
        task.state = advance(advance(task.state, Cause.START), Cause.CONTEXT_ENDS)
        task.params = ContextPhaseParams(0, ORCHESTRATOR, task.request.num_prompt_tokens, (0,))
        task.num_tokens = 1
        if task.first_token_at is None:
            task.first_token_at = now
            self._out.append(Deliver(task.request.id, None, 1))
        if task.request.max_tokens == 1:
            self._end(task, Cause.FINISH, FinishReason.LENGTH, None, now)
        else:
            self._route_generation(task, now)

    def _bind_early(self, task: Task, context: int, now: int) -> None:
        """`context`: the executor of its context phase, which is still to be done."""
        fleet = self.fleet.at(now)
        pool = fleet.generation
        if pool.num_healthy <= 0:
            pool = fleet.mixed
        if not pool.num_healthy:
            return
        answer = self.routers.bind_generation(task, context, fleet)
        self._decided(task, "generation", answer, pool, now)
        if isinstance(answer, Route) and answer.generation is not None:
            task.generation_executor = self.routers.checked(answer.generation, _GENERATING, answer)
        elif not isinstance(answer, Hold):  # holding means to decide when the context phase is done
            raise PolicyError(f"a generation phase cannot be bound early by {answer!r}; allowed: Route, Hold")

    def _first_token_out(self, event: FirstTokenOut, now: int) -> None:
        task, _, executor = self._dispatches.get(event.request_id)
        if task is None or executor is None or task.first_token_at is not None:
            return
        task.context_start = event.context_start
        task.first_token_at = now
        self._out.append(Deliver(task.request.id, None, 1, executor, event.request_id))

    def _context_started(self, event: ContextStarted, now: int) -> None:
        task, _, executor = self._dispatches.get(event.request_id)
        if task is None or executor is None or task.cancelled or task.generation_id is not None:
            return
        if task.generation_executor is None:
            self._bind_early(task, executor, now)
        self._dispatches.promise(task, now)

    def _unbind(self, request_id: int, task: Task, executor: int, now: int) -> None:
        """An early binding came to nothing and nothing is lost: the generation phase is routed when it is due."""
        self._visit_over(request_id, task, Stage.GENERATION, executor, False, now)
        task.generation_executor = task.generation_id = None

    def _route_generation(self, task: Task, now: int) -> None:
        fleet = self.fleet.at(now)
        pool = fleet.generation
        if pool.num_healthy <= 0:
            pool = fleet.mixed
        if not pool.num_healthy:
            self._dispatches.release(task)
            self._end(
                task, Cause.FAIL, FinishReason.ERROR, "no healthy executor is left to run its generation phase", now
            )
            return
        answer = self.routers.route_generation(task, fleet)
        self._decided(task, "generation", answer, pool, now)
        if type(answer) is Route and answer.generation is not None:
            self._send_generation(task, self.routers.checked(answer.generation, _GENERATING, answer), now)
            return  # as below
        match answer:
            case Route(generation=generation) if generation is not None:
                executor = self.routers.checked(generation, _GENERATING, answer)
                self._send_generation(task, executor, now)
            case Hold(until=until):
                self._hold(task, Stage.GENERATION, until, now)
                self._unbound.add(task, now)
            case Reject(reason=reason):
                self._dispatches.release(task)
                self._end(task, Cause.FAIL, FinishReason.REJECTED, reason, now)
            case _:
                raise PolicyError(f"a generation phase cannot be routed by {answer!r}")

    def _send_context(self, task: Task, stage: Stage, executor: int, now: int) -> None:
        if self._tells_order:
            self._order.on_served(task.shown, task.order_key, now)
        self._dispatches.send_context(task, stage, executor, now)

    def _send_generation(self, task: Task, executor: int, now: int) -> None:
        self._unbound.discard(task)
        self._dispatches.send_generation(task, executor, now)

    def _hold(self, task: Task, stage: Stage, until: int | None, now: int) -> None:
        if until is not None and until <= now:
            raise PolicyError(f"Hold(until={until}) at {now}: the instant to ask again must lie in the future")
        self._held.put(task, stage, self._num_changes)
        if until is not None:
            self._timers.set(until, "held")

    def _try_held(self, now: int) -> None:
        """Ask again for held requests, generation phases first (their KV fills an executor), each queue in its order.

        A queue stops at the first that must wait on: whoever is behind it came later.
        """
        for stage in (Stage.GENERATION, Stage.CONTEXT):
            while (task := self._held.first(stage)) is not None and task.held_at_change < self._num_changes:
                self._held.take(stage)
                if stage is Stage.GENERATION:
                    self._route_generation(task, now)
                else:
                    self._start(task, now)
                if task.held_for is stage:
                    break

    # ---- records ----------------------------------------------------------------------------------------------------

    def _decided(self, task: Task, stage: str, answer: Any, pool: ExecutorPool | None, now: int) -> None:
        self._out.append(Record(decision_row(task.request.id, stage, answer, pool, now)))

    def _end(
        self,
        task: Task,
        cause: Cause,
        reason: FinishReason,
        error: str | None,
        now: int,
        executor: int | None = None,
        executor_request: int | None = None,
    ) -> None:
        request_id = task.request.id
        self._forget_visits(task, now)
        task.state = advance(task.state, cause)
        task.held_for = None
        del self.tasks[request_id]
        if self._roles.policy is not None:
            self._roles.ended(task.shown, task.num_tokens, now)
        self._unbound.discard(task)
        self._out.append(Deliver(request_id, reason, task.num_tokens, executor, executor_request, error))
        self._out.append(Record(task.row(reason, error, now)))
