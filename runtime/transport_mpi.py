"""Segments over MPI messages: packed by the sender, one message each under the line's tag, unpacked by the receiver.

The sender announces a segment as soon as there is a buffer for it, for its message needs nothing more then, and the
receiver posts a receive for each that is announced, wanted or not: MPI keeps messages of one tag in order, and none is left
that nobody waits for. (Announced without a buffer, receivers could wait for each other's senders in a ring.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from .progress import Progress
from .transport import TransportCapabilities, pack_pieces, unpack_pieces
from .transport_ends import Desk, Done, End, Receiving, Sending
from .transport_lane import Computed, ThreadLane
from .transport_on_lane import OnLane
from .transport_segments import Segment
from .transport_wire import KvPoolAddress

_MESSAGE_BYTES: Final = 1 << 30
_NOTHING: Final = b"\0"  # in the place of a segment that could not be packed: of no segment's size
_LOOKS_FOR_FIRST: Final = 20  # about as long as a first segment takes to be packed, less than to launch the next


class Stager(Protocol):
    """Where a segment lies between pages and messages. Methods and callbacks on the transport's thread."""

    @property
    def max_segment_bytes(self) -> int: ...

    @property
    def num_ahead(self) -> int:
        """There is room for so many segments that nobody has asked for yet."""

    def pack(
        self,
        end: Sending,
        segment: Segment,
        begun: Callable[[], None],
        packed: Callable[[Any], None],
        failed: Done,
    ) -> None:
        """`begun()` once there is a buffer and the packing has begun, then `packed(buffer)` or `failed(error)`.

        Nothing at all if the end is over before there is a buffer; holds the end while it reads.
        """

    def land(self, num_bytes: int, ready: Callable[[Any], None], failed: Done) -> None:
        """`ready(buffer)` once there is room for a message of that size; in order."""

    def message(self, buffer: Any) -> Any:
        """The buffer as mpi4py takes bytes."""

    def unpack(self, end: Receiving, segment: Segment, buffer: Any, done: Done) -> None:
        """Write a received buffer into the pages and give it back; holds the end meanwhile."""

    def give_back(self, buffer: Any) -> None: ...

    def checksums(self, end: End, tokens_per_block: int, then: Computed) -> None: ...

    def poll(self) -> bool: ...

    @property
    def is_busy(self) -> bool: ...

    def close(self) -> None: ...


