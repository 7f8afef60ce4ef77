"""The seam through which KV pages travel between ranks, whatever carries them.

One transfer is named by an id that both ends know (the reader's request id). On each source rank `send` is called once
per destination rank, on each destination rank `receive` once per source rank, with the same pieces; the order in which
the two ends call does not matter. A transport copies pages and says when it is done; when to transfer, and when memory
may be freed, is the core's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from msgspec import Struct

from ..core.kv_layout import Piece, Range

if TYPE_CHECKING:
    from .kv_pages import KvPages
    from .progress import Progress

NOT_ENABLED: Final = "Disaggregated serving is not enabled, please check the configuration"
BACKENDS: Final = ("mpi",)


class TransportError(ValueError):
    """A transport that is not configured, or a transfer that makes no sense."""


class TransportCapabilities(Struct, frozen=True):
    device_memory: bool  # moves pages that lie on an accelerator without staging them in host memory
    survives_peer_loss: bool  # the death of one rank fails its own transfers only


class TransferOutcome(Struct, frozen=True):
    """The end of one rank's part of a transfer with one other rank. `error` None is success.

    Checksums are those of `KvPages.checksums`, piece by piece, flattened, little-endian int64; empty without `verify`.
    Of a sender, `own_checksums` are those that it sent. `duration` is in picoseconds, from the call to the end.
    """

    transfer_id: int
    peer_rank: int
    is_sender: bool
    num_bytes: int
    duration: int
    error: str | None = None
    own_checksums: bytes = b""
    sent_checksums: bytes = b""

    @property
    def num_checked(self) -> int:
        """(layer, KV head, block) triples whose checksums both ends know."""
        return min(len(self.own_checksums), len(self.sent_checksums)) // 8


OutcomeHandler = Callable[[TransferOutcome], None]


class KvTransport(Protocol):
    """All methods may be called from any thread and return at once.

    `on_done` is called exactly once per transfer, on a thread of the transport; after it, the transport touches neither
    the blocks nor their contents. A transfer that cannot be fails by its outcome, alone, and never by an exception.
    """

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> TransportCapabilities: ...

    def send(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        """Send these pieces (their rank numbers are not looked at) of the KV in `blocks` to world rank `peer_rank`."""

    def receive(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        """Receive what `peer_rank` sends under `transfer_id` into `blocks`."""

    def abort(self, transfer_id: int, peer_rank: int, reason: str) -> None:
        """Give the transfer up with this error on this rank, and tell the peer. Harmless for one that has ended."""

    def close(self) -> None:
        """Fail what is in flight and release threads. Before `Progress.stop`."""


def check_backend(backend: str | None) -> str:
    """`backend` if it names a transport. Raises TransportError otherwise."""
    if backend is None:
        raise TransportError(NOT_ENABLED)
    if backend not in BACKENDS:
        raise TransportError(f"cache_transceiver.backend {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    return backend


def make_transport(
    backend: str | None, progress: Progress, pages: KvPages, *, verify: bool = False, survives_peer_loss: bool = True
) -> KvTransport:
    """The transport that the configuration names, for this rank's `pages`, before `progress` is started.

    `verify` compares the checksum of every (layer, KV head, block) at both ends. Raises TransportError.
    """
    check_backend(backend)
    from .transport_mpi import MpiKvTransport

    return MpiKvTransport(progress, pages, verify=verify, survives_peer_loss=survives_peer_loss)


# ---- what all transports share ---------------------------------------------------------------------------------------


def ranges_of(pieces: Sequence[Piece]) -> tuple[tuple[Range, Range], ...]:
    """(layers, heads) of each piece, in an order that both ends agree on."""
    return tuple(sorted((piece.layers, piece.heads) for piece in pieces))


def packed_bytes(pages: KvPages, ranges: Sequence[tuple[Range, Range]], num_tokens: int) -> int:
    """Bytes of these pieces packed: layers · 2 · heads · tokens · head_dim elements each."""
    elements = sum((l1 - l0) * (h1 - h0) for (l0, l1), (h0, h1) in ranges)
    return elements * 2 * num_tokens * pages.layout.head_dim * int(pages.pool.element_size())


def pack_pieces(pages: KvPages, ranges: Sequence[tuple[Range, Range]], blocks: Sequence[int], num_tokens: int) -> Any:
    """One contiguous uint8 tensor with the pieces one after the other. Raises KvPageError."""
    import torch

    parts = [
        pages.pack(blocks, num_tokens, layers, heads).reshape(-1).view(torch.uint8) for layers, heads in ranges
    ]  # of one piece no second copy is made
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack_pieces(
    pages: KvPages, packed: Any, ranges: Sequence[tuple[Range, Range]], blocks: Sequence[int], num_tokens: int
) -> None:
    """Write a `pack_pieces` of another rank into this rank's blocks. Raises KvPageError."""
    start = 0
    for layers, heads in ranges:
        size = packed_bytes(pages, ((layers, heads),), num_tokens)
        shape = (layers[1] - layers[0], 2, heads[1] - heads[0], num_tokens, pages.layout.head_dim)
        part = packed[start : start + size].view(pages.pool.dtype).view(shape)
        pages.unpack(part, blocks, num_tokens, layers, heads)
        start += size


def checksum_bytes(
    pages: KvPages,
    ranges: Sequence[tuple[Range, Range]],
    blocks: Sequence[int],
    num_tokens: int,
    tokens_per_block: int,
) -> bytes:
    """The checksums of these pieces in blocks of `tokens_per_block`, as in `TransferOutcome`."""
    return b"".join(
        pages.checksums(blocks, num_tokens, layers, heads, tokens_per_block).contiguous().numpy().tobytes()
        for layers, heads in ranges
    )


def num_checksum_bytes(ranges: Sequence[tuple[Range, Range]], num_tokens: int, tokens_per_block: int) -> int:
    num_blocks = -(-num_tokens // tokens_per_block)
    return 8 * num_blocks * sum((l1 - l0) * (h1 - h0) for (l0, l1), (h0, h1) in ranges)


def first_difference(own: bytes, sent: bytes, ranges: Sequence[tuple[Range, Range]], num_blocks: int) -> str | None:
    """Where two rows of checksums first differ, in words, or None where they are equal."""
    if own == sent:
        return None
    index = next((i // 8 for i in range(0, min(len(own), len(sent)), 8) if own[i : i + 8] != sent[i : i + 8]), None)
    if index is None:
        return f"{len(own) // 8} checksums here, {len(sent) // 8} at the sender"
    for layers, heads in ranges:
        num_heads = heads[1] - heads[0]
        size = (layers[1] - layers[0]) * num_heads * num_blocks
        if index < size:
            layer, rest = divmod(index, num_heads * num_blocks)
            head, block = divmod(rest, num_blocks)
            return f"layer {layers[0] + layer}, KV head {heads[0] + head}, block {block} differs"
        index -= size
    return "checksums beyond the pieces"
