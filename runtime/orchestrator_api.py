"""Orchestrator mode, for users on rank 0: a cluster's executors behind one object. Replaceable by a user's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, overload

from msgspec.structs import replace

from ..core.events import Report
from ..policies.vocabulary import Request, RequestType, Role
from .executor_answers import Answers, Response
from .executor_inbox import Submitted
from .executor_rank import ExecutorRank
from .executor_spec import HardwareSpec, SpecError
from .executor_tokens import check_tokens
from .leader_executor import Closing, join
from .mpi_world import MpiWorld
from .orchestrator_driver import FIRST_DIRECT_ID, OrchestratorDriver
from .rank_record import RankInfo
from .session_record import SessionRecord


def serve(spec: HardwareSpec, world: MpiWorld | None = None) -> None:
    """Orchestrator mode, every rank but 0: be a rank of an executor until rank 0 ends the cluster.

    Raises what `DisaggExecutorOrchestrator` raises, and ExecutorBrokenError when a rank of the same executor dies.
    """
    roster, world = join(spec, world)
    rank = ExecutorRank(world, roster)
    rank.serve()
    rank.close()


class DisaggExecutorOrchestrator(Closing):
    """Orchestrator mode, rank 0: the executors of a cluster behind one object. Ranks 1… call `serve`.

    Two levels. `submit` hands a whole request to the cluster's policies: they route it, hand it over, retry it.
    `enqueue_context` and `enqueue_generation` leave all that to the caller, who names the executors. Ids are global;
    executors know requests by ids of their own. Raises what `Executor` raises, and ClusterError if a rank cannot start.
    """

    def __init__(self, spec: HardwareSpec, world: MpiWorld | None = None) -> None:
        if spec.leader_mode:
            raise SpecError("leader_mode has no orchestrator: each process makes an Executor")
        self._roster, world = join(spec, world)
        self._whole, self._context, self._generation = Answers(), Answers(), Answers()
        self._whole_ids = itertools.count(1)
        self._direct_ids = itertools.count(FIRST_DIRECT_ID)
        self._is_context: dict[int, bool] = {}
        self._driver = OrchestratorDriver(world, self._roster, self)
        self._is_shut_down = False
        try:
            self._driver.start()
            self._driver.open_session()
        except BaseException:
            self._driver.abandon()
            raise

    def __enter__(self) -> DisaggExecutorOrchestrator:
        return self

    # ---- the executors -----------------------------------------------------------------------------------------------

    @property
    def context_executors(self) -> list[int]:
        """Ids of the executors that take context-only requests."""
        return self._of_roles(Role.CONTEXT, Role.MIXED)

    @property
    def generation_executors(self) -> list[int]:
        return self._of_roles(Role.GENERATION, Role.MIXED)

    @property
    def ranks(self) -> list[RankInfo]:
        """What each rank holds."""
        return [self._driver.ranks[rank] for rank in sorted(self._driver.ranks)]

    def latest_report(self, executor: int) -> Report | None:
        """An executor's load as it last reported it."""
        return self._driver.reports.get(executor)

    def change_role(self, executor: int, role: Role) -> None:
        """Have `executor` serve `role` from now on; it finishes what it has. An order that would leave nobody to compute
        prompts, or to generate, changes nothing and is recorded as refused. Raises SpecError.
        """
        if executor not in self._roster.configs:
            raise SpecError(f"there is no executor {executor}; allowed: {list(self._roster.configs)}")
        if self._roster.spec.transport is None:
            raise SpecError("roles cannot change where no KV can travel; allowed: a transport")
        if role not in list(Role):
            raise SpecError(f"{role!r} is no role; allowed: {', '.join(Role)}")
        self._driver.change_role(executor, Role(role))

    def can_enqueue(self) -> bool:
        return not self._is_shut_down and self._driver.failure is None

    # ---- routed by policy --------------------------------------------------------------------------------------------

    def submit(self, request: Request, output_length: int | None = None) -> int:
        """The id to await. The request's type is the policies' business. Raises TokenError."""
        self._check(request, RequestType.CONTEXT_AND_GENERATION)
        request_id = next(self._whole_ids)
        self._whole.expect(request_id, request.streaming)
        request = self._roster.named(replace(request, id=request_id, arrival=self._driver.clock.read()))
        self._driver.submit(Submitted(request, output_length))
        return request_id

    @overload
    def await_responses(self, ids: int | None = None, timeout: float | None = None) -> list[Response]: ...
    @overload
    def await_responses(self, ids: Sequence[int], timeout: float | None = None) -> list[list[Response]]: ...

    def await_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """Of submitted requests; see `Answers.await_responses`."""
        return self._whole.await_responses(ids, timeout)

    def cancel_request(self, request_id: int) -> None:
        """Of either level. Its final response says `cancelled`, unless it ended before. Unknown ids are ignored."""
        self._driver.cancel(request_id)

    # ---- routed by the caller ----------------------------------------------------------------------------------------

    def enqueue_context(
        self, requests: Iterable[Request], executor: int, output_lengths: Sequence[int | None] | None = None
    ) -> list[int]:
        """Run the context phases of context-only `requests` on `executor`; the ids to await.

        Raises TokenError, SpecError for another request type or an executor without that role.
        """
        return self._enqueue(
            list(requests), executor, output_lengths, RequestType.CONTEXT_ONLY, self.context_executors, self._context
        )

    def enqueue_generation(
        self, requests: Iterable[Request], executor: int, output_lengths: Sequence[int | None] | None = None
    ) -> list[int]:
        """Run the generation phases of generation-only `requests`, each with the `context_phase_params` that its
        context response brought, on `executor`; the ids to await. Raises as `enqueue_context`.
        """
        kind, executors = RequestType.GENERATION_ONLY, self.generation_executors
        return self._enqueue(list(requests), executor, output_lengths, kind, executors, self._generation)

    def await_context_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """See `Answers.await_responses`."""
        return self._context.await_responses(ids, timeout)

    def await_generation_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """See `Answers.await_responses`. The first token is in the context's response and in these."""
        return self._generation.await_responses(ids, timeout)

    def _enqueue(
        self,
        requests: list[Request],
        executor: int,
        output_lengths: Sequence[int | None] | None,
        kind: RequestType,
        allowed: list[int],
        answers: Answers,
    ) -> list[int]:
        if executor not in allowed:
            raise SpecError(f"executor {executor} takes no {kind.name} requests; allowed: {allowed}")
        for each in requests:
            self._check(each, kind)
        lengths = output_lengths if output_lengths is not None else [None] * len(requests)
        ids = []
        for each, length in zip(requests, lengths, strict=True):
            request_id = next(self._direct_ids)
            self._is_context[request_id] = kind is RequestType.CONTEXT_ONLY
            answers.expect(request_id, each.streaming)
            self._driver.submit(Submitted(self._roster.named(replace(each, id=request_id)), length, executor))
            ids.append(request_id)
        return ids

    def shutdown(self, drain: bool = True) -> SessionRecord | None:
        """End the cluster: `drain` finishes what is there, otherwise it fails. What the session recorded.

        Raises what the cluster failed with.
        """
        if self._is_shut_down:
            return None
        self._is_shut_down = True
        try:
            record = self._driver.close_session(drain)
        except BaseException:
            self._driver.abandon()
            raise
        self._driver.end()
        return record

    # ---- a Listener --------------------------------------------------------------------------------------------------

    def tokens(self, request_id: int, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._answers_of(request_id).tokens(request_id, first_index, token_ids)

    def ended(self, request_id: int, reason: Any, error: str | None, params: Any) -> None:
        self._answers_of(request_id).ended(request_id, reason, error, params)
        self._is_context.pop(request_id, None)

    def broken(self, error: str) -> None:
        for answers in (self._whole, self._context, self._generation):
            answers.broken(error)

    # ---- small helpers -----------------------------------------------------------------------------------------------

    def _answers_of(self, request_id: int) -> Answers:
        if request_id < FIRST_DIRECT_ID:
            return self._whole
        return self._context if self._is_context.get(request_id) else self._generation

    def _check(self, request: Request, kind: RequestType) -> None:
        if not self.can_enqueue():
            raise RuntimeError(f"the orchestrator is shut down, or has failed: {self._driver.failure}")
        if request.request_type is not kind:
            raise SpecError(f"a request of type {request.request_type.name}; allowed here: {kind.name}")
        check_tokens(request, self._roster.shape.vocab_size)

    def _of_roles(self, *roles: Role) -> list[int]:
        now = self._driver.roles
        return [config.id for config in self._roster.configs.values() if now.get(config.id, config.role) in roles]
