"""SimPy's clock in whole picoseconds, and calls at an instant, in the order that the core defines for ties.

SimPy's heap orders by (time, priority, serial). Within one instant messages, transfers and timers come first, then step
ends, then planning passes, each by rank; events of a user's own processes (priorities 0 and 1) come before them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import simpy

MESSAGE: Final = 1 << 24
STEP_END: Final = 2 << 24
POLL: Final = 3 << 24


class FloatDelayError(TypeError):
    """A process slept for a float of SimPy time; the clock counts whole picoseconds."""


class Environment(simpy.Environment):
    """SimPy's environment on integer time: a delay that is not a whole number is refused where it is made."""

    num_scheduled = 0

    def __init__(self) -> None:
        super().__init__(initial_time=0)

    @property
    def now(self) -> int:
        """Picoseconds since the start."""
        return self._now  # type: ignore[return-value]

    def schedule(self, event: simpy.Event, priority: Any = simpy.events.NORMAL, delay: Any = 0) -> None:
        if type(delay) is not int:
            raise FloatDelayError(f"a delay of {delay!r} picoseconds: use cluster.sleep(seconds), the clock is integer")
        self.num_scheduled += 1
        super().schedule(event, priority, delay)


class Call(simpy.Event):
    """A triggered event that calls `function(argument)`."""

    def __init__(self, env: Environment, function: Callable[[Any], None], argument: Any) -> None:
        # an Event's own constructor, less what a call never needs: this is the simulator's hottest allocation
        self.env = env
        self.callbacks = [self._run]
        self._ok = True
        self._value = None
        self._function = function
        self._argument = argument

    def _run(self, _: simpy.Event) -> None:
        self._function(self._argument)


def call_at(env: Environment, at: int, priority: int, function: Callable[[Any], None], argument: Any) -> None:
    """Call at the instant `at` (integer picoseconds, not in the past)."""
    env.schedule(Call(env, function, argument), priority, at - env.now)
