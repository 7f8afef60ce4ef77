"""The clock of one process: integer picoseconds since the origin of a session, shared by the processes of one host.

CLOCK_MONOTONIC counts the same nanoseconds in every process of a host, so an origin that all of them were told makes
their instants comparable. Across hosts it does not: their offsets are measured (`clock_offsets`).
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final

from ..policies.vocabulary import PS_PER_S

PS_PER_NS: Final = 1000


def monotonic_ns() -> int:
    """What an origin is taken from."""
    return time.monotonic_ns()


def clock_domain() -> str:
    """Names the clock that `monotonic_ns` reads: equal in processes that share it, different on different hosts.

    On Linux the boot of the kernel and the time namespace; elsewhere the host's name, the best there is.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
    try:
        namespace = os.readlink("/proc/self/ns/time")
    except OSError:  # before Linux 5.6
        namespace = ""
    return f"{boot} {namespace}"


class Clock:
    """`origin_ns`: the CLOCK_MONOTONIC reading at instant 0; now, if it is left out.

    A host may have been up for longer than 64 bits hold picoseconds (106 days), so instants never count from its boot.
    """

    def __init__(self, origin_ns: int | None = None) -> None:
        self.origin_ns = monotonic_ns() if origin_ns is None else origin_ns
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
