"""Segments over MPI messages: packed by the sender, one message each under the line's tag, unpacked by the receiver.

The sender announces a segment once its message has been given to MPI, and the receiver posts a receive for each that is
announced, wanted or not: MPI keeps messages of one tag in order, and none is left that nobody waits for.
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
_LOOKS_FOR_FIRST: Final = 20  # about as long as a first segment takes to be packed, less than to launch the next


class Stager(Protocol):
    """Where a segment lies between pages and messages. Methods and callbacks on the transport's thread."""

    @property
    def max_segment_bytes(self) -> int: ...

    @property
    def packs_ahead(self) -> bool:
        """There is room to pack a segment that nobody has asked for yet."""

    def pack(self, end: Sending, segment: Segment, packed: Callable[[Any], None], failed: Done) -> None:
        """`packed(buffer)` or `failed(error)`, or nothing if the end is over by then; holds the end while it reads."""

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


class _Ahead:
    """The first segment of a transfer that nobody has asked for yet, being packed or packed."""

    def __init__(self, end: Sending, segment: Segment) -> None:
        self.end = end
        self.segment = segment
        self.buffer: Any = None  # None: it is not packed yet
        self.wanted: Callable[[Any], None] | None = None  # it has been asked for meanwhile
        self.failed: Done | None = None


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
        self._ahead: _Ahead | None = None  # one at a time, so that all other buffers are for what was asked for

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

    def prepare(self, end: Sending, segment: Segment) -> None:
        held = self._ahead
        if not self._stager.packs_ahead or (held is not None and not held.end.is_over):
            return
        if held is not None and held.buffer is not None:
            self._stager.give_back(held.buffer)
        ahead = self._ahead = _Ahead(end, segment)

        def packed(buffer: Any) -> None:
            ahead.buffer = buffer
            if ahead.wanted is not None:
                ahead.wanted(buffer)
            elif self._ahead is not ahead:
                self._stager.give_back(buffer)

        def failed(error: str | None) -> None:
            if self._ahead is ahead:
                self._ahead = None  # whoever asks has it packed anew, and hears of it
            if ahead.failed is not None:
                ahead.failed(error)

        end.mark("packing")
        self._stager.pack(end, segment, packed, failed)

    def _take_ahead(self, end: Sending, segment: Segment, packed: Callable[[Any], None], failed: Done) -> bool:
        """Whether the segment has been packed, or is being packed, already; it is `packed`'s then."""
        ahead = self._ahead
        if ahead is None or ahead.end is not end or ahead.segment != segment:
            return False
        self._ahead = None
        ahead.wanted, ahead.failed = packed, failed
        if ahead.buffer is not None:
            packed(ahead.buffer)
        return True

    def send(self, end: Sending, index: int, segment: Segment, sent: Done) -> None:
        def packed(buffer: Any) -> None:
            if end.is_over:
                self._stager.give_back(buffer)
                return
            try:
                self._progress.isend_buffer(end.key[0], end.line, self._stager.message(buffer), gone)
            except (ValueError, RuntimeError) as error:
                self._stager.give_back(buffer)
                sent(str(error))
                return
            keep.append(buffer)
            end.mark("packed")
            self._desk.announce(end, index, segment)

        def gone(error: BaseException | None) -> None:
            end.mark("sent")
            self._stager.give_back(keep.pop())
            sent(None if error is None else str(error))

        keep: list[Any] = []
        if self._take_ahead(end, segment, packed, sent):
            return
        end.mark("packing")
        self._stager.pack(end, segment, packed, sent)
        # What was packed meanwhile goes out before the next is launched; nothing is on its way before the first.
        for _ in range(_LOOKS_FOR_FIRST if index == 0 else 1):
            if self._stager.poll():
                break

    def receive(self, end: Receiving, segment: Segment, arrived: Done) -> None:
        def post(buffer: Any) -> None:
            keep.append(buffer)
            try:
                self._progress.irecv_buffer(end.key[0], end.line, self._stager.message(buffer), landed)
            except (ValueError, RuntimeError) as error:
                self._stager.give_back(keep.pop())
                arrived(str(error))

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
    packs_ahead: Final = False

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._pages = desk.pages
        self._lane = ThreadLane(desk.post)

    def pack(self, end: Sending, segment: Segment, packed: Callable[[Any], None], failed: Done) -> None:
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
