"""Segments that the receiver reads for itself: one kernel (or a batch of copies) from the peer's pages into its own.

No staging, no packing: the sender only says what may be read, and its pages are held until the receiver says that it
does not read them any more. The sender's pool is opened once and stays open until the peer or this rank is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

import torch

from ..core.kv_layout import Range
from .kv_pages import KvPages
from .kv_places import KvCopy, KvPool
from .kv_runs import copy_in_host_memory, run_bytes, runs_of
from .transport import TransportCapabilities
from .transport_ends import Desk, Done, Receiving, Sending
from .transport_lane import CudaLane, InlineLane, Lane
from .transport_on_lane import OnLane
from .transport_segments import Segment
from .transport_tables import TableRing
from .transport_wire import KvPoolAddress

_NO_LIMIT: Final = 1 << 50

Copy = Callable[[KvCopy, Sequence[int], Sequence[int]], None]  # with the block ids of source and destination


class PeerMemory(Protocol):
    """Memory that other processes of this host can open. Raises ValueError or RuntimeError."""

    def export(self, pages: KvPages) -> tuple[bytes, int, int, bytes]:
        """(handle of the allocation, its bytes, offset of the pool in it, UUID of its device)."""

    def open(self, handle: bytes, device: bytes) -> int:
        """Where that allocation begins in this process."""

    def close(self, address: int) -> None: ...


class CudaMemory:
    """Device memory through CUDA's IPC handles."""

    def __init__(self, device: torch.device) -> None:
        from .cuda_ipc import Driver, use_device

        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._driver = Driver()
        self._use = use_device

    def export(self, pages: KvPages) -> tuple[bytes, int, int, bytes]:
        from .cuda_ipc import device_uuid

        self._use(self._index)
        address = int(pages.pool.data_ptr())
        base, size = self._driver.allocation_of(address)
        return self._driver.export(base), size, address - base, device_uuid(self._index)

    def open(self, handle: bytes, device: bytes) -> int:
        self._use(self._index)
        return self._driver.open(handle)

    def close(self, address: int) -> None:
        self._use(self._index)
        self._driver.close(address)


