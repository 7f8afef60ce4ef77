"""Decode attention of large batches on one GPU, by how unlike their lengths are: parts found by all KV there is, or fixed.

Microseconds a layer (32 query and 8 KV heads of 128, bf16, pages of 32 tokens; from a CUDA graph, `find_cut` once in
32 layers) beside the KV's bytes over a copy's bandwidth. Parts of 2,048 are how large batches were cut before.
"""

from __future__ import annotations

import torch

from disagg.runtime.decode_attention import DecodeAttention

QUERY, KV, DIM, TOKENS, BLOCKS = 32, 8, 128, 32, 8192
FIXED = 2048


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


def timed(attention: DecodeAttention, lengths: list[int], pool: torch.Tensor, cut: int | None) -> float:
    batch, device = len(lengths), pool.device
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    width = max(-(-length // TOKENS) for length in lengths)
    tables = torch.stack([torch.randperm(BLOCKS, device=device)[:width] for _ in lengths]).to(torch.int32)
    q = torch.randn(batch, QUERY * DIM, dtype=pool.dtype, device=device)
    out = torch.empty_like(q)

    def step() -> None:
        if cut is None:
            attention.find_cut(positions)
        else:
            attention._cut.fill_(cut)
        for _ in range(32):
            attention(q, positions, tables, pool[0], pool[1], out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (5 * 32)


def main() -> None:
    torch.manual_seed(0)
    pool = torch.randn(2, BLOCKS, KV, TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    attention = DecodeAttention(256, QUERY, KV, DIM, None, torch.device("cuda"))
    rate = bandwidth()
    print(f"{'batch':>6s}  {'lengths':24s} {'KV tokens':>9s} {'bytes alone':>12s} {'found':>8s} {'fixed':>8s}")
    for batch in (33, 40, 64, 128, 256):
        spread = torch.randn(batch).mul(0.9).exp().mul(600).clamp(16, 8000).int().tolist()
        cases = {"1024 each": [1024] * batch, "300 each": [300] * batch, "lognormal, 16 to 8000": spread}
        cases["one of 8000, others 300"] = [8000] + [300] * (batch - 1)
        for name, lengths in cases.items():
            least = sum(lengths) * KV * DIM * 2 * 2 / rate * 1e6
            found, fixed = (timed(attention, lengths, pool, cut) for cut in (None, FIXED))
            print(f"{batch:6d}  {name:24s} {sum(lengths):9d} {least:12.1f} {found:8.1f} {fixed:8.1f}")


if __name__ == "__main__":
    main()
