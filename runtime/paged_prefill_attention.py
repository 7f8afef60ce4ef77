"""Attention of prompt chunks over their pages, in Triton: what a graph needs, where nothing may be read on the host.

Flash attention (Dao et al., 2022; causality aligned at the last token). A program takes some rows of one chunk and all
query heads of one KV head, so that a page is read once for the whole group. Chunks, their lengths and what lies before
them are read from the device: one launch, whose size the number of rows alone decides, serves any of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128  # rows of the tensor core's tile: tokens of a program times query heads of a KV head
_BLOCK = 64  # KV tokens of a loop step


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    acc,
    top,
    total,
    query,
    position,
    table,
    k_head,
    v_head,
    block_stride,
    first,
    stop,
    scale,
    window,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KV tokens [first, stop) into the running sums; all of them seen by every row unless MASKED."""
    at = tl.arange(0, DIM)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        if MASKED:
            inside = token < stop
            block = tl.load(table + token // TOKENS, mask=inside, other=0).to(tl.int64)
            page = block * block_stride + (token % TOKENS) * DIM
            k = tl.load(k_head + page[:, None] + at[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(v_head + page[:, None] + at[None, :], mask=inside[:, None], other=0.0)
        else:
            block = tl.load(table + token // TOKENS).to(tl.int64)
            page = block * block_stride + (token % TOKENS) * DIM
            k = tl.load(k_head + page[:, None] + at[None, :])
            v = tl.load(v_head + page[:, None] + at[None, :])
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            seen = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
            scores = tl.where(seen & inside[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A block that a row sees nothing of leaves -inf - -inf, which must count as nothing.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _prefill(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    positions,
    bounds,
    tables,
    table_width,
    k_pages,
    v_pages,
    block_stride,
    out,
    scale,
    num_kv,
    window,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    # Which chunk this tile is of: chunks take as many tiles each as their rows fill.
    slots = tl.arange(0, SLOTS)
    tiles = tl.cdiv(tl.load(bounds + slots + 1) - tl.load(bounds + slots), ROWS)
    before = tl.cumsum(tiles, 0) <= tile
    slot = tl.sum(before.to(tl.int32), 0)
    if slot < SLOTS:
        tile -= tl.sum(tl.where(before, tiles, 0), 0)
        begin = tl.load(bounds + slot)
        end = tl.load(bounds + slot + 1)
        start = tl.load(positions + begin)  # tokens before the chunk
        member = tl.arange(0, ROWS * GROUP_PADDED) % GROUP_PADDED
        row = tile * ROWS + tl.arange(0, ROWS * GROUP_PADDED) // GROUP_PADDED
        position = start + row
        row += begin
        at = tl.arange(0, DIM)
        here = (row < end) & (member < GROUP)
        column = (head * GROUP + member)[:, None] * DIM + at[None, :]
        query = tl.load(q + row.to(tl.int64)[:, None] * q_stride + column, mask=here[:, None], other=0.0)
        top = tl.full([ROWS * GROUP_PADDED], -float("inf"), tl.float32)
        total = tl.zeros([ROWS * GROUP_PADDED], tl.float32)
        acc = tl.zeros([ROWS * GROUP_PADDED, DIM], tl.float32)
        lowest = start + tile * ROWS  # position of the first row
        stop = tl.minimum(lowest + ROWS, start + end - begin)
        oldest = 0
        common = (lowest + 1) // BLOCK * BLOCK  # seen by every row
        if WINDOWED:
            oldest = tl.maximum(lowest + 1 - window, 0) // BLOCK * BLOCK
            common = oldest
        table = tables + slot * table_width
        k_head = k_pages + head * TOKENS * DIM
        v_head = v_pages + head * TOKENS * DIM
        acc, top, total = _attend(
            acc, top, total, query, position, table, k_head, v_head, block_stride, oldest, common,
            scale, window, TOKENS, DIM, BLOCK, False, PRECISION,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, query, position, table, k_head, v_head, block_stride, common, stop,
            scale, window, TOKENS, DIM, BLOCK, True, PRECISION,
        )  # fmt: skip
        safe = tl.where(total > 0, total, 1.0)
        tl.store(
            out + row.to(tl.int64)[:, None] * (num_kv * GROUP * DIM) + column,
            (acc / safe[:, None]).to(out.dtype.element_ty),
            mask=here[:, None],
        )


class PagedPrefillAttention:
    """One rank's heads. Nothing is kept between calls."""

    def __init__(self, num_query: int, num_kv: int, dim: int, window: int | None) -> None:
        self._group = num_query // num_kv
        self._num_kv = num_kv
        self._dim = dim
        self._window = window
        self._scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp

    def __call__(
        self,
        q: Tensor,
        positions: Tensor,
        bounds: Tensor,
        tables: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        out: Tensor,
    ) -> None:
        """out rows [bounds[i], bounds[i + 1]) = causal attention of those rows of q over tables[i].

        q [rows, ≥ query heads · head_dim] with rows of any stride; positions int32 [rows], ascending by one within a
        chunk; bounds int32 [chunks + 1], ascending, chunks a power of two, those of no row at the end; tables int32
        [chunks, width]; k_pages, v_pages [blocks, KV heads, tokens, head_dim], each block contiguous, which hold the
        chunks' own tokens already; out [rows, query heads · head_dim], contiguous. Rows beyond the last bound are left.
        """
        padded = triton.next_power_of_2(self._group)
        rows = max(1, _TILE // padded)
        num_slots = bounds.shape[0] - 1
        num_tiles = triton.cdiv(q.shape[0], rows) + num_slots  # each chunk's last tile may be of one row
        _prefill[(self._num_kv, num_tiles)](
            q,
            q.stride(0),
            positions,
            bounds,
            tables,
            tables.stride(0),
            k_pages,
            v_pages,
            k_pages.stride(0),
            out,
            self._scale,
            self._num_kv,
            self._window if self._window is not None else 1 << 30,
            SLOTS=num_slots,
            GROUP=self._group,
            GROUP_PADDED=padded,
            ROWS=rows,
            TOKENS=k_pages.shape[2],
            DIM=self._dim,
            BLOCK=_BLOCK,
            WINDOWED=self._window is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=8,
            num_stages=2,
        )
