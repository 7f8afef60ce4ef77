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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from ..core.kv_layout import Piece, Range
from .kv_pages import KvPages
from .progress import TRANSFER_CHANNEL, Progress, ProgressError
from .transport import OutcomeHandler, TransportCapabilities, first_difference
from .transport_ends import Carrier, End, Key, Receiving, Sending
from .transport_segments import Segment, SegmentError, Written
from .transport_throttle import Throttle
from .transport_wire import (
    MAX_TRANSFER_ID,
    KvGivenUp,
    KvMessage,
    KvPoolAddress,
    KvReady,
    KvRefused,
    KvSegment,
    KvSent,
    KvTaken,
    decode,
    encode,
)

MIN_SEGMENT_BYTES: Final = 8 << 20
_REMEMBERED: Final = 1 << 16  # early questions, given-up transfers and written layers kept for whoever is late
_CLOSE_LIMIT_S: Final = 5.0  # for what still touches pages
_FAREWELL_S: Final = 0.5  # for peers to say their last word on what was given up


class SegmentTransport:
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
        self.pages: Final = pages
        self._progress = progress
        self._carrier = carrier
        self._verify = verify
        self._min_segment_bytes = min_segment_bytes
        self._throttle = throttle
        self._max_line = progress.max_tag
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._sends: dict[Key, Sending] = {}
        self._receives: dict[Key, Receiving] = {}
        self._out: dict[tuple[int, int], Sending] = {}  # (peer, line): sends that a receiver has asked for
        self._in: dict[tuple[int, int], Receiving] = {}  # (peer, line): until the sender's last word, and all is taken
        self._early: OrderedDict[Key, KvReady] = OrderedDict()  # asked for before `send` was called
        self._refusals: OrderedDict[Key, str] = OrderedDict()  # transfers that this sender will not make
        self._written: OrderedDict[int, Written] = OrderedDict()
        self._introduced: set[int] = set()  # peers that know this rank's pool
        self._next_line = 0
        self._closed_at: float | None = None
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

    def post(self, what: Callable[..., None], *args: Any) -> None:
        self._inbox.put((what, args))

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

    # ---- the sender --------------------------------------------------------------------------------------------------

    def _on_send(self, end: Sending, is_written: bool) -> None:
        key = end.key
        refusal = self._refusals.pop(key, None)
        problem = self._problem(end, self._sends)
        if refusal is not None or problem is not None:
            if problem is not None and key not in self._sends:
                self._refuse(key, problem)
            self._conclude(end, refusal or problem)
            return
        if not is_written:
            end.written = self._written_of(key[1])
            end.note_written()
        self._sends[key] = end
        ready = self._early.pop(key, None)
        if ready is not None:
            self._meet(end, ready)

    def _on_advance(self, transfer_id: int, layers: Range, num_tokens: int) -> None:
        self._written_of(transfer_id).advance(layers, num_tokens)
        for end in [end for end in self._sends.values() if end.key[1] == transfer_id]:
            end.note_written()
            self._push(end)

    def _on_forget(self, transfer_id: int) -> None:
        self._written.pop(transfer_id, None)

    def _written_of(self, transfer_id: int) -> Written:
        known = self._written.get(transfer_id)
        if known is None:
            known = Written()
            _remember(self._written, transfer_id, known)
        return known

    def _meet(self, end: Sending, ready: KvReady) -> None:
        outline = end.outline
        asked = (ready.ranges, ready.num_tokens, ready.num_bytes)
        have = (outline.ranges, outline.num_tokens, outline.num_bytes)
        end.ready, end.line = ready, ready.line
        self._out[end.key[0], ready.line] = end
        if asked != have:
            self._fail_send(
                end,
                f"transfer {ready.transfer_id}: rank {end.key[0]} expects {asked[2]} bytes, {asked[1]} tokens of "
                f"(layers, KV heads) {asked[0]}, but the sender has {have[2]} bytes, {have[1]} tokens of {have[0]}",
            )
        elif ready.line > self._max_line:
            self._fail_send(end, f"transfer {ready.transfer_id}: line {ready.line}; allowed: to {self._max_line}")
        else:
            self._push(end)

    def _push(self, end: Sending) -> None:
        """Cut off and send what is ready, if it is worth a segment."""
        if end.ready is None or end.is_over:
            return
        worth = self._min_segment_bytes if end.in_flight and not end.written_at else 1
        segments = end.outgoing.cut(end.written, worth, self._carrier.max_segment_bytes)
        try:
            if segments and end.key[0] not in self._introduced:
                pool = self._carrier.own_pool()
                if pool is not None:
                    self._tell(end.key[0], pool)
                self._introduced.add(end.key[0])
            first = end.num_cut
            end.num_cut += len(segments)  # before any is announced: the last announced one ends the line
            for index, segment in enumerate(segments, first):
                num_bytes = end.outline.bytes_of(segment)
                end.in_flight[index] = num_bytes
                sent = self._throttled(end.key[0], num_bytes, True, self._sent_handler(end, index))
                if self._carrier.receiver_reads:
                    end.being_read[index] = sent
                    self.hold(end)
                self._carrier.send(end, index, segment, sent)
        except (ValueError, RuntimeError) as error:
            self._fail_send(end, f"transfer {end.key[1]}: {error}")

    def _sent_handler(self, end: Sending, index: int) -> Callable[[str | None], None]:
        return lambda error: self._on_sent(end, index, error)

    def announce(self, end: Sending, index: int, segment: Segment) -> None:
        if end.is_over:
            return
        blocks = end.blocks if self._carrier.receiver_reads and index == 0 else ()
        self._tell(end.key[0], KvSegment(end.line, index, segment.layers, segment.tokens, blocks))
        end.num_announced += 1
        if end.num_announced < end.num_cut or not end.outgoing.is_over() or end.ready is None:
            return
        try:
            size = end.ready.tokens_per_block
            if size:
                end.own_checksums = self._carrier.checksums(end, size)
            self._tell(end.key[0], KvSent(end.line, end.own_checksums))
            end.is_last_word = True
        except (ValueError, RuntimeError) as error:
            self._fail_send(end, f"transfer {end.key[1]}: {error}")

    def _on_sent(self, end: Sending, index: int, error: str | None) -> None:
        num_bytes = end.in_flight.pop(index, None)
        if num_bytes is None or end.is_over:
            return
        if error is not None:
            self._fail_send(end, f"transfer {end.key[1]}: {error}")
            return
        end.bytes_sent += num_bytes
        if end.bytes_sent == end.outline.num_bytes:
            self._drop(self._sends, end)
            self._conclude(end, None)
        else:
            self._push(end)

    def _fail_send(self, end: Sending, error: str) -> None:
        self._drop(self._sends, end)
        if end.ready is None:
            self._refuse(end.key, error)
        elif not end.is_over and not end.is_last_word:
            self._tell(end.key[0], KvRefused(end.line, error[: 1 << 12]))
            end.is_last_word = True
        self._conclude(end, error)

    def _refuse(self, key: Key, error: str) -> None:
        """Tell the receiver that nothing will come: now if it has asked, else when it asks."""
        ready = self._early.pop(key, None)
        if ready is not None:
            self._tell(key[0], KvRefused(ready.line, error))
        else:
            _remember(self._refusals, key, error)

    # ---- the receiver ------------------------------------------------------------------------------------------------

    def _on_receive(self, end: Receiving) -> None:
        problem = self._problem(end, self._receives)
        if problem is not None:
            self._conclude(end, problem)
            return
        peer, transfer_id = end.key
        end.line = self._take_line(peer)
        self._receives[end.key] = end
        self._in[peer, end.line] = end
        outline, size = end.outline, self.pages.tokens_per_block if self._verify else 0
        ready = KvReady(transfer_id, end.line, outline.num_bytes, outline.num_tokens, outline.ranges, size)
        if not self._tell(peer, ready):
            end.is_last_word = True
            self._fail_receive(end, f"rank {peer} is down")

    def _on_segment(self, end: Receiving, message: KvSegment) -> None:
        segment = Segment(message.layers, message.tokens)
        if message.blocks:
            end.source_blocks = message.blocks
        try:
            end.incoming.announce(segment)
        except SegmentError as error:
            self._fail_receive(end, f"transfer {end.key[1]}: rank {end.key[0]} sent {error}")
            return
        end.num_fetching += 1
        num_bytes = end.outline.bytes_of(segment)
        arrived = self._throttled(end.key[0], num_bytes, False, self._arrived_handler(end, message.index, segment))
        self._carrier.receive(end, segment, arrived)

    def _arrived_handler(self, end: Receiving, index: int, segment: Segment) -> Callable[[str | None], None]:
        return lambda error: self._on_arrived(end, index, segment, error)

    def _on_arrived(self, end: Receiving, index: int, segment: Segment, error: str | None) -> None:
        end.num_fetching -= 1
        if self._carrier.receiver_reads:
            self._tell(end.key[0], KvTaken(end.line, index))
        if error is not None:
            self._fail_receive(end, f"transfer {end.key[1]}: {error}")
        elif not end.is_over:
            end.incoming.arrive(segment)
            self._complete(end)
        self._leave_line(end)

    def _complete(self, end: Receiving) -> None:
        """End a receive of which everything has come."""
        if end.is_over or not end.incoming.is_whole() or (self._verify and end.sent_checksums is None):
            return
        error = None
        if self._verify:
            size = self.pages.tokens_per_block
            num_blocks = -(-end.outline.num_tokens // size)
            try:
                end.own_checksums = self._carrier.checksums(end, size)
                sent = end.sent_checksums or b""
                different = first_difference(end.own_checksums, sent, end.outline.ranges, num_blocks)
                error = None if different is None else f"transfer {end.key[1]}: checksum of {different}"
            except (ValueError, RuntimeError) as problem:
                error = f"transfer {end.key[1]}: {problem}"
        self._drop(self._receives, end)
        self._conclude(end, error)

    def _fail_receive(self, end: Receiving, error: str) -> None:
        self._drop(self._receives, end)
        if not end.is_over and not end.is_last_word:
            self._tell(end.key[0], KvGivenUp(end.key[1], end.line, error[: 1 << 12]))
        self._conclude(end, error)
        self._leave_line(end)

    def _leave_line(self, end: Receiving) -> None:
        if end.is_last_word and end.num_fetching == 0 and self._in.get((end.key[0], end.line)) is end:
            del self._in[end.key[0], end.line]

    def _take_line(self, peer: int) -> int:
        """A number that no receive from `peer` uses."""
        while True:
            line = self._next_line
            self._next_line = line + 1 if line < self._max_line else 0
            if (peer, line) not in self._in:
                return line

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

    def _on_ready(self, key: Key, ready: KvReady) -> None:
        end = self._sends.get(key)
        refusal = self._refusals.pop(key, None)
        if refusal is not None or self._closed_at is not None:
            self._tell(key[0], KvRefused(ready.line, refusal or "the sender was closed"))
        elif end is not None and end.ready is None:
            self._meet(end, ready)
        else:
            _remember(self._early, key, ready)

    def _on_given_up(self, key: Key, message: KvGivenUp) -> None:
        end = self._out.get((key[0], message.line))
        if end is not None:
            if end.key == key:
                self._fail_send(end, message.reason)
            return
        asked = self._early.get(key)
        if asked is not None and asked.line == message.line:
            self._refuse(key, message.reason)
            _remember(self._refusals, key, message.reason)

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

    def _problem(self, end: End, table: dict[Key, Any]) -> str | None:
        """Why this transfer cannot be, or None."""
        peer, transfer_id = end.key
        outline = end.outline
        if self._closed_at is not None:
            return "the transport was closed"
        if end.key in table:
            return f"transfer {transfer_id} with rank {peer} is already in flight"
        if not 0 <= transfer_id <= MAX_TRANSFER_ID:
            return f"transfer id {transfer_id}; allowed: 0 to {MAX_TRANSFER_ID}"
        if peer in self._progress.down_ranks:
            return f"rank {peer} is down"
        if outline.num_tokens < 1 or not outline.ranges:
            return f"transfer {transfer_id} with rank {peer} has {outline.num_tokens} tokens of {len(outline.ranges)} pieces"
        if outline.num_bytes < 1:
            return f"transfer {transfer_id} with rank {peer} has no data: {outline.ranges}"
        try:
            self.pages.check_pieces(end.blocks, outline.num_tokens, outline.ranges)
        except ValueError as error:
            return f"transfer {transfer_id}: {error}"
        return None

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

    def hold(self, end: End) -> None:
        end.num_holding += 1

    def release(self, end: End) -> None:
        end.num_holding -= 1
        self._tell_outcome(end)

    def _conclude(self, end: End, error: str | None) -> None:
        if not end.is_over:
            end.is_over, end.error = True, error
            self._tell_outcome(end)

    def _tell_outcome(self, end: End) -> None:
        if not end.is_over or end.num_holding > 0:
            return
        if self._out.get((end.key[0], end.line)) is end:
            del self._out[end.key[0], end.line]
        on_done, end.on_done = end.on_done, None
        if on_done is not None:
            on_done(end.outcome())

    def _drop(self, table: dict[Key, Any], end: End) -> None:
        if table.get(end.key) is end:
            del table[end.key]

    def _tell(self, rank: int, message: KvMessage) -> bool:
        try:
            return self._progress.send(rank, encode(message), TRANSFER_CHANNEL)
        except ProgressError:
            return False  # progress has stopped, and with it all that this could be about

    def _throttled(
        self, peer: int, num_bytes: int, is_send: bool, done: Callable[[str | None], None]
    ) -> Callable[[str | None], None]:
        """`done`, but not before the throttle lets that many bytes through from now on."""
        throttle = self._throttle
        if throttle is None:
            return done
        ticket = throttle.enter(peer, num_bytes, is_send)
        return lambda error: throttle.when_through(ticket, lambda: done(error))


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
