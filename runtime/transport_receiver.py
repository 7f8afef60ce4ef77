"""The receiving half of a transport: asks, takes every segment that is announced, knows when all has come."""

from __future__ import annotations

from collections.abc import Callable

from .progress import ProgressError
from .transport import first_difference
from .transport_desk import TransferDesk, mismatch
from .transport_ends import Key, Receiving
from .transport_segments import Segment, SegmentError
from .transport_wire import MAX_OFFERS, KvAhead, KvGivenUp, KvOffer, KvOfferTaken, KvReady, KvSegment, KvTaken


class ReceiverDesk(TransferDesk):
    """See `transport_worker`."""

    def _on_receive(self, end: Receiving) -> None:
        end.mark("begun")
        problem = self._problem(end, self._receives)
        if problem is not None:
            self._conclude(end, problem)
            return
        peer, transfer_id = end.key
        self._receives[end.key] = end
        offer = self._offers.pop(end.key, None)
        if offer is not None and not self._verify:
            end.is_last_word = True  # nothing needs to be asked
            self._take_offer(end, offer)
            return
        end.line = self._take_line(peer)
        self._in[peer, end.line] = end
        outline, size = end.outline, self.pages.tokens_per_block if self._verify else 0
        for ahead in self._aheads.pop(end.key, ()):  # before anything is said: nobody else has to do with it
            self._take_ahead(end, ahead)
        ready = KvReady(transfer_id, end.line, outline.num_bytes, outline.num_tokens, outline.ranges, size)
        if not self._tell(peer, ready):
            end.is_last_word = True
            self._fail_receive(end, f"rank {peer} is down")
        elif offer is not None:
            self._take_offer(end, offer)

    def _on_segment(self, end: Receiving, message: KvSegment) -> None:
        end.is_last_word = end.is_last_word or message.is_last
        if message.blocks:
            end.source_blocks = message.blocks
        segment = Segment(message.layers, message.tokens)
        try:
            end.incoming.announce(segment)
        except SegmentError as error:
            self._fail_receive(end, f"transfer {end.key[1]}: rank {end.key[0]} sent {error}")
        else:
            self._fetch(end, message.index, segment)
        self._leave_line(end)

    def _fetch(self, end: Receiving, index: int, segment: Segment, tag: int | None = None) -> None:
        """Take a segment that was announced."""
        end.mark("announced")
        end.num_fetching += 1
        num_bytes = end.outline.bytes_of(segment)
        arrived = self._throttled(end.key[0], num_bytes, False, self._arrived_handler(end, index, segment))
        self._carrier.receive(end, segment, arrived, tag)

    def _arrived_handler(self, end: Receiving, index: int, segment: Segment) -> Callable[[str | None], None]:
        return lambda error: self._on_arrived(end, index, segment, error)

    def _on_arrived(self, end: Receiving, index: int, segment: Segment, error: str | None) -> None:
        end.num_fetching -= 1
        try:
            if error is None and not end.is_over:
                end.incoming.arrive(segment)
                self._complete(end)
        finally:  # the sender hears after whoever waits for the pages here
            if end.offer >= 0:
                self._read_of_offer(end, error)
            elif self._carrier.receiver_reads:
                self._tell(end.key[0], KvTaken(end.line, index))
        if error is not None:
            self._fail_receive(end, f"transfer {end.key[1]}: {error}")
        self._leave_line(end)

    def _complete(self, end: Receiving) -> None:
        """End a receive of which everything has come."""
        if end.is_over or not end.incoming.is_whole() or (self._verify and end.sent_checksums is None):
            return
        end.mark("whole")
        if not self._verify:
            self._drop(self._receives, end)
            self._conclude(end, None)
        elif not end.is_checking:
            end.is_checking = True
            self.hold(end)
            size = self.pages.tokens_per_block
            self._carrier.checksums(end, size, lambda own, error: self._on_checked(end, own, error))

    def _on_checked(self, end: Receiving, own: bytes, error: str | None) -> None:
        end.own_checksums = own
        if error is None:
            num_blocks = -(-end.outline.num_tokens // self.pages.tokens_per_block)
            different = first_difference(own, end.sent_checksums or b"", end.outline.ranges, num_blocks)
            error = None if different is None else f"checksum of {different}"
        self._drop(self._receives, end)
        self._conclude(end, None if error is None else f"transfer {end.key[1]}: {error}")
        self.release(end)

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

    # ---- messages that came ahead ------------------------------------------------------------------------------------

    def _on_ahead(self, peer: int, ahead: KvAhead) -> None:
        key = (peer, ahead.transfer_id)
        # It is of the question that the sender answers: of two with that id, as after one was given up, the first that it
        # has not said its last word on. One that was given up takes it too; the sender need not know.
        asked = next((end for end in self._in.values() if end.key == key and not end.is_last_word), None)
        if asked is not None:
            self._take_ahead(asked, ahead)
        elif self._closed_at is not None:
            self._discard(peer, ahead)
        else:
            self._aheads.setdefault(key, []).append(ahead)

    def _take_ahead(self, end: Receiving, ahead: KvAhead) -> None:
        outline, segment = end.outline, Segment(ahead.layers, ahead.tokens)
        try:
            if (outline.ranges, outline.num_tokens, outline.num_bytes) != (
                ahead.ranges,
                ahead.num_tokens,
                ahead.num_bytes,
            ):
                raise SegmentError("a transfer of another shape")  # of which the sender will hear, and speak
            end.incoming.announce(segment)
        except SegmentError:
            self._discard(end.key[0], ahead)
        else:
            self._fetch(end, 0, segment, ahead.message_tag)

    def _discard(self, peer: int, ahead: KvAhead) -> None:
        if ahead.size > self._carrier.max_segment_bytes:
            raise ProgressError(
                f"rank {peer} sent {ahead.size} bytes ahead; allowed: {self._carrier.max_segment_bytes}"
            )
        self._carrier.discard(peer, ahead.message_tag, ahead.size)

    def _discard_aheads(self, key: Key) -> None:
        for ahead in self._aheads.pop(key, ()):
            self._discard(key[0], ahead)

    # ---- offers ------------------------------------------------------------------------------------------------------

    def _on_offer(self, peer: int, offer: KvOffer) -> None:
        key = (peer, offer.transfer_id)
        end = self._receives.get(key)
        if end is not None and end.offer < 0 and end.incoming.is_untouched:
            self._take_offer(end, offer)  # the question has crossed it
            return
        earlier = self._offers.pop(key, None)
        if earlier is not None:
            self._tell(peer, KvOfferTaken(earlier.serial, f"transfer {offer.transfer_id} was offered again"))
        if sum(rank == peer for rank, _ in self._offers) >= MAX_OFFERS or self._closed_at is not None:
            self._tell(peer, KvOfferTaken(offer.serial, "the receiver takes no more offers"))
        else:
            self._offers[key] = offer

    def _on_withdrawn(self, peer: int, serial: int) -> None:
        for key, offer in list(self._offers.items()):
            if key[0] == peer and offer.serial == serial:
                del self._offers[key]
                self._tell(peer, KvOfferTaken(serial))

    def _take_offer(self, end: Receiving, offer: KvOffer) -> None:
        outline = end.outline
        want = (outline.ranges, outline.num_tokens, outline.num_bytes)
        have = (offer.ranges, offer.num_tokens, offer.num_bytes)
        if want != have:
            error = mismatch(end.key[1], "the receiver", want, f"rank {end.key[0]}", have)
            self._tell(end.key[0], KvOfferTaken(offer.serial, error[: 1 << 12]))
            self._fail_receive(end, error)
            return
        segments = outline.whole()
        end.offer, end.num_offered, end.source_blocks = offer.serial, len(segments), offer.blocks
        end.incoming.announce_all()
        for index, segment in enumerate(segments):
            self._fetch(end, index, segment)

    def _read_of_offer(self, end: Receiving, error: str | None) -> None:
        """Tell the sender once nothing of its offer is being read any more."""
        end.num_offered -= 1
        end.offer_error = end.offer_error or error or ""
        if end.num_offered == 0:
            self._tell(end.key[0], KvOfferTaken(end.offer, end.offer_error[: 1 << 12]))
