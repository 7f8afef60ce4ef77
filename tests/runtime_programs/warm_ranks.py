"""Ranks that run one program after another, each on communicators of its own. Argument: the folder of `tests.warm_world`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from disagg.runtime.mpi_world import MpiWorld
from tests.mpi_programs.part_of_world import PartOfWorld
from tests.warm_world import ENDED, WELL


def main() -> None:
    folder = Path(sys.argv[1])
    world = MpiWorld()
    if world.rank == 0:
        (folder / "partial").write_text(str(os.getpid()))
        (folder / "partial").replace(folder / "pid")
    with (folder / str(world.rank)).open() as jobs, (folder / ENDED).open("w") as ended:
        while line := jobs.readline().rstrip("\n"):
            name, num_ranks, program, *args = line.split("\t")
            output = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            part = PartOfWorld(world, int(num_ranks))
            try:
                importlib.import_module(program).main(part, args)
                part.finalize()
            except BaseException as error:
                print(f"rank {world.rank} failed: {type(error).__name__}: {error}", file=ended, flush=True)
                raise
            sys.stdout.flush()
            sys.stderr.flush()
            print(WELL, file=ended, flush=True)
    world.finalize()


main()
