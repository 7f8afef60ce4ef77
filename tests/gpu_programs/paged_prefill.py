"""Attention of short prompt chunks on one GPU: our kernel over pages, and flash's over K and V gathered from them.

Microseconds a layer, 32 query and 8 KV heads of 128, bf16, pages of 32 tokens; the device's time, from a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from disagg.runtime.model_kernels import gather_pages
from disagg.runtime.paged_prefill_attention import PagedPrefillAttention
from disagg.runtime.prefill_attention import varlen_attention

QUERY, KV, DIM, TOKENS, SLOTS = 32, 8, 128, 32, 32
CASES = (
    (1, 0, 64),
    (1, 0, 512),
    (1, 0, 1024),
    (32, 0, 32),
    (1, 3072, 300),
    (1, 8192, 512),
    (1, 16384, 64),
    (4, 2048, 256),
)


def timed(work: Callable[[], object]) -> float:
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(32):
            work()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (4 * 32)


def one(num: int, before: int, length: int, pool: torch.Tensor) -> None:
    device, rows, total = pool.device, num * length, before + length
    width = -(-total // TOKENS)
    tables = torch.randperm(4096, device=device)[: num * width].view(num, width).to(torch.int32)
    q = torch.randn(rows, QUERY * DIM, dtype=torch.bfloat16, device=device)
    sums = [min(i, num) * length for i in range(SLOTS + 1)]
    bounds = torch.tensor(sums, dtype=torch.int32, device=device)
    positions = torch.arange(before, total, dtype=torch.int32, device=device).repeat(num)
    cu_k = torch.tensor([i * total for i in range(num + 1)], dtype=torch.int32, device=device)
    k, v = (torch.empty(num * total, KV, DIM, dtype=torch.bfloat16, device=device) for _ in range(2))
    outs = torch.empty_like(q), torch.empty_like(q)
    paged = PagedPrefillAttention(QUERY, KV, DIM, None)

    def gathered() -> None:
        for i in range(num):
            for at, kept in ((0, k), (1, v)):
                gather_pages(pool[at], tables[i], kept[i * total : (i + 1) * total])
        found = varlen_attention()(q.view(rows, QUERY, DIM), k, v, bounds[: num + 1], cu_k, length, total, None)
        outs[1].copy_(found.view(rows, -1))

    ours = timed(lambda: paged(q, positions, bounds, tables, pool[0], pool[1], outs[0]))
    theirs = timed(gathered)
    far = (outs[0].float() - outs[1].float()).abs().max().item()
    print(f"{num:6d} {before:7d} {length:5d} {ours:7.1f} {theirs:17.1f} {far:19.4f}")


def main() -> None:
    torch.manual_seed(0)
    pool = torch.randn(2, 4096, KV, TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    print("chunks  before  rows   paged  gathered + flash  largest difference")
    for case in CASES:
        one(*case, pool)


if __name__ == "__main__":
    main()
