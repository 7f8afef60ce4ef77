"""The clock of one process: integer picoseconds since the origin of a session, shared by the processes of one host.

CLOCK_MONOTONIC counts the same nanoseconds in every process of a host, so an origin that all of them were told makes
their instants comparable. Across hosts it does not: offsets would have to be measured.
"""

from __future__ import annotations

import time
from typing import Final

from ..policies.vocabulary import PS_PER_S

PS_PER_NS: Final = 1000


def monotonic_ns() -> int:
    """What an origin is taken from."""
    return time.monotonic_ns()


class Clock:
    """`origin_ns`: the CLOCK_MONOTONIC reading at instant 0."""

    def __init__(self, origin_ns: int = 0) -> None:
        self.origin_ns = origin_ns
        self._last = -1

    def read(self) -> int:
        """The present instant, for information; any thread may ask."""
        return (time.monotonic_ns() - self.origin_ns) * PS_PER_NS

    def now(self) -> int:
        """The instant of the next events of a core: strictly after the one before. Only the core's own thread asks."""
        self._last = max(self.read(), self._last + 1)
        return self._last

    def seconds_until(self, at: int) -> float:
        """How long to wait for the instant `at`; never negative."""
        return max(0, at - self.read()) / PS_PER_S
