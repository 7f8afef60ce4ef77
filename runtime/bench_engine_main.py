"""One rank of `bench_engine` with tp > 1: `python -m disagg.runtime.bench_engine_main MODEL DEVICE QUICK RESULT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from ..core.model_shapes import PRESETS
from .bench_engine import EngineBench
from .engine_build import executor_collectives
from .model_place import Place
from .mpi_world import MpiWorld


def main() -> int:
    """0; rank 0 leaves the rows in RESULT."""
    model, device, quick, result = sys.argv[1:5]
    world = MpiWorld()
    shape = PRESETS[model]
    own = f"{device}:{world.rank}"
    place = Place.of(shape, world.size, 1, world.rank)
    bench = EngineBench(shape, place, executor_collectives(world.group(range(world.size)), place, own), own)
    rows = bench.rows(quick == "1")
    if world.rank == 0:
        partial = Path(result + ".partial")
        partial.write_bytes(msgspec.json.encode(rows))
        os.replace(partial, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
