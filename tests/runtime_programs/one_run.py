"""A run of a cluster on ranks that are there already. Argument: the folder that holds its job, and will its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.orchestrator_job import JOB, RESULT, decode_job, encode
from disagg.runtime.orchestrator_main import run_job


def main(world: MpiWorld, args: Sequence[str]) -> None:
    folder = Path(args[0])
    result = run_job(decode_job((folder / JOB).read_bytes()), world=world)
    if result is not None:
        (folder / RESULT).write_bytes(encode(result))
