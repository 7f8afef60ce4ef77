"""This rank's pages of the KV cache: its own layers and heads, and nothing of anybody else's.

A page is (block, layer, K or V, head): `tokens_per_block` rows of `head_dim`. Layer and head ranges in arguments are
global and half-open; the pool knows where its own part of them begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..core.kv_layout import KvLayout, Range
from ..core.model_shapes import DTYPE_BYTES

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS: Final = {2: torch.int16, 4: torch.int32}


class KvPageError(ValueError):
    """A request for pages that this rank does not have, or data that does not fit them."""


def needed_bytes(layout: KvLayout, rank: int, num_blocks: int, tokens_per_block: int) -> int:
    """Bytes that `KvPages` of `rank` will allocate."""
    return layout.kv_bytes_per_token(rank, DTYPE_BYTES[layout.dtype]) * num_blocks * tokens_per_block


class KvPages:
    """`pool`: [local layers, 2 (K, V), num_blocks, local KV heads, tokens_per_block, head_dim], zeroed.

    It is a view: in memory the block comes first, then the layer, so that what a request holds of all layers lies in one
    piece per block. Copy engines then carry a transfer in few large copies, which leave the multiprocessors to decoding.
    """

    def __init__(
        self, layout: KvLayout, rank: int, num_blocks: int, tokens_per_block: int, device: str | torch.device = "cpu"
    ) -> None:
        if num_blocks < 1 or tokens_per_block < 1:
            raise KvPageError(f"num_blocks {num_blocks} and tokens_per_block {tokens_per_block} must be at least 1")
        self.layout = layout
        self.rank = rank
        self.layers = layout.layers_of(rank)
        self.heads = layout.heads_of(rank)
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.device = torch.device(device)
        self.pool = torch.zeros(
            num_blocks,
            self.layers[1] - self.layers[0],
            2,
            self.heads[1] - self.heads[0],
            tokens_per_block,
            layout.head_dim,
            dtype=TORCH_DTYPES[layout.dtype],
            device=self.device,
        ).permute(1, 2, 0, 3, 4, 5)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.pool.numel() * self.pool.element_size()

    # ---- what the attention uses -------------------------------------------------------------------------------------

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Write one token's k and v ([tokens, local heads, head_dim]) at each (block, offset) of local `layer`."""
        pages = self.pool[layer]
        pages[0][blocks, :, offsets] = k
        pages[1][blocks, :, offsets] = v

    def gather(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V of local `layer`: [requests, local heads, width · tokens_per_block, head_dim] each.

        `tables`: int64 [requests, width], block ids in token order.
        """
        requests, width = tables.shape
        pages = self.pool[layer].index_select(1, tables.reshape(-1))  # [2, requests · width, heads, tokens, head_dim]
        pages = pages.view(2, requests, width, *pages.shape[2:]).transpose(2, 3)
        flat = pages.reshape(2, requests, pages.shape[2], width * self.tokens_per_block, self.layout.head_dim)
        return flat[0], flat[1]

    # ---- what a transfer uses ----------------------------------------------------------------------------------------

    def pack(self, blocks: Sequence[int], num_tokens: int, layers: Range, heads: Range, first_token: int = 0) -> Tensor:
        """A contiguous copy [layers, 2, heads, num_tokens - first_token, head_dim] of tokens [first_token, num_tokens).

        `blocks` are all blocks of the request, from its first token on; the result is free of the block size.
        """
        index = self._block_index(blocks, num_tokens, first_token)
        skipped = first_token // self.tokens_per_block
        pages = self._part(layers, heads).index_select(2, index[skipped:])  # [layers, 2, blocks, heads, tokens, dim]
        pages = pages.transpose(2, 3)
        flat = pages.reshape(*pages.shape[:3], (len(index) - skipped) * self.tokens_per_block, self.layout.head_dim)
        start = skipped * self.tokens_per_block
        return flat[:, :, :, first_token - start : num_tokens - start].contiguous()

    def unpack(
        self,
        packed: Tensor,
        blocks: Sequence[int],
        num_tokens: int,
        layers: Range,
        heads: Range,
        first_token: int = 0,
    ) -> None:
        """Write what `pack` gave, of whatever block size, into `blocks`; only tokens [first_token, num_tokens)."""
        index = self._block_index(blocks, num_tokens, first_token)
        part = self._part(layers, heads)
        expected = (part.shape[0], 2, part.shape[3], num_tokens - first_token, self.layout.head_dim)
        if tuple(packed.shape) != expected or packed.dtype != part.dtype:
            raise KvPageError(
                f"packed KV is {tuple(packed.shape)} {packed.dtype}, expected {expected} {part.dtype} "
                f"for layers {layers}, heads {heads}"
            )
        packed = packed.to(self.device)
        size = self.tokens_per_block
        at = first_token
        if at % size:  # the rest of a block whose beginning came before
            end = min(num_tokens, at - at % size + size)
            part[:, :, blocks[at // size], :, at % size : end - at + at % size] = packed[:, :, :, : end - at]
            at = end
        full = (num_tokens - at) // size
        if full > 0:
            skipped, done = at // size, at - first_token
            whole = packed[:, :, :, done : done + full * size].reshape(*expected[:3], full, size, expected[4])
            part.index_copy_(2, index[skipped : skipped + full], whole.transpose(2, 3))
            at += full * size
        if at < num_tokens:
            part[:, :, blocks[at // size], :, : num_tokens - at] = packed[:, :, :, at - first_token :]

    def checksums(
        self,
        blocks: Sequence[int],
        num_tokens: int,
        layers: Range,
        heads: Range,
        tokens_per_block: int | None = None,
    ) -> Tensor:
        """int64 [layers, heads, ⌈num_tokens / tokens_per_block⌉], over the raw bits of K and V, on the CPU.

        A sum modulo 2⁶⁴ of the values times weights that depend on (K or V, token in block, element), so that it does
        not depend on block ids or layout and sees swapped values. Tokens past `num_tokens` do not count.
        `tokens_per_block`, by default the pool's own, lets two pools of different block sizes be compared.
        """
        size = self.tokens_per_block if tokens_per_block is None else tokens_per_block
        if size < 1:
            raise KvPageError(f"tokens_per_block {size} must be at least 1")
        weights = _weights(2, size, self.layout.head_dim).to(self.device)
        sums = []
        for layer in range(*layers):  # layer by layer: the values widen to 64 bits
            packed = self.pack(blocks, num_tokens, (layer, layer + 1), heads)[0]
            bits = packed.view(_BITS[packed.element_size()]).to(torch.int64)  # [2, heads, tokens, head_dim]
            bits = torch.nn.functional.pad(bits, (0, 0, 0, -num_tokens % size))
            bits = bits.view(2, bits.shape[1], -1, size, self.layout.head_dim)
            sums.append((bits * weights[:, None, None]).sum(dim=(0, 3, 4)))
        if not sums:
            raise KvPageError(f"layers {layers} are an empty range")
        return torch.stack(sums).to("cpu")

    def check_blocks(self, blocks: Sequence[int], num_tokens: int, first_token: int = 0) -> None:
        """Raises KvPageError unless `blocks` are exactly those that tokens [0, num_tokens) need, and are here."""
        expected = -(-num_tokens // self.tokens_per_block)
        if num_tokens < 1 or len(blocks) != expected:
            raise KvPageError(
                f"{num_tokens} tokens in blocks of {self.tokens_per_block} need {expected} block ids, not {len(blocks)}"
            )
        if not 0 <= first_token < num_tokens:
            raise KvPageError(f"first_token {first_token} must lie in 0 to {num_tokens - 1}")
        if min(blocks) < 0 or max(blocks) >= self.num_blocks:
            raise KvPageError(f"block ids must lie in 0 to {self.num_blocks - 1}, not {min(blocks)} to {max(blocks)}")

    def check_pieces(self, blocks: Sequence[int], num_tokens: int, pieces: Sequence[tuple[Range, Range]]) -> None:
        """As `check_blocks`, and each (layers, heads) must be this rank's."""
        self.check_blocks(blocks, num_tokens)
        for layers, heads in pieces:
            self._check_ranges(layers, heads)

    def _block_index(self, blocks: Sequence[int], num_tokens: int, first_token: int = 0) -> Tensor:
        self.check_blocks(blocks, num_tokens, first_token)
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    def _part(self, layers: Range, heads: Range) -> Tensor:
        """The view of the pool that holds these layers and heads."""
        self._check_ranges(layers, heads)
        first_layer, first_head = self.layers[0], self.heads[0]
        return self.pool[
            layers[0] - first_layer : layers[1] - first_layer, :, :, heads[0] - first_head : heads[1] - first_head
        ]

    def _check_ranges(self, layers: Range, heads: Range) -> None:
        for what, asked, own in (("layers", layers, self.layers), ("heads", heads, self.heads)):
            if not own[0] <= asked[0] < asked[1] <= own[1]:
                raise KvPageError(f"{what} {asked} are not on rank {self.rank}, which holds {own}")


def _weights(*shape: int) -> Tensor:
    """Odd pseudo-random int64 multipliers: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014) over 0, 1, 2, …"""
    z = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64).reshape(shape))
