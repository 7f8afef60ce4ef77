"""A KvTransport whose bytes are carried by something else: who sends what to whom, in which segments, and how it ends.

The protocol is in `transport_wire`. All state lives on one thread, on which callbacks run too. A sender cuts what is
written into segments: at once while nothing of the transfer is on its way, else when there is enough for a large one, so
that the link is never idle and little is left when the last layer ends.
"""

from __future__ import annotations

import queue
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
from .transport_ends import Carrier, End, Key, Receiving, Sending
from .transport_receiver import ReceiverDesk
from .transport_segments import Written
from .transport_sender import SenderDesk
from .transport_throttle import Throttle
from .transport_wire import KvGivenUp, KvMessage, KvPoolAddress, KvReady, KvSegment, KvSent, KvTaken, decode

_CLOSE_LIMIT_S: Final = 5.0  # for what still touches pages
_FAREWELL_S: Final = 0.5  # for peers to say their last word on what was given up


class SegmentTransport(SenderDesk, ReceiverDesk):
    """See `KvTransport`. Made before `progress` is started, whose TRANSFER_CHANNEL it takes."""

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
        carrier.start(self)
        progress.subscribe(TRANSFER_CHANNEL, lambda rank, frame: self.post(self._on_frame, rank, frame))
        progress.watch_peers(lambda rank: self.post(self._on_peer_down, rank))
        self._worker = threading.Thread(target=self._run, name="kv-transport", daemon=True)
        self._worker.start()

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
        if threading.current_thread() is not self._worker:
            self._worker.join(_CLOSE_LIMIT_S + _FAREWELL_S + 5.0)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._may_leave():
            try:
                what, args = self._inbox.get(timeout=self._patience())
                what(*args)
            except queue.Empty:
                pass
            except Exception as error:  # one bad frame or callback must not end all transfers
                traceback.print_exception(error)
            self._progress.is_expecting = bool(self._sends or self._receives or self._out or self._in)
            if self._throttle is not None:
                for release in self._throttle.due():
                    self.post(release)
        self._carrier.close()

    def _patience(self) -> float | None:
        if self._closed_at is not None:
            return 0.01
        return None if self._throttle is None else self._throttle.seconds_to_next()

    def _may_leave(self) -> bool:
        if self._closed_at is None or not self._inbox.empty():
            return False
        waited = time.monotonic() - self._closed_at
        ends: list[End] = [*self._out.values(), *self._in.values()]
        if any(end.num_holding for end in ends):
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
        elif isinstance(message, KvPoolAddress):
            self._carrier.learn_pool(rank, message)
        elif isinstance(message, KvTaken):
            sending = self._out.get((rank, message.line))
            if sending is not None and message.index in sending.being_read:
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
        for receiving in [end for (peer, _), end in self._in.items() if peer == rank]:
            receiving.is_last_word = True
            if not receiving.is_over:
                self._fail_receive(receiving, f"transfer {receiving.key[1]}: rank {rank} is down")
            self._leave_line(receiving)
        for sending in [*[s for s in self._sends.values() if s.key[0] == rank], *self._out.values()]:
            if sending.key[0] != rank:
                continue
            if self._carrier.receiver_reads:  # and does so no more
                sending.num_holding -= len(sending.being_read)
                sending.being_read.clear()
            self._drop(self._sends, sending)
            self._conclude(sending, f"transfer {sending.key[1]}: rank {rank} is down")
        for memory in (self._early, self._refusals):
            for key in [key for key in memory if key[0] == rank]:
                del memory[key]
        self._introduced.discard(rank)
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
