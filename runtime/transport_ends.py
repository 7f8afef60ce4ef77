"""The two ends of a transfer between two ranks, and what carries its segments: the values that a transport works on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..core.kv_layout import Piece
from .kv_pages import KvPages
from .transport import OutcomeHandler, TransferOutcome, TransportCapabilities, ranges_of
from .transport_segments import Incoming, Outgoing, Outline, Segment, Written
from .transport_tables import Tables
from .transport_wire import KvPoolAddress, KvReady

Key = tuple[int, int]  # (peer rank, transfer id)
Done = Callable[[str | None], None]  # with an error, or None


class End(ABC):
    """One end of a transfer with one peer. `num_holding` operations are touching its pages at this moment."""

    def __init__(
        self,
        key: Key,
        pages: KvPages,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self.key = key
        row_bytes = pages.layout.head_dim * int(pages.pool.element_size())
        self.outline = Outline(ranges_of(pieces), num_tokens, row_bytes)
        self.blocks = tuple(blocks)
        self.on_done: OutcomeHandler | None = on_done  # None: it has been told
        self.began = time.monotonic_ns()
        self.line = -1
        self.num_holding = 0
        self.is_over = False  # nothing more will be begun; told once nothing is held
        self.error: str | None = None
        self.own_checksums = b""
        self.tables: Tables | None = None  # block ids in the device's memory, for a carrier that needs them
        self.marks: list[tuple[str, int]] = []  # what happened when, monotonic ns

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic_ns()))

    def blocks_until(self, num_tokens: int, tokens_per_block: int) -> tuple[int, ...]:
        """The blocks that tokens [0, num_tokens) lie in."""
        return self.blocks[: -(-num_tokens // tokens_per_block)]

    @abstractmethod
    def outcome(self) -> TransferOutcome: ...

    def _outcome(self, is_sender: bool, sent: bytes, left: int = 0, since: int = 0) -> TransferOutcome:
        now = time.monotonic_ns()
        num_bytes = self.outline.num_bytes if self.error is None else 0
        peer, transfer_id = self.key
        duration, after = 1000 * (now - self.began), 1000 * (now - since) if since else 0
        own = self.own_checksums
        marks = (("called", self.began), *self.marks, ("told", now))
        return TransferOutcome(
            transfer_id, peer, is_sender, num_bytes, duration, self.error, own, sent, left, after, marks
        )


class Sending(End):
    def __init__(self, *args: Any, written: Written) -> None:
        super().__init__(*args)
        self.written = written
        self.outgoing = Outgoing(self.outline)
        self.ready: KvReady | None = None  # the receiver has asked
        self.num_cut = 0
        self.num_announced = 0
        self.num_untold = 0  # segments that go ahead of the receiver's question, and have not been packed
        self.was_told_ahead = False  # of such a segment
        self.later: list[Segment] = []  # cut off with those, to be sent once it asks
        self.in_flight: dict[int, int] = {}  # index of a segment: its bytes
        self.being_read: dict[int, Done] = {}  # by the receiver itself: index of a segment, and whom to tell
        self.is_last_word = False  # the last segment, KvSent or KvRefused has been said
        self.offer = -1  # serial of the offer that the receiver has not answered yet
        self.bytes_sent = 0
        self.written_at = 0  # monotonic ns; 0: not all is written
        self.bytes_after_written = 0
        self.note_written()

    def note_written(self) -> None:
        """See whether the last of it has been written."""
        if not self.written_at and self.outgoing.is_written(self.written):
            self.written_at = time.monotonic_ns()
            self.bytes_after_written = self.outline.num_bytes - self.bytes_sent

    def outcome(self) -> TransferOutcome:
        return self._outcome(True, self.own_checksums, self.bytes_after_written, self.written_at)


class Receiving(End):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.incoming = Incoming(self.outline)
        self.num_fetching = 0  # segments on their way to here
        self.is_last_word = False  # the sender has said it, or is gone, or needs no line
        self.is_checking = False  # its checksums are being made
        self.offer = -1  # serial of the offer that is being read
        self.num_offered = 0  # segments of it that have not been read yet
        self.offer_error = ""
        self.source_blocks: tuple[int, ...] = ()  # where the receiver reads by itself
        self.sent_checksums: bytes | None = None  # None: they have not come

    def outcome(self) -> TransferOutcome:
        return self._outcome(False, self.sent_checksums or b"")


class Desk(Protocol):
    """What a carrier may ask of the transport that it carries for. Only `post` may be called from another thread."""

    @property
    def pages(self) -> KvPages: ...

    def post(self, what: Callable[..., None], *args: Any) -> None:
        """Call `what(*args)` on the transport's thread."""

    def announce(self, end: Sending, index: int, segment: Segment) -> None:
        """Tell the receiver of a segment; in the order of their indices."""

    def announce_ahead(self, end: Sending, segment: Segment, tag: int) -> None:
        """Tell the receiver of a message that it has not asked for."""

    def hold(self, end: End) -> None:
        """This end's pages are being touched from now on; it is not done before `release`."""

    def release(self, end: End) -> None: ...


class Carrier(Protocol):
    """How the bytes of a segment get from rank to rank. All methods are called on the transport's thread."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def capabilities(self) -> TransportCapabilities: ...

    @property
    def max_segment_bytes(self) -> int: ...

    @property
    def receiver_reads(self) -> bool:
        """The receiver reads the sender's pages by itself: they are held until it says KvTaken."""

    @property
    def num_ahead(self) -> int:
        """So many segments of one transfer may be sent before the receiver asks."""

    def start(self, desk: Desk) -> None:
        """Make everything ready that takes time; on the thread that makes the transport."""

    def own_pool(self) -> KvPoolAddress | None:
        """What a receiver must know of this rank's pages, once; None if nothing. Raises ValueError or RuntimeError."""

    def learn_pool(self, peer: int, pool: KvPoolAddress) -> None:
        """The same, of a sender."""

    def send(self, end: Sending, index: int, segment: Segment, sent: Done, tag: int | None = None) -> None:
        """Announce the segment and send it; `sent` when the receiver has it (not called where it reads by itself).

        `tag`: it goes ahead of the receiver's question, and is told of with `announce_ahead` once it is on its way.
        """

    def receive(self, end: Receiving, segment: Segment, arrived: Done, tag: int | None = None) -> None:
        """Take an announced segment; into the pages, unless `end.is_over`. Always calls `arrived`, once.

        `tag`: of a message that came ahead.
        """

    def discard(self, peer: int, tag: int, size: int) -> None:
        """Take a message that came ahead, and that nobody wants."""

    def checksums(self, end: End, tokens_per_block: int, then: Callable[[bytes, str | None], None]) -> None:
        """Give those of all pieces of `end`, or an error, to `then`."""

    def poll(self) -> bool:
        """Go on with what the device has done; whether there was any."""

    @property
    def is_busy(self) -> bool:
        """The device is at work for it: `poll` often."""

    def peer_down(self, peer: int) -> None: ...

    def close(self) -> None:
        """Give back what it holds; on another thread, after everything else."""
