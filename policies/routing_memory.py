"""Routing by what is left of an executor's memory and compute for each of its requests."""

from __future__ import annotations

from heapq import nsmallest
from math import inf
from random import Random
from typing import Any

import numpy as np

from .interfaces import ScoringPolicy
from .parameters import at_least, where, whole
from .registry import register
from .views import ExecutorPool, ExecutorRow
from .vocabulary import Hold, Request


class _TopKPolicy(ScoringPolicy):
    """Any of the `k` executors of least score with equal probability; the least one for k = 1."""

    def __init__(self, *, rng: Random, k: int = 1) -> None:
        super().__init__(rng=rng)
        self.k = whole(type(self).__name__, "k", k)

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        if self.k == 1:
            return super().select(request, pool)
        if not pool.vectorised:
            best = nsmallest(self.k, pool.healthy_rows, key=lambda row: self.score(request, row))
            return self.rng.choice(best)
        scores = np.where(pool.healthy == 1, self.score(request, pool), inf)
        k = min(self.k, pool.num_healthy)
        return pool[int(np.argsort(scores, kind="stable")[self.rng.randrange(k)])]


@register("remaining_steps", kind="routing", source="Llumnix remaining_steps (freeness)")
class RemainingSteps(_TopKPolicy):
    """Most free KV blocks per request: how many blocks each could still grow by; an idle executor first.

    Free blocks less those that waiting requests will take, over the requests there and on the wire. `k`: any of the k best.
    """

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        available = x.kv_blocks_free - (x.queued_prefill_tokens + x.wire_tokens) / x.tokens_per_block
        requests = _requests(x)
        return where(requests == 0, -inf, -available / at_least(requests, 1))


@register("adaptive_decode", kind="routing", source="Llumnix adaptive_decode")
class AdaptiveDecode(_TopKPolicy):
    """Fill one batch after the other up to where decoding is compute-bound, then balance.

    Load, least first: bound - batch below `compute_bound_batch_size`, batch from there on; an empty executor counts as the
    bound. `k`: any of the k best.
    """

    def __init__(self, *, rng: Random, k: int = 1, compute_bound_batch_size: int = 64) -> None:
        super().__init__(rng=rng, k=k)
        self.bound = whole("adaptive_decode", "compute_bound_batch_size", compute_bound_batch_size)

    def score(self, request: Request, executors: Any) -> Any:
        batch = _requests(executors)
        return where(batch < self.bound, self.bound - batch, batch)


def _requests(executors: Any) -> Any:
    x = executors
    return x.running_requests + x.queued_requests + x.wire_requests
