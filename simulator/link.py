"""One direction of the path between two executors, shared fairly by the transfers on it.

Service is counted in units of 2^-20 ps of the link's full rate. With n transfers each gets 1/n of it; a virtual clock
counts the service that each has got since the link was made, a transfer is over when that clock reaches its tag, and the
tags lie in a heap: O(log n) a transfer, however many share the link.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from ..core.cost import UNIT_BITS, UNITS_PER_S
from .calls import MESSAGE, Environment, call_at


class Link:
    """`bytes_per_s` is the full rate; `latency` and, for each KV block, `page_latency` (picoseconds) come before a
    transfer and take no bandwidth.
    """

    def __init__(self, env: Environment, bytes_per_s: float, latency: int, rank: int, page_latency: int = 0) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a link needs a positive rate, got {bytes_per_s} bytes/s")
        self._env = env
        self._units_per_byte = UNITS_PER_S / bytes_per_s
        self._latency = latency
        self._page_latency = page_latency
        self._rank = rank
        self._virtual = 0
        self._updated_at = 0
        self._active: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._serial = 0
        self._version = 0

    def __len__(self) -> int:
        return len(self._active)

    def transfer(self, num_bytes: int, done: Callable[[Any], None], argument: Any, num_pages: int = 0) -> None:
        """Call `done(argument)` when `num_bytes` in `num_pages` KV blocks have arrived."""
        self._serial += 1
        call_at(
            self._env,
            self._env.now + self._latency + num_pages * self._page_latency,
            MESSAGE + self._rank,
            self._start,
            (num_bytes, self._serial, done, argument),
        )

    def _start(self, item: tuple[int, int, Callable[[Any], None], Any]) -> None:
        num_bytes, serial, done, argument = item
        self._advance()
        service = max(1, round(num_bytes * self._units_per_byte))
        heapq.heappush(self._active, (self._virtual + service, serial, done, argument))
        self._schedule()

    def _advance(self) -> None:
        now = self._env.now
        if self._active:
            self._virtual += (now - self._updated_at << UNIT_BITS) // len(self._active)
        self._updated_at = now

    def _schedule(self) -> None:
        self._version += 1
        if self._active:
            left = max(0, self._active[0][0] - self._virtual) * len(self._active)
            at = self._env.now + (left + (1 << UNIT_BITS) - 1 >> UNIT_BITS)
            call_at(self._env, at, MESSAGE + self._rank, self._finish, self._version)

    def _finish(self, version: int) -> None:
        if version != self._version:
            return  # another transfer came or went since
        self._advance()
        _, _, done, argument = heapq.heappop(self._active)
        self._virtual = max(self._virtual, 0)
        self._schedule()
        done(argument)
