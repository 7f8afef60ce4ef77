"""The seam through which KV pages travel between ranks, whatever carries them.

One transfer is named by an id that both ends know (the reader's request id). On each source rank `send` is called once
per destination rank, on each destination rank `receive` once per source rank, with the same pieces; the order in which
the two ends call does not matter. A transport copies pages and says when it is done; when to transfer, and when memory
may be freed, is the core's business.

A progressive send (`is_written=False`) begins while the pages are still being computed: `advance` says what may be read,
and the transport cuts what has become ready into segments, (layers) × (tokens) each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from msgspec import Struct

from ..core.kv_layout import Piece, Range

if TYPE_CHECKING:
    import torch

    from .kv_pages import KvPages
    from .progress import Progress
    from .transport_ends import Carrier
    from .transport_throttle import Throttle

NOT_ENABLED: Final = "Disaggregated serving is not enabled, please check the configuration"
BACKENDS: Final = ("mpi", "cuda_ipc", "host", "auto")


class TransportError(ValueError):
    """A transport that is not configured, or a transfer that makes no sense."""


class TransportCapabilities(Struct, frozen=True):
    device_memory: bool  # moves pages that lie on an accelerator without staging them in host memory
    survives_peer_loss: bool  # the death of one rank fails its own transfers only


class TransferOutcome(Struct, frozen=True):
    """The end of one rank's part of a transfer with one other rank. `error` None is success.

    Checksums are those of `KvPages.checksums`, piece by piece, flattened, little-endian int64; empty without `verify`.
    Of a sender, `own_checksums` are those that it sent. `duration` is in picoseconds, from the call to the end.
    Of a sender also: what was left to send when the last of it was written (all of it, if `send` came after that),
    and the time from then, or from the call, to the end.
    """

    transfer_id: int
    peer_rank: int
    is_sender: bool
    num_bytes: int
    duration: int
    error: str | None = None
    own_checksums: bytes = b""
    sent_checksums: bytes = b""
    bytes_after_written: int = 0
    time_after_written: int = 0  # picoseconds
    marks: tuple[tuple[str, int], ...] = ()  # what happened when at this end, monotonic ns; for benchmarks

    @property
    def num_checked(self) -> int:
        """(layer, KV head, block) triples whose checksums both ends know."""
        return min(len(self.own_checksums), len(self.sent_checksums)) // 8


OutcomeHandler = Callable[[TransferOutcome], None]


class KvTransport(Protocol):
    """All methods may be called from any thread and return at once.

    `on_done` is called exactly once per transfer, on the thread of MPI progress, so it must be quick; after it, the
    transport touches neither the blocks nor their contents. A transfer that cannot be fails by its outcome, alone, and
    never by an exception.
    """

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> TransportCapabilities: ...

    @property
    def description(self) -> str:
        """How KV travels here and why so, in words."""

    def send(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
        *,
        is_written: bool = True,
    ) -> None:
        """Send these pieces (their rank numbers are not looked at) of the KV in `blocks` to world rank `peer_rank`.

        `is_written` False: the pages are still being computed; only what `advance` has permitted is read and sent.
        """

    def advance(self, transfer_id: int, layers: Range, num_tokens: int) -> None:
        """Tokens [0, num_tokens) of these (global) layers are written and visible to every stream, for every peer.

        Calls for a layer come with growing `num_tokens`. They may come before `send`, and are then remembered (for
        the latest 65,536 transfers); an unknown id is harmless.
        """

    def forget(self, transfer_id: int) -> None:
        """Drop what `advance` said of a transfer that will not be sent, or has been. Harmless for an unknown one."""

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
    backend: str | None,
    progress: Progress,
    pages: KvPages,
    *,
    verify: bool = False,
    survives_peer_loss: bool = True,
    min_segment_bytes: int | None = None,
    throttle: Throttle | None = None,
    devices: Iterable[int] = (),
) -> KvTransport:
    """The transport that the configuration names, for this rank's `pages`, before `progress` is started.

    `devices`: the GPUs that the cluster uses on this host, which alone are looked at, as they were before the world began.
    `verify` compares the checksum of every (layer, KV head, block) at both ends. A progressive send waits for
    `min_segment_bytes` to be written while something of it is on its way. Raises TransportError.
    """
    from .transport_desk import MIN_SEGMENT_BYTES
    from .transport_worker import SegmentTransport

    carrier = _carrier(check_backend(backend), progress, pages.pool.device, survives_peer_loss, tuple(devices))
    least = MIN_SEGMENT_BYTES if min_segment_bytes is None else min_segment_bytes
    return SegmentTransport(progress, pages, carrier, verify=verify, min_segment_bytes=least, throttle=throttle)


def _carrier(
    backend: str, progress: Progress, device: torch.device, survives_peer_loss: bool, devices: tuple[int, ...] = ()
) -> Carrier:
    """What carries segments between ranks of this world. Raises TransportError for what cannot work here."""
    from .transport_mpi import CpuStager, MpiCarrier

    capabilities = TransportCapabilities(device.type != "cpu" and backend != "host", survives_peer_loss)
    if device.type == "cpu":
        if backend == "cuda_ipc":
            raise TransportError("cuda_ipc needs device: cuda, not cpu; allowed here: mpi, host, auto")
        name = "mpi" if backend == "auto" else backend
        return MpiCarrier(progress, CpuStager, name, "MPI messages from host memory", capabilities)

    from .transport_facts import choose_backend, gather_facts, pml_of, transport_problem

    facts, why, pml = gather_facts(), "", pml_of()
    if backend == "auto":
        one_host = len(set(progress.hostnames)) == 1
        backend, reason = choose_backend(facts, device.type, one_host=one_host, pml=pml, devices=devices)
        why = f", chosen because {reason}"
        capabilities = TransportCapabilities(backend != "host", survives_peer_loss)
    problem = transport_problem(backend, facts, device.type, devices)
    if problem is not None:
        raise TransportError(problem)
    from .transport_cuda_ipc import cuda_carrier

    if backend == "cuda_ipc":
        return cuda_carrier(device, f"the receiver reads the peer's pages (cuda_ipc){why}")
    from .transport_staging import staged_carrier

    if backend == "mpi":
        from .cuda_ipc import use_device
        from .transport_probe import check_cuda_mpi

        check_cuda_mpi(device, pml)
        index = device.index if device.index is not None else 0
        progress.call(lambda: use_device(index))  # UCX copies in the context of the thread that calls it
        text = f"CUDA-aware MPI over UCX{why}"
        return staged_carrier(progress, device, "mpi", text, TransportCapabilities(True, False))
    return staged_carrier(progress, device, "host", f"MPI messages from pinned host memory{why}", capabilities)


# ---- what all transports share ---------------------------------------------------------------------------------------


def ranges_of(pieces: Sequence[Piece]) -> tuple[tuple[Range, Range], ...]:
    """(layers, heads) of each piece, in an order that both ends agree on."""
    return tuple(sorted((piece.layers, piece.heads) for piece in pieces))


def packed_bytes(pages: KvPages, ranges: Sequence[tuple[Range, Range]], num_tokens: int) -> int:
    """Bytes of these pieces packed: layers · 2 · heads · tokens · head_dim elements each."""
    elements = sum((l1 - l0) * (h1 - h0) for (l0, l1), (h0, h1) in ranges)
    return elements * 2 * num_tokens * pages.layout.head_dim * int(pages.pool.element_size())


def pack_pieces(
    pages: KvPages,
    ranges: Sequence[tuple[Range, Range]],
    blocks: Sequence[int],
    num_tokens: int,
    first_token: int = 0,
) -> Any:
    """These pieces of tokens [first_token, num_tokens), one after the other: a uint8 tensor. Raises KvPageError."""
    import torch

    parts = [
        pages.pack(blocks, num_tokens, layers, heads, first_token).reshape(-1).view(torch.uint8)
        for layers, heads in ranges
    ]  # of one piece no second copy is made
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack_pieces(
    pages: KvPages,
    packed: Any,
    ranges: Sequence[tuple[Range, Range]],
    blocks: Sequence[int],
    num_tokens: int,
    first_token: int = 0,
) -> None:
    """Write a `pack_pieces` of another rank into this rank's blocks. Raises KvPageError."""
    start = 0
    count = num_tokens - first_token
    for layers, heads in ranges:
        size = packed_bytes(pages, ((layers, heads),), count)
        shape = (layers[1] - layers[0], 2, heads[1] - heads[0], count, pages.layout.head_dim)
        part = packed[start : start + size].view(pages.pool.dtype).view(shape)
        pages.unpack(part, blocks, num_tokens, layers, heads, first_token)
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
