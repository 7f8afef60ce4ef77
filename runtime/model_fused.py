"""The forward pass of one rank with fused kernels: what `ModelPart` computes, at the speed of the memory.

Decodes and prompt chunks share the matrices of a step; each has its own attention. Nothing here waits for the device,
so that a decode step can be captured in a CUDA graph, collectives included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..core.model_shapes import ModelShape
from .collectives import Collectives
from .decode_attention import DecodeAttention, SplitSizes
from .gemv_kernels import gated_gemv, gemv
from .kv_pages import TORCH_DTYPES, KvPages
from .model_kernels import add_rms_norm, rms_norm, rope_write, silu_mul
from .model_layers import inverse_frequencies, rotary
from .model_place import Place
from .peer_reduce import ATTENDED, EMBEDDED, GATED, PeerReduce
from .prefill_attention import PrefillAttention, PrefillBatch
from .weights import ModelWeights

_ROTATIONS_AT_ONCE: Final = 8192
LayerHook = Callable[[int], None]


def can_fuse(shape: ModelShape) -> bool:
    """Whether the kernels take heads of this size: a power of two that a tensor core's tile holds."""
    dim = shape.head_dim
    return 16 <= dim <= 256 and dim & (dim - 1) == 0


class FusedModel:
    """This rank's part. A step has `max_batch` decodes and `max_rows` tokens at most. Every rank runs the same step."""

    def __init__(
        self,
        place: Place,
        weights: ModelWeights,
        pages: KvPages,
        collectives: Collectives,
        device: torch.device,
        max_batch: int,
        max_rows: int,
    ) -> None:
        shape = place.shape
        self._place = place
        self._shape = shape
        self._weights = weights
        self._pages = pages
        self._collectives = collectives
        self._device = device
        self._dtype = TORCH_DTYPES[shape.dtype]
        self._num_query = place.query_heads[1] - place.query_heads[0]
        self._num_kv = place.kv_heads[1] - place.kv_heads[0]
        window = shape.sliding_window
        self.decode_attention = DecodeAttention(
            max_batch, self._num_query, self._num_kv, shape.head_dim, window, device
        )
        self._prefill_attention = PrefillAttention(self._num_query, self._num_kv, shape.head_dim, window)
        self.max_positions = min(pages.num_blocks * pages.tokens_per_block, max(shape.max_position_embeddings, 1))
        self._rotation = self._rotations()
        # One set of activations for all steps: an allocation in the middle of a step may wait for the device.
        self._inner = place.intermediate[1] - place.intermediate[0]
        sizes = {"residual": shape.hidden_size, "normed": shape.hidden_size, "delta": shape.hidden_size}
        sizes |= {"qkv": (self._num_query + 2 * self._num_kv) * shape.head_dim, "gate_up": 2 * self._inner}
        sizes |= {"attended": self._num_query * shape.head_dim, "gated": self._inner}
        self._space = {
            name: torch.zeros(max_rows, width, dtype=self._dtype, device=device) for name, width in sizes.items()
        }

    def _rotations(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, [positions, head_dim / 2] in the model's dtype."""
        frequencies = inverse_frequencies(self._shape).to(self._device)
        half = self._shape.head_dim // 2
        size = (self.max_positions, half)
        cos, sin = (torch.empty(size, dtype=self._dtype, device=self._device) for _ in range(2))
        for first in range(0, self.max_positions, _ROTATIONS_AT_ONCE):
            end = min(first + _ROTATIONS_AT_ONCE, self.max_positions)
            c, s = rotary(frequencies, torch.arange(first, end, device=self._device), self._dtype)
            cos[first:end], sin[first:end] = c[:, 0, :half], s[:, 0, :half]
        return cos, sin

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        tables: Tensor,
        num_decodes: int,
        prefill: PrefillBatch | None,
        sampled_rows: Tensor | None,
        *,
        sizes: SplitSizes | None = None,
        on_layer: LayerHook | None = None,
    ) -> Tensor | None:
        """Run a step, writing its KV; the local logits [sampled rows, vocab rows] on the last stage, else None.

        token_ids, positions, sequences: int32 [rows], decodes first; sequences are rows of `tables` (int32). A row of
        position -1 is padding. `sampled_rows` None: every row. `on_layer(i)` is called when layer i has been launched.
        """
        place, shape, eps = self._place, self._shape, self._shape.rms_norm_eps
        rows = token_ids.shape[0]
        if rows == num_decodes == 1 and place.tp == 1 and sampled_rows is None:
            return self._forward_one(token_ids, positions, sequences, tables, sizes)
        space = {name: whole[:rows] for name, whole in self._space.items()}
        normed, qkv, attended, gated = (space[name] for name in ("normed", "qkv", "attended", "gated"))
        peers = self._peers_for(rows)
        # What each rank has of a sum; without peers one place serves for all.
        parts = [space["delta"] if peers is None else peers.slot(which, rows) for which in (ATTENDED, GATED)]
        residual = space["residual"]
        if num_decodes:
            self.decode_attention.find_cut(positions[:num_decodes], sizes)
        if peers is None:
            rms_norm(self._enter(token_ids, residual), self._weights.layers[0].input_norm, eps, normed)
        else:
            self._enter_by(peers, token_ids, residual, normed)
        for layer, weights in enumerate(self._weights.layers):
            if layer:
                self._add_and_norm(peers, GATED, parts[1], residual, weights.input_norm, normed)
            if weights.qkv_bias is None:
                torch.mm(normed, weights.qkv.t(), out=qkv)
            else:
                torch.addmm(weights.qkv_bias, normed, weights.qkv.t(), out=qkv)
            k_pages, v_pages = self._rotate_and_write(layer, qkv, positions, sequences, tables)
            if num_decodes:
                self.decode_attention(
                    qkv[:num_decodes],
                    positions[:num_decodes],
                    tables,
                    k_pages,
                    v_pages,
                    attended[:num_decodes],
                    sizes,
                )
            if prefill is not None:
                first, end = prefill.rows
                heads = qkv[first:end].view(end - first, -1, shape.head_dim)
                q, k, v = torch.split(heads, [self._num_query, self._num_kv, self._num_kv], dim=1)
                self._prefill_attention(
                    q, k, v, prefill, layer, self._pages, attended[first:end].view(end - first, -1, shape.head_dim)
                )
            if on_layer is not None:
                on_layer(layer)
            torch.mm(attended, weights.o.t(), out=parts[0])
            self._add_and_norm(peers, ATTENDED, parts[0], residual, weights.post_norm, normed)
            silu_mul(torch.mm(normed, weights.gate_up.t(), out=space["gate_up"]), gated)
            torch.mm(gated, weights.down.t(), out=parts[1])
        if peers is not None:
            return self._logits_by(peers, residual, normed, sampled_rows)
        delta = self._collectives.tp_all_reduce(parts[1])
        if not place.is_last_stage:
            self._collectives.send_hidden(residual.add_(delta))
            return None
        return self._logits(delta, residual, sampled_rows)

    def _peers_for(self, rows: int) -> PeerReduce | None:
        """Who sums so many rows: the ranks in each other's memory, or (None) the collectives."""
        peers = self._collectives.peers
        return None if peers is None or rows > peers.max_rows else peers

    def _add_and_norm(
        self, peers: PeerReduce | None, slot: int, part: Tensor, residual: Tensor, weight: Tensor, out: Tensor
    ) -> None:
        """residual += the sum of all ranks' `part`, which with peers is their `slot`; then its norm into `out`."""
        eps = self._shape.rms_norm_eps
        if peers is None:
            add_rms_norm(self._collectives.tp_all_reduce(part), residual, weight, eps, out)
        else:
            peers.add_rms_norm(slot, residual, weight, eps, out)

    def _enter(self, token_ids: Tensor, residual: Tensor) -> Tensor:
        """What goes into the first layer here: the tokens' embeddings, or what the stage before says; into `residual`."""
        if not self._place.is_first_stage:
            shape = (token_ids.shape[0], self._shape.hidden_size)
            return residual.copy_(self._collectives.recv_hidden(*shape, self._dtype, self._device))
        table = self._weights.embedding
        if table is None:
            raise RuntimeError(f"rank {self._place.rank} is the first stage but holds no embedding")
        if self._place.tp == 1:
            return torch.index_select(table, 0, token_ids, out=residual)
        start, stop = self._place.vocab
        elsewhere = (token_ids < start) | (token_ids >= stop)
        rows = functional.embedding((token_ids - start).masked_fill(elsewhere, 0), table)
        return residual.copy_(self._collectives.tp_all_reduce(rows.masked_fill(elsewhere[:, None], 0.0)))

    def _enter_by(self, peers: PeerReduce, token_ids: Tensor, residual: Tensor, normed: Tensor) -> None:
        """The tokens' embeddings into `residual`, and what the first layer makes of them first into `normed`."""
        table = self._weights.embedding
        if table is None:
            raise RuntimeError(f"rank {self._place.rank} is the first stage but holds no embedding")
        peers.embed(token_ids, table, self._place.vocab)
        peers.rms_norm(EMBEDDED, residual, self._weights.layers[0].input_norm, self._shape.rms_norm_eps, normed)

    def _rotate_and_write(
        self, layer: int, qkv: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Finish q and k, and write k and v; the layer's pages of K and of V."""
        weights = self._weights.layers[layer]
        norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norms = (weights.q_norm, weights.k_norm)
        k_pages, v_pages = self._pages.pool[layer, 0], self._pages.pool[layer, 1]
        rope_write(
            qkv,
            positions,
            sequences,
            tables,
            self._rotation,
            norms,
            k_pages,
            v_pages,
            self._num_query,
            self._shape.rms_norm_eps,
        )
        return k_pages, v_pages

    def _forward_one(
        self, token_ids: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor, sizes: SplitSizes | None
    ) -> Tensor | None:
        """A step of one decode alone, whose products are of one row."""
        place, eps = self._place, self._shape.rms_norm_eps
        residual = self._enter(token_ids, self._space["residual"][:1])
        qkv, attended, gated = (self._space[name][:1] for name in ("qkv", "attended", "gated"))
        self.decode_attention.find_cut(positions, sizes)
        for layer, weights in enumerate(self._weights.layers):
            gemv(residual, weights.qkv, qkv, bias=weights.qkv_bias, norm=weights.input_norm, eps=eps)
            k_pages, v_pages = self._rotate_and_write(layer, qkv, positions, sequences, tables)
            self.decode_attention(qkv, positions, tables, k_pages, v_pages, attended, sizes)
            gemv(attended, weights.o, residual, add=True)
            gated_gemv(residual, weights.gate_up, weights.post_norm, eps, gated)
            gemv(gated, weights.down, residual, add=True)
        if not place.is_last_stage:
            self._collectives.send_hidden(residual)
            return None
        norm, head = self._final()
        logits = torch.empty((1, head.shape[0]), dtype=self._dtype, device=self._device)
        return gemv(residual, head, logits, norm=norm, eps=eps)

    def _final(self) -> tuple[Tensor, Tensor]:
        norm, head = self._weights.final_norm, self._weights.head
        if norm is None or head is None:
            raise RuntimeError(f"rank {self._place.rank} is the last stage but holds no head")
        return norm, head

    def _logits_by(self, peers: PeerReduce, residual: Tensor, normed: Tensor, rows: Tensor | None) -> Tensor | None:
        """As `_logits`. The sum is taken even where no row is wanted: slots must go on alternating."""
        norm, head = self._final()
        peers.add_rms_norm(GATED, residual, norm, self._shape.rms_norm_eps, normed)
        if rows is not None:
            if not len(rows):
                return None
            normed = normed.index_select(0, rows)
        return functional.linear(normed, head)

    def _logits(self, delta: Tensor, residual: Tensor, rows: Tensor | None) -> Tensor | None:
        norm, head = self._final()
        if rows is not None:
            if not len(rows):
                return None
            delta, residual = delta.index_select(0, rows), residual.index_select(0, rows)
        normed = torch.empty_like(residual)
        add_rms_norm(delta, residual, norm, self._shape.rms_norm_eps, normed)
        return functional.linear(normed, head)
