"""Decode attention on one GPU, by how unlike the lengths of a batch are, in several ways to cut its sequences, by turns.

Microseconds a layer (32 query and 8 KV heads of 128, bf16, pages of 32 tokens; 32 layers, each with pages of its own, in
one CUDA graph, `find_cut` once) beside the KV's bytes over a copy's bandwidth. `small`: batches whose last part merges;
`large`: those that are merged by a kernel of its own. Every way's result is compared with softmax over the tokens first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from disagg.runtime.decode_attention import DecodeAttention, SplitSizes

QUERY, KV, DIM, TOKENS, BLOCKS, LAYERS = 32, 8, 128, 32, 4096, 32
SMALL, LARGE = (1, 4, 8, 12, 16, 32), (33, 64, 128)


def bandwidth() -> float:
    """Bytes a second of a copy within the device, read and written."""
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    b.copy_(a)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        b.copy_(a)
    end.record()
    end.synchronize()
    return 10 * (1 << 30) / (start.elapsed_time(end) / 1000)


class Batch:
    """Sequences of these lengths, with tables of their own."""

    def __init__(self, attention: DecodeAttention, lengths: list[int], pool: torch.Tensor) -> None:
        device = pool.device
        self.attention, self.lengths, self.pool = attention, lengths, pool
        self.positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
        width = max(-(-length // TOKENS) for length in lengths)
        self.tables = torch.stack([torch.randperm(BLOCKS, device=device)[:width] for _ in lengths]).to(torch.int32)
        self.q = torch.randn(len(lengths), QUERY * DIM, dtype=pool.dtype, device=device)
        self.out = torch.empty_like(self.q)

    def step(self, sizes: SplitSizes, layers: int = LAYERS) -> None:
        self.attention.find_cut(self.positions, sizes)
        for layer in range(layers):
            k, v = self.pool[layer]
            self.attention(self.q, self.positions, self.tables, k, v, self.out, sizes)

    def error(self, sizes: SplitSizes) -> float:
        """The largest difference from softmax over the tokens, of the first layer."""
        self.out.fill_(torch.nan)
        self.step(sizes, 1)
        worst = 0.0
        for i, length in enumerate(self.lengths):
            k, v = (
                p[self.tables[i].long()].transpose(0, 1).reshape(KV, -1, DIM)[:, :length].float() for p in self.pool[0]
            )
            q = self.q[i].view(KV, -1, DIM).float()
            expected = torch.softmax(q @ k.transpose(1, 2) / DIM**0.5, -1) @ v
            difference = (self.out[i].view(KV, -1, DIM).float() - expected).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
        return worst

    def graph(self, sizes: SplitSizes) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(sizes)
        graph.replay()
        return graph


def replayed(graph: torch.cuda.CUDAGraph, times: int = 3) -> float:
    """Microseconds a layer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (times * LAYERS)


def ways_of(batch: int, now: SplitSizes) -> dict[str, SplitSizes]:
    """What the engine takes, beside how small batches were cut before: in few parts, eight from eight sequences on."""
    if not now.fused:
        return {"now": now, "reading ahead": replace(now, num_stages=3)}
    wanted = 4 * 132 // (batch * KV)
    most = max(8, min(32, 1 << (wanted - 1).bit_length()))
    before = replace(now, by_all=False, max_splits=most, at_once=most, num_stages=2)
    return {"now": now, "before": before, "reading ahead": replace(now, num_stages=3)}


def cases(batch: int, device: torch.device) -> Iterator[tuple[str, list[int]]]:
    for length in (300, 1024, 4096):
        if batch <= 64 or length < 4096:
            yield f"{length} each", [length] * batch
    if batch == 1:
        yield from (("12000", [12_000]), ("32768", [32_768]))
        return
    spread = torch.randn(batch, device=device).mul(0.9).exp().mul(600).clamp(16, 8000).int().tolist()
    yield "lognormal, 16 to 8000", spread
    yield "one of 12000, others 300", [12_000] + [300] * (batch - 1)


def table(batches: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    pool = torch.empty(LAYERS, 2, BLOCKS, KV, TOKENS, DIM, dtype=torch.bfloat16, device=device)
    for layer in pool:
        layer.normal_()
    attention = DecodeAttention(1024, QUERY, KV, DIM, None, device)  # room for any way's parts
    rate = bandwidth()
    for batch in batches:
        ways = ways_of(batch, attention.sizes(batch))
        checked = Batch(attention, [(i * 997 + 2991) % 9000 + 1 for i in range(batch)], pool)
        errors = {name: checked.error(sizes) for name, sizes in ways.items()}
        print(f"batch {batch}: largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        print(f"{'lengths':24s} {'KV tokens':>9s} {'bytes alone':>12s} " + " ".join(f"{name:>16s}" for name in ways))
        for name, lengths in cases(batch, device):
            least = sum(lengths) * KV * DIM * 2 * 2 / rate * 1e6
            own = Batch(attention, lengths, pool)
            graphs = [own.graph(sizes) for sizes in ways.values()]
            rounds = [[replayed(graph) for graph in graphs] for _ in range(4)]
            best = " ".join(f"{min(way):16.1f}" for way in zip(*rounds, strict=True))
            print(f"{name:24s} {sum(lengths):9d} {least:12.1f} {best}", flush=True)


def main() -> None:
    wanted = sys.argv[1:] or ["small", "large"]
    if "small" in wanted:
        table(SMALL)
    if "large" in wanted:
        table(LARGE)


if __name__ == "__main__":
    main()
