"""Routing composed in the experiment file: filters leave candidates, weighted scorers rate them, a picker takes one.

router: {name: weighted_scorers, scorers: {prefix: 3, queue: 2, kv: 2}, filters: {max_kv: 0.9}, picker: max}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from random import Random
from typing import Any, Final

from .interfaces import PolicyError, ScoringPolicy
from .parameters import LARGEST, number, one_of, where
from .registry import register
from .sessions import SessionMemory
from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import Hold, Request, Role, Stage

_LOAD_THRESHOLD: Final = 128  # waiting requests from which on the load scorer gives nothing
_PASSED_OVER: Final = 1e9  # more than any sum of scores


def kv_share(executors: Any) -> Any:
    """Share of KV blocks that are not free."""
    return 1 - executors.kv_blocks_free / executors.kv_blocks_total


def _queue(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """1 for the shortest queue, 0 for the longest, 1 for all if they are equal."""
    least, most = _pool(x).range_of(_pool(x).queued_requests)
    return (most - x.queued_requests) / (most - least) if most > least else 1.0


def _active(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """The same of active requests, by the orchestrator's own count."""
    least, most = _pool(x).range_of(_pool(x).active_requests)
    return (most - x.active_requests) / (most - least) if most > least else 1.0


def _kv(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """Free share of the KV blocks."""
    return 1 - kv_share(x)


def _prefix(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """Matched blocks over the prompt's blocks."""
    return x.prefix_match(request) / max(len(request.block_hashes), 1)


def _session(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """1 where the session was served last."""
    last = policy.sessions.executor_of(request, x.role is Role.GENERATION)
    return where(x.executor_id == (-1 if last is None else last), 1.0, 0.0)


def _load(policy: WeightedScorers, request: Request, x: Any) -> Any:
    """0.5 without a queue, falling to 0 at 128 waiting requests."""
    return where(x.queued_requests < _LOAD_THRESHOLD, 0.5 * (1 - x.queued_requests / _LOAD_THRESHOLD), 0.0)


SCORERS: Final[dict[str, Callable[[Any, Request, Any], Any]]] = {
    "queue": _queue,
    "active": _active,
    "kv": _kv,
    "prefix": _prefix,
    "session": _session,
    "load": _load,
}
FILTERS: Final[dict[str, Callable[[float, Request, Any], Any]]] = {
    "max_queue": lambda limit, request, x: x.queued_requests <= limit,
    "max_active": lambda limit, request, x: x.active_requests <= limit,
    "max_kv": lambda limit, request, x: kv_share(x) <= limit,
    "min_prefix": lambda limit, request, x: x.prefix_match(request) >= limit * len(request.block_hashes),
}
_SHARES: Final = ("max_kv", "min_prefix")
PICKERS: Final = ("max", "random", "weighted")


@register("weighted_scorers", kind="routing", source="llm-d (Gateway API inference extension)")
class WeightedScorers(ScoringPolicy):
    """Most sum of weight * score; scores are in [0, 1], more is better.

    Scorers: queue, active, kv, prefix, session, load. Filters: max_queue, max_active, max_kv, min_prefix (shares for the
    last two); if they leave nobody, all remain. Picker: max, random among those left, weighted by their sums.
    """

    def __init__(
        self,
        *,
        rng: Random,
        scorers: Mapping[str, float] | None = None,
        filters: Mapping[str, float] | None = None,
        picker: str = "max",
    ) -> None:
        super().__init__(rng=rng)
        scorers = {"prefix": 3.0, "queue": 2.0, "kv": 2.0} if scorers is None else scorers
        self.scorers = [(SCORERS[n], w) for n, w in _known("scorers", scorers, SCORERS) if w]
        self.filters = [(FILTERS[n], limit) for n, limit in _known("filters", filters or {}, FILTERS)]
        self.picker = one_of("weighted_scorers", "picker", picker, PICKERS)
        self.sessions = SessionMemory()

    def rating(self, request: Request, executors: Any) -> Any:
        """The weighted sum; more is better."""
        return sum(weight * scorer(self, request, executors) for scorer, weight in self.scorers)

    def score(self, request: Request, executors: Any) -> Any:
        return self._passed_over(request, executors) * _PASSED_OVER - self.rating(request, executors)

    def _passed_over(self, request: Request, executors: Any) -> Any:
        """How many filters an executor does not pass: truth values and counts alike."""
        return sum(1 - 1 * check(limit, request, executors) for check, limit in self.filters)

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        if self.picker == "max":
            return super().select(request, pool)
        rows = pool.healthy_rows
        candidates = [row for row in rows if not self._passed_over(request, row)] or rows
        if self.picker == "random":
            return self.rng.choice(candidates)
        weights = [float(self.rating(request, row)) for row in candidates]
        return self.rng.choices(candidates, weights)[0] if sum(weights) > 0 else self.rng.choice(candidates)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        self.sessions.dispatched(request, stage, executor)


def _pool(executors: Any) -> ExecutorPool:
    """The pool itself, or that of a row."""
    return executors if isinstance(executors, ExecutorPool) else executors.pool


def _known(what: str, given: Any, allowed: Mapping[str, Any]) -> list[tuple[str, float]]:
    if not isinstance(given, Mapping):
        raise PolicyError(f"weighted_scorers: {what} must map names to numbers, got {given!r}")
    for name in given:
        if name not in allowed:
            raise PolicyError(f"weighted_scorers: there is no {name!r} among {what}; allowed: {', '.join(allowed)}")
    return [
        (name, number("weighted_scorers", f"{what}.{name}", value, 0, _most(what, name)))
        for name, value in given.items()
    ]


def _most(what: str, name: str) -> float:
    return LARGEST if what == "scorers" else 1.0 if name in _SHARES else inf
