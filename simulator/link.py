"""One direction of the path between two executors, shared fairly by the transfers on it.

Service is counted in units of 2^-20 ps of the link's full rate. With n transfers each gets 1/n of it; a virtual clock
counts the service that each has got since the link was made, a transfer is over when that clock reaches its tag, and the
tags lie in a heap: O(log n) a transfer, however many share the link. One call is outstanding: of the next end, or, where
several transfers are still in their latency, of the next beginning.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

from ..core.cost import UNIT_BITS, UNITS_PER_S
from .calls import MESSAGE, Environment

_ALMOST_UNIT: Final = (1 << UNIT_BITS) - 1


class Link:
    """`bytes_per_s` is the full rate; `latency` and, for each KV block, `page_latency` (picoseconds) come before a
    transfer and take no bandwidth.
    """

    def __init__(self, env: Environment, bytes_per_s: float, latency: int, rank: int, page_latency: int = 0) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a link needs a positive rate, got {bytes_per_s} bytes/s")
        self._calendar = env.calendar
        self._units_per_byte = UNITS_PER_S / bytes_per_s
        self._latency = latency
        self._page_latency = page_latency
        self._priority = MESSAGE + rank
        self._virtual = 0
        self._updated_at = 0
        self._active: list[tuple[int, int, Callable[[Any], object], Any]] = []
        self._coming: list[tuple[int, int, int, Callable[[Any], object], Any]] = []  # in their latency, by its end
        self._serial = 0
        self._due = 0  # serial of the outstanding call, 0 for none
        self._due_at = 0
        self._call_look: Callable[[None], None] = self._look  # bound once: see SimulatedExecutor

    def __len__(self) -> int:
        """Transfers that take bandwidth now."""
        return len(self._active) + sum(entry[0] <= self._calendar.now for entry in self._coming)

    def transfer(self, num_bytes: int, done: Callable[[Any], object], argument: Any, num_pages: int = 0) -> None:
        """Call `done(argument)` when `num_bytes` in `num_pages` KV blocks have arrived."""
        self._serial += 1
        begins = self._calendar.now + self._latency + num_pages * self._page_latency
        service = max(1, round(num_bytes * self._units_per_byte))
        heapq.heappush(self._coming, (begins, self._serial, service, done, argument))
        self._begin_those_due()
        self._plan()

    def _begin_those_due(self) -> None:
        now, coming = self._calendar.now, self._coming
        while coming and coming[0][0] <= now:
            begins, serial, service, done, argument = heapq.heappop(coming)
            self._advance(begins)
            heapq.heappush(self._active, (self._virtual + service, serial, done, argument))

    def _advance(self, to: int) -> None:
        if self._active:
            self._virtual += (to - self._updated_at << UNIT_BITS) // len(self._active)
        self._updated_at = to

    def _plan(self) -> None:
        """Ask for the next call, unless it is the one that is outstanding."""
        at = self._next_end()
        if self._due:
            if at == self._due_at:
                return
            self._calendar.take_back(self._due)
            self._due = 0
        if at is not None:
            self._due_at = at
            self._due = self._calendar.call_at(at, self._priority, self._call_look, None)

    def _next_end(self) -> int | None:
        """When the first active transfer ends, or when something begins that changes this in a way not foreseen."""
        active, coming = self._active, self._coming
        end = None
        if active:
            left = max(0, active[0][0] - self._virtual) * len(active)
            end = self._updated_at + (left + _ALMOST_UNIT >> UNIT_BITS)
        if not coming or (end is not None and end <= coming[0][0]):
            return end
        begins, _, service, _, _ = coming[0]
        if active or len(coming) > 1:
            return begins
        return begins + (service + _ALMOST_UNIT >> UNIT_BITS)

    def _look(self, _: None) -> None:
        self._due = 0
        self._begin_those_due()
        now, active = self._calendar.now, self._active
        self._advance(now)
        if not active or active[0][0] > self._virtual:
            self._plan()
            return
        done, argument = heapq.heappop(active)[2:]
        self._plan()
        done(argument)
