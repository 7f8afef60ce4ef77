"""Deadlines of one core: many timers, one wake-up asked of the driver.

A timer is never cancelled: whoever set it looks, when it fires, whether it still matters. A renewal sets another.
"""

from __future__ import annotations

import heapq


class Timers:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str, int]] = []  # (deadline, serial, what, id)
        self._serial = 0
        self._asked: int | None = None

    def set(self, deadline: int, what: str, subject: int = 0) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (deadline, self._serial, what, subject))

    def due(self, now: int) -> list[tuple[str, int]]:
        """Timers whose deadline has come, in order of deadline, then of setting."""
        fired = []
        while self._heap and self._heap[0][0] <= now:
            _, _, what, subject = heapq.heappop(self._heap)
            fired.append((what, subject))
        return fired

    def woken(self) -> None:
        """The driver gave its wake-up: none is outstanding."""
        self._asked = None

    def wake_up(self) -> int | None:
        """The instant to ask the driver for now, or None if the one it knows is early enough."""
        if not self._heap:
            return None
        first = self._heap[0][0]
        if self._asked is not None and self._asked <= first:
            return None
        self._asked = first
        return first
