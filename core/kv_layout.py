"""Which rank of an executor holds which layers and KV heads, and what must travel when the layout changes.

Ranks inside an executor are numbered pp_rank * tp + tp_rank. All ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from .model_shapes import ModelError, ModelShape, check_parallelism

Range = tuple[int, int]


class KvLayout(Struct, frozen=True, array_like=True):
    """How one executor spreads the KV of a model over its tp × pp ranks.

    Raises ModelError if `tp` fits the KV heads in no way, or `layers_per_stage` is not one positive number per stage.
    """

    tp: int
    pp: int
    layers_per_stage: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.num_kv_heads, self.head_dim) < 1:
            raise ModelError(f"a KV layout needs positive sizes, not {self!r}")
        if self.num_kv_heads % self.tp and self.tp % self.num_kv_heads:
            raise ModelError(
                f"tensor_parallel_size {self.tp} must divide the {self.num_kv_heads} KV heads or be a multiple of them"
            )
        if len(self.layers_per_stage) != self.pp or min(self.layers_per_stage) < 1:
            raise ModelError(
                f"layers_per_stage {list(self.layers_per_stage)} must be {self.pp} numbers, one per stage, "
                "each at least 1"
            )

    @classmethod
    def of(cls, shape: ModelShape, tp: int = 1, pp: int = 1, layers_per_stage: Sequence[int] | None = None) -> KvLayout:
        """The layout of `shape` on tp × pp ranks; ModelError if it does not fit (see `check_parallelism`)."""
        stages = check_parallelism(shape, tp, pp, layers_per_stage)
        return cls(tp, pp, stages, shape.num_kv_heads, shape.head_dim, shape.dtype)

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_stage)

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def num_replicas(self) -> int:
        """Ranks of one stage that hold the same heads: more than one only where tp exceeds the KV heads."""
        return max(1, self.tp // self.num_kv_heads)

    def layers_of(self, rank: int) -> Range:
        """The layers of `rank`."""
        stage = self._checked(rank) // self.tp
        start = sum(self.layers_per_stage[:stage])
        return start, start + self.layers_per_stage[stage]

    def heads_of(self, rank: int) -> Range:
        """The KV heads of `rank`: [⌊t·H/tp⌋, max(⌊t·H/tp⌋ + 1, ⌊(t+1)·H/tp⌋)), as in TensorRT-LLM."""
        t = self._checked(rank) % self.tp
        start = t * self.num_kv_heads // self.tp
        return start, max(start + 1, (t + 1) * self.num_kv_heads // self.tp)

    def kv_bytes_per_token(self, rank: int, dtype_bytes: int) -> int:
        """Bytes of K and V that `rank` keeps of one token."""
        (first_layer, end_layer), (first_head, end_head) = self.layers_of(rank), self.heads_of(rank)
        return 2 * (end_layer - first_layer) * (end_head - first_head) * self.head_dim * dtype_bytes

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.num_ranks:
            raise ModelError(f"rank {rank} is not in this layout; allowed: 0 to {self.num_ranks - 1}")
        return rank


class Piece(Struct, frozen=True, array_like=True):
    """One rectangle of (layers, KV heads) that `source_rank` sends to `destination_rank`, in global numbers."""

    source_rank: int
    destination_rank: int
    layers: Range
    heads: Range


def transfer_plan(source: KvLayout, destination: KvLayout) -> tuple[Piece, ...]:
    """The pieces that bring each destination rank each (layer, head) that it holds, exactly once.

    Where the source holds a head several times, its replicas share the work: destination replicas are dealt out
    among them, and if those are fewer, a destination's layers are. Sorted by destination, layer, head.
    ModelError if the two sides do not hold the same model's KV.
    """
    for what in ("num_layers", "num_kv_heads", "head_dim", "dtype"):
        ours, theirs = getattr(source, what), getattr(destination, what)
        if ours != theirs:
            raise ModelError(f"KV cannot be moved between executors whose {what} differs: {ours} and {theirs}")
    pieces = []
    for rank in range(destination.num_ranks):
        replica = rank % destination.tp % destination.num_replicas
        senders = _share(replica, source.num_replicas, destination.num_replicas)
        for first in range(0, source.num_ranks, source.num_replicas):  # the first of each group of equal ranks
            layers = _overlap(source.layers_of(first), destination.layers_of(rank))
            heads = _overlap(source.heads_of(first), destination.heads_of(rank))
            if layers is None or heads is None:
                continue
            num_senders = senders[1] - senders[0]
            for i in range(num_senders):
                part = _split(layers, i, num_senders)
                if part[0] < part[1]:
                    pieces.append(Piece(first + senders[0] + i, rank, part, heads))
    return tuple(sorted(pieces, key=lambda piece: (piece.destination_rank, piece.layers, piece.heads)))


def _overlap(a: Range, b: Range) -> Range | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def _share(index: int, num_items: int, num_takers: int) -> Range:
    """The items that taker `index` uses: its own share, or one shared with others where items are fewer."""
    start = index * num_items // num_takers
    return start, max(start + 1, (index + 1) * num_items // num_takers)


def _split(whole: Range, index: int, parts: int) -> Range:
    size = whole[1] - whole[0]
    return whole[0] + index * size // parts, whole[0] + (index + 1) * size // parts
