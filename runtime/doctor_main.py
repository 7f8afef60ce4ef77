"""Two ranks that time messages between them: `python -m disagg.runtime.doctor_main FOLDER`, started by the launcher."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from .mpi_world import MpiWorld

_LARGE: Final = (64 << 20, 5)  # bytes, round trips
_SMALL: Final = (8, 500)


def _round_trip_s(world: MpiWorld, num_bytes: int, times: int) -> float:
    """The shortest round trip between ranks 0 and 1."""
    from mpi4py import MPI

    buffer = np.zeros(num_bytes, np.uint8)
    best = float("inf")
    for _ in range(times + 1):  # the first sets the connection up
        began = time.perf_counter()
        if world.rank == 0:
            world.data.Send([buffer, MPI.BYTE], 1)
            world.data.Recv([buffer, MPI.BYTE], 1)
        else:
            world.data.Recv([buffer, MPI.BYTE], 0)
            world.data.Send([buffer, MPI.BYTE], 0)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> int:
    from .doctor_paths import RESULT

    world = MpiWorld()
    large, small = _round_trip_s(world, *_LARGE), _round_trip_s(world, *_SMALL)
    if world.rank == 0:
        values = {"gb_per_s": 2 * _LARGE[0] / large / 1e9, "latency_us": small / 2 * 1e6}
        (Path(sys.argv[1]) / RESULT).write_text(json.dumps(values))
    world.finalize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
