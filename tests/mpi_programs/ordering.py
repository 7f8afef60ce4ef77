"""Every rank sends numbered frames of mixed sizes to every other; each pair's must arrive in order and whole."""

from __future__ import annotations

import sys
import threading

from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress

NUM_FRAMES = 2000
SIZES = (8, 100, 5_000, 70_000)  # below and above the eager limit


def frame(number: int) -> bytes:
    size = SIZES[number % len(SIZES)] if number % 50 < 4 else 16
    return number.to_bytes(8, "big").ljust(size, bytes([number % 251]))


def main() -> None:
    world = MpiWorld()
    peers = [rank for rank in range(world.size) if rank != world.rank]
    seen: dict[int, int] = dict.fromkeys(peers, 0)
    wrong: list[str] = []
    everything = threading.Event()

    def on_message(rank: int, data: bytes) -> None:
        if data != frame(seen[rank]):
            wrong.append(f"from {rank}: expected number {seen[rank]}, got {int.from_bytes(data[:8], 'big')}")
        seen[rank] += 1
        if all(count == NUM_FRAMES for count in seen.values()):
            everything.set()

    progress = Progress(world, on_message, lambda rank: wrong.append(f"rank {rank} down"))
    progress.start()
    for number in range(NUM_FRAMES):
        for peer in peers:
            progress.send(peer, frame(number))
    if not everything.wait(60):
        wrong.append(f"frames are missing: {seen}")
    progress.stop()
    world.finalize()
    if wrong:
        sys.exit(f"rank {world.rank}: {wrong[:3]}")
    print(f"rank {world.rank} has {sum(seen.values())} frames in order", flush=True)


main()
