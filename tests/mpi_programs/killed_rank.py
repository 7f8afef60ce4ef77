"""Rank 2 is killed in the middle of transfers (or stops, or exits); the others see it once and go on talking."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from disagg.core.kv_layout import KvLayout, Piece
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import PeerDownError, Progress
from disagg.runtime.transport import TransferOutcome, make_transport

VICTIM = 2
TALK = 200


def main() -> None:
    how = sys.argv[1]
    world = MpiWorld()
    survivors = [rank for rank in range(world.size) if rank not in (VICTIM, world.rank)]
    down: list[int] = []
    is_down, talked, failed = threading.Event(), threading.Event(), threading.Event()
    seen = dict.fromkeys(range(world.size), 0)
    errors: list[BaseException | None] = []

    def on_message(rank: int, data: bytes) -> None:
        seen[rank] += 1
        if all(seen[survivor] == TALK for survivor in survivors):
            talked.set()

    def on_peer_down(rank: int) -> None:
        down.append(rank)
        is_down.set()

    def on_done(error: BaseException | None) -> None:
        errors.append(error)
        if len(errors) == 2:
            failed.set()

    outcomes: list[TransferOutcome] = []
    outcome_in = threading.Event()

    def on_outcome(outcome: TransferOutcome) -> None:
        outcomes.append(outcome)
        outcome_in.set()

    progress = Progress(world, on_message, on_peer_down, silence_limit_s=3.0)
    transport = make_transport("mpi", progress, KvPages(KvLayout(1, 1, (1,), 1, 4, "float32"), 0, 4, 4))
    progress.start()
    if world.rank == VICTIM:
        for rank in survivors:  # half a conversation: these receives never get their message
            progress.irecv_buffer(rank, 1, bytearray(1 << 20), lambda error: None)
        time.sleep(0.3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise RuntimeError("this rank fails on purpose")
    began = time.monotonic()
    buffers = [bytearray(64 << 20), bytearray(1 << 20)]
    progress.isend_buffer(VICTIM, 9, buffers[0], on_done)  # nobody receives this
    progress.irecv_buffer(VICTIM, 9, buffers[1], on_done)  # nobody sends this
    transport.receive(1, VICTIM, [Piece(0, 0, (0, 1), (0, 1))], (0, 1), 8, on_outcome)
    if not is_down.wait(20) or not failed.wait(5) or not outcome_in.wait(5):
        sys.exit(f"rank {world.rank} noticed nothing")
    noticed_s = time.monotonic() - began
    if progress.send(VICTIM, b"anyone there?"):
        sys.exit("a frame for a dead rank was accepted")
    for _ in range(TALK):
        for rank in survivors:
            progress.send(rank, b"still here")
    if not talked.wait(20):
        sys.exit(f"rank {world.rank} heard too little: {seen}")
    lost = bool(progress.down_ranks)  # MPI_Finalize may wait for ever for a rank that died
    transport.close()
    progress.stop()
    world.finalize(lost_ranks=lost)
    if down != [VICTIM] or not all(isinstance(error, PeerDownError) for error in errors):
        sys.exit(f"rank {world.rank}: down {down}, errors {errors}")
    if len(outcomes) != 1 or f"rank {VICTIM}" not in str(outcomes[0].error):
        sys.exit(f"rank {world.rank}: {outcomes}")
    print(f"rank {world.rank} survived, noticed after {noticed_s:.2f} s", flush=True)


main()
