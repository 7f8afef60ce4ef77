"""A world over ob1 is asked to carry device memory by MPI: every rank says why not, and ends well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from carriers import device_of

from disagg.core.kv_layout import KvLayout
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransportError, make_transport


def main() -> None:
    world = MpiWorld()
    pages = KvPages(KvLayout(1, 1, (1,), 1, 8, "bfloat16"), 0, 4, 16, device_of("gpu-mpi", world.rank))
    progress = Progress(world, lambda rank, data: None, lambda rank: None)
    try:
        make_transport("mpi", progress, pages)
    except TransportError as error:
        print(f"refused: {error}", flush=True)
    world.finalize()


main()
