"""Attention over paged KV, written with plain torch operations: right on every device, tuned for none.

`Attention` is the seam: a device's own kernels take the same step and the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .kv_pages import KvPages

_QUERIES_AT_ONCE: Final = 512  # bounds the mask of a long chunk, and skips most of what causality hides


@dataclass(slots=True)
class ChunkRows:
    """One prompt chunk of a step: its rows among the step's tokens, and where they stand in the sequence."""

    first_row: int
    num_rows: int
    start: int  # position of the first row
    table: Tensor  # int64 [1, width], the blocks of tokens [0, start + num_rows)


@dataclass(slots=True)
class StepTokens:
    """The tokens of one step: `num_decodes` decodes, one row each, then the rows of the chunks."""

    positions: Tensor  # int64 [rows]
    blocks: Tensor  # int64 [rows], where the row's k and v are written
    offsets: Tensor  # int64 [rows]
    num_decodes: int
    decode_tables: Tensor  # int64 [num_decodes, width], padded with any valid block
    chunks: list[ChunkRows]


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, step: StepTokens, pages: KvPages) -> Tensor:
        """Causal attention of q [rows, query heads, head_dim] over local `layer`'s pages, rows' own k, v included."""


class TorchAttention:
    """`sliding_window`: a token sees itself and the window - 1 tokens before it; None: all."""

    def __init__(self, head_dim: int, sliding_window: int | None = None) -> None:
        self._scale = float(head_dim**-0.5)
        self._window = sliding_window

    def __call__(self, layer: int, q: Tensor, step: StepTokens, pages: KvPages) -> Tensor:
        out = torch.empty_like(q)
        if step.num_decodes:
            self._decode(layer, q, step, pages, out)
        for chunk in step.chunks:
            self._chunk(layer, q, chunk, pages, out)
        return out

    def _decode(self, layer: int, q: Tensor, step: StepTokens, pages: KvPages, out: Tensor) -> None:
        n = step.num_decodes
        k, v = pages.gather(layer, step.decode_tables)  # [n, KV heads, tokens, head_dim]
        keys = torch.arange(k.shape[2], device=q.device)
        position = step.positions[:n, None]
        hidden = keys > position
        if self._window is not None:
            hidden |= keys <= position - self._window
        # Rows past the end hold what others left there; a weight of 0 does not hide a NaN.
        v.masked_fill_(hidden[:, None, :, None], 0.0)
        grouped = q[:n].reshape(n, k.shape[1], -1, q.shape[2])  # [n, KV heads, queries per KV head, head_dim]
        scores = (grouped * self._scale) @ k.transpose(2, 3)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out[:n] = (weights @ v).reshape(n, q.shape[1], q.shape[2])

    def _chunk(self, layer: int, q: Tensor, chunk: ChunkRows, pages: KvPages, out: Tensor) -> None:
        k, v = (each[0] for each in pages.gather(layer, chunk.table))  # [KV heads, tokens, head_dim]
        for first in range(0, chunk.num_rows, _QUERIES_AT_ONCE):
            num = min(_QUERIES_AT_ONCE, chunk.num_rows - first)
            start, stop = chunk.start + first, chunk.start + first + num
            oldest = 0 if self._window is None else max(0, start - self._window + 1)
            position = torch.arange(start, stop, device=q.device)[:, None]
            keys = torch.arange(oldest, stop, device=q.device)
            seen = keys <= position  # [queries, keys]
            if self._window is not None:
                seen &= keys > position - self._window
            at = slice(chunk.first_row + first, chunk.first_row + first + num)
            attended = functional.scaled_dot_product_attention(
                q[at].transpose(0, 1)[None],  # [1, query heads, queries, head_dim]
                k[None, :, oldest:stop],
                v[None, :, oldest:stop],
                attn_mask=seen,
                scale=self._scale,
                enable_gqa=True,
            )
            out[at] = attended[0].transpose(0, 1)
