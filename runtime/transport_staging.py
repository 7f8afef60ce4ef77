"""Staging of segments between a device's pages and MPI messages: a few buffers, each used over and over.

One kernel packs a segment's scattered rows into a buffer, one unpacks it; they run on a lane of their own, so that the
packing of one segment overlaps the message of the one before. Where MPI cannot be given device memory, the buffer has a
twin in pinned host memory and is copied there and back by the copy engines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch

from .kv_places import KvCopy, KvPlace, KvPool, packed_place
from .progress import Progress
from .transport import TransportCapabilities
from .transport_cuda_ipc import Copy, local_copy
from .transport_ends import Desk, Done, End, Receiving, Sending
from .transport_lane import CudaLane, Lane
from .transport_mpi import MpiCarrier
from .transport_on_lane import OnLane
from .transport_segments import Segment
from .transport_tables import TableRing

NUM_BUFFERS: Final = 3  # of each direction: one is packed, one on its way, one given back
NUM_AHEAD: Final = 2  # segments of one transfer that go out before anybody asks: one more buffer is for them
# A segment costs 200 to 400 µs of MPI's calls at both ends, whatever its size; NVLink has 64 MiB across in 190. A smaller
# first one, to fill the pipeline sooner, was tried: 256 tokens in two took 1,261 µs, in one 838.
DEVICE_SEGMENT_BYTES: Final = 64 << 20
HOST_SEGMENT_BYTES: Final = 16 << 20


class StagingBuffer:
    """`num_bytes` of it are in use. `host` None: messages are made of the device's memory itself."""

    __slots__ = ("address", "device", "host", "num_bytes")

    def __init__(self, size: int, device: torch.device, via_host: bool) -> None:
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") if via_host else None
        self.address = int(self.device.data_ptr())
        self.num_bytes = 0


class _Pool:
    """At most `size` buffers, lent in the order in which they are asked for; `is_full`: all are made at once."""

    def __init__(self, make: Callable[[], StagingBuffer], size: int, is_full: bool) -> None:
        self._make = make
        self._size = size
        self._num_made = size if is_full else 0
        self._free = [make() for _ in range(self._num_made)]
        self._waiting: deque[Callable[[StagingBuffer], None]] = deque()

    def take(self, then: Callable[[StagingBuffer], None]) -> None:
        if self._free:
            then(self._free.pop())
        elif self._num_made < self._size:
            buffer = self._make()  # RuntimeError where there is no memory
            self._num_made += 1
            then(buffer)
        else:
            self._waiting.append(then)

    def give(self, buffer: StagingBuffer) -> None:
        if self._waiting:
            self._waiting.popleft()(buffer)
        else:
            self._free.append(buffer)


