"""What was sent to which executor and is not answered yet. Ids are the orchestrator's own, one per attempt and phase.

So a late message from before a retry is about an id that nobody knows any more, and harmless. With early binding a
generation phase is sent off as a promise, before its context phase is done.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from ..policies.vocabulary import ContextPhaseParams, Request, RequestType, Stage
from .commands import Dispatched, OrchestratorCommand, Send
from .config import OrchestratorConfig
from .events import Cancel, Enqueue, FirstTokens
from .fleet import Fleet
from .life_cycle import Cause, State, advance
from .routers import Routers
from .task import Task


class Dispatches:
    """`announces`: executors are to say when a context phase starts. `emit` takes commands."""

    def __init__(
        self,
        config: OrchestratorConfig,
        fleet: Fleet,
        routers: Routers,
        announces: bool,
        emit: Callable[[OrchestratorCommand], object],
    ) -> None:
        self._fleet = fleet
        self._routers = routers
        self._announces = announces
        self._emit = emit
        self._owed: dict[int, tuple[Task, Stage, int]] = {}  # executor-level id: (task, stage, executor)
        self._by_executor: dict[int, dict[int, None]] = {e.id: {} for e in config.executors}  # its ids, in order
        self._next_id = 0

    # ---- what is owed -----------------------------------------------------------------------------------------------

    def is_owed(self, request_id: int | None) -> bool:
        """Whether an executor owes an answer for that id."""
        return request_id in self._owed

    def get(self, request_id: int) -> tuple[Task | None, Stage | None, int | None]:
        """Task, stage and executor; all None for an id from before a retry."""
        return self._owed.get(request_id, (None, None, None))

    def pop(self, request_id: int) -> tuple[Task, Stage, int] | None:
        """The answer is here, or not waited for any more; `closed` is to follow."""
        return self._owed.pop(request_id, None)

    def closed(self, request_id: int, executor: int) -> None:
        """The executor owes nothing for this id any more."""
        del self._by_executor[executor][request_id]
        self._fleet.answered(executor)

    def owed_by(self, executor: int) -> list[int]:
        return list(self._by_executor[executor])

    def stages_at(self, executor: int) -> list[Stage]:
        return [self._owed[request_id][1] for request_id in self._by_executor[executor]]

    def movable(self) -> dict[int, list[Request]]:
        """By executor, the requests that could be told to move: sent to generate, and their KV is not still to come."""
        found: dict[int, list[Request]] = {}
        for executor, request_ids in self._by_executor.items():
            tasks = [self._owed[request_id] for request_id in request_ids]
            found[executor] = [
                task.shown
                for task, stage, _ in tasks
                if (stage is Stage.MIXED or (stage is Stage.GENERATION and task.state is State.GENERATION_QUEUED))
                and not task.cancelled
            ]
        return found

    def may_generate(self, executor: int) -> bool:
        """Whether a generation phase that was bound to it may still be sent there."""
        return self._fleet.is_healthy(executor) and self._fleet.roles[executor].serves(Stage.GENERATION)

    def release(self, task: Task) -> bool:
        """Tell executors that hold anything for this task to let go; whether one of them still owes an answer."""
        owed = False
        phases = ((task.generation_id, task.generation_executor), (task.context_id, task.context_executor))
        for request_id, executor in phases:
            if request_id is None or executor is None:
                continue
            if request_id in self._owed:
                owed = True
            elif request_id == task.generation_id or task.params is None:
                continue
            if executor in self._by_executor and not self._fleet.is_gone(executor):
                self._emit(Send(executor, Cancel(request_id)))
        return owed

    # ---- sending ----------------------------------------------------------------------------------------------------

    def send_context(self, task: Task, stage: Stage, executor: int, now: int) -> None:
        """Its context phase, or, where `stage` is mixed, all of it."""
        request = task.request
        self._next_id += 1
        request_id = self._next_id
        task.attempts += 1
        task.state = advance(task.state, Cause.START)
        task.context_executor, task.context_id = executor, request_id
        kind, announces = RequestType.CONTEXT_ONLY, self._announces and request.max_tokens > 1
        if stage is Stage.MIXED:
            task.generation_executor = executor
            kind, announces = RequestType.CONTEXT_AND_GENERATION, False
        sent = replace(request, id=request_id, client_id=request.id, request_type=kind)
        self._send_off(task, stage, executor, Enqueue(sent, announces), now)

    def send_generation(self, task: Task, executor: int, now: int) -> None:
        """Its generation phase, where its context phase is done."""
        task.state = advance(task.state, Cause.ROUTE_GENERATION)
        self._send_generation(task, executor, task.params, now)
        self._count_transfer(task.params, executor, now)

    def promise(self, task: Task, now: int) -> None:
        """Have the executor that the generation phase is bound to reserve blocks and get ready for its KV."""
        executor = task.generation_executor
        if executor is None or task.context_id is None or task.context_executor is None:
            return
        if executor == task.context_executor or not self.may_generate(executor):
            return  # nothing travels, or it is routed when it is due
        num_tokens = task.request.num_prompt_tokens
        params = ContextPhaseParams(task.context_id, task.context_executor, num_tokens, is_promised=True)
        self._send_generation(task, executor, params, now)

    def is_promise(self, task: Task) -> bool:
        """Whether its generation phase was sent off before its context phase, which is still owed, is done."""
        return not task.cancelled and task.context_id in self._owed and task.generation_id is not None

    def keep_promise(self, task: Task, now: int) -> None:
        """Its context phase is done, and its generation phase where it is to be."""
        if task.generation_id is None or task.generation_executor is None or task.params is None:
            return
        task.state = advance(task.state, Cause.ROUTE_GENERATION)
        self._emit(Send(task.generation_executor, FirstTokens(task.generation_id, task.params.first_gen_tokens)))
        self._count_transfer(task.params, task.generation_executor, now)

    def _count_transfer(self, params: ContextPhaseParams | None, executor: int, now: int) -> None:
        links = self._fleet.links
        if links is not None and links.is_asked and params is not None:
            links.sent(params.executor, executor, params.num_kv_tokens, now)

    def _send_generation(self, task: Task, executor: int, params: ContextPhaseParams | None, now: int) -> None:
        request = task.request
        self._next_id += 1
        task.generation_executor, task.generation_id = executor, self._next_id
        sent = replace(
            request,
            id=self._next_id,
            client_id=request.id,
            request_type=RequestType.GENERATION_ONLY,
            context_phase_params=params,
        )
        self._send_off(task, Stage.GENERATION, executor, Enqueue(sent), now)

    def _send_off(self, task: Task, stage: Stage, executor: int, message: Enqueue, now: int) -> None:
        request_id, num_tokens = message.request.id, message.request.num_prompt_tokens
        self._owed[request_id] = (task, stage, executor)
        self._by_executor[executor][request_id] = None
        self._fleet.dispatched(executor, num_tokens, message.request.block_hashes)
        self._emit(Dispatched(task.request.id, executor, message.request))
        self._emit(Send(executor, message))
        self._routers.dispatched(task, stage, executor, now)
