"""A core on a desk: events are handed to it one by one, and its commands are looked at. Helper of the tests of the core."""

from __future__ import annotations

from typing import Any, TypeVar

from disagg.core.commands import ORCHESTRATOR, ReceiveKv, RunSteps, Send, ServeKv, StopAfterStep, WakeAt
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.events import Enqueue, KvReceived, KvRequested, Report, Response, StepsDone, Stopped, Wake
from disagg.core.executor import ExecutorCore
from disagg.core.orchestrator import OrchestratorCore
from disagg.policies.vocabulary import ContextPhaseParams, Request, RequestType, Role

C = TypeVar("C")
FAR = 10**15
LEASE = 3000
TIMEOUT = 1000


def executor_config(
    role: Role = Role.MIXED, num_blocks: int = 100, id: int = 2, capacity: str = "guaranteed_no_evict", **changes: Any
) -> ExecutorConfig:
    """Blocks of 4 tokens, leases of 3000 ps, transfers of at most 1000 ps, no reports by interval."""
    scheduler = {
        name: changes.pop(name)
        for name in ("max_batch_size", "max_num_tokens", "chunked_context", "batching", "queue_order")
        if name in changes
    }
    scheduler = {n: PolicySpec(v) if isinstance(v, str) else v for n, v in scheduler.items()}
    fields = {
        "tokens_per_block": 4,
        "lease": LEASE,
        "transfer_timeout_base": TIMEOUT,
        "report_interval": FAR,
        **changes,
    }
    return ExecutorConfig(id, role, num_blocks, scheduler=SchedulerConfig(capacity=capacity, **scheduler), **fields)


class ExecutorDesk:
    """`now` is the instant of the next event; the plan outstanding is `run`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.core = ExecutorCore(executor_config(*args, **kwargs))
        self.now = 0
        self.last: list[Any] = []
        self.history: list[Any] = []
        self.run: RunSteps | None = None
        self.wake_at: int | None = None

    def give(self, *events: Any, at: int | None = None) -> ExecutorDesk:
        """All `events` in one instant, and the planning pass at its end."""
        if at is not None:
            self.now = at
        self.last = []
        for event in events:
            self.last += self.core.handle(event, self.now, True)
        self.last += self.core.handle(None, self.now)
        self.history += self.last
        for command in self.last:
            if isinstance(command, RunSteps):
                self.run = command
            elif isinstance(command, WakeAt):
                self.wake_at = command.at
        self.core.check()
        return self

    def end_steps(self, steps: int | None = None, *stopped: Stopped, at: int | None = None, more: Any = ()) -> None:
        """The outstanding plan ends, after all its steps or at step `steps` of its epoch; `more` comes before it."""
        assert self.run is not None
        run, self.run = self.run, None
        self.give(*more, StepsDone(run.plan, run.epoch, steps or run.last_step, stopped), at=at)

    def wake(self) -> ExecutorDesk:
        """The wake-up that the core asked for, at its time; nothing else happens."""
        assert self.wake_at is not None
        at, self.wake_at = self.wake_at, None
        return self.give(Wake(), at=at)

    def of(self, kind: type[C]) -> list[C]:
        """Commands of this kind from the last instant."""
        return [command for command in self.last if isinstance(command, kind)]

    @property
    def responses(self) -> list[Response]:
        return [
            command.message
            for command in self.of(Send)
            if command.to == ORCHESTRATOR and isinstance(command.message, Response)
        ]

    @property
    def response(self) -> Response:
        (response,) = self.responses
        return response

    @property
    def all_answers(self) -> list[int]:
        """The ids answered so far, in order."""
        return [c.message.request_id for c in self.history if isinstance(c, Send) and isinstance(c.message, Response)]

    @property
    def pull(self) -> ReceiveKv:
        (pull,) = self.of(ReceiveKv)
        return pull

    @property
    def served(self) -> ServeKv:
        (served,) = self.of(ServeKv)
        return served

    @property
    def asked_to_stop(self) -> bool:
        return bool(self.of(StopAfterStep))

    @property
    def free(self) -> int:
        return self.core.blocks.num_free

    @property
    def report(self) -> Report:
        return self.core.report()

    def until_context_done(self, request_id: int = 1, prompt: int = 8) -> Response:
        """A context-only request that has just answered, its KV held."""
        self.give(context(request_id, prompt))
        while not self.responses:
            self.end_steps(at=self.now + 10)
        return self.response

    def until_in_flight(self, request_id: int = 1, prompt: int = 8, max_tokens: int = 5) -> ReceiveKv:
        self.give(generation(request_id, prompt, max_tokens))
        return self.pull

    def until_decoding(self, request_id: int = 1, prompt: int = 8, max_tokens: int = 5) -> RunSteps:
        self.until_in_flight(request_id, prompt, max_tokens)
        self.give(KvReceived(request_id, True))
        assert self.run is not None
        return self.run


def context(id: int = 1, prompt: int = 8, max_tokens: int = 5) -> Enqueue:
    return Enqueue(Request(id, prompt, max_tokens, RequestType.CONTEXT_ONLY))


def both(id: int = 1, prompt: int = 8, max_tokens: int = 5) -> Enqueue:
    return Enqueue(Request(id, prompt, max_tokens, RequestType.CONTEXT_AND_GENERATION))


def generation(id: int = 1, prompt: int = 8, max_tokens: int = 5, source: int = 1, source_id: int = 77) -> Enqueue:
    params = ContextPhaseParams(source_id, source, prompt)
    return Enqueue(Request(id, prompt, max_tokens, RequestType.GENERATION_ONLY, context_phase_params=params))


def asks(request_id: int = 1, reader: int = 9, reader_id: int = 50) -> KvRequested:
    return KvRequested(request_id, reader, reader_id)


class OrchestratorDesk:
    """An orchestrator of context executors 1 and 2, generation executors 3 and 4, or others."""

    def __init__(self, roles: str = "CCGG", /, router: str = "round_robin", **config: Any) -> None:
        names = {"C": Role.CONTEXT, "G": Role.GENERATION, "M": Role.MIXED}
        executors = tuple(executor_config(names[r], id=i) for i, r in enumerate(roles, 1))
        spec = PolicySpec(router)
        config = {"context_router": spec, "generation_router": spec, "mixed_router": spec, **config}
        self.core = OrchestratorCore(OrchestratorConfig(executors, **config))
        self.now = 0
        self.last: list[Any] = []
        self.history: list[Any] = []
        self.wake_at: int | None = None

    def give(self, *events: Any, at: int | None = None) -> OrchestratorDesk:
        if at is not None:
            self.now = at
        self.last = []
        for event in events:
            self.last += self.core.handle(event, self.now, True)
        self.last += self.core.handle(None, self.now)
        self.history += self.last
        for command in self.last:
            if isinstance(command, WakeAt):
                self.wake_at = command.at
        return self

    def wake(self) -> OrchestratorDesk:
        assert self.wake_at is not None
        at, self.wake_at = self.wake_at, None
        return self.give(Wake(), at=at)

    def of(self, kind: type[C]) -> list[C]:
        return [command for command in self.last if isinstance(command, kind)]

    def sent(self, kind: type[C]) -> list[tuple[int, C]]:
        """(executor, message) of each message of this kind from the last instant."""
        return [(c.to, c.message) for c in self.of(Send) if isinstance(c.message, kind)]

    @property
    def enqueued(self) -> tuple[int, Request]:
        """Executor and request of the one Enqueue of the last instant."""
        ((executor, message),) = self.sent(Enqueue)
        return executor, message.request
