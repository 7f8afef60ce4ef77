"""Ranks 0 and 1 (tp 2) send KV to ranks 2 and 3 (pp 2) and back, many at once, contents compared at both ends.

Argument: comma-separated ways (see `carriers`), each with `:verify` for checksums or `:plain`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from carriers import device_of, each_way, transport_of

from disagg.core.kv_layout import KvLayout, Piece, transfer_plan
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransferOutcome

NUM_REQUESTS = 40
LAYOUTS = (KvLayout(2, 1, (3,), 4, 8, "bfloat16"), KvLayout(1, 2, (1, 2), 4, 8, "bfloat16"))
BLOCK_SIZES = (16, 4)  # tokens a block on either side
TOKENS = 50
NUM_BLOCKS = 4 + NUM_REQUESTS * 26


def blocks_of(side: int, slot: int) -> tuple[int, ...]:
    count = -(-TOKENS // BLOCK_SIZES[side])
    return tuple(NUM_BLOCKS - 1 - slot * count - i for i in range(count))  # not in ascending order


def pieces_with(pieces: tuple[Piece, ...], source: int, destination: int) -> list[Piece]:
    return [p for p in pieces if p.source_rank == source and p.destination_rank == destination]


def truth(seed: int) -> torch.Tensor:
    """The KV of a request as a whole: [layers, 2, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 4, TOKENS, 8, generator=generator).to(torch.bfloat16)


told: list[int] = []


def transfers(world: MpiWorld, way_and_how: str) -> list[str]:
    side, local = divmod(world.rank, 2)
    other = 1 - side
    device = torch.device(device_of(way_and_how, world.rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    pages = KvPages(LAYOUTS[side], local, 2 * NUM_BLOCKS, BLOCK_SIZES[side], device)
    errors: list[str] = []
    progress = Progress(world, lambda rank, data: None, lambda rank: errors.append(f"rank {rank} down"))
    way, _, how = way_and_how.partition(":")
    verify = how == "verify"
    transport, shared = transport_of(way, progress, pages, verify=verify)
    progress.start()

    own_part = (slice(*pages.layers), slice(None), slice(*pages.heads))
    for request in range(NUM_REQUESTS):  # what this side sends
        whole = truth(1000 * side + request)[own_part].contiguous().to(device)
        pages.unpack(whole, blocks_of(side, request), TOKENS, pages.layers, pages.heads)

    outcomes: list[TransferOutcome] = []
    finished = threading.Event()
    expected = 0

    def on_done(outcome: TransferOutcome) -> None:
        outcomes.append(outcome)
        if outcome.error is not None:
            errors.append(outcome.error)
        if len(outcomes) == expected:
            finished.set()

    outgoing = transfer_plan(LAYOUTS[side], LAYOUTS[other])
    incoming = transfer_plan(LAYOUTS[other], LAYOUTS[side])
    sends = [(peer, pieces_with(outgoing, local, peer)) for peer in (0, 1)]
    receives = [(peer, pieces_with(incoming, peer, local)) for peer in (0, 1)]
    expected = NUM_REQUESTS * sum(bool(pieces) for _, pieces in sends + receives)
    for request in range(NUM_REQUESTS):
        late = NUM_REQUESTS - 1 - request  # receives in another order than sends
        for peer, pieces in sends:
            if pieces:
                ident = request + 1000 * side
                transport.send(ident, 2 * other + peer, pieces, blocks_of(side, request), TOKENS, on_done)
        for peer, pieces in receives:
            if pieces:
                ident = late + 1000 * other
                slots = blocks_of(side, NUM_REQUESTS + late)
                transport.receive(ident, 2 * other + peer, pieces, slots, TOKENS, on_done)
    if not finished.wait(60):
        errors.append(f"only {len(outcomes)} of {expected} transfers ended")
    checked = sum(outcome.num_checked for outcome in outcomes)
    if verify and checked == 0:
        errors.append("no checksum was compared")
    for request in range(NUM_REQUESTS):  # not only the checksums: the contents
        slots = blocks_of(side, NUM_REQUESTS + request)
        got = pages.pack(slots, TOKENS, pages.layers, pages.heads).cpu()
        if not torch.equal(got, truth(1000 * other + request)[own_part]):
            errors.append(f"request {request} arrived damaged")
    transport.close()
    if shared is not None:
        shared.remove()
    progress.stop()
    told[:] = [len(outcomes), checked]
    return errors


def main(world: MpiWorld, args: Sequence[str]) -> None:
    each_way(world, args[0], transfers, lambda: f"{told[0]} transfers, {told[1]} checksums")


if __name__ == "__main__":
    everyone = MpiWorld()
    main(everyone, sys.argv[1:])
    everyone.finalize()
