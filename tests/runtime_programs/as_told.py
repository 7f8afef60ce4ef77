"""Rank 1 does what it is told: is well, fails, is killed, or stays away; rank 0 waits for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

from disagg.runtime.mpi_world import MpiWorld


def main(world: MpiWorld, args: Sequence[str]) -> None:
    if world.rank == 1 and args[0] == "fails":
        raise ValueError("on purpose")
    if world.rank == 1 and args[0] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 1 and args[0] == "stays away":
        threading.Event().wait()
    world.control.Barrier()
    print(f"rank {world.rank} of {world.size} is well")
