"""Routing between pools that lend each other executors."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from .interfaces import RoutingPolicy
from .parameters import number
from .registry import register
from .views import ExecutorRow, FleetView
from .vocabulary import Request, Role, Route, RouteMixed, Routing, Stage


@register("mixed_pool", kind="routing", source="Splitwise cluster-level scheduling")
class MixedPool(RoutingPolicy):
    """Prompt, token and mixed pools: an overloaded pool borrows executors of the other, which return when drained.

    The first `prompt_share` of the mixed executors, and all context executors, are at home in the prompt pool, the rest and
    all generation executors in the token pool. A phase goes to the least loaded of its own pool if that is not overloaded;
    else of the mixed pool; else to a lender, which is in the mixed pool while it has phases that are foreign to its home.
    Overloaded: more than `max_prompt_tokens` pending, more than `max_kv` of its blocks in use. By itself it can only lend
    executors that are mixed; with the role policy of the same name the others become mixed while they are lent.
    """

    def __init__(
        self, *, rng: Random, prompt_share: float = 0.5, max_prompt_tokens: float = 8192, max_kv: float = 0.8
    ) -> None:
        super().__init__(rng=rng)
        self.prompt_share = number("mixed_pool", "prompt_share", prompt_share, 0, 1)
        self.max_prompt_tokens = number("mixed_pool", "max_prompt_tokens", max_prompt_tokens)
        self.max_kv = number("mixed_pool", "max_kv", max_kv, 0.01, 1)
        self._mixed_home: dict[int, int] = {}  # executors that are mixed by configuration: their place among these
        self._num_foreign: dict[int, int] = {}  # executor: phases there that are foreign to its home

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        rows = [*fleet.context.healthy_rows, *fleet.mixed.healthy_rows]
        if fleet.mixed.num_healthy and len(rows) + fleet.generation.num_healthy == 1:
            return RouteMixed(rows[0].executor_id)  # nobody to hand over to
        chosen = self._choose(rows, Stage.CONTEXT, fleet)
        return Route(context=chosen.executor_id)

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        rows = [*fleet.generation.healthy_rows, *fleet.mixed.healthy_rows]
        others = [row for row in rows if row.executor_id != fleet.context_executor]
        return Route(generation=self._choose(others or rows, Stage.GENERATION, fleet).executor_id)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        self._count(stage, executor, fleet, 1)

    def on_finished(self, request: Request, stage: Stage, executor: int, ok: bool, fleet: FleetView) -> None:
        self._count(stage, executor, fleet, -1)

    def _count(self, stage: Stage, executor: int, fleet: FleetView, change: int) -> None:
        if stage is not Stage.MIXED and self._home(fleet.executor(executor), fleet) is not stage:
            self._num_foreign[executor] = self._num_foreign.get(executor, 0) + change

    def _home(self, row: ExecutorRow, fleet: FleetView) -> Stage:
        home = fleet.home[row.executor_id]
        if home is not Role.MIXED:
            return Stage.CONTEXT if home is Role.CONTEXT else Stage.GENERATION
        if not self._mixed_home:
            mixed = sorted(executor for executor, role in fleet.home.items() if role is Role.MIXED)
            self._mixed_home = {executor: place for place, executor in enumerate(mixed)}
        place, num = self._mixed_home[row.executor_id], len(self._mixed_home)
        return Stage.CONTEXT if place < round(self.prompt_share * num) else Stage.GENERATION

    def _choose(self, rows: Sequence[ExecutorRow], stage: Stage, fleet: FleetView) -> ExecutorRow:
        """Own pool, mixed pool, lenders, in this order; the least loaded of all if everybody is overloaded."""

        def load(row: Any) -> Any:
            return (
                pending_prompts(row) / max(self.max_prompt_tokens, 1)
                if stage is Stage.CONTEXT
                else kv_in_use(row) / self.max_kv
            )

        tiers: tuple[list[ExecutorRow], ...] = ([], [], [])
        for row in rows:
            if row.role is not Role.MIXED:  # it serves this stage, and no other
                tiers[0].append(row)
                continue
            is_lent = fleet.home[row.executor_id] is not Role.MIXED or self._num_foreign.get(row.executor_id, 0) > 0
            tiers[1 if is_lent else 0 if self._home(row, fleet) is stage else 2].append(row)
        for tier in tiers:
            best = min(tier, key=load, default=None)
            if best is not None and load(best) <= 1:
                return best
        return min(rows, key=load)


def pending_prompts(row: Any) -> Any:
    """Prompt tokens that it has yet to compute, or that are on their way to it."""
    return row.queued_prefill_tokens + row.inflight_prefill_tokens + row.wire_tokens


def kv_in_use(row: Any) -> Any:
    """Share of its KV blocks in use, those included that what is on its way will take."""
    return (row.kv_blocks_total - row.kv_blocks_free + row.wire_tokens / row.tokens_per_block) / row.kv_blocks_total
