"""Routing by predicted times: what TTFT and TPOT a request would see where (`policies/prediction.py`)."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import numpy as np

from .interfaces import RoutingPolicy, ScoringPolicy
from .parameters import flag, number, one_of, where
from .registry import register
from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import PS_PER_MS, PS_PER_S, Hold, Reject, Request, Role, Route, RouteMixed, Routing

_TIER: Final = 1e6  # between tiers; headrooms are relative to their objectives


def predicted_ttft(request: Request, executors: Any) -> Any:
    """Picoseconds from arrival to first token: waited already, queue there, uncached part of the prompt."""
    x = executors
    waited = max(x.now - request.arrival, 0)
    prefill = x.predictor.prefill_time(x, x.uncached_tokens(request), x.cached_tokens(request))
    return waited + x.predictor.queue_time(x) + prefill


def predicted_tpot(request: Request, executors: Any) -> Any:
    """Picoseconds a decode step with this request in the batch."""
    return executors.predictor.step_time(executors, 1, request.num_prompt_tokens)


@register("slo_headroom", kind="routing", source="llm-d predicted-latency scorer")
class SloHeadroom(ScoringPolicy):
    """Headroom = (objective - predicted) / objective; who meets it first, among them the least headroom.

    Context executors: TTFT; generation executors: TPOT; mixed ones: ttft_weight and the rest of 1 between both. `strategy`
    least packs, most spreads. If nobody meets it: an idle executor, else the least damage. Without an objective: the least
    predicted time.
    """

    def __init__(self, *, rng: Random, strategy: str = "least", ttft_weight: float = 0.8) -> None:
        super().__init__(rng=rng)
        self.sign = 1 if one_of("slo_headroom", "strategy", strategy, ("least", "most")) == "least" else -1
        self.ttft_weight = number("slo_headroom", "ttft_weight", ttft_weight, 0, 1)

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        headroom = self._headroom(request, x)
        damage = where(x.active_requests == 0, _TIER, 2 * _TIER) - headroom
        return where(headroom >= 0, self.sign * headroom, damage)

    def _headroom(self, request: Request, x: Any) -> Any:
        if x.role is Role.CONTEXT:
            return _relative(request.ttft_objective, predicted_ttft(request, x))
        tpot = _relative(request.tpot_objective, predicted_tpot(request, x))
        if x.role is Role.GENERATION:
            return tpot
        ttft = _relative(request.ttft_objective, predicted_ttft(request, x))
        return self.ttft_weight * ttft + (1 - self.ttft_weight) * tpot


def _relative(objective: int | None, predicted: Any) -> Any:
    """Without an objective: always short of it, by the predicted seconds."""
    return -predicted / PS_PER_S if objective is None else (objective - predicted) / objective


class _LeastTtft(ScoringPolicy):
    """Predicted TTFT; where prefixes are fetched from others, with the best prefix if moving it pays."""

    def __init__(self, *, rng: Random, fetches_prefixes: bool) -> None:
        super().__init__(rng=rng)
        self.fetches_prefixes = fetches_prefixes

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        own = predicted_ttft(request, x)
        if not self.fetches_prefixes:
            return own
        pool: ExecutorPool = getattr(x, "pool", x)
        best = int(pool.range_of(pool.cached_tokens(request))[1])
        missing = best - x.cached_tokens(request)
        predictor = x.predictor
        with_best = (
            max(x.now - request.arrival, 0)
            + where(missing > 0, predictor.transfer_time(missing), 0)
            + predictor.queue_time(x)
            + predictor.prefill_time(x, request.num_prompt_tokens - best, best)
        )
        return np.minimum(own, with_best) if isinstance(own, np.ndarray) else min(own, with_best)


class _LeastTpot(ScoringPolicy):
    def score(self, request: Request, executors: Any) -> Any:
        return predicted_tpot(request, executors)


@register("mooncake", kind="routing", source="Mooncake, algorithm 1")
class Mooncake(RoutingPolicy):
    """Least predicted TTFT over context executors, least predicted TPOT over generation ones; reject if either is missed.

    Both are chosen at arrival. TTFT = queue + prefill(prompt, own prefix); with `fetches_prefixes`, or transfer of the best
    remote prefix + queue + prefill(prompt, that prefix) where this is less. No executor here fetches prefixes from others
    yet, so it is off. `rejects` False serves requests that will miss their objectives.
    """

    def __init__(self, *, rng: Random, rejects: bool = True, fetches_prefixes: bool = False) -> None:
        super().__init__(rng=rng)
        self.rejects = flag("mooncake", "rejects", rejects)
        self._ttft = _LeastTtft(rng=rng, fetches_prefixes=flag("mooncake", "fetches_prefixes", fetches_prefixes))
        self._tpot = _LeastTpot(rng=rng)

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.context if fleet.context.num_healthy else fleet.mixed
        context = _chosen(self._ttft, request, pool)
        generation: ExecutorRow | None = context
        if pool is not fleet.mixed:
            decodes_at = fleet.generation if fleet.generation.num_healthy else fleet.mixed
            generation = _chosen(self._tpot, request, decodes_at) if decodes_at.num_healthy else None
        missed = self._missed(request, context, generation) if self.rejects else None
        if missed is not None:
            return Reject(missed)
        if pool is fleet.mixed:
            return RouteMixed(context.executor_id)
        return Route(context.executor_id, None if generation is None else generation.executor_id)

    def _missed(self, request: Request, context: ExecutorRow, generation: ExecutorRow | None) -> str | None:
        """The objective that would be missed there, in words."""
        times = [("TTFT", request.ttft_objective, self._ttft.score(request, context))]
        if generation is not None:
            times.append(("TPOT", request.tpot_objective, self._tpot.score(request, generation)))
        for name, objective, predicted in times:
            if objective is not None and predicted > objective:
                return f"predicted {name} {predicted / PS_PER_MS:.1f} ms, objective {objective / PS_PER_MS:.1f} ms"
        return None

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        return Route(generation=_chosen(self._tpot, request, pool).executor_id)


def _chosen(policy: ScoringPolicy, request: Request, pool: ExecutorPool) -> ExecutorRow:
    row = policy.select(request, pool)
    if isinstance(row, Hold):
        raise TypeError("a score does not hold")
    return row
