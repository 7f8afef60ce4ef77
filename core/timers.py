"""Deadlines of one core: many timers, one wake-up asked of the driver.

A timer is never cancelled: whoever set it looks, when it fires, whether it still matters. A renewal sets another. Nobody
is woken for one that is known not to matter by the time a wake-up is asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .commands import WakeAt


class Timers:
    """`matters(what, id)` says whether a timer still does; one that does not never will again. By default all do."""

    def __init__(self, matters: Callable[[str, int], bool] | None = None) -> None:
        self._matters = matters
        self._heap: list[tuple[int, int, str, int]] = []  # (deadline, serial, what, id)
        self._serial = 0
        self._asked: int | None = None  # what the driver knows: the next wake-up, and the next report
        self._asked_report: int | None = None

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
        self._asked = self._asked_report = None

    def wake_up(self, report_at: int | None = None) -> WakeAt | None:
        """What to ask of the driver now, with a report due at `report_at`; None if it knows that."""
        heap, matters = self._heap, self._matters
        if self._asked is None and matters is not None:
            while heap and not matters(heap[0][2], heap[0][3]):
                heapq.heappop(heap)
        first = heap[0][0] if heap else None
        if self._asked is not None and (first is None or self._asked < first):
            first = self._asked  # a spurious one does no harm
        if report_at is not None and first is not None and first <= report_at:
            report_at = None
        if first == self._asked and report_at == self._asked_report:
            return None
        self._asked, self._asked_report = first, report_at
        return WakeAt(first, report_at)