class MpiCarrier:
    """See `Carrier`. What a message is made of, and in whose memory, is the stager's business."""

    receiver_reads: Final = False

    def __init__(
        self,
        progress: Progress,
        make_stager: Callable[[Desk], Stager],
        name: str,
        description: str,
        capabilities: TransportCapabilities,
    ) -> None:
        self.name: Final = name
        self.description: Final = description
        self.capabilities: Final = capabilities
        self._progress = progress
        self._make_stager = make_stager
        self._desk: Desk
        self._stager: Stager

    @property
    def max_segment_bytes(self) -> int:
        return min(_MESSAGE_BYTES, self._stager.max_segment_bytes)

    def start(self, desk: Desk) -> None:
        self._desk = desk
        self._stager = self._make_stager(desk)

    def own_pool(self) -> KvPoolAddress | None:
        return None

    def learn_pool(self, peer: int, pool: KvPoolAddress) -> None:
        pass

    @property
    def num_ahead(self) -> int:
        return self._stager.num_ahead

    def send(self, end: Sending, index: int, segment: Segment, sent: Done, tag: int | None = None) -> None:
        peer = end.key[0]

        def begun() -> None:
            if tag is None:  # its message will come whatever happens: the receiver can make ready for it
                announced.append(index)
                self._desk.announce(end, index, segment)

        def packed(buffer: Any) -> None:
            if tag is not None and end.is_over:  # nobody has heard of it
                self._stager.give_back(buffer)
                return
            try:
                self._progress.isend_buffer(peer, end.line if tag is None else tag, self._stager.message(buffer), gone)
            except (ValueError, RuntimeError) as error:
                self._stager.give_back(buffer)
                sent(str(error))
                return
            keep.append(buffer)
            end.mark("packed")
            if tag is not None:
                self._desk.announce_ahead(end, segment, tag)

        def failed(error: str | None) -> None:
            if announced:
                try:
                    self._progress.isend_buffer(peer, end.line, _NOTHING, lambda problem: None)
                except (ValueError, RuntimeError):
                    pass  # then nobody waits for it
            sent(error)

        def gone(error: BaseException | None) -> None:
            end.mark("sent")
            self._stager.give_back(keep.pop())
            sent(None if error is None else str(error))

        keep: list[Any] = []
        announced: list[int] = []
        end.mark("packing")
        self._stager.pack(end, segment, begun, packed, failed)
        # What was packed meanwhile goes out before the next is launched; nothing is on its way before the first.
        for _ in range(_LOOKS_FOR_FIRST if index == 0 else 1):
            if self._stager.poll():
                break

    def receive(self, end: Receiving, segment: Segment, arrived: Done, tag: int | None = None) -> None:
        def post(buffer: Any) -> None:
            keep.append(buffer)
            try:
                message = self._stager.message(buffer)
                self._progress.irecv_buffer(end.key[0], end.line if tag is None else tag, message, landed)
            except (ValueError, RuntimeError) as error:
                self._stager.give_back(keep.pop())
                arrived(str(error))
            end.mark("posted")

        def landed(error: BaseException | None) -> None:
            end.mark("landed")
            buffer = keep.pop()
            if error is None and not end.is_over:
                self._stager.unpack(end, segment, buffer, arrived)
                return
            self._stager.give_back(buffer)
            arrived(None if error is None else str(error))

        keep: list[Any] = []
        self._stager.land(end.outline.bytes_of(segment), post, arrived)

    def discard(self, peer: int, tag: int, size: int) -> None:
        def post(buffer: Any) -> None:
            try:
                self._progress.irecv_buffer(
                    peer, tag, self._stager.message(buffer), lambda error: self._stager.give_back(buffer)
                )
            except (ValueError, RuntimeError):  # MPI is not asked any more
                self._stager.give_back(buffer)

        self._stager.land(size, post, lambda error: None)

    def checksums(self, end: End, tokens_per_block: int, then: Computed) -> None:
        self._stager.checksums(end, tokens_per_block, then)

    def poll(self) -> bool:
        return self._stager.poll()

    @property
    def is_busy(self) -> bool:
        return self._stager.is_busy

    def peer_down(self, peer: int) -> None:
        pass

    def close(self) -> None:
        self._stager.close()


class CpuStager(OnLane):
    """Pages in host memory: packed and unpacked by a thread, into buffers made for the purpose."""

    max_segment_bytes: Final = _MESSAGE_BYTES
    num_ahead: Final = 0

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._pages = desk.pages
        self._lane = ThreadLane(desk.post)

    def pack(
        self,
        end: Sending,
        segment: Segment,
        begun: Callable[[], None],
        packed: Callable[[Any], None],
        failed: Done,
    ) -> None:
        first, last = segment.tokens
        blocks = end.blocks_until(last, self._pages.tokens_per_block)
        made: list[Any] = []

        def work() -> None:
            made.append(pack_pieces(self._pages, end.outline.pieces_of(segment), blocks, last, first))

        def finish(error: str | None) -> None:
            self._desk.release(end)
            if error is None:
                packed(made.pop())
            else:
                failed(error)

        self._desk.hold(end)
        begun()
        self._lane.run(work, finish)

    def message(self, buffer: Any) -> Any:
        return buffer.numpy()

    def land(self, num_bytes: int, ready: Callable[[Any], None], failed: Done) -> None:
        ready(torch.empty(num_bytes, dtype=torch.uint8))

    def unpack(self, end: Receiving, segment: Segment, buffer: Any, done: Done) -> None:
        first, last = segment.tokens
        blocks = end.blocks_until(last, self._pages.tokens_per_block)

        def finish(error: str | None) -> None:
            self._desk.release(end)
            done(error)

        self._desk.hold(end)
        self._lane.run(
            lambda: unpack_pieces(self._pages, buffer, end.outline.pieces_of(segment), blocks, last, first), finish
        )

    def give_back(self, buffer: Any) -> None:
        pass

    def close(self) -> None:
        self._lane.close()
