"""A KvTransport whose bytes are carried by something else: who sends what to whom, in which segments, and how it ends.

The protocol is in `transport_wire`. All state lives on the thread of MPI progress, where frames arrive and callbacks run:
a message is answered in the round in which it came. What takes long is the carrier's to do elsewhere. A sender cuts what is
written into segments: at once while nothing of the transfer is on its way, else when there is enough for a large one, so
that the link is never idle and little is left when the last layer ends.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from typing import Final

import msgspec

from ..core.kv_layout import Piece, Range
from .kv_pages import KvPages
from .progress import TRANSFER_CHANNEL, Progress, ProgressError
from .transport import OutcomeHandler, TransportCapabilities
from .transport_desk import MIN_SEGMENT_BYTES
from .transport_ends import Carrier, Key, Receiving, Sending
from .transport_receiver import ReceiverDesk
from .transport_segments import Written
from .transport_sender import SenderDesk
from .transport_throttle import Throttle
from .transport_wire import (
    KvAhead,
    KvAheadDropped,
    KvGivenUp,
    KvMessage,
    KvOffer,
    KvOfferTaken,
    KvPoolAddress,
    KvReady,
    KvSegment,
    KvSent,
    KvTaken,
    KvWithdrawn,
    decode,
)

_CLOSE_LIMIT_S: Final = 5.0  # for what still touches pages
_FAREWELL_S: Final = 0.5  # for peers to say their last word on what was given up


class SegmentTransport(SenderDesk, ReceiverDesk):
    """See `KvTransport`. Made before frames of `progress`'s TRANSFER_CHANNEL can come, which it takes."""

    def __init__(
        self,
        progress: Progress,
        pages: KvPages,
        carrier: Carrier,
        *,
        verify: bool = False,
        min_segment_bytes: int = MIN_SEGMENT_BYTES,
        throttle: Throttle | None = None,
    ) -> None:
        super().__init__(
            progress, pages, carrier, verify=verify, min_segment_bytes=min_segment_bytes, throttle=throttle
        )
        self._left = threading.Event()
        carrier.start(self)
        progress.subscribe(TRANSFER_CHANNEL, lambda rank, frame: self._guarded(self._on_frame, rank, frame))
        progress.watch_peers(lambda rank: self._guarded(self._on_peer_down, rank))
        progress.poll(self._poll)

    @property
    def name(self) -> str:
        return self._carrier.name

    @property
    def capabilities(self) -> TransportCapabilities:
        return self._carrier.capabilities

    @property
    def description(self) -> str:
        return self._carrier.description + (f", {self._throttle.description}" if self._throttle is not None else "")

    # ---- any thread --------------------------------------------------------------------------------------------------

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
        written = Written()
        if is_written:
            written.advance_all()
        end = Sending((peer_rank, transfer_id), self.pages, pieces, blocks, num_tokens, on_done, written=written)
        self.post(self._on_send, end, is_written)

    def receive(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self.post(
            self._on_receive, Receiving((peer_rank, transfer_id), self.pages, pieces, blocks, num_tokens, on_done)
        )

    def advance(self, transfer_id: int, layers: Range, num_tokens: int) -> None:
        self.post(self._on_advance, transfer_id, layers, num_tokens)

    def forget(self, transfer_id: int) -> None:
        self.post(self._on_forget, transfer_id)

    def abort(self, transfer_id: int, peer_rank: int, reason: str) -> None:
        self.post(self._on_abort, (peer_rank, transfer_id), reason)

    def close(self) -> None:
        self.post(self._on_close)
        if self._progress.is_own_thread:
            return
        if self._progress.is_running:
            self._left.wait(_CLOSE_LIMIT_S + _FAREWELL_S + 5.0)
        self._left.set()
        self._carrier.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _poll(self) -> bool:
        """A round of the progress thread: what the device has done, and what the throttle lets through."""
        if self._left.is_set():
            return False
        found = False
        try:
            found = self._carrier.poll()
            for release in self._throttle.due() if self._throttle is not None else ():
                found = True
                release()
        except Exception as error:  # of one callback
            traceback.print_exception(error)
        if found:
            self._note()
        if self._closed_at is not None and self._may_leave():
            self._left.set()
        return found

    def _may_leave(self) -> bool:
        if self._closed_at is None:
            return False
        waited = time.monotonic() - self._closed_at
        if self._held:
            return waited > _CLOSE_LIMIT_S
        return not self._in or waited > _FAREWELL_S

    # ---- what the peer says ------------------------------------------------------------------------------------------

    def _on_frame(self, rank: int, frame: bytes) -> None:
        try:
            message: KvMessage = decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProgressError(f"rank {rank} sent a transfer message that cannot be read: {error}") from error
        if isinstance(message, KvReady):
            self._on_ready((rank, message.transfer_id), message)
        elif isinstance(message, KvGivenUp):
            self._on_given_up((rank, message.transfer_id), message)
        elif isinstance(message, KvOffer):
            self._on_offer(rank, message)
        elif isinstance(message, KvAhead):
            self._on_ahead(rank, message)
        elif isinstance(message, KvAheadDropped):
            self._discard_aheads((rank, message.transfer_id))
        elif isinstance(message, KvWithdrawn):
            self._on_withdrawn(rank, message.serial)
        elif self._left.is_set():
            return  # closed: only answers are given
        elif isinstance(message, KvOfferTaken):
            self._on_offer_taken(rank, message.serial, message.error)
        elif isinstance(message, KvPoolAddress):
            self._carrier.learn_pool(rank, message)
        elif isinstance(message, KvTaken):
            sending = self._out.get((rank, message.line))
            if sending is not None and message.index in sending.being_read:
                sending.mark("taken")
                sending.being_read.pop(message.index)(None)
                self.release(sending)
        else:
            receiving = self._in.get((rank, message.line))
            if receiving is None:
                return  # of a line that ended with an error of its own
            if isinstance(message, KvSegment):
                self._on_segment(receiving, message)
                return
            receiving.is_last_word = True
            if isinstance(message, KvSent):
                receiving.sent_checksums = message.checksums
                self._complete(receiving)
            else:
                self._fail_receive(receiving, message.error)
            self._leave_line(receiving)

    def _on_peer_down(self, rank: int) -> None:
        # Messages with that rank fail in Progress.
        theirs = [*self._in.values(), *self._receives.values()]
        for receiving in dict.fromkeys(end for end in theirs if end.key[0] == rank):
            receiving.is_last_word = True
            if not receiving.is_over:
                self._fail_receive(receiving, f"transfer {receiving.key[1]}: rank {rank} is down")
            self._leave_line(receiving)
        ours = [*self._sends.values(), *self._out.values(), *self._offered.values()]
        for sending in dict.fromkeys(end for end in ours if end.key[0] == rank):
            self._drop(self._sends, sending)
            self._conclude(sending, f"transfer {sending.key[1]}: rank {rank} is down")
            self._end_offer(sending)
            if self._carrier.receiver_reads:  # and does so no more
                num_read = len(sending.being_read)
                sending.being_read.clear()
                for _ in range(num_read):
                    self.release(sending)
        for key in [key for key in self._offers if key[0] == rank]:
            del self._offers[key]
        for memory in (self._early, self._refusals, self._aheads):
            for key in [key for key in memory if key[0] == rank]:
                del memory[key]
        self._introduced.discard(rank)
        if not self._left.is_set():
            self._carrier.peer_down(rank)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _on_abort(self, key: Key, reason: str) -> None:
        receiving = self._receives.get(key)
        if receiving is not None:
            self._fail_receive(receiving, reason)
        sending = self._sends.get(key)
        if sending is not None:
            self._fail_send(sending, reason)

    def _on_close(self) -> None:
        self._closed_at = time.monotonic()
        for key in [*self._sends, *self._receives]:
            self._on_abort(key, "the transport was closed")
        for key in list(self._aheads):
            self._discard_aheads(key)
