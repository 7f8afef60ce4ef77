"""How long the progress thread rests between two looks at MPI: the price of a message's latency in processor time.

With cores to spare, a rank that has a transfer under way looks without pause for a bounded time after anything happened,
then with short sleeps: what one rank says must not lie unread while the other sleeps. With few cores it always sleeps,
because a thread that looks takes the core from one that computes. No clock in here.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Final

_MANY_CORES: Final = 8
_YIELDS: Final = 20  # idle rounds without a sleep
_SPIN_S: Final = 2e-3  # without a pause after something happened; five times a prompt's copy over NVLink
_FIRST_SLEEP_S: Final = 20e-6
_PR_SET_TIMERSLACK: Final = 29


class Pace:
    """Ask `rest` after every round. `num_cores`: this machine's."""

    def __init__(self, num_cores: int | None = None) -> None:
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cores = num_cores or len(own)  # not those that a scheduler or a container keeps from us
        self.can_spin: Final = cores >= _MANY_CORES
        self._longest_sleep_s = 1e-4 if self.can_spin else 1e-3  # half of it is added to a message's latency
        self._longest_in_transfer_s = 4e-5 if self.can_spin else 1e-4
        self._idle_rounds = 0
        self._sleep_s = _FIRST_SLEEP_S
        self._spin_until = 0.0

    def rest(self, busy: bool, in_transfer: bool, now: float) -> float | None:
        """Seconds to sleep after a round that ended `now` (monotonic s) and was `busy`; 0 to yield, None to go on.

        `in_transfer`: somebody waits for what the other ranks do. Not where KV is merely offered to this rank or by it: a
        thread that looks takes its turns from the one that launches steps, and its transfers are not faster.
        """
        if busy:
            self._idle_rounds, self._sleep_s = 0, _FIRST_SLEEP_S
            if in_transfer and self.can_spin:
                self._spin_until = now + _SPIN_S
            return None
        self._idle_rounds += 1
        if self._idle_rounds <= _YIELDS or (in_transfer and now < self._spin_until):
            return 0.0
        sleep_s = self._sleep_s
        self._sleep_s = min(2 * sleep_s, self._longest_in_transfer_s if in_transfer else self._longest_sleep_s)
        return sleep_s


class Bell:
    """Ends the sleep of one thread. `ring` is for whoever holds the lock that goes with it, and is not lost.

    Not SimpleQueue.get with a time-out of microseconds: under load ranks were seen to fall silent in it (Python 3.11), as
    if the time left had turned negative between two looks at the clock, which it takes for "without end".
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        if self._silence.locked():
            self._silence.release()

    def wait(self, seconds: float) -> bool:
        """Sleep until it rings, or has rung since the last `wait`, at most so long; whether it did."""
        return self._silence.acquire(timeout=seconds)


def wake_promptly() -> None:
    """Let the kernel end sleeps of this thread when they are over, not 50 µs later; harmless where that is unknown."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000), 0, 0, 0)
    except (AttributeError, OSError):
        pass