class DeviceStager(OnLane):
    """See `Stager`. `via_host`: messages from pinned host memory.

    `message_of(address, bytes)`: a message of device memory as mpi4py takes it; None: torch's own tensors, of which it asks
    much before it believes them.
    """

    num_ahead: Final = NUM_AHEAD  # two buffers are left, as many as another transfer needs to keep going

    def __init__(
        self,
        desk: Desk,
        lane: Lane,
        copy: Copy,
        segment_bytes: int,
        *,
        via_host: bool,
        message_of: Callable[[int, int], Any] | None = None,
    ) -> None:
        self.max_segment_bytes: Final = segment_bytes
        self._desk = desk
        self._pages = desk.pages
        self._lane = lane
        self._copy = copy
        self._message_of = message_of
        self._row_bytes = KvPool.of(desk.pages).row_bytes
        self._tables = TableRing(desk.pages.device, lane.stream)

        def make() -> StagingBuffer:
            return StagingBuffer(segment_bytes, self._pages.device, via_host)

        is_device = self._pages.device.type != "cpu"  # where making one in the middle of serving would hold it up
        self._outgoing = _Pool(make, NUM_BUFFERS + 1, is_device)
        self._incoming = _Pool(make, NUM_BUFFERS, is_device)
        self._owner: dict[StagingBuffer, _Pool] = {}

    def message(self, buffer: StagingBuffer) -> Any:
        if buffer.host is not None:
            return buffer.host[: buffer.num_bytes].numpy()
        if self._message_of is not None:
            return self._message_of(buffer.address, buffer.num_bytes)
        return buffer.device[: buffer.num_bytes]

    def pack(
        self,
        end: Sending,
        segment: Segment,
        begun: Callable[[], None],
        packed: Callable[[Any], None],
        failed: Done,
    ) -> None:
        def begin(buffer: StagingBuffer) -> None:
            self._owner[buffer] = self._outgoing
            if end.is_over:
                self.give_back(buffer)
                return
            buffer.num_bytes = end.outline.bytes_of(segment)
            self._desk.hold(end)
            begun()
            self._lane.run(lambda: self._pack(end, segment, buffer), lambda error: finish(buffer, error))

        def finish(buffer: StagingBuffer, error: str | None) -> None:
            self._desk.release(end)
            if error is None:
                packed(buffer)
            else:
                self.give_back(buffer)
                failed(error)

        try:
            self._outgoing.take(begin)
        except RuntimeError as error:
            failed(f"no memory for a staging buffer: {_first_line(error)}")

    def land(self, num_bytes: int, ready: Callable[[Any], None], failed: Done) -> None:
        def begin(buffer: StagingBuffer) -> None:
            self._owner[buffer] = self._incoming
            buffer.num_bytes = num_bytes
            ready(buffer)

        try:
            self._incoming.take(begin)
        except RuntimeError as error:
            failed(f"no memory for a staging buffer: {_first_line(error)}")

    def unpack(self, end: Receiving, segment: Segment, buffer: StagingBuffer, done: Done) -> None:
        def finish(error: str | None) -> None:
            self._desk.release(end)
            self.give_back(buffer)
            done(error)

        self._desk.hold(end)
        self._lane.run(lambda: self._unpack(end, segment, buffer), finish)

    def give_back(self, buffer: StagingBuffer) -> None:
        self._owner.pop(buffer).give(buffer)

    def close(self) -> None:
        self._lane.close()

    # ---- in the lane -------------------------------------------------------------------------------------------------

    def _pack(self, end: Sending, segment: Segment, buffer: StagingBuffer) -> Any:
        for pages, packed, size in self._places(end, segment, buffer):
            self._copy(KvCopy(pages, packed, *size), end.blocks, ())
        if buffer.host is not None:
            n = buffer.num_bytes
            buffer.host[:n].copy_(buffer.device[:n], non_blocking=True)
        return end.tables

    def _unpack(self, end: Receiving, segment: Segment, buffer: StagingBuffer) -> Any:
        if buffer.host is not None:
            n = buffer.num_bytes
            buffer.device[:n].copy_(buffer.host[:n], non_blocking=True)
        for pages, packed, size in self._places(end, segment, buffer):
            self._copy(KvCopy(packed, pages, *size), (), end.blocks)
        return end.tables

    def _places(
        self, end: End, segment: Segment, buffer: StagingBuffer
    ) -> list[tuple[KvPlace, KvPlace, tuple[int, int, int, int]]]:
        """(in the pages, in the buffer, (layers, heads, tokens, row bytes)) of each piece of the segment."""
        if end.tables is None:
            end.tables = self._tables.put(end.blocks)
        pool, table = KvPool.of(self._pages), end.tables.addresses[0]
        first, last = segment.tokens
        address = buffer.address
        found = []
        for layers, heads in end.outline.pieces_of(segment):
            size = (layers[1] - layers[0], heads[1] - heads[0], last - first, self._row_bytes)
            place = packed_place(address, size[1], size[2], self._row_bytes)
            found.append((pool.place(layers, heads, first, table), place, size))
            address += size[0] * 2 * size[1] * size[2] * self._row_bytes
        return found


def staged_carrier(
    progress: Progress, device: torch.device, name: str, description: str, capabilities: TransportCapabilities
) -> MpiCarrier:
    """A GPU's pages over MPI messages: from its own memory (`mpi`, which needs UCX) or from pinned host memory."""
    via_host = name == "host"

    def make(desk: Desk) -> DeviceStager:
        from .kv_kernels import warm_copy

        lane = CudaLane(device, desk.post)
        warm_copy(desk.pages)
        size = HOST_SEGMENT_BYTES if via_host else DEVICE_SEGMENT_BYTES
        return DeviceStager(
            desk, lane, local_copy(lane), size, via_host=via_host, message_of=_at if not via_host else None
        )

    return MpiCarrier(progress, make, name, description, capabilities)


def _at(address: int, num_bytes: int) -> Any:
    """That memory as a message; MPI finds out by itself whose it is."""
    from mpi4py import MPI

    return MPI.buffer.fromaddress(address, num_bytes)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
