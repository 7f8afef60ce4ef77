"""Progressive transfers that are given up half-way fail alone, at both ends, and leave nothing behind.

Argument: the ways (see `carriers`), comma-separated. Rank 0 sends to rank 1: number 1 is aborted by the sender, 2 by the
receiver, 3 is fine while rank 0's main thread computes without pause for 200 ms, 4 is open when the sender's transport is
closed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from carriers import each_way, transport_of

from disagg.core.kv_layout import KvLayout, Piece
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransferOutcome

TOKENS, LAYERS = 64, 4
WHOLE = [Piece(0, 0, (0, LAYERS), (0, 2))]
BUSY_S = 0.2


def blocks_of(number: int) -> tuple[int, ...]:
    return tuple(range(16 * number, 16 * number + 16))


def transfers(world: MpiWorld, way: str) -> list[str]:
    peer = 1 - world.rank
    pages = KvPages(KvLayout(1, 1, (LAYERS,), 2, 8, "float32"), 0, 96, 4)
    words: dict[bytes, threading.Event] = {word: threading.Event() for word in (b"half", b"busy", b"over", b"done")}
    progress = Progress(world, lambda rank, data: words[data].set(), lambda rank: None)
    transport, shared = transport_of(way, progress, pages, verify=True, min_segment_bytes=1)
    progress.start()
    errors: list[str] = []
    outcomes: dict[int, TransferOutcome] = {}
    ended = {number: threading.Event() for number in range(1, 5)}

    def on_done(outcome: TransferOutcome) -> None:
        outcomes[outcome.transfer_id] = outcome
        ended[outcome.transfer_id].set()

    def await_half(number: int) -> None:
        """The first two layers have arrived here."""
        for _ in range(3000):
            if bool((pages.pool[:2, :, list(blocks_of(number))] == float(number)).all()):
                progress.send(peer, b"half")
                return
            time.sleep(0.01)
        errors.append(f"half of {number} did not arrive")

    def await_word(word: bytes) -> None:
        if not words[word].wait(30):
            errors.append(f"{word!r} was not said")
        words[word].clear()

    def send(number: int) -> None:
        pages.pool[:, :, list(blocks_of(number))] = float(number)
        transport.send(number, peer, WHOLE, blocks_of(number), TOKENS, on_done, is_written=False)
        transport.advance(number, (0, 2), TOKENS)

    for number in (1, 2):
        if world.rank == 0:
            send(number)
            await_word(b"half")
            if number == 1:
                transport.abort(1, peer, "the request was cancelled")
        else:
            transport.receive(number, peer, WHOLE, blocks_of(number), TOKENS, on_done)
            await_half(number)
            if number == 2:
                transport.abort(2, peer, "the reader was cancelled")
        if not ended[number].wait(30):
            errors.append(f"{number} never ended")
        pages.pool[:, :, list(blocks_of(number))] = -1.0  # ours again: nothing may touch them
        transport.advance(number, (2, 4), TOKENS)  # too late, and harmless

    if world.rank == 0:
        send(3)
        transport.advance(3, (2, 4), TOKENS)
        progress.send(peer, b"busy")
        until = time.monotonic() + BUSY_S
        while time.monotonic() < until:
            pass
        progress.send(peer, b"over")
        ended[3].wait(30)
        send(4)
        await_word(b"half")
    else:
        await_word(b"busy")
        transport.receive(3, peer, WHOLE, blocks_of(3), TOKENS, on_done)
        if not ended[3].wait(30):
            errors.append("3 never ended")
        if words[b"over"].is_set():
            errors.append("the transfer ended only after its sender had stopped computing")
        transport.receive(4, peer, WHOLE, blocks_of(4), TOKENS, on_done)
        await_half(4)
        if not ended[4].wait(30):
            errors.append("4 never ended")
        progress.send(peer, b"done")
    transport.close()
    if world.rank == 0:
        await_word(b"done")
    wanted = {1: "the request was cancelled", 2: "the reader was cancelled", 3: None, 4: "the transport was closed"}
    for number, text in wanted.items():
        if number not in outcomes or outcomes[number].error != text:
            errors.append(f"{number}: {outcomes.get(number)}, expected {text}")
    for number in (1, 2):
        if not bool((pages.pool[:, :, list(blocks_of(number))] == -1.0).all()):
            errors.append(f"the blocks of {number} were touched after its end")
    if world.rank == 1 and not torch.equal(pages.pool[:, :, list(blocks_of(3))].unique(), torch.tensor([3.0])):
        errors.append("3 arrived damaged")
    progress.stop()
    if shared is not None:
        shared.remove()
    return errors


def main(world: MpiWorld, args: Sequence[str]) -> None:
    each_way(world, args[0], transfers, lambda: "cut short")
