"""Routing policies: which executor serves the next phase of a request."""

from __future__ import annotations

from random import Random
from typing import Any

from .interfaces import PolicyError, ScoringPolicy, SelectingPolicy
from .registry import register
from .views import ExecutorPool, ExecutorRow
from .vocabulary import Hold, Request, Role


@register("round_robin", kind="routing", source="TensorRT-LLM, and every other")
class RoundRobin(SelectingPolicy):
    """Each healthy executor in turn: counter mod n."""

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)
        self._count: dict[Role, int] = {}

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        count = self._count.get(pool.role, 0)
        self._count[pool.role] = count + 1
        rows = pool.healthy_rows
        return rows[count % len(rows)]


@register("random", kind="routing", source="SGLang, vLLM")
class Uniform(SelectingPolicy):
    """Any healthy executor with equal probability."""

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        rows = pool.healthy_rows
        return rows[self.rng.randrange(len(rows))]


@register("least_requests", kind="routing", source="TensorRT-LLM load_balancing; Splitwise JSQ")
class LeastRequests(ScoringPolicy):
    """Fewest requests dispatched and unanswered, by the orchestrator's own count; ties in turn."""

    def score(self, request: Request, executors: Any) -> Any:
        return executors.active_requests


@register("least_tokens", kind="routing", source="TensorRT-LLM use_tokens; Splitwise token JSQ; DistServe")
class LeastTokens(ScoringPolicy):
    """Fewest pending tokens.

    Context: prompt tokens queued, in flight and on the wire. Generation: KV tokens decoding and on the wire. Mixed: both.
    """

    def score(self, request: Request, executors: Any) -> Any:
        return tokens_ahead(executors)


@register("power_of_two", kind="routing", source="SGLang")
class PowerOfTwo(SelectingPolicy):
    """`d` healthy executors at random, of which the one with the fewest active requests (the first drawn if equal)."""

    def __init__(self, *, rng: Random, d: int = 2) -> None:
        super().__init__(rng=rng)
        if not isinstance(d, int) or d < 1:
            raise PolicyError(f"power_of_two: d must be a whole number of at least 1, got {d!r}")
        self.d = d

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        rows = pool.healthy_rows
        drawn = self.rng.sample(range(len(rows)), min(self.d, len(rows)))
        return min((rows[i] for i in drawn), key=lambda row: row.active_requests)


@register("least_kv", kind="routing", source="Splitwise, decode side")
class LeastKv(ScoringPolicy):
    """Least KV memory taken: blocks not free over the pool's size, plus the blocks that requests on the wire will take."""

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        total = x.kv_blocks_total
        on_the_wire = x.wire_tokens / x.tokens_per_block
        return (total - x.kv_blocks_free + on_the_wire) / total


def tokens_ahead(executors: Any) -> Any:
    """Tokens that keep an executor busy: prompts on a context executor, KV on a generation executor, both on a mixed one."""
    x = executors
    prompts = x.queued_prefill_tokens + x.inflight_prefill_tokens
    if x.role is Role.CONTEXT:
        return prompts + x.wire_tokens
    if x.role is Role.GENERATION:
        return x.decode_kv_tokens + x.wire_tokens
    return prompts + x.decode_kv_tokens + x.wire_tokens
