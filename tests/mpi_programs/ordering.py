"""Every rank sends numbered frames of mixed sizes to every other; each pair's must arrive in order and whole.

Half of them are sent by the main thread and, meanwhile, one for each that came by the progress thread, which gives its
own to MPI at once where none of the others waits.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress

NUM_FRAMES = 2000
SIZES = (8, 100, 5_000, 70_000)  # below and above the eager limit


def frame(number: int) -> bytes:
    size = SIZES[number % len(SIZES)] if number % 50 < 4 else 16
    return number.to_bytes(8, "big").ljust(size, bytes([number % 251]))


def main(world: MpiWorld, args: Sequence[str]) -> None:
    peers = [rank for rank in range(world.size) if rank != world.rank]
    seen: dict[int, int] = dict.fromkeys(peers, 0)
    wrong: list[str] = []
    everything = threading.Event()
    said: dict[int, int] = dict.fromkeys(peers, 0)
    saying = threading.Lock()

    def say(peer: int) -> None:
        with saying:  # the numbers leave in their order
            if said[peer] < NUM_FRAMES:
                progress.send(peer, frame(said[peer]))
                said[peer] += 1

    def on_message(rank: int, data: bytes) -> None:
        say(rank)
        if data != frame(seen[rank]):
            wrong.append(f"from {rank}: expected number {seen[rank]}, got {int.from_bytes(data[:8], 'big')}")
        seen[rank] += 1
        if all(count == NUM_FRAMES for count in seen.values()):
            everything.set()

    progress = Progress(world, on_message, lambda rank: wrong.append(f"rank {rank} down"))
    progress.start()
    for _ in range(NUM_FRAMES // 2):
        for peer in peers:
            say(peer)
    if not everything.wait(60):
        wrong.append(f"frames are missing: {seen}")
    progress.stop()
    if wrong:
        sys.exit(f"rank {world.rank}: {wrong[:3]}")
    print(f"rank {world.rank} has {sum(seen.values())} frames in order", flush=True)
