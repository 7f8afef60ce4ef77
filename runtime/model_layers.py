"""The forward pass of one rank: its pipeline stage, its slice of each layer.

Llama (Touvron et al., 2023) and its kin: RMS norm before each block, rotary positions, grouped-query attention, SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..core.model_shapes import ModelShape
from .collectives import Collectives
from .kv_pages import TORCH_DTYPES, KvPages
from .model_attention import Attention, StepTokens
from .model_place import Place
from .weights import LayerWeights, ModelWeights


class ModelPart:
    """This rank's part of the model. Every rank of the executor runs the same step."""

    def __init__(
        self,
        place: Place,
        weights: ModelWeights,
        pages: KvPages,
        collectives: Collectives,
        attention: Attention,
        device: torch.device,
    ) -> None:
        self._place = place
        self._weights = weights
        self._pages = pages
        self._collectives = collectives
        self._attention = attention
        self._device = device
        self.on_layer: Callable[[int], None] | None = None  # told of each local layer once its KV is written
        self._inverse_frequencies = inverse_frequencies(place.shape).to(device)

    def forward(
        self,
        token_ids: Tensor,
        step: StepTokens,
        sampled_rows: Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor | None:
        """Run a step of tokens, int64 [rows], writing their KV; `on_layer(i)` is called when local layer i has its.

        Returns float32 logits [len(sampled_rows), vocab] on the last stage; else, or with no row, None.
        """
        place, shape = self._place, self._place.shape
        if place.is_first_stage:
            hidden = self._embed(token_ids)
        else:
            dtype = TORCH_DTYPES[shape.dtype]
            hidden = self._collectives.recv_hidden(len(token_ids), shape.hidden_size, dtype, self._device)
        rotation = rotary(self._inverse_frequencies, step.positions, hidden.dtype)
        for layer, weights in enumerate(self._weights.layers):
            normed = rms_norm(hidden, weights.input_norm, shape.rms_norm_eps)
            attended = self._attend(layer, weights, normed, step, rotation)
            if on_layer is not None:
                on_layer(layer)
            hidden = hidden + self._collectives.tp_all_reduce(attended)
            if self.on_layer is not None:
                self.on_layer(layer)
            normed = rms_norm(hidden, weights.post_norm, shape.rms_norm_eps)
            gate, up = functional.linear(normed, weights.gate_up).chunk(2, dim=-1)
            hidden = hidden + self._collectives.tp_all_reduce(
                functional.linear(functional.silu(gate) * up, weights.down)
            )
        if not place.is_last_stage:
            self._collectives.send_hidden(hidden)
            return None
        return self._logits(hidden[sampled_rows]) if len(sampled_rows) else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self._weights.embedding
        if table is None:
            raise RuntimeError(f"rank {self._place.rank} is the first stage but holds no embedding")
        if self._place.tp == 1:
            return functional.embedding(token_ids, table)
        start, stop = self._place.vocab
        elsewhere = (token_ids < start) | (token_ids >= stop)
        rows = functional.embedding((token_ids - start).masked_fill(elsewhere, 0), table)
        return self._collectives.tp_all_reduce(rows.masked_fill(elsewhere[:, None], 0.0))

    def _attend(
        self, layer: int, weights: LayerWeights, normed: Tensor, step: StepTokens, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        shape, rows = self._place.shape, normed.shape[0]
        (first_query, end_query), (first_kv, end_kv) = self._place.query_heads, self._place.kv_heads
        num_query, num_kv = end_query - first_query, end_kv - first_kv
        qkv = functional.linear(normed, weights.qkv, weights.qkv_bias).view(rows, -1, shape.head_dim)
        q, k, v = torch.split(qkv, [num_query, num_kv, num_kv], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = rms_norm(q, weights.q_norm, shape.rms_norm_eps)
            k = rms_norm(k, weights.k_norm, shape.rms_norm_eps)
        q, k = rotate(q, rotation), rotate(k, rotation)
        self._pages.write(layer, step.blocks, step.offsets, k, v)
        attended = self._attention(layer, q, step, self._pages)
        return functional.linear(attended.reshape(rows, -1), weights.o)

    def _logits(self, hidden: Tensor) -> Tensor:
        norm, head = self._weights.final_norm, self._weights.head
        if norm is None or head is None:
            raise RuntimeError(f"rank {self._place.rank} is the last stage but holds no head")
        local = functional.linear(rms_norm(hidden, norm, self._place.shape.rms_norm_eps), head)
        return self._collectives.tp_all_gather(local)[:, : self._place.shape.vocab_size].float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, the mean taken in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """float32 [head_dim / 2]: θ^(-2i / head_dim), with Llama 3's scaling where the shape asks for it.

    Llama 3.1 divides by `factor` the frequencies whose wavelength exceeds original / low_freq_factor, leaves those
    under original / high_freq_factor alone, and interpolates between.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def rotary(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at `positions`, each [rows, 1, head_dim] (both halves alike), computed in float32."""
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [rows, heads, head_dim], pairing element i with i + head_dim / 2 as Hugging Face checkpoints do."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
