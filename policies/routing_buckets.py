"""Routing by prompt length: each executor serves an interval of lengths, cut so that all get an equal share of work."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate
from random import Random
from typing import Any

from .interfaces import ScoringPolicy
from .parameters import number, whole
from .registry import register
from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import PS_PER_S, Hold, Request, Role, Stage


@register("bucket", kind="routing", source="SGLang router bucket")
class Bucket(ScoringPolicy):
    """Buckets of prompt lengths, one an executor, re-cut so that each holds an equal share of recent prompt tokens.

    Cut anew every `interval_s` from the last `window` prompts; until the first cut, and while load is unbalanced
    (max - min > balance_abs and max > balance_rel * min, of active requests), the least loaded serves. A length at which
    buckets meet goes to the less loaded of them.
    """

    def __init__(
        self,
        *,
        rng: Random,
        interval_s: float = 5.0,
        window: int = 1000,
        balance_abs: float = 64,
        balance_rel: float = 1.5,
    ) -> None:
        super().__init__(rng=rng)
        self.interval = round(number("bucket", "interval_s", interval_s) * PS_PER_S)
        self.balance_abs = number("bucket", "balance_abs", balance_abs)
        self.balance_rel = number("bucket", "balance_rel", balance_rel, 1)
        self._lengths: dict[bool, deque[int]] = {
            stage: deque(maxlen=whole("bucket", "window", window)) for stage in (False, True)
        }
        self._cuts: dict[Role, tuple[int, list[int]]] = {}  # when cut, upper ends of all buckets but the last

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        least, most = pool.range_of(pool.active_requests)
        rows = pool.healthy_rows
        ends = self._ends(pool, len(rows))
        if len(ends) != len(rows) - 1 or (most - least > self.balance_abs and most > self.balance_rel * least):
            return super().select(request, pool)
        length = request.num_prompt_tokens
        buckets = rows[bisect_left(ends, length) : bisect_right(ends, length) + 1]
        return min(buckets, key=lambda row: row.active_requests)

    def score(self, request: Request, executors: Any) -> Any:
        return executors.active_requests

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        self._lengths[stage is Stage.GENERATION].append(request.num_prompt_tokens)

    def _ends(self, pool: ExecutorPool, num_buckets: int) -> list[int]:
        """The longest prompt of each bucket but the last; empty before there are prompts to cut by."""
        at, ends = self._cuts.setdefault(pool.role, (pool.now, []))
        if pool.now - at < self.interval and len(ends) in (0, num_buckets - 1):
            return ends
        lengths = sorted(self._lengths[pool.role is Role.GENERATION])
        if lengths:
            sums = list(accumulate(lengths))
            ends = [lengths[bisect_left(sums, sums[-1] * i / num_buckets)] for i in range(1, num_buckets)]
            self._cuts[pool.role] = (pool.now, ends)
        return ends
