"""Transfers that cannot be fail alone and with words; the ones beside them succeed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

from disagg.core.kv_layout import KvLayout, Piece
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransferOutcome, make_transport

BLOCKS = (3, 1)
WHOLE = [Piece(0, 0, (0, 2), (0, 2))]
HALF = [Piece(0, 0, (0, 1), (0, 2))]
CORRUPTED = (4, 2)  # blocks that the receiver damages as it writes them


def main(world: MpiWorld, args: Sequence[str]) -> None:
    peer = 1 - world.rank
    pages = KvPages(KvLayout(1, 1, (2,), 2, 4, "float32"), 0, 8, 4)
    pages.pool.uniform_()
    outcomes: dict[int, TransferOutcome] = {}
    all_in = threading.Event()
    spoken = threading.Event()
    progress = Progress(world, lambda rank, data: spoken.set(), lambda rank: None)
    transport = make_transport("mpi", progress, pages, verify=True)
    progress.start()

    def on_done(outcome: TransferOutcome) -> None:
        outcomes[outcome.transfer_id] = outcome
        if len(outcomes) == 7:
            all_in.set()

    if world.rank == 0:
        transport.send(1, peer, WHOLE, BLOCKS, 8, on_done)
        transport.send(2, peer, HALF, BLOCKS, 8, on_done)  # the receiver expects WHOLE
        transport.send(3, peer, WHOLE, BLOCKS, 0, on_done)  # no tokens
        transport.send(4, peer, WHOLE, (7, 99), 8, on_done)  # a block that does not exist
        transport.send(6, peer, WHOLE, BLOCKS, 8, on_done)
        transport.send(7, peer, WHOLE, BLOCKS, 8, on_done)  # beside all that
        spoken.wait(30)  # the receiver has given number 5 up
        transport.send(5, peer, WHOLE, BLOCKS, 8, on_done)
    else:
        unpack = pages.unpack

        def unpack_damaged(packed: torch.Tensor, blocks: Sequence[int], *rest: Any) -> None:
            unpack(packed, blocks, *rest)
            if tuple(blocks) == CORRUPTED:
                pages.pool[1, 0, CORRUPTED[1], 1, 3, 0] += 1.0

        pages.unpack = unpack_damaged  # type: ignore[method-assign]
        transport.receive(6, peer, WHOLE, CORRUPTED, 8, on_done)
        transport.receive(1, peer, WHOLE, BLOCKS, 8, on_done)
        transport.receive(2, peer, WHOLE, BLOCKS, 8, on_done)
        transport.receive(3, peer, WHOLE, BLOCKS, 8, on_done)
        transport.receive(4, peer, WHOLE, BLOCKS, 8, on_done)
        given_up = threading.Event()

        def on_given_up(outcome: TransferOutcome) -> None:
            given_up.set()
            on_done(outcome)

        transport.receive(5, peer, WHOLE, BLOCKS, 8, on_given_up)
        transport.abort(5, peer, "the reader was cancelled")
        given_up.wait(30)
        progress.send(peer, b"given up")
        transport.receive(7, peer, WHOLE, (5, 6), 8, on_done)
    all_in.wait(30)
    transport.close()
    progress.stop()
    errors = {i: outcomes[i].error for i in sorted(outcomes)}
    print(f"rank {world.rank}: {errors}", flush=True)
    wanted = {1: None, 2: "expects", 3: "0 tokens", 4: "block ids", 5: "the reader was cancelled", 6: None, 7: None}
    if world.rank == 1:
        wanted[6] = "checksum of layer 1, KV head 1, block 1 differs"
    for ident, text in wanted.items():
        got = errors.get(ident, "never ended")
        if (got is None) != (text is None) or (text is not None and text not in str(got)):
            sys.exit(f"rank {world.rank}: transfer {ident} gave {got!r}, expected {text!r}")
