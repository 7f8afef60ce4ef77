"""A source executor sends KV while it is being computed, chunk by chunk and layer by layer, to another layout.

Arguments: the ways (see `carriers`), comma-separated; tp, layers of each stage (comma-separated) and tokens a block of the
source, then of the destination; KV heads (default 4).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from carriers import device_of, each_way, transport_of

from disagg.core.kv_layout import KvLayout, transfer_plan
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransferOutcome

HEAD_DIM, TOKENS, NUM_BLOCKS = 8, 45, 64
CHUNKS = (16, 23, 45)  # where each chunk of the prompt ends; not all on a block boundary
REQUESTS = range(8)


def layout_of(tp: str, stages: str, heads: int) -> KvLayout:
    layers = tuple(map(int, stages.split(",")))
    return KvLayout(int(tp), len(layers), layers, heads, HEAD_DIM, "bfloat16")


def blocks_of(request: int, tokens_per_block: int) -> tuple[int, ...]:
    count = -(-TOKENS // tokens_per_block)
    return tuple(NUM_BLOCKS * 4 - 1 - request * count - i for i in range(count))


def truth(request: int, layout: KvLayout) -> torch.Tensor:
    """[layers, 2, heads, tokens, head_dim]"""
    generator = torch.Generator().manual_seed(request)
    whole = torch.randn(layout.num_layers, 2, layout.num_kv_heads, TOKENS, HEAD_DIM, generator=generator)
    return whole.to(torch.bfloat16)


def transfers(world: MpiWorld, way: str, args: Sequence[str]) -> list[str]:
    heads = int(args[6]) if len(args) > 6 else 4
    layouts = (layout_of(*args[0:2], heads), layout_of(*args[3:5], heads))
    sizes = (int(args[2]), int(args[5]))
    is_source = world.rank < layouts[0].num_ranks
    local = world.rank if is_source else world.rank - layouts[0].num_ranks
    side = 0 if is_source else 1
    device = device_of(way, world.rank)
    pages = KvPages(layouts[side], local, NUM_BLOCKS * 4, sizes[side], device)
    errors: list[str] = []
    seen = threading.Semaphore(0)
    progress = Progress(world, lambda rank, data: seen.release(), lambda rank: errors.append(f"rank {rank} down"))
    transport, shared = transport_of(way, progress, pages, verify=True, min_segment_bytes=1)
    pages.pool.fill_(float("nan"))
    progress.start()

    plan = transfer_plan(*layouts)
    peers: dict[int, list] = {}
    for piece in plan:
        if (piece.source_rank if is_source else piece.destination_rank) == local:
            peer = piece.destination_rank + layouts[0].num_ranks if is_source else piece.source_rank
            peers.setdefault(peer, []).append(piece)
    outcomes: list[TransferOutcome] = []
    finished = threading.Event()

    def on_done(outcome: TransferOutcome) -> None:
        outcomes.append(outcome)
        if outcome.error is not None:
            errors.append(outcome.error)
        if len(outcomes) == len(peers) * len(REQUESTS):
            finished.set()

    def compute(request: int) -> None:
        whole = truth(request, layouts[0])
        blocks = blocks_of(request, sizes[0])
        start = 0
        for end in CHUNKS:
            for layer in range(*pages.layers):
                part = whole[layer : layer + 1, :, slice(*pages.heads), start:end].contiguous()
                needed = blocks[: -(-end // sizes[0])]
                pages.unpack(part, needed, end, (layer, layer + 1), pages.heads, start)
                if device != "cpu":
                    torch.cuda.synchronize(device)  # written, for every stream to see
                transport.advance(request, (layer, layer + 1), end)
                time.sleep(0.001)
            start = end
            if request == REQUESTS[-1] and end == CHUNKS[0]:
                for _ in peers:  # its readers have this chunk before the next is begun
                    if not seen.acquire(timeout=30):
                        errors.append("the first chunk was not seen while the second was not computed")

    def watch(request: int) -> None:
        blocks = blocks_of(request, sizes[1])[: -(-CHUNKS[0] // sizes[1])]
        for _ in range(3000):
            if not pages.pack(blocks, CHUNKS[0], pages.layers, pages.heads).isnan().any():
                break
            time.sleep(0.01)
        for peer in peers:
            progress.send(peer, b"seen")

    def serve(request: int) -> None:
        for peer, pieces in peers.items():
            blocks = blocks_of(request, sizes[0])
            transport.send(request, peer, pieces, blocks, TOKENS, on_done, is_written=False)

    if not peers:
        finished.set()
    for request in REQUESTS:
        if not is_source:
            for peer, pieces in peers.items():
                transport.receive(request, peer, pieces, blocks_of(request, sizes[1]), TOKENS, on_done)
        elif request % 3 == 0:
            compute(request)  # all of it before anybody asks to send
            serve(request)
        else:
            serve(request)
            compute(request)
    if not is_source:
        watch(REQUESTS[-1])
    if not finished.wait(60):
        errors.append(f"only {len(outcomes)} of {len(peers) * len(REQUESTS)} transfers ended")
    if peers and not all(outcome.num_checked for outcome in outcomes):
        errors.append("a transfer without a compared checksum")
    if is_source:
        early = [o for o in outcomes if o.bytes_after_written < o.num_bytes]
        if peers and not early:
            errors.append("nothing was sent before everything was written")
    else:
        for request in REQUESTS:
            got = pages.pack(blocks_of(request, sizes[1]), TOKENS, pages.layers, pages.heads)
            want = truth(request, layouts[1])[slice(*pages.layers), :, slice(*pages.heads)]
            if not torch.equal(got.cpu(), want):
                errors.append(f"request {request} arrived damaged")
    transport.close()
    if shared is not None:
        shared.remove()
    progress.stop()
    return errors


def main(world: MpiWorld, args: Sequence[str]) -> None:
    each_way(world, args[0], lambda own, way: transfers(own, way, args[1:]), lambda: "progressive transfers")


if __name__ == "__main__":
    everyone = MpiWorld()
    main(everyone, sys.argv[1:])
    everyone.finalize()
