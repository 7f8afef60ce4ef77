"""Attention of prompt chunks over scattered pages equals plain attention over the same tokens in a row."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tests.fused_models  # noqa: F401  (Triton is asked for, or the module skipped)

from disagg.runtime.paged_prefill_attention import PagedPrefillAttention  # isort: skip  (after Triton was asked for)

DIM, TOKENS = 16, 4


@pytest.mark.parametrize(("num_query", "num_kv", "window"), [(4, 2, None), (7, 1, None), (4, 2, 50)])
def test_chunks_of_any_length_behind_any_kv_attend_to_all_before_them_and_to_nothing_else(
    num_query: int, num_kv: int, window: int | None
) -> None:
    """More rows than a program takes, more KV than a loop step, a chunk of one row, one without KV before, empty places."""
    generator = torch.Generator().manual_seed(1)
    chunks = ((150, 70), (0, 3), (64, 1))  # (tokens before, rows)
    tables = torch.randperm(192, generator=generator).view(3, 64).to(torch.int32)
    k_pages, v_pages = torch.randn((2, 192, num_kv, TOKENS, DIM), generator=generator)
    bounds = torch.tensor([0, 70, 73, 74, 74], dtype=torch.int32)
    rows = int(bounds[-1])
    positions = torch.full((rows + 6,), -1, dtype=torch.int32)
    for (before, num), first in zip(chunks, bounds.tolist(), strict=False):
        positions[first : first + num] = torch.arange(before, before + num)
    wide = torch.randn((rows + 6, (num_query + 3) * DIM), generator=generator)  # the projection's: K and V stand beside
    q = wide[:, : num_query * DIM]
    out = torch.full((rows + 6, num_query * DIM), torch.nan)
    PagedPrefillAttention(num_query, num_kv, DIM, window)(q, positions, bounds, tables, k_pages, v_pages, out)
    for (before, num), first, table in zip(chunks, bounds.tolist(), tables.long(), strict=False):
        total = before + num
        k, v = (x[table].transpose(0, 1).reshape(num_kv, -1, DIM)[None, :, :total] for x in (k_pages, v_pages))
        at, key = torch.arange(before, total)[:, None], torch.arange(total)[None, :]
        seen = (key <= at) & (key > at - (window or total + 1))
        query = q[first : first + num].view(num, num_query, DIM).transpose(0, 1)[None]
        expected = functional.scaled_dot_product_attention(query, k, v, attn_mask=seen, enable_gqa=True)
        found = out[first : first + num].view(num, num_query, DIM).transpose(0, 1)[None]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert out[rows:].isnan().all()
