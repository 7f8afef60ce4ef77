"""Routing by where executors stand: KV that stays within a topology domain takes no slow link."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from .interfaces import ScoringPolicy
from .parameters import LARGEST, flag, number
from .registry import register
from .routing import tokens_ahead
from .views import FleetView
from .vocabulary import Request, Role, Routing

_FORBIDDEN: Final = 1e9  # more than any load: another domain only if no executor of the own one is healthy


@register("topology", kind="routing", source="Dynamo topology-aware routing")
class Topology(ScoringPolicy):
    """Generation near the context executor: least KV share in use + link_cost if its `domain` is another.

    `limit`: only executors of the context executor's domain, where there is a healthy one. The context phase goes to the
    least tokens ahead. With early binding the context executor is known as well; in a mixed pool nothing travels.
    """

    def __init__(self, *, rng: Random, link_cost: float = 0.5, limit: bool = False) -> None:
        super().__init__(rng=rng)
        self.link_cost = (
            _FORBIDDEN if flag("topology", "limit", limit) else number("topology", "link_cost", link_cost, 0, LARGEST)
        )
        self._home: int | None = None

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        source = fleet.context_executor
        self._home = None if source is None else fleet.executor(source).domain
        return super().route_generation(request, fleet)

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        if x.role is not Role.GENERATION:
            return tokens_ahead(x)
        in_use = (x.kv_blocks_total - x.kv_blocks_free + x.wire_tokens / x.tokens_per_block) / x.kv_blocks_total
        return in_use if self._home is None else in_use + self.link_cost * (x.domain != self._home)
