"""Ends in the way that its argument names. `sleep PATH` first leaves the process ids in files under PATH."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from disagg.runtime.mpi_world import MpiWorld


def main() -> None:
    how = sys.argv[1]
    if how == "die-first" and os.environ["OMPI_COMM_WORLD_RANK"] == sys.argv[2]:
        time.sleep(0.5)  # while the others are in MPI_Init
        os.kill(os.getpid(), signal.SIGKILL)
    world = MpiWorld()
    if how == "code":
        if world.rank == 0:
            sys.exit(int(sys.argv[2]))
    elif how == "clean-code":
        world.finalize()
        sys.exit(int(sys.argv[2]) if world.rank == 0 else 0)
    elif how == "kill-rank-0":
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    elif how == "sleep":
        partial = Path(sys.argv[2]) / f".{world.rank}"
        partial.write_text(str(os.getpid()))
        partial.rename(Path(sys.argv[2]) / str(world.rank))
        time.sleep(600)
    elif how == "groups":
        ranks = [0, 2] if world.rank in (0, 2) else [3, 1]
        group = world.group(ranks)
        everyone = bytearray(world.size)
        from mpi4py import MPI

        group.Allgather([bytes([world.rank]), MPI.BYTE], [everyone, 1, MPI.BYTE])
        if list(everyone[:2]) != ranks or group.Get_rank() != ranks.index(world.rank):
            sys.exit(f"rank {world.rank} is in the wrong group: {list(everyone)}")
        print(f"rank {world.rank} on {world.hostname} is number {group.Get_rank()} of {ranks}", flush=True)
    world.finalize()


main()
