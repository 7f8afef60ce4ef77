"""Routing by consistent hashing: equal keys meet at one executor without any memory of them, unless it is overloaded."""

from __future__ import annotations

from bisect import bisect_left
from hashlib import blake2b
from math import ceil
from random import Random
from typing import Final

from .interfaces import SelectingPolicy
from .parameters import number, whole
from .registry import register
from .views import ExecutorPool, ExecutorRow
from .vocabulary import Hold, Request

_POINTS: Final = 160  # of an executor on the ring


class _RingPolicy(SelectingPolicy):
    """The first executor from the key's point on whose load, this request included, is at most load_factor x the mean.

    Load: active requests. The bound is rounded up, so at least one executor is within it. A request without a key goes to
    the least loaded.
    """

    name = ""

    def __init__(self, *, rng: Random, load_factor: float, prefix_tokens: int) -> None:
        super().__init__(rng=rng)
        self.load_factor = number(self.name, "load_factor", load_factor, 1)
        self.prefix_tokens = whole(self.name, "prefix_tokens", prefix_tokens)
        self._rings: dict[ExecutorPool, tuple[list[int], list[int]]] = {}  # points ascending, and whose (row) each is

    def key(self, request: Request, pool: ExecutorPool) -> str | None:
        """The hash of the prompt's first blocks: as many whole ones as `prefix_tokens` hold, or all of a shorter prompt."""
        if not request.block_hashes:
            return None
        wanted = max(self.prefix_tokens // pool.tokens_per_hash, 1)
        return str(request.block_hashes[min(wanted, len(request.block_hashes)) - 1])

    def select(self, request: Request, pool: ExecutorPool) -> ExecutorRow | Hold:
        key = self.key(request, pool)
        if key is None:
            return min(pool.healthy_rows, key=lambda row: row.active_requests)
        loads = pool.healthy_part(pool.active_requests)
        total = int(loads.sum()) if pool.vectorised else sum(loads)
        bound = ceil(self.load_factor * (total + 1) / pool.num_healthy)
        points, owners = self._ring(pool)
        start = bisect_left(points, _point(key))
        passed: set[int] = set()
        for i in range(len(points)):
            owner = owners[(start + i) % len(points)]
            if owner in passed:
                continue
            row = pool[owner]
            if row.healthy and row.active_requests + 1 <= bound:
                return row
            passed.add(owner)
        return min(pool.healthy_rows, key=lambda row: row.active_requests)

    def _ring(self, pool: ExecutorPool) -> tuple[list[int], list[int]]:
        ring = self._rings.get(pool)
        if ring is None:
            pairs = sorted((_point(f"{row.executor_id}/{i}"), row.index) for row in pool for i in range(_POINTS))
            ring = self._rings[pool] = ([point for point, _ in pairs], [owner for _, owner in pairs])
        return ring


@register("prefix_hash", kind="routing", source="SGLang gateway prefix_hash")
class PrefixHash(_RingPolicy):
    """Consistent hash of the prompt's first 256 tokens, passing over executors above 1.25 x the mean load."""

    name = "prefix_hash"

    def __init__(self, *, rng: Random, load_factor: float = 1.25, prefix_tokens: int = 256) -> None:
        super().__init__(rng=rng, load_factor=load_factor, prefix_tokens=prefix_tokens)


@register("bounded_hash", kind="routing", source="SGLang gateway consistent_hashing; bounded loads of Mirrokni et al.")
class BoundedHash(_RingPolicy):
    """Consistent hash of the session, of the prompt's beginning without one, up to 1.5 x the mean load."""

    name = "bounded_hash"

    def __init__(self, *, rng: Random, load_factor: float = 1.5, prefix_tokens: int = 256) -> None:
        super().__init__(rng=rng, load_factor=load_factor, prefix_tokens=prefix_tokens)

    def key(self, request: Request, pool: ExecutorPool) -> str | None:
        return f"session {request.session}" if request.session is not None else super().key(request, pool)


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
