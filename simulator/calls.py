"""SimPy's clock in whole picoseconds, and calls at an instant, in the order that the core defines for ties.

The calendar orders by (time, priority, serial). Within one instant messages, transfers and timers come first,
then step ends, then planning passes, each by rank; events of a user's own processes (priorities 0 and 1) come before them
all.
"""

from __future__ import annotations

from math import inf
from typing import Any, Final

import simpy
from simpy.core import EmptySchedule, StopSimulation

from .calendar import END, Calendar

MESSAGE: Final = 1 << 24
STEP_END: Final = 2 << 24
POLL: Final = 3 << 24


class FloatDelayError(TypeError):
    """A process slept for a float of SimPy time; the clock counts whole picoseconds."""


class Environment(simpy.Environment):
    """SimPy's environment on integer time and on a calendar that holds plain calls beside SimPy's events.

    A delay that is not a whole number is refused where it is made.
    """

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.calendar = Calendar()

    @property
    def now(self) -> int:
        """Picoseconds since the start."""
        return self.calendar.now

    def schedule(self, event: simpy.Event, priority: Any = simpy.events.NORMAL, delay: Any = 0) -> None:
        if type(delay) is not int:
            raise FloatDelayError(f"a delay of {delay!r} picoseconds: use cluster.sleep(seconds), the clock is integer")
        calendar = self.calendar
        calendar.call_at(calendar.now + delay, int(priority), self._happen, event)

    def peek(self) -> Any:
        at = self.calendar.peek()
        return inf if at == END else at

    def step(self) -> None:
        if not self.calendar.step():
            raise EmptySchedule

    def run(self, until: Any = None) -> Any:
        if until is not None:
            return super().run(until)
        self.calendar.run()
        return None

    def _happen(self, event: simpy.Event) -> None:
        """What SimPy does with an event whose instant has come."""
        callbacks: list[Any] = event.callbacks
        event.callbacks = None  # type: ignore[assignment]
        for number, callback in enumerate(callbacks, 1):
            try:
                callback(event)
            except StopSimulation:
                event.callbacks = callbacks[number:]  # they are called when the simulation goes on
                self.schedule(event, -1)
                raise
        if not event.ok and not event.defused:
            raise event.value  # type: ignore[misc]
