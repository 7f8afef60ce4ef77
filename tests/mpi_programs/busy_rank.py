"""Rank 0 computes in Python without pause while rank 1 sends to it and receives from it: neither waits for rank 0."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress

NUM_BYTES = 32 << 20  # a rendezvous: the receiver must act for the sender to get on
BUSY_S = 2.0


def main(world: MpiWorld, args: Sequence[str]) -> None:
    begun, over = threading.Event(), threading.Event()
    progress = Progress(world, lambda rank, data: (begun if data == b"busy" else over).set(), lambda rank: None)
    progress.start()
    peer = 1 - world.rank
    incoming = bytearray(NUM_BYTES)
    outgoing = bytes([world.rank + 1]) * NUM_BYTES
    done = {"sent": threading.Event(), "received": threading.Event()}
    problems: list[BaseException] = []

    def mark(what: str, error: BaseException | None) -> None:
        if error is not None:
            problems.append(error)
        done[what].set()

    if world.rank == 0:
        progress.irecv_buffer(peer, 5, incoming, lambda error: mark("received", error))
        progress.isend_buffer(peer, 6, outgoing, lambda error: mark("sent", error))
        progress.send(peer, b"busy")
        until = time.monotonic() + BUSY_S
        count = 0
        while time.monotonic() < until:  # pure Python: it gives the GIL up only when made to
            count += 1
        progress.send(peer, b"over")
    else:
        begun.wait(30)
        progress.isend_buffer(peer, 5, outgoing, lambda error: mark("sent", error))
        progress.irecv_buffer(peer, 6, incoming, lambda error: mark("received", error))
        for event in done.values():
            event.wait(30)
        if over.is_set():
            sys.exit("the transfers ended only after rank 0 had stopped computing")
        print("both transfers ended while rank 0 was busy", flush=True)
    for event in done.values():
        event.wait(30)
    progress.stop()
    if problems or incoming != bytes([peer + 1]) * NUM_BYTES:
        sys.exit(f"rank {world.rank}: {problems}")