class PeerReadCarrier(OnLane):
    """See `Carrier`. `make_lane`, `memory` and `make_copies` make it one of a GPU, or of host memory for tests.

    `make_copies`: of runs of `engines_from` bytes on, and of shorter ones; only the latter reads block ids from tables.
    """

    name: Final = "cuda_ipc"
    max_segment_bytes: Final = _NO_LIMIT
    receiver_reads: Final = True
    num_ahead: Final = 0  # it makes offers

    def __init__(
        self,
        description: str,
        capabilities: TransportCapabilities,
        make_lane: Callable[[Desk], Lane],
        memory: PeerMemory,
        make_copies: Callable[[Lane], tuple[Copy, Copy]],
        engines_from: int = 0,
    ) -> None:
        self.description: Final = description
        self.capabilities: Final = capabilities
        self._make_lane = make_lane
        self._make_copies = make_copies
        self._engines_from = engines_from
        self._memory = memory
        self._told: dict[int, KvPoolAddress] = {}
        self._open: dict[int, tuple[int, KvPool]] = {}  # (address of the allocation, the pool)
        self._desk: Desk
        self._lane: Lane
        self._copy_long: Copy
        self._copy_short: Copy
        self._tables: TableRing
        self._own: KvPool
        self._pool: KvPoolAddress | None = None

    def start(self, desk: Desk) -> None:
        self._desk = desk
        self._lane = self._make_lane(desk)
        self._copy_long, self._copy_short = self._make_copies(self._lane)
        self._tables = TableRing(desk.pages.device, self._lane.stream)
        self._own = KvPool.of(desk.pages)
        if desk.pages.device.type != "cpu":
            from .kv_kernels import warm_copy

            warm_copy(desk.pages)

    # ---- the sender --------------------------------------------------------------------------------------------------

    def own_pool(self) -> KvPoolAddress:
        if self._pool is None:
            self._pool = self._export()
        return self._pool

    def _export(self) -> KvPoolAddress:
        pages = self._desk.pages
        handle, size, offset, device = self._memory.export(pages)
        layout = pages.layout
        return KvPoolAddress(
            handle,
            size,
            offset,
            device,
            pages.layers,
            pages.heads,
            pages.num_blocks,
            pages.tokens_per_block,
            layout.head_dim,
            layout.dtype,
        )

    def send(self, end: Sending, index: int, segment: Segment, sent: Done, tag: int | None = None) -> None:
        self._desk.announce(end, index, segment)

    # ---- the receiver ------------------------------------------------------------------------------------------------

    def learn_pool(self, peer: int, pool: KvPoolAddress) -> None:
        self._told.setdefault(peer, pool)  # what is open must not be closed under a kernel

    def discard(self, peer: int, tag: int, size: int) -> None:
        raise ValueError(f"rank {peer} sends messages, which this rank does not take")

    def receive(self, end: Receiving, segment: Segment, arrived: Done, tag: int | None = None) -> None:
        if end.is_over:
            arrived(None)
            return
        try:
            source = self._pool_of(end.key[0])
            self._check_source(source, end)
        except (ValueError, RuntimeError) as error:
            arrived(str(error))
            return
        desk = self._desk

        def done(error: str | None) -> None:
            desk.release(end)
            arrived(error)

        desk.hold(end)
        self._lane.run(lambda: self._read(end, segment, source), done)

    def _read(self, end: Receiving, segment: Segment, source: KvPool) -> Any:
        end.mark("launching")
        first, last = segment.tokens
        own = self._own
        for layers, heads in end.outline.pieces_of(segment):
            is_long = _run_bytes(source, own, layers, heads, segment.tokens) >= self._engines_from
            if not is_long and end.tables is None:
                end.tables = self._tables.put(end.source_blocks, end.blocks)
            # Block ids that a kernel can read; copy engines are told addresses, and need none.
            theirs, ours = end.tables.addresses if end.tables is not None and not is_long else (0, 0)
            copy = KvCopy(
                source.place(layers, heads, first, theirs),
                own.place(layers, heads, first, ours),
                layers[1] - layers[0],
                heads[1] - heads[0],
                last - first,
                own.row_bytes,
            )
            (self._copy_long if is_long else self._copy_short)(copy, end.source_blocks, end.blocks)
        end.mark("launched")
        return end.tables

    def _check_source(self, source: KvPool, end: Receiving) -> None:
        """What a peer says is not believed where believing it would read beyond its pool."""
        blocks, size = end.source_blocks, source.tokens_per_block
        if len(blocks) != -(-end.outline.num_tokens // size):
            raise ValueError(f"{end.outline.num_tokens} tokens in {len(blocks)} blocks of {size} at rank {end.key[0]}")
        if max(blocks) >= source.num_blocks:
            raise ValueError(f"rank {end.key[0]} named block {max(blocks)} of a pool of {source.num_blocks}")
        for layers, heads in end.outline.ranges:
            if not source.holds(layers, heads):
                raise ValueError(f"layers {layers}, heads {heads} are not in the pool of rank {end.key[0]}")

    def _pool_of(self, peer: int) -> KvPool:
        known = self._open.get(peer)
        if known is not None:
            return known[1]
        told = self._told.get(peer)
        if told is None:
            raise ValueError(f"rank {peer} has not told where its pages are")
        pages = self._desk.pages
        if (told.head_dim, told.dtype) != (pages.layout.head_dim, pages.layout.dtype):
            raise ValueError(f"rank {peer} keeps KV as {told.head_dim} x {told.dtype}, this rank does not")
        layers: Range = told.layers
        own = self._own
        pool = KvPool(0, layers, told.heads, told.num_blocks, told.tokens_per_block, own.row_bytes)
        if layers[0] >= layers[1] or told.heads[0] >= told.heads[1] or told.offset % 16:
            raise ValueError(f"rank {peer} told of a pool that cannot be: {told.layers}, {told.heads}, {told.offset}")
        if told.offset + pool.nbytes > told.allocation_bytes:
            raise ValueError(f"rank {peer} told of a pool of {pool.nbytes} bytes in {told.allocation_bytes}")
        base = self._memory.open(told.handle, told.device)
        pool = KvPool(base + told.offset, layers, told.heads, told.num_blocks, told.tokens_per_block, own.row_bytes)
        self._open[peer] = (base, pool)
        return pool

    # ---- the end -----------------------------------------------------------------------------------------------------

    def peer_down(self, peer: int) -> None:
        # Behind what the lane still reads: a pool must not be closed under a kernel.
        self._lane.run(lambda: None, lambda error: self._forget(peer))

    def close(self) -> None:
        self._lane.close()
        for peer in list(self._open):
            self._forget(peer)

    def _forget(self, peer: int) -> None:
        self._told.pop(peer, None)
        known = self._open.pop(peer, None)
        if known is not None:
            try:
                self._memory.close(known[0])
            except RuntimeError:
                pass  # the driver takes it back when this process ends


@lru_cache(maxsize=1024)
def _run_bytes(source: KvPool, own: KvPool, layers: Range, heads: Range, tokens: Range) -> int:
    """`run_bytes` of the copy of such a piece, of which a peer sends many alike."""
    places = [pool.place(layers, heads, tokens[0], 0) for pool in (source, own)]
    sizes = (layers[1] - layers[0], heads[1] - heads[0], tokens[1] - tokens[0], own.row_bytes)
    return run_bytes(KvCopy(places[0], places[1], *sizes))


# Bytes a run from which copy engines, which leave every multiprocessor to the steps that run beside, are fast enough.
# Measured on H200: 64 KiB 46 GB/s, 128 KiB 180, 512 KiB 380, the kernel 360.
_ENGINES_FROM: Final = 96 << 10


def cuda_carrier(device: torch.device, description: str, copy: str = "auto") -> PeerReadCarrier:
    """Reads over NVLink or PCIe. `copy`: "kernel", "batch" for copy engines, or "auto": engines where runs are long."""
    return PeerReadCarrier(
        description,
        TransportCapabilities(device_memory=True, survives_peer_loss=True),
        lambda desk: CudaLane(device, desk.post),
        CudaMemory(device),
        lambda lane: (batch_copy(lane), kernel_copy(lane)),
        {"auto": _ENGINES_FROM, "kernel": _NO_LIMIT, "batch": 0}[copy],
    )


def host_carrier(memory: PeerMemory) -> PeerReadCarrier:
    """The same over shared host memory, for tests of all but the device."""
    return PeerReadCarrier(
        "shared host memory",
        TransportCapabilities(device_memory=False, survives_peer_loss=True),
        lambda desk: InlineLane(),
        memory,
        lambda lane: (copy_in_host_memory, copy_in_host_memory),
    )


def kernel_copy(lane: Lane) -> Copy:
    from .kv_kernels import read_rows

    stream = lane.stream
    return lambda copy, source_blocks, destination_blocks: read_rows(copy, stream)


def local_copy(lane: Lane) -> Copy:
    """Between pages and a buffer of one device, at the speed of its memory."""
    from .kv_kernels import copy_rows

    stream = lane.stream
    return lambda copy, source_blocks, destination_blocks: copy_rows(copy, stream=stream)


def batch_copy(lane: Lane) -> Copy:
    from .cuda_ipc import AT_ONCE, SUBMISSIONS, Driver

    driver = Driver()

    def by_engines(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> None:
        submissions = AT_ONCE if lane.is_busy else SUBMISSIONS
        driver.copy_runs(runs_of(copy, source_blocks, destination_blocks), lane.stream, submissions)

    return by_engines
