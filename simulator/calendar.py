"""What is to happen when: calls at instants of virtual time, without an object for each.

A call is one tuple in a heap, ordered by (instant, priority, serial). One that will no longer be wanted is taken back: it
is dropped when its turn comes and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

END: Final = 1 << 61  # no instant is as late as this


class Calendar:
    """`now` is the instant of the call that runs, `priority` and `serial` are its place in that instant."""

    def __init__(self) -> None:
        self.now = 0
        self.priority = 0
        self.serial = 0
        self.num_calls = 0  # made so far: the simulator's unit of work
        self._before = 0  # the instant of the call before the one that runs
        self._last_serial = 0
        self._heap: list[tuple[int, int, int, Callable[[Any], object], Any]] = []
        self._taken_back: set[int] = set()

    def call_at(self, at: int, priority: int, function: Callable[[Any], object], argument: Any) -> int:
        """Call `function(argument)` at the instant `at` (picoseconds); the serial of the call. ValueError in the past."""
        if at < self.now:
            raise ValueError(f"a call at {at} ps, before now, {self.now} ps")
        serial = self._last_serial + 1
        self._last_serial = serial
        heappush(self._heap, (at, priority, serial, function, argument))
        return serial

    def call_in_place(
        self, at: int, priority: int, serial: int, function: Callable[[Any], object], argument: Any
    ) -> None:
        """As `call_at`, with a serial from `next_serial`."""
        if at < self.now:
            raise ValueError(f"a call at {at} ps, before now, {self.now} ps")
        heappush(self._heap, (at, priority, serial, function, argument))

    def take_back(self, serial: int) -> None:
        """A call that has not been made yet is not to be made."""
        self._taken_back.add(serial)

    def disregard(self) -> None:
        """The call that runs is not wanted any more, and did nothing: as if it had been taken back, no time has passed."""
        self.now = self._before

    def next_serial(self) -> int:
        """A place in the order of calls for something that is no call."""
        self._last_serial += 1
        return self._last_serial

    def peek(self) -> int:
        """The instant of the next call, or END."""
        heap, taken_back = self._heap, self._taken_back
        while taken_back and heap and heap[0][2] in taken_back:
            taken_back.remove(heappop(heap)[2])
        return heap[0][0] if heap else END

    def is_due(self, at: int) -> bool:
        """Whether another call is to be made at `at`, which is now. As `peek` says, and cheaper where there is none."""
        heap = self._heap
        return bool(heap) and heap[0][0] == at and self.peek() == at

    def step(self) -> bool:
        """Make the next call; False if there is none."""
        while self._heap:
            at, priority, serial, function, argument = heappop(self._heap)
            if self._taken_back and serial in self._taken_back:
                self._taken_back.remove(serial)
                continue
            self._before = self.now
            self.now, self.priority, self.serial = at, priority, serial
            self.num_calls += 1
            function(argument)
            return True
        return False

    def run(self) -> None:
        """Make every call, until none is left."""
        while self.step():
            pass
