"""How ranks of other hosts get their job: rank 0 reads it, and sends it over MPI."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from .launcher import LaunchError
from .mpi_world import MpiWorld

FROM_RANK0: Final = "DISAGG_JOB_FROM_RANK0"  # "1" in the ranks of a world over several hosts
MAX_JOB_BYTES: Final = (1 << 31) - 1  # an MPI count
_LENGTH: Final = struct.Struct("<q")


def broadcast_job(world: MpiWorld, path: Path) -> bytes:
    """The bytes of `path`, which only rank 0 must be able to read. Collective.

    Raises LaunchError on every rank if rank 0 cannot.
    """
    from mpi4py import MPI

    data = b""
    length = bytearray(_LENGTH.size)
    if world.rank == 0:
        try:
            data = path.read_bytes()
            _LENGTH.pack_into(length, 0, len(data))
        except OSError:
            _LENGTH.pack_into(length, 0, -1)
    world.control.Bcast([length, MPI.BYTE], 0)
    (num_bytes,) = _LENGTH.unpack(length)
    if not 0 < num_bytes <= MAX_JOB_BYTES:
        what = "cannot be read" if num_bytes < 0 else f"has {num_bytes} bytes; allowed: 1 to {MAX_JOB_BYTES}"
        raise LaunchError(
            f"the job in {path.parent} {what} on {world.hostnames[0]}, where rank 0 runs; allowed: an output folder on a"
            " file system that it shares with the launching machine, or that machine as the first host"
        )
    frame = bytearray(data) if world.rank == 0 else bytearray(num_bytes)
    world.control.Bcast([frame, MPI.BYTE], 0)
    return bytes(frame)
