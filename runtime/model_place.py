"""The place of one rank in its executor: which layers, heads and slices of each matrix it holds."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ..core.kv_layout import KvLayout, Range
from ..core.model_shapes import ModelShape


class Place(Struct, frozen=True):
    """Rank `rank` = pp_rank · tp + tp_rank of an executor of `shape`. Ranges are half-open and global."""

    shape: ModelShape
    layout: KvLayout
    rank: int = 0

    @classmethod
    def of(
        cls, shape: ModelShape, tp: int = 1, pp: int = 1, rank: int = 0, layers_per_stage: Sequence[int] | None = None
    ) -> Place:
        """ModelError if the shape cannot be spread so, or has no such rank."""
        place = cls(shape, KvLayout.of(shape, tp, pp, layers_per_stage), rank)
        place.layout.layers_of(rank)  # refuses a rank outside the layout
        return place

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.layout.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.layout.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def layers(self) -> Range:
        return self.layout.layers_of(self.rank)

    @property
    def kv_heads(self) -> Range:
        return self.layout.heads_of(self.rank)

    @property
    def query_heads(self) -> Range:
        """Those that read this rank's KV heads; with more ranks than KV heads, a part of them."""
        each = self.shape.num_attention_heads // self.tp
        return self.tp_rank * each, (self.tp_rank + 1) * each

    @property
    def intermediate(self) -> Range:
        """Columns of the MLP, as even as they go."""
        size = self.shape.intermediate_size
        return self.tp_rank * size // self.tp, (self.tp_rank + 1) * size // self.tp

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and head tables on each rank; the last rank's are padded so that all have as many."""
        return -(-self.shape.vocab_size // self.tp)

    @property
    def vocab(self) -> Range:
        """Token ids of this rank's rows, without the padding."""
        size, rows = self.shape.vocab_size, self.vocab_rows
        return min(self.tp_rank * rows, size), min((self.tp_rank + 1) * rows, size)
