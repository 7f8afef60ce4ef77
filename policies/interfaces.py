"""What decides: one small interface per kind of decision, used unmodified by the simulator and by the runtime.

A policy sees views, answers with a value of `vocabulary.py`, and the core checks the answer. It holds no executor, reads
no clock (`fleet.now` is the time) and takes chance from the seeded generator it is given, so that a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import (
    PS_PER_MS,
    Admission,
    BatchPlan,
    ChangeRole,
    Hold,
    MoveRequest,
    Request,
    Role,
    Route,
    RouteMixed,
    Routing,
    Stage,
)
from .vocabulary import (
    PolicyError as PolicyError,
)

_INFINITE: Final = float("inf")


def _undefined(policy: object, method: str) -> PolicyError:
    return PolicyError(f"{type(policy).__name__} does not define {method}, and was asked for it")


class RoutingPolicy:
    """Chooses where each phase of a request runs.

    `route_context` is asked when a request is due for its context phase and may answer Route(context), Route(context,
    generation) to bind both at once, RouteMixed(executor), Hold or Reject. `route_generation` is asked when the context
    phase is done and answers Route(generation=...), Hold or Reject; the request then carries `context_phase_params`. With
    early binding it is asked before, without them. `fleet.context_executor` names the executor of the context phase.
    The hooks tell a stateful policy what became of its answers.
    """

    is_oracle: ClassVar[bool] = False  # True: is told true output lengths; reports mark it

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        raise _undefined(self, "route_context")

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        raise _undefined(self, "route_generation")

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        """`request` was sent to `executor` for `stage`."""

    def on_finished(self, request: Request, stage: Stage, executor: int, ok: bool, fleet: FleetView) -> None:
        """`executor` answered; `ok` False if it failed or was cancelled."""

    def on_report(self, executor: ExecutorRow, fleet: FleetView) -> None:
        """A report of `executor` was received; the row already shows it."""


class SelectingPolicy(RoutingPolicy):
    """A policy that picks one executor of the pool in question, by the same rule at each stage.

    The context stage picks among the context executors, or, in a cluster that has none, among the mixed ones.
    Only `select` is left to write.
    """

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        """One healthy row of `pool`, which has at least one."""
        raise _undefined(self, "select")

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.context if fleet.context.num_healthy else fleet.mixed
        row = self.select(request, pool)
        if not isinstance(row, ExecutorRow):
            return row  # Hold
        if pool.role is Role.MIXED:
            return RouteMixed(row.executor_id)
        return Route(context=row.executor_id)

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        row = self.select(request, pool)
        return Route(generation=row.executor_id) if isinstance(row, ExecutorRow) else row


class ScoringPolicy(SelectingPolicy):
    """The executor with the least score; equal scores are served in turn (round robin).

    `score` is one expression over columns. It is given the whole pool when its columns are numpy arrays, and row by row
    when the pool is small; `executors.role` tells the stage.
    """

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)
        self._turn: dict[Role, int] = {}

    def score(self, request: Request, executors: Any) -> Any:
        """Lower is better. `executors` is an ExecutorPool of arrays or one ExecutorRow, with the same attributes."""
        raise _undefined(self, "score")

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        turn = self._turn.get(pool.role, 0)
        index = self._least_vectorised(request, pool, turn) if pool.vectorised else self._least(request, pool, turn)
        self._turn[pool.role] = index + 1
        return pool.rows[index]

    def _least(self, request: Request, pool: ExecutorPool, turn: int) -> int:
        best: Any = None
        chosen = -1
        for row in pool.healthy_rows:
            score = self.score(request, row)
            if type(score) is not int:
                try:
                    is_number = bool(score <= _INFINITE)  # false for NaN
                except (TypeError, ValueError):
                    is_number = False
                if not is_number:
                    raise self._not_a_number(row.executor_id)
            # among equals the first at or after `turn`, else the first of all
            if chosen < 0 or score < best or (score == best and chosen < turn <= row.index):
                best, chosen = score, row.index
        return chosen

    def _least_vectorised(self, request: Request, pool: ExecutorPool, turn: int) -> int:
        scores = np.asarray(self.score(request, pool))
        if not scores.ndim:  # it read no column: one number for all
            scores = np.full(len(pool), scores)
        candidates = None
        if pool.num_unhealthy:
            candidates = np.flatnonzero(pool.healthy)
            scores = scores[candidates]
            turn = int(candidates.searchsorted(turn))
        # the first of the least from `turn` on, if none before is less; argmin finds NaN before anything else
        chosen = turn + int(scores[turn:].argmin()) if turn < len(scores) else 0
        if turn:
            first = int(scores[:turn].argmin())
            if scores[first] < scores[chosen] or scores[first] != scores[first]:  # NaN behind stays chosen
                chosen = first
        if scores[chosen] != scores[chosen]:
            ids = pool.executor_id if candidates is None else pool.executor_id[candidates]
            raise self._not_a_number(ids[np.isnan(scores)][0])
        return chosen if candidates is None else int(candidates[chosen])

    def _not_a_number(self, executor: int) -> PolicyError:
        return PolicyError(f"{type(self).__name__}: the score of executor {executor} is not a number")


class AdmissionPolicy:
    """Whether a request enters the cluster at all, asked before it is routed."""

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        raise _undefined(self, "admit")


class QueueOrder:
    """In which order waiting requests are served. Ties keep the order of arrival."""

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def key(self, request: Request, now: int) -> Any:
        """Smallest first; taken once, when the request joins the queue."""
        raise _undefined(self, "key")

    def on_served(self, request: Request, key: Any, now: int) -> None:
        """`request`, whose key is `key`, has left the queue: for an executor, or there for its first step or its KV."""


class WaitingPrompt(Protocol):
    """A prompt that a step could work on. `num_blocks` is what admitting it would take: 0 once it has begun."""

    @property
    def request_id(self) -> int: ...
    @property
    def num_tokens_left(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...


class BatchView(Protocol):
    """What a batch policy sees at a change point, between two steps."""

    now: int
    role: Role
    num_decodes: int  # requests in the decode batch, all of which the next step would run
    num_free_blocks: int
    num_free_slots: int  # max_batch_size less decodes and begun prefills
    max_num_tokens: int
    chunked: bool  # False: a prompt is computed whole or not at all

    @property
    def begun(self) -> Sequence[WaitingPrompt]:
        """Prefills that have begun, oldest first."""
        ...

    @property
    def waiting(self) -> Iterable[WaitingPrompt]:
        """Prompts not begun, in queue order. Reading on costs a little per prompt: stop when nothing more fits."""
        ...


class BatchPolicy:
    """What the next step of one executor computes.

    Asked at change points only (a start, an end, an arrival), so the answer must not depend on how many steps the
    current batch has run; one that depends on time alone says when to ask again.
    """

    pull_reserve_blocks: int = 0  # blocks that must stay free when an executor asks for the KV of a generation phase

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def plan(self, batch: BatchView) -> BatchPlan:
        raise _undefined(self, "plan")


class CapacityPolicy:
    """What a request is given blocks for when it begins: all that it can ever need, or (`evicts`) what it is about to write.

    Then the youngest is paused when blocks run out, is computed again later, and goes before all that wait. What both mean
    for spans and reservations is the core's business; this says which of them holds.
    """

    evicts: ClassVar[bool]


class RolePolicy:
    """Which executor serves what, while the cluster runs.

    With an `interval_ps` it is asked each time that this has passed while there are requests, with 0 whenever a report was
    received; and at the instant that `next_at` names. What it answers is done at once: new phases are routed by the new
    roles, and an executor finishes what it has of an earlier one (`fleet.draining` counts that). At least one healthy
    executor must be left for context phases and one for generation phases: a change that would leave none, or is of an
    executor that is gone, is recorded as refused. `fleet.home` holds the roles of the start.
    """

    interval_ps: int = 0

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        """The changes that are due now; usually none."""
        raise _undefined(self, "change_roles")

    def next_at(self, now: int) -> int | None:
        """The instant at which to ask next, whether or not a report comes by then; None: none is known."""
        return now + self.interval_ps if self.interval_ps else None

    def on_arrival(self, request: Request, fleet: FleetView) -> None:
        """A user has sent `request`; it is not admitted yet."""

    def on_ended(self, request: Request, num_output_tokens: int, fleet: FleetView) -> None:
        """`request` has ended, for whatever reason."""


class MigrationPolicy:
    """Which running requests go on elsewhere: live migration.

    Asked each time that `interval_ps` has passed while there are requests. A request that is moved leaves its executor's
    batch at the next step boundary; its KV is read by the other executor as that of a context phase is, and it goes on there
    with the tokens that it has. One that is not decoding when its executor hears of this stays where it is.
    """

    interval_ps: int = 100 * PS_PER_MS

    def __init__(self, *, rng: Random) -> None:
        self.rng = rng

    def migrate(self, fleet: FleetView, movable: Mapping[int, Sequence[Request]]) -> Sequence[MoveRequest]:
        """The moves to begin now; usually none. `movable`: by executor, the requests that it was sent to generate, first sent
        first; those that were told to move are among them until they have.
        """
        raise _undefined(self, "migrate")
