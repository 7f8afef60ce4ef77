"""Routing by prefixes: where the KV of a prompt's beginning is believed to lie, weighed against load.

Matches (`ExecutorPool.prefix_match`) come from what executors that reuse blocks report of them, and for all others from the
orchestrator's own dispatches, as in the approximate mode of each source.
"""

from __future__ import annotations

from math import exp
from random import Random
from typing import Any

from .interfaces import ScoringPolicy
from .parameters import LARGEST, number
from .prediction import decode_tokens, pending_prompt_tokens
from .registry import register
from .routing import tokens_ahead
from .sessions import SessionMemory
from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import Hold, Request, Role, Stage


@register("cache_aware", kind="routing", source="SGLang router")
class CacheAware(ScoringPolicy):
    """Least loaded if load is unbalanced; else the best prefix match, if good enough; else who holds least.

    Unbalanced: max - min > balance_abs and max > balance_rel * min, of active requests. Good enough: matched blocks
    over the prompt's blocks > cache_threshold. Who holds least has room for a new prefix (SGLang's smallest tree).
    """

    def __init__(
        self, *, rng: Random, cache_threshold: float = 0.3, balance_abs: float = 64, balance_rel: float = 1.5
    ) -> None:
        super().__init__(rng=rng)
        self.cache_threshold = number("cache_aware", "cache_threshold", cache_threshold, 0, 1)
        self.balance_abs = number("cache_aware", "balance_abs", balance_abs)
        self.balance_rel = number("cache_aware", "balance_rel", balance_rel, 1)
        self._by = ""

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        least, most = pool.range_of(pool.active_requests)
        best = pool.range_of(pool.prefix_match(request))[1]
        if most - least > self.balance_abs and most > self.balance_rel * least:
            self._by = "load"
        elif best > self.cache_threshold * len(request.block_hashes):
            self._by = "match"
        else:
            self._by = "room"
        return super().select(request, pool)

    def score(self, request: Request, executors: Any) -> Any:
        if self._by == "load":
            return executors.active_requests
        return -executors.prefix_match(request) if self._by == "match" else executors.prefix_blocks


@register("kv_cache_aware", kind="routing", source="TensorRT-LLM KvCacheAwareRouter")
class KvCacheAware(ScoringPolicy):
    """Most matched_tokens / prompt_tokens - active / max_batch_size."""

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        return x.active_requests / x.max_batch_size - x.cached_tokens(request) / request.num_prompt_tokens


@register("conversation", kind="routing", source="TensorRT-LLM ConversationRouter")
class Conversation(ScoringPolicy):
    """Where the session was served last; else the longest prefix of at least `threshold` of the prompt; else least tokens."""

    def __init__(self, *, rng: Random, threshold: float = 0.75) -> None:
        super().__init__(rng=rng)
        self.threshold = number("conversation", "threshold", threshold, 0, 1)
        self._sessions = SessionMemory()
        self._by_prefix = False

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        sticky = pool.row_of(self._sessions.executor_of(request, pool.role is Role.GENERATION))
        if sticky is not None and sticky.healthy:
            return sticky
        best = pool.range_of(pool.prefix_match(request))[1] * pool.tokens_per_hash
        self._by_prefix = best > 0 and best >= self.threshold * request.num_prompt_tokens
        return super().select(request, pool)

    def score(self, request: Request, executors: Any) -> Any:
        return -executors.prefix_match(request) if self._by_prefix else tokens_ahead(executors)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        self._sessions.dispatched(request, stage, executor)


@register("kv_cost", kind="routing", source="Dynamo KV router")
class KvCost(ScoringPolicy):
    """Least overlap_weight * prefill blocks + decode blocks + active_weight * active; softmax with `temperature`.

    Prefill blocks: prompt tokens there and on the way, plus this prompt's less its prefix match, over the block size.
    Decode blocks: KV blocks of the decode batch. With a temperature above 0 an executor is drawn with probability
    proportional to exp(-cost / temperature), cost normalised to [0, 1] over the pool.
    """

    def __init__(
        self, *, rng: Random, overlap_weight: float = 1.0, temperature: float = 0.0, active_weight: float = 0.0
    ) -> None:
        super().__init__(rng=rng)
        self.overlap_weight = number("kv_cost", "overlap_weight", overlap_weight, 0, LARGEST)
        self.temperature = number("kv_cost", "temperature", temperature, 0, LARGEST)
        self.active_weight = number("kv_cost", "active_weight", active_weight, 0, LARGEST)

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        new = x.uncached_tokens(request)
        if x.role is Role.GENERATION:  # nothing is computed there; blocks that it shares are not taken twice
            prefill, decode = 0, decode_tokens(x) + new
        else:
            prefill, decode = pending_prompt_tokens(x) + new, x.decode_kv_tokens
        blocks = (self.overlap_weight * prefill + decode) / x.tokens_per_block
        return blocks + self.active_weight * x.active_requests

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        if not self.temperature:
            return super().select(request, pool)
        rows = pool.healthy_rows
        costs = [float(c) for c in pool.healthy_part(self.score(request, pool))] if pool.vectorised else [
            float(self.score(request, row)) for row in rows
        ]  # fmt: skip
        least, most = min(costs), max(costs)
        scale = self.temperature * (most - least) or 1.0
        (chosen,) = self.rng.choices(rows, [exp(-(cost - least) / scale) for cost in costs])
        return chosen


@register("lmetric", kind="routing", source="SGLang; Dynamo")
class Lmetric(ScoringPolicy):
    """Least (uncached prompt tokens + tokens queued there) * (active requests + 1): a product has no weight to tune."""

    def score(self, request: Request, executors: Any) -> Any:
        x = executors
        return (x.uncached_tokens(request) + tokens_ahead(x)) * (x.active_requests + 1)
