"""Where the KV of a request lies, as addresses: in the pages of a pool, or packed in a buffer. No device needed.

Offsets within a place are in bytes. A pool is [num_blocks, layers, 2, heads, tokens_per_block, head_dim], a packed buffer
[layers, 2, heads, tokens, head_dim], both contiguous; layer and head ranges are global and half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.kv_layout import Range

if TYPE_CHECKING:
    from .kv_pages import KvPages

PACKED = 1 << 30  # tokens a "block" of a packed buffer


@dataclass(frozen=True, slots=True)
class KvPlace:
    """A place for some layers, heads and tokens. Token t lies `first_token` + t tokens after the place's beginning.

    `table`: address of its block ids, int32, in memory that the kernel can read; 0 for a packed buffer.
    """

    address: int
    layer_bytes: int
    kv_bytes: int
    block_bytes: int
    head_bytes: int
    tokens_per_block: int
    first_token: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True)
class KvPool:
    """A pool of pages, this process's or a peer's as it is mapped here."""

    address: int
    layers: Range
    heads: Range
    num_blocks: int
    tokens_per_block: int
    row_bytes: int  # of one token of one head

    @classmethod
    def of(cls, pages: KvPages) -> KvPool:
        row_bytes = pages.layout.head_dim * int(pages.pool.element_size())
        address = int(pages.pool.data_ptr())
        return cls(address, pages.layers, pages.heads, pages.num_blocks, pages.tokens_per_block, row_bytes)

    @property
    def page_bytes(self) -> int:
        """One block of one layer's K: all heads."""
        return (self.heads[1] - self.heads[0]) * self.tokens_per_block * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """One block: K and V of all layers."""
        return (self.layers[1] - self.layers[0]) * 2 * self.page_bytes

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def holds(self, layers: Range, heads: Range) -> bool:
        return all(
            own[0] <= asked[0] < asked[1] <= own[1] for asked, own in ((layers, self.layers), (heads, self.heads))
        )

    def place(self, layers: Range, heads: Range, first_token: int, table: int) -> KvPlace:
        """These layers and heads of the request whose block ids lie at `table`, from `first_token` on."""
        if not self.holds(layers, heads):
            raise ValueError(f"layers {layers}, heads {heads} are not in a pool of {self.layers}, {self.heads}")
        kv_bytes = self.page_bytes
        head_bytes = self.tokens_per_block * self.row_bytes
        start = (layers[0] - self.layers[0]) * 2 * kv_bytes + (heads[0] - self.heads[0]) * head_bytes
        return KvPlace(
            self.address + start,
            2 * kv_bytes,
            kv_bytes,
            self.block_bytes,
            head_bytes,
            self.tokens_per_block,
            first_token,
            table,
        )


def packed_place(address: int, num_heads: int, num_tokens: int, row_bytes: int) -> KvPlace:
    """A packed buffer of `num_tokens` tokens, the first of them at its beginning."""
    head_bytes = num_tokens * row_bytes
    return KvPlace(address, 2 * num_heads * head_bytes, num_heads * head_bytes, 0, head_bytes, PACKED)


@dataclass(frozen=True, slots=True)
class KvCopy:
    """`num_tokens` rows of each (layer, K or V, head) from one place to another."""

    source: KvPlace
    destination: KvPlace
    num_layers: int
    num_heads: int
    num_tokens: int
    row_bytes: int
