"""The sending half of a transport: meets the receivers' questions, cuts what is written into segments, ends lines."""

from __future__ import annotations

from collections.abc import Callable

from ..core.kv_layout import Range
from .transport_desk import TransferDesk, mismatch, remember
from .transport_ends import Key, Sending
from .transport_segments import Segment, Written
from .transport_wire import (
    MAX_OFFERS,
    KvAhead,
    KvAheadDropped,
    KvGivenUp,
    KvOffer,
    KvReady,
    KvRefused,
    KvSegment,
    KvSent,
    KvWithdrawn,
)


class SenderDesk(TransferDesk):
    """See `transport_worker`."""

    def _on_send(self, end: Sending, is_written: bool) -> None:
        end.mark("begun")
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
            return
        self._offer(end)
        self._send_ahead(end)

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
            remember(self._written, transfer_id, known)
        return known

    def _meet(self, end: Sending, ready: KvReady) -> None:
        outline = end.outline
        asked = (ready.ranges, ready.num_tokens, ready.num_bytes)
        have = (outline.ranges, outline.num_tokens, outline.num_bytes)
        end.ready, end.line = ready, ready.line
        self._out[end.key[0], ready.line] = end
        if asked != have:
            self._fail_send(end, mismatch(ready.transfer_id, f"rank {end.key[0]}", asked, "the sender", have))
        elif ready.line > self._max_line:
            self._fail_send(end, f"transfer {ready.transfer_id}: line {ready.line}; allowed: to {self._max_line}")
        elif end.offer >= 0:  # nothing more is to be announced
            self._end_line(end)
        else:
            end.mark("asked")
            is_all_ahead = not end.later and 0 < end.num_cut == end.num_announced
            self._push(end)
            if is_all_ahead:
                self._end_line(end)
                self._conclude_if_sent(end)

    def _push(self, end: Sending) -> None:
        """Cut off and send what is ready, if it is worth a segment."""
        if end.ready is None or end.is_over or end.num_untold:  # the receiver must hear of segments in their order
            return
        if end.later:
            segments, end.later = end.later, []
            first = end.num_cut - len(segments)
        else:
            worth = self._min_segment_bytes if end.in_flight and not end.written_at else 1
            segments = end.outgoing.cut(end.written, worth, self._carrier.max_segment_bytes)
            first = end.num_cut
            end.num_cut += len(segments)  # before any is announced: the last announced one ends the line
        try:
            if segments:
                self._introduce(end.key[0])
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
        if index == 0:
            end.mark("announced")
        blocks = end.blocks if self._carrier.receiver_reads and index == 0 else ()
        end.num_announced += 1
        is_end = end.num_announced == end.num_cut and end.outgoing.is_over() and end.ready is not None
        is_last = is_end and end.ready is not None and not end.ready.tokens_per_block
        self._tell(end.key[0], KvSegment(end.line, index, segment.layers, segment.tokens, blocks, is_last))
        if is_last:
            end.is_last_word = True
        elif is_end:
            self._end_line(end)

    def _end_line(self, end: Sending) -> None:
        """Say KvSent, with the checksums that the receiver asked for. They are made of pages that must stay."""
        size = end.ready.tokens_per_block if end.ready is not None else 0
        if not size:
            self._tell(end.key[0], KvSent(end.line))
            end.is_last_word = True
            return

        def made(checksums: bytes, error: str | None) -> None:
            if not end.is_last_word:
                end.is_last_word = True
                if error is None:
                    end.own_checksums = checksums
                    self._tell(end.key[0], KvSent(end.line, checksums))
                else:
                    error = f"transfer {end.key[1]}: {error}"
                    self._tell(end.key[0], KvRefused(end.line, error[: 1 << 12]))
                    self._fail_send(end, error)
            self.release(end)

        self.hold(end)
        self._carrier.checksums(end, size, made)

    def _on_sent(self, end: Sending, index: int, error: str | None) -> None:
        num_bytes = end.in_flight.pop(index, None)
        if num_bytes is None or end.is_over:
            return
        if error is not None:
            self._fail_send(end, f"transfer {end.key[1]}: {error}")
            return
        end.bytes_sent += num_bytes
        if not self._conclude_if_sent(end):
            self._push(end)

    def _conclude_if_sent(self, end: Sending) -> bool:
        """Small messages may leave this rank before their receiver has asked: it is not over before that."""
        is_unasked = end.was_told_ahead and end.ready is None
        if end.is_over or is_unasked or end.bytes_sent < end.outline.num_bytes:
            return end.is_over
        self._drop(self._sends, end)
        self._conclude(end, None)
        return True

    def _fail_send(self, end: Sending, error: str) -> None:
        self._drop(self._sends, end)
        if end.ready is None:
            self._refuse(end.key, error)
        elif not end.is_over and not end.is_last_word:
            self._tell(end.key[0], KvRefused(end.line, error[: 1 << 12]))
            end.is_last_word = True
        if not end.is_over:
            self._withdraw(end)
            if end.was_told_ahead:
                self._tell(end.key[0], KvAheadDropped(end.key[1]))
        self._conclude(end, error)

    def _refuse(self, key: Key, error: str) -> None:
        """Tell the receiver that nothing will come: now if it has asked, else when it asks."""
        ready = self._early.pop(key, None)
        if ready is not None:
            self._tell(key[0], KvRefused(ready.line, error))
        else:
            remember(self._refusals, key, error)

    def _on_ready(self, key: Key, ready: KvReady) -> None:
        end = self._sends.get(key)
        refusal = self._refusals.pop(key, None)
        if refusal is not None or self._closed_at is not None:
            self._tell(key[0], KvRefused(ready.line, refusal or "the sender was closed"))
        elif end is not None and end.ready is None:
            self._meet(end, ready)
        else:
            remember(self._early, key, ready)

    def _on_given_up(self, key: Key, message: KvGivenUp) -> None:
        end = self._out.get((key[0], message.line))
        if end is not None:
            if end.key == key:
                self._fail_send(end, message.reason)
            return
        asked = self._early.get(key)
        if asked is not None and asked.line == message.line:
            self._refuse(key, message.reason)
            remember(self._refusals, key, message.reason)

    # ---- messages that go ahead of the receiver's question -----------------------------------------------------------

    def _send_ahead(self, end: Sending) -> None:
        """Give the first segments to the carrier before the receiver asks, where they come as messages."""
        held = self._last_ahead
        is_free = held is None or held.is_over or held.ready is not None
        if (
            not (self._carrier.num_ahead and is_free and end.written.is_all)
            or end.is_over
            or self._throttle is not None
        ):
            return  # a throttle counts from when the receiver wants it
        self._last_ahead = end
        segments = end.outgoing.cut(end.written, 1, self._carrier.max_segment_bytes)
        ahead, end.later = segments[: self._carrier.num_ahead], segments[self._carrier.num_ahead :]
        end.num_cut, end.num_untold = len(segments), len(ahead)
        try:
            for index, segment in enumerate(ahead):
                end.in_flight[index] = end.outline.bytes_of(segment)
                self._next_tag = self._next_tag + 1 if self._next_tag < self._progress.max_tag else self._max_line + 1
                self._carrier.send(end, index, segment, self._sent_handler(end, index), self._next_tag)
        except (ValueError, RuntimeError) as error:  # the rest would never be told of
            self._fail_send(end, f"transfer {end.key[1]}: {error}")

    def announce_ahead(self, end: Sending, segment: Segment, tag: int) -> None:
        outline = end.outline
        end.mark("ahead")
        end.was_told_ahead = True
        end.num_announced += 1
        end.num_untold -= 1
        size = outline.bytes_of(segment)
        ranges = outline.ranges
        self._tell(
            end.key[0],
            KvAhead(
                tag, end.key[1], outline.num_bytes, outline.num_tokens, ranges, segment.layers, segment.tokens, size
            ),
        )
        if end.ready is not None and not end.num_untold:  # it has been asked meanwhile
            if end.later:
                self._push(end)
            else:
                self._end_line(end)

    # ---- offers ------------------------------------------------------------------------------------------------------

    def _offer(self, end: Sending) -> None:
        """Let the receiver begin before it asks, where it reads for itself and everything is there to be read."""
        peer, transfer_id = end.key
        if not (self._carrier.receiver_reads and end.written.is_all) or self._verify or self._throttle is not None:
            return  # checksums would be wanted first; a throttle counts from when the receiver wants it
        if sum(rank == peer for rank, _ in self._offered) >= MAX_OFFERS:
            return
        outline = end.outline
        try:
            self._introduce(peer)
        except (ValueError, RuntimeError) as error:
            self._fail_send(end, f"transfer {transfer_id}: {error}")
            return
        end.offer = self._next_offer
        self._next_offer += 1
        end.outgoing.cut_all()
        end.in_flight[0], end.num_cut, end.num_announced = outline.num_bytes, 1, 1
        self.hold(end)
        self._offered[peer, end.offer] = end
        self._tell(
            peer, KvOffer(end.offer, transfer_id, outline.num_bytes, outline.num_tokens, outline.ranges, end.blocks)
        )
        end.mark("announced")

    def _withdraw(self, end: Sending) -> None:
        """Take an offer back; its pages are held until the receiver says that it does not read them."""
        if end.offer >= 0 and not self._tell(end.key[0], KvWithdrawn(end.offer)):
            self._end_offer(end)

    def _end_offer(self, end: Sending) -> None:
        if self._offered.pop((end.key[0], end.offer), None) is end:
            end.offer = -1
            self.release(end)

    def _on_offer_taken(self, peer: int, serial: int, error: str) -> None:
        end = self._offered.get((peer, serial))
        if end is None:
            return
        end.mark("taken")
        del self._offered[peer, serial]
        end.offer = -1
        if error:
            self._fail_send(end, error)
        else:
            self._on_sent(end, 0, None)
        self.release(end)
