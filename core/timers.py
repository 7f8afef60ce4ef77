"""Deadlines of one core: many timers, one wake-up asked of the driver.

A timer is never cancelled: whoever set it looks, when it fires, whether it still matters. A renewal sets another. Nobody
is woken for one that is known not to matter by the time a wake-up is asked for.
"""

from __future__ import annotations

import heapq
from typing import Final

from .commands import WakeAt
from .life_cycle import State
from .visit import Visit

_NONE: Final = -1  # no instant: an integer, which compiled code keeps without an object


class Timers:
    """`limits`: which timers limit how long a visit, one of `visits`, is in that state. Once it is past that they do not
    matter, and never will again; all others do.
    """

    def __init__(self, visits: dict[int, Visit] | None = None, limits: dict[str, State] | None = None) -> None:
        self._visits = visits if visits is not None else {}
        self._limits = limits if limits is not None else {}
        self._heap: list[tuple[int, int, str, int]] = []  # (deadline, serial, what, id)
        self._serial = 0
        self._asked = _NONE  # what the driver knows: the next wake-up, and the next report
        self._asked_report = _NONE

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
        self._asked = self._asked_report = _NONE

    def wake_up(self, report_at: int | None = None) -> WakeAt | None:
        """What to ask of the driver now, with a report due at `report_at`; None if it knows that."""
        heap = self._heap
        asked = self._asked
        if asked == _NONE:
            while heap and not self._matters(heap[0][2], heap[0][3]):
                heapq.heappop(heap)
        first = heap[0][0] if heap else _NONE
        if asked != _NONE and (first == _NONE or asked < first):
            first = asked  # a spurious one does no harm
        report = _NONE if report_at is None or (first != _NONE and first <= report_at) else report_at
        if first == asked and report == self._asked_report:
            return None
        self._asked, self._asked_report = first, report
        return WakeAt(None if first == _NONE else first, None if report == _NONE else report)

    def _matters(self, what: str, subject: int) -> bool:
        state = self._limits.get(what)
        if state is None:
            return True
        visit = self._visits.get(subject)
        return visit is not None and visit.doom is None and visit.state is state
