"""Attention of prompt chunks on a GPU: torch's flash and cuDNN kernels over contiguous K and V, and in graphs our own.

Chunks that begin their prompt take K and V as the projection made them; a chunk with KV before it has that gathered
from its pages first. Flash's varlen form takes chunks of any lengths at once, aligned at their last tokens, which is what
a chunk with KV before it needs; cuDNN is faster on long sequences of one length and has only the plain causal mask.
Where a graph holds the step, what is told on the host would be fixed in it: there pages are read where they lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model_attention import ChunkRows, StepTokens, TorchAttention
from .model_kernels import gather_pages
from .paged_prefill_attention import PagedPrefillAttention

# cuDNN makes a plan for each new shape, which takes it 50 to 100 ms: only lengths of which there are few go there.
CUDNN_MULTIPLE: Final = 4096


@dataclass(slots=True)
class PagedChunks:
    """Where a graph's kernel finds what its chunks are: see `PagedPrefillAttention`."""

    positions: Tensor
    bounds: Tensor
    tables: Tensor


@dataclass(slots=True)
class PrefillBatch:
    """The chunks of one step as the kernels want them; made once a step, used by each layer.

    `rows` [first, end) of the step's tokens; `cu_q`, `cu_k` int32 [chunks + 1], running sums of new and of all tokens.
    """

    rows: tuple[int, int]
    chunks: list[ChunkRows]
    tables: list[Tensor]  # int32 [width] each, of chunks with KV before them; else empty
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    total_k: int
    paged: PagedChunks | None = None  # then nothing else here but `rows` is to be believed

    @property
    def is_plain(self) -> bool:
        """Every chunk begins its prompt."""
        return all(chunk.start == 0 for chunk in self.chunks)

    @property
    def one_length(self) -> int | None:
        """The length that all chunks have, if they have one."""
        lengths = {chunk.num_rows for chunk in self.chunks}
        return lengths.pop() if len(lengths) == 1 else None


def prefill_batch(chunks: list[ChunkRows], device: torch.device) -> PrefillBatch:
    """What the chunks of a step have in common. `chunks` lie one after the other among the step's rows."""
    first = chunks[0].first_row
    end = chunks[-1].first_row + chunks[-1].num_rows
    sums = [[0], [0]]
    for chunk in chunks:
        sums[0].append(sums[0][-1] + chunk.num_rows)
        sums[1].append(sums[1][-1] + chunk.start + chunk.num_rows)
    where = torch.tensor(sums, dtype=torch.int32)
    if device.type == "cuda":
        where = where.pin_memory().to(device, non_blocking=True)
    return PrefillBatch(
        (first, end),
        chunks,
        [chunk.table[0].to(torch.int32) for chunk in chunks],
        where[0],
        where[1],
        max(chunk.num_rows for chunk in chunks),
        max(chunk.start + chunk.num_rows for chunk in chunks),
        sums[1][-1],
    )


class PrefillAttention:
    """One rank's heads. In half precision torch's own kernels; in float32 plain torch, which has no flash kernel."""

    def __init__(self, num_query: int, num_kv: int, dim: int, window: int | None) -> None:
        self._num_query = num_query
        self._num_kv = num_kv
        self._dim = dim
        self._window = window
        self._plain = TorchAttention(dim, window)
        self._paged = PagedPrefillAttention(num_query, num_kv, dim, window)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, layer: int, pages: Any, out: Tensor
    ) -> None:
        """Attention of the chunks' rows into out [rows, query heads, head_dim].

        q, k, v: [rows, heads, head_dim] views of the chunks' rows alone, k and v already in their `pages` of `layer`.
        """
        if (paged := batch.paged) is not None:
            k_pages, v_pages = pages.pool[layer, 0], pages.pool[layer, 1]
            self._paged(q, paged.positions, paged.bounds, paged.tables, k_pages, v_pages, out)
            return
        if q.dtype == torch.float32 or q.device.type != "cuda":
            self._by_torch(q, batch, layer, pages, out)
            return
        length = batch.one_length
        windowed = self._window is not None and batch.max_k > self._window
        if batch.is_plain and length is not None and _for_cudnn(length) and not windowed:
            self._by_cudnn(q, k, v, length, out)
            return
        if not batch.is_plain:
            k, v = self._gathered(batch, layer, pages)
        out.copy_(
            varlen_attention()(
                q, k, v, batch.cu_q, batch.cu_k, batch.max_q, batch.max_k, self._window if windowed else None
            )
        )

    def _by_cudnn(self, q: Tensor, k: Tensor, v: Tensor, length: int, out: Tensor) -> None:
        def split(x: Tensor) -> Tensor:
            return x.view(-1, length, *x.shape[1:]).transpose(1, 2)  # [chunks, heads, length, head_dim]

        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            attended = functional.scaled_dot_product_attention(
                split(q), split(k), split(v), is_causal=True, enable_gqa=True
            )
        out.view(-1, length, self._num_query, self._dim).copy_(attended.transpose(1, 2))

    def _gathered(self, batch: PrefillBatch, layer: int, pages: Any) -> tuple[Tensor, Tensor]:
        size = (batch.total_k, self._num_kv, self._dim)
        k, v = (torch.empty(size, dtype=pages.pool.dtype, device=pages.device) for _ in range(2))
        first = 0
        for chunk, table in zip(batch.chunks, batch.tables, strict=True):
            end = first + chunk.start + chunk.num_rows
            gather_pages(pages.pool[layer, 0], table, k[first:end])
            gather_pages(pages.pool[layer, 1], table, v[first:end])
            first = end
        return k, v

    def _by_torch(self, q: Tensor, batch: PrefillBatch, layer: int, pages: Any, out: Tensor) -> None:
        first = batch.rows[0]
        chunks = [ChunkRows(c.first_row - first, c.num_rows, c.start, c.table) for c in batch.chunks]
        nothing = torch.empty(0, dtype=torch.int64, device=q.device)
        step = StepTokens(nothing, nothing, nothing, 0, nothing.view(0, 0), chunks)
        out.copy_(self._plain(layer, q, step, pages))


def _for_cudnn(length: int) -> bool:
    return length % CUDNN_MULTIPLE == 0


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, "int | None"], Tensor]


@cache
def varlen_attention() -> Varlen:
    """Flash attention over sequences of different lengths, as this torch offers it.

    The operator itself where it takes what torch 2.11's does: `varlen_attn` around it costs 60 µs of the host a layer.
    """
    names = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    if {"cum_seq_q", "max_q", "is_causal", "window_size_left"} <= names:
        return _aten_varlen
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: int | None
    ) -> Tensor:
        sides = (-1 if window is None else window - 1, 0)
        result: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=sides, **more)
        return result  # type: ignore[no-any-return]

    return attend


def _aten_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: int | None
) -> Tensor:
    result: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, window_size_left=None if window is None else window - 1
    )[0]
    return result
