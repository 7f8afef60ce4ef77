"""The orchestrator of a cluster: it admits, routes, hands over from context to generation, and answers for each request.

Sees messages only. It issues ids of its own, one per attempt and phase, so that a late message from before a retry is
harmless, and it keeps the KV of a finished context phase alive until a generation executor is bound.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from ..policies import registry
from ..policies.interfaces import AdmissionPolicy, MigrationPolicy, PolicyError, QueueOrder, RolePolicy, RoutingPolicy
from ..policies.views import ExecutorPool
from ..policies.vocabulary import (
    Admit,
    ContextPhaseParams,
    FinishReason,
    Hold,
    MoveRequest,
    Reject,
    Request,
    RequestType,
    Role,
    Route,
    RouteMixed,
    Routing,
    Stage,
    in_plain_integers,
)
from .commands import ORCHESTRATOR, Deliver, Dispatched, Drained, OrchestratorCommand, Record, Send
from .config import OrchestratorConfig, PolicySpec
from .decisions import decision_row
from .events import (
    Arrive,
    Cancel,
    ContextStarted,
    Enqueue,
    FirstTokenOut,
    FirstTokens,
    LeaseRenewed,
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
from .moves import TIMER as MOVES
from .moves import Moves
from .prediction import TablePredictor
from .roles import TIMER as ROLES
from .roles import Roles
from .task import Task
from .timers import Timers

AT_ARRIVAL: Final = "at_arrival"
AT_CONTEXT_START: Final = "at_context_start"
AT_CONTEXT_DONE: Final = "at_context_done"
_SERVED: Final = (FinishReason.STOP, FinishReason.LENGTH)


def _shown(task: Task, router: RoutingPolicy) -> Request:
    """The request as `router` sees it: without tokens, and without its true output length unless it is an oracle."""
    return task.told_oracle if router.is_oracle else task.shown


class OrchestratorCore:
    """Routes every request of a cluster. `handle` takes an event and gives the commands that follow from it."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        predictor = None
        if config.prediction is not None:
            predictor = TablePredictor(config.prediction, [e.id for e in config.executors])
        self.fleet = Fleet(config.executors, 0, predictor)
        self._routers: dict[Stage, RoutingPolicy] = self._make_routers()
        self._report_hooks = self._that_define("on_report")
        self._end_hooks = self._that_define("on_finished")
        self._dispatch_hooks = self._that_define("on_dispatched")
        self._admission: AdmissionPolicy = self._make(config.admission, "admission", "admission")
        self._order: QueueOrder = self._make(config.queue_order, "queue_order", "queue")
        self.tasks: dict[int, Task] = {}
        self._visits: dict[int, tuple[Task, Stage, int]] = {}  # executor-level id: (task, stage, executor)
        self._by_executor: dict[int, dict[int, None]] = {e.id: {} for e in config.executors}  # its visits, in order
        self._held = HeldTasks()
        self._num_changes = 0  # of what policies see: a held request is asked about again once this has grown
        self._waiting_for_generation: dict[int, Task] = {}
        self._next_id = 0
        self._serial = 0
        self._lease = min((e.lease for e in config.executors), default=0)
        self._renewal_armed = False
        self._timers = Timers()
        self._closing = False
        self._drained = False
        self._out: list[OrchestratorCommand] = []
        policy: RolePolicy | None = None if config.roles is None else self._make(config.roles, "roles", "roles")
        self._roles = Roles(policy, self.fleet, self._timers, self._stages_at, self._routers, self._emit)
        moving: MigrationPolicy | None = None
        if config.migration is not None:
            moving = self._make(config.migration, "migration", "migration")
        self._moves = Moves(moving, self.fleet, self._timers, self._movable)

    def _emit(self, command: OrchestratorCommand) -> None:
        self._out.append(command)

    def _stages_at(self, executor: int) -> list[Stage]:
        return [self._visits[request_id][1] for request_id in self._by_executor[executor]]

    def _make(self, spec: PolicySpec, kind: str, name: str) -> Any:
        seed = f"{self.config.seed}/{name}"
        return registry.create(spec.name, kind, spec.params, seed=seed, root=self.config.policy_root)

    def _make_routers(self) -> dict[Stage, RoutingPolicy]:
        config = self.config
        if config.router is not None:
            both = self._make(config.router, "routing", "router")
            return {Stage.CONTEXT: both, Stage.GENERATION: both}
        routers: dict[Stage, RoutingPolicy] = {}
        first = config.context_router or config.mixed_router
        if first is not None:
            routers[Stage.CONTEXT] = self._make(first, "routing", "context_router")
        if config.generation_router is not None:
            routers[Stage.GENERATION] = self._make(config.generation_router, "routing", "generation_router")
        return routers

    def _that_define(self, hook: str) -> list[RoutingPolicy]:
        """The routers for whom this hook does something."""
        different = dict.fromkeys(self._routers.values())
        return [router for router in different if getattr(type(router), hook) is not getattr(RoutingPolicy, hook)]

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: OrchestratorEvent | None, now: int, more: bool = False) -> list[OrchestratorCommand]:
        """Take `event` (None: only held requests are due) at instant `now`; held requests are tried once an instant."""
        if event is not None:
            self._take(event, now)
        if not more:
            if self._roles.ask(now, bool(self.tasks)):
                self._num_changes += 1
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
        return not self._report_hooks and not self.is_holding

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
        task = Task(request, self._serial, self._order.key(request, now), now)
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
        for router in self._report_hooks:
            router.on_report(self.fleet.row(report.executor), self.fleet.at(now))

    def _answered(self, response: Response, now: int) -> None:
        if response.report is not None:
            self._reported(response.report, now)
        self._num_changes += 1
        known = self._visits.pop(response.request_id, None)
        if known is None:
            return  # from before a retry
        task, stage, executor = known
        if stage is Stage.GENERATION and response.recomputable and self._is_promise(task):
            self._unbind(response.request_id, task, executor, now)
            return
        ok = response.error is None and response.finish_reason is not FinishReason.CANCELLED
        self._visit_over(response.request_id, task, stage, executor, ok, now)
        if response.context_start is not None:
            task.context_start = response.context_start
        if stage is not Stage.GENERATION:
            task.num_cached_tokens = response.num_cached_tokens
        elif task.prompt_executor is None:  # else it has moved before: that is part of its decode time
            task.transfer_start = response.transfer_start
            task.kv_usable = response.kv_usable
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
            if task.generation_id in self._visits:  # the first token was the last: the promise will not be kept
                self._release(task)
            if task.first_token_at is None:
                self._first_token(task, executor, response, now)
            self._end(task, Cause.FINISH, response.finish_reason, None, now, executor, response.request_id)

    def _visit_over(self, request_id: int, task: Task, stage: Stage, executor: int, ok: bool, now: int) -> None:
        """An executor owes no answer for this id any more."""
        del self._by_executor[executor][request_id]
        self.fleet.answered(executor)
        if executor in self._roles.draining:
            self._roles.answered(executor, stage, now)
        router = self._router(stage)
        if router in self._end_hooks:
            router.on_finished(_shown(task, router), stage, executor, ok, self.fleet.at(now))

    def _router(self, stage: Stage) -> RoutingPolicy:
        return self._routers[Stage.GENERATION if stage is Stage.GENERATION else Stage.CONTEXT]

    def _context_done(self, task: Task, response: Response, now: int) -> None:
        task.params = response.context_phase_params
        task.num_tokens = 1
        task.state = advance(task.state, Cause.CONTEXT_ENDS)
        self._first_token(task, response.executor, response, now)
        if task.cancelled:  # the executor got the cancel after it had answered, and has freed the KV
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif task.generation_id in self._visits:
            self._keep_promise(task)
        elif task.generation_executor is not None and self._may_generate(task.generation_executor):
            self._dispatch(task, Stage.GENERATION, task.generation_executor, now)
        else:
            self._route_generation(task, now)

    # ---- moves: generation phases that go on at another executor -----------------------------------------------------

    def _movable(self) -> dict[int, list[Request]]:
        """By executor, the requests that could be told to move: sent to generate, and their KV is not still to come."""
        found: dict[int, list[Request]] = {}
        for executor, visits in self._by_executor.items():
            tasks = [self._visits[request_id] for request_id in visits]
            found[executor] = [
                task.shown
                for task, stage, _ in tasks
                if (stage is Stage.MIXED or (stage is Stage.GENERATION and task.state is State.GENERATION_QUEUED))
                and not task.cancelled
            ]
        return found

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
        if task.prompt_executor is None:
            task.prompt_executor = task.context_executor
        task.context_executor, task.context_id = response.executor, response.request_id
        task.generation_executor = task.generation_id = None
        task.params = response.context_phase_params
        task.num_tokens = response.num_output_tokens
        task.state = advance(task.state, Cause.MOVE)
        self._first_token(task, response.executor, response, now)
        target, task.moves_to = task.moves_to, None
        if task.cancelled:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)
        elif target is not None and self._may_generate(target):
            self._dispatch(task, Stage.GENERATION, target, now)
        else:
            self._route_generation(task, now)

    def _may_generate(self, executor: int) -> bool:
        """Whether a generation phase that was bound to it may still be sent there."""
        return self.fleet.is_healthy(executor) and self.fleet.roles[executor].serves(Stage.GENERATION)

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
            self._release(task)
            self._end(task, Cause.FAIL, FinishReason.ERROR, error, now)

    def _retry(self, task: Task, now: int) -> None:
        """Run it again from its prompt; what an executor may still hold for it is given up."""
        if task.state is State.CONTEXT_DONE:
            task.state = advance(task.state, Cause.ROUTE_GENERATION)
        self._release(task)
        self._forget_visits(task, now)
        task.held_for = None
        self._waiting_for_generation.pop(task.request.id, None)
        task.state = advance(task.state, Cause.RETRY)
        task.forget_attempt()
        self._start(task, now)

    def _cancel(self, request_id: int, now: int) -> None:
        """Give a request up. Where an executor works on it, the end comes with that executor's answer."""
        task = self.tasks.get(request_id)
        if task is None:
            return
        if self._release(task):
            task.cancelled = True
        else:
            self._end(task, Cause.CANCEL, FinishReason.CANCELLED, None, now)

    def _release(self, task: Task) -> bool:
        """Tell executors that hold anything for this task to let go; whether one of them still owes an answer."""
        owed = False
        visits = ((task.generation_id, task.generation_executor), (task.context_id, task.context_executor))
        for request_id, executor in visits:
            if request_id is None or executor is None:
                continue
            if request_id in self._visits:
                owed = True
            elif request_id == task.generation_id or task.params is None:
                continue
            if executor in self._by_executor and not self.fleet.is_gone(executor):
                self._out.append(Send(executor, Cancel(request_id)))
        return owed

    def _peer_down(self, executor: int, now: int) -> None:
        self.fleet.lost(executor)
        self._num_changes += 1
        for request_id in list(self._by_executor[executor]):
            known = self._visits.pop(request_id, None)
            if known is None:
                continue
            task, stage, _ = known
            if stage is Stage.GENERATION and self._is_promise(task):
                self._unbind(request_id, task, executor, now)
                continue
            self._visit_over(request_id, task, stage, executor, False, now)
            self._failed(task, f"executor {executor} is gone", True, now)
        for task in list(self._waiting_for_generation.values()):
            if task.context_executor == executor:
                self._failed(task, f"executor {executor}, which held the KV, is gone", True, now)

    def _fire(self, what: str, subject: int, now: int) -> None:
        if what == "held":
            self._num_changes += 1  # a Hold's `until` has come: ask again at the end of this instant
        elif what == "allotted":
            task = self.tasks.get(subject)
            if task is not None:
                limit = (task.request.allotted_time or 0) // 10**9
                self._abandon(task, f"the allotted {limit} ms ran out", now)
        elif what == "renew":
            self._renew(now)
        elif what == ROLES:
            self._roles.woken(subject)
        elif what == MOVES:
            self._moves.woken()

    def _abandon(self, task: Task, error: str, now: int) -> None:
        """Fail a task at once, without waiting for the answers of executors that work on it."""
        self._release(task)
        self._end(task, Cause.FAIL, FinishReason.ERROR, error, now)

    def _forget_visits(self, task: Task, now: int) -> None:
        """Answers that executors still owe for this task are not waited for."""
        for request_id in (task.context_id, task.generation_id):
            known = self._visits.pop(request_id, None) if request_id is not None else None
            if known is not None and request_id is not None:
                self._visit_over(request_id, *known, ok=False, now=now)

    def _renew(self, now: int) -> None:
        """While no generation executor is bound, the lease of the held KV is ours to renew."""
        self._renewal_armed = False
        held: dict[int, list[int]] = {}
        for task in self._waiting_for_generation.values():
            if task.context_executor is not None and task.context_id is not None:
                held.setdefault(task.context_executor, []).append(task.context_id)
        for executor, ids in held.items():
            self._out.append(Send(executor, LeaseRenewed(tuple(ids))))
        if held:
            self._arm_renewal(now)

    def _arm_renewal(self, now: int) -> None:
        if not self._renewal_armed:
            self._renewal_armed = True
            self._timers.set(now + self._lease // 3, "renew")

    # ---- routing ----------------------------------------------------------------------------------------------------

    def _start(self, task: Task, now: int) -> None:
        """Admit the request if it is not yet, and route its context phase."""
        fleet = self.fleet.at(now)
        if not task.admitted:
            admission = self._admission.admit(task.shown, fleet)
            if not isinstance(admission, Admit):
                self._decided(task, "admission", admission, None, now)
                if isinstance(admission, Hold):
                    self._hold(task, Stage.CONTEXT, admission.until, now)
                else:
                    self._end(task, Cause.FAIL, FinishReason.REJECTED, admission.reason, now)
                return
            task.admitted = True
        if self.config.skip_context_phase:
            self._skip_context(task, now)
            return
        pool = fleet.context if fleet.context.num_healthy else fleet.mixed
        if not pool.num_healthy:
            self._end(task, Cause.FAIL, FinishReason.ERROR, "no healthy executor is left to run its context phase", now)
            return
        router = self._routers[Stage.CONTEXT]
        answer = in_plain_integers(router.route_context(_shown(task, router), fleet))
        self._decided(task, "context", answer, pool, now)
        match answer:
            case Route(context=context, generation=generation) if context is not None:
                executor = self._checked(context, (Role.CONTEXT, Role.MIXED), answer)
                binds = self.config.generation_binding == AT_ARRIVAL and task.request.max_tokens > 1
                if generation is not None:
                    task.generation_executor = self._checked(generation, (Role.GENERATION, Role.MIXED), answer)
                elif binds:
                    self._bind_early(task, executor, now)
                self._dispatch(task, Stage.CONTEXT, executor, now)
                if binds:
                    self._promise(task, now)
            case RouteMixed(executor=mixed):
                self._dispatch(task, Stage.MIXED, self._checked(mixed, (Role.MIXED,), answer), now)
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
        pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        if not pool.num_healthy:
            return
        router = self._routers[Stage.GENERATION]
        fleet.context_executor = context
        answer = in_plain_integers(router.route_generation(_shown(task, router), fleet))
        self._decided(task, "generation", answer, pool, now)
        if isinstance(answer, Route) and answer.generation is not None:
            task.generation_executor = self._checked(answer.generation, (Role.GENERATION, Role.MIXED), answer)
        elif not isinstance(answer, Hold):  # holding means to decide when the context phase is done
            raise PolicyError(f"a generation phase cannot be bound early by {answer!r}; allowed: Route, Hold")

    def _first_token_out(self, event: FirstTokenOut, now: int) -> None:
        task, _, executor = self._visits.get(event.request_id, (None, None, None))
        if task is None or executor is None or task.first_token_at is not None:
            return
        task.context_start = event.context_start
        task.first_token_at = now
        self._out.append(Deliver(task.request.id, None, 1, executor, event.request_id))

    def _context_started(self, event: ContextStarted, now: int) -> None:
        task, _, executor = self._visits.get(event.request_id, (None, None, None))
        if task is None or executor is None or task.cancelled or task.generation_id is not None:
            return
        if task.generation_executor is None:
            self._bind_early(task, executor, now)
        self._promise(task, now)

    # ---- promises: generation phases that are sent to their executor before their context phase is done --------------

    def _promise(self, task: Task, now: int) -> None:
        """Have the executor that the generation phase is bound to reserve blocks and get ready for its KV."""
        executor = task.generation_executor
        if executor is None or task.context_id is None or task.context_executor is None:
            return
        if executor == task.context_executor or not self._may_generate(executor):
            return  # nothing travels, or it is routed when it is due
        request = task.request
        self._next_id += 1
        request_id = task.generation_id = self._next_id
        sent = replace(
            request,
            id=request_id,
            client_id=request.id,
            request_type=RequestType.GENERATION_ONLY,
            context_phase_params=ContextPhaseParams(
                task.context_id, task.context_executor, request.num_prompt_tokens, is_promised=True
            ),
        )
        self._send_off(task, Stage.GENERATION, executor, Enqueue(sent), now)

    def _is_promise(self, task: Task) -> bool:
        """Whether its generation phase was sent off before its context phase, which is still owed, is done."""
        return not task.cancelled and task.context_id in self._visits and task.generation_id is not None

    def _keep_promise(self, task: Task) -> None:
        if task.generation_id is None or task.generation_executor is None or task.params is None:
            return
        task.state = advance(task.state, Cause.ROUTE_GENERATION)
        self._out.append(Send(task.generation_executor, FirstTokens(task.generation_id, task.params.first_gen_tokens)))

    def _unbind(self, request_id: int, task: Task, executor: int, now: int) -> None:
        """An early binding came to nothing and nothing is lost: the generation phase is routed when it is due."""
        self._visit_over(request_id, task, Stage.GENERATION, executor, False, now)
        task.generation_executor = task.generation_id = None

    def _route_generation(self, task: Task, now: int) -> None:
        fleet = self.fleet.at(now)
        pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        if not pool.num_healthy:
            self._release(task)
            self._end(
                task, Cause.FAIL, FinishReason.ERROR, "no healthy executor is left to run its generation phase", now
            )
            return
        router = self._routers[Stage.GENERATION]
        fleet.context_executor = task.context_executor
        told = replace(_shown(task, router), context_phase_params=task.params)
        answer = in_plain_integers(router.route_generation(told, fleet))
        self._decided(task, "generation", answer, pool, now)
        match answer:
            case Route(generation=generation) if generation is not None:
                executor = self._checked(generation, (Role.GENERATION, Role.MIXED), answer)
                self._dispatch(task, Stage.GENERATION, executor, now)
            case Hold(until=until):
                self._hold(task, Stage.GENERATION, until, now)
                self._waiting_for_generation[task.request.id] = task
                self._arm_renewal(now)
            case Reject(reason=reason):
                self._release(task)
                self._end(task, Cause.FAIL, FinishReason.REJECTED, reason, now)
            case _:
                raise PolicyError(f"a generation phase cannot be routed by {answer!r}")

    def _checked(self, executor: int, roles: tuple[Role, ...], answer: Routing) -> int:
        """The executor a policy named; PolicyError if it cannot serve that phase."""
        role = self.fleet.roles.get(executor)
        if role not in roles or not self.fleet.is_healthy(executor):
            can = [e for e, r in self.fleet.roles.items() if r in roles and self.fleet.is_healthy(e)]
            state = (
                "unknown" if role is None else f"{role.value}, {'' if self.fleet.is_healthy(executor) else 'un'}healthy"
            )
            raise PolicyError(f"{answer!r} names executor {executor} ({state}); allowed here: {can}")
        return executor

    def _dispatch(self, task: Task, stage: Stage, executor: int, now: int) -> None:
        self._next_id += 1
        request_id = self._next_id
        request = task.request
        announces = False
        if stage is Stage.GENERATION:
            self._waiting_for_generation.pop(request.id, None)
            task.state = advance(task.state, Cause.ROUTE_GENERATION)
            task.generation_executor, task.generation_id = executor, request_id
            sent = replace(
                request,
                id=request_id,
                client_id=request.id,
                request_type=RequestType.GENERATION_ONLY,
                context_phase_params=task.params,
            )
        else:
            self._order.on_served(task.shown, task.order_key, now)
            task.attempts += 1
            task.state = advance(task.state, Cause.START)
            task.context_executor, task.context_id = executor, request_id
            kind = RequestType.CONTEXT_ONLY if stage is Stage.CONTEXT else RequestType.CONTEXT_AND_GENERATION
            if stage is Stage.MIXED:
                task.generation_executor = executor
            elif self.config.generation_binding == AT_CONTEXT_START:
                announces = request.max_tokens > 1
            sent = replace(request, id=request_id, client_id=request.id, request_type=kind)
        self._send_off(task, stage, executor, Enqueue(sent, announces), now)

    def _send_off(self, task: Task, stage: Stage, executor: int, message: Enqueue, now: int) -> None:
        request_id, num_tokens = message.request.id, message.request.num_prompt_tokens
        self._visits[request_id] = (task, stage, executor)
        self._by_executor[executor][request_id] = None
        self.fleet.dispatched(executor, num_tokens, message.request.block_hashes)
        self._out.append(Dispatched(task.request.id, executor, message.request))
        self._out.append(Send(executor, message))
        router = self._router(stage)
        if router in self._dispatch_hooks:
            router.on_dispatched(_shown(task, router), stage, executor, self.fleet.at(now))

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
        self._waiting_for_generation.pop(request_id, None)
        self._out.append(Deliver(request_id, reason, task.num_tokens, executor, executor_request, error))
        self._out.append(Record(task.row(reason, error, now)))
