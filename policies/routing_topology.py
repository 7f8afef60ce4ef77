"""Routing by where executors stand: KV that stays within a topology domain takes no slow link."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import numpy as np

from .interfaces import ScoringPolicy
from .parameters import LARGEST, flag, number, one_of
from .registry import register
from .routing import tokens_ahead
from .views import ExecutorPool, FleetView
from .vocabulary import Request, Role, Routing

_FORBIDDEN: Final = 1e9  # more than any load: another domain only if no executor of the own one is healthy


@register("topology", kind="routing", source="Dynamo topology-aware routing")
class Topology(ScoringPolicy):
    """Generation near the context executor: least KV share in use + link_cost if its `domain` is another.

    `by` link: + link_cost * the time that the KV takes on that link, behind what is in flight, over that on the slowest one.
    `limit`: only executors of the context executor's domain, where there is a healthy one. The context phase goes to the
    least tokens ahead. With early binding the context executor is known as well; in a mixed pool nothing travels.
    """

    def __init__(self, *, rng: Random, link_cost: float = 0.5, limit: bool = False, by: str = "domain") -> None:
        super().__init__(rng=rng)
        self.by_link = one_of("topology", "by", by, ("domain", "link")) == "link" and not limit
        self._distances: dict[int, float] = {}  # by executor, of the pool and request at hand; 1 is the farthest
        self.link_cost = (
            _FORBIDDEN if flag("topology", "limit", limit) else number("topology", "link_cost", link_cost, 0, LARGEST)
        )
        self._home: int | None = None

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        source = fleet.context_executor
        self._home = None if source is None else fleet.executor(source).domain
        if self.by_link and source is not None:
            pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
            ids = [int(row.executor_id) for row in pool.healthy_rows]
            times = [fleet.link(source, reader).transfer_time(request.num_prompt_tokens) for reader in ids]
            longest = max(times) or 1.0
            self._distances = {reader: time / longest for reader, time in zip(ids, times, strict=True)}
        return super().route_generation(request, fleet)

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        if x.role is not Role.GENERATION:
            return tokens_ahead(x)
        in_use = (x.kv_blocks_total - x.kv_blocks_free + x.wire_tokens / x.tokens_per_block) / x.kv_blocks_total
        if self._home is None:
            return in_use
        if not self.by_link:
            return in_use + self.link_cost * (x.domain != self._home)
        if isinstance(x, ExecutorPool) and x.vectorised:
            return in_use + self.link_cost * np.array([self._distances.get(int(e), 1.0) for e in x.executor_id])
        return in_use + self.link_cost * self._distances[int(x.executor_id)]
