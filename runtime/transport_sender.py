"""The sending half of a transport: meets the receivers' questions, cuts what is written into segments, ends lines."""

from __future__ import annotations

from collections.abc import Callable

from ..core.kv_layout import Range
from .transport_desk import TransferDesk, remember
from .transport_ends import Key, Sending
from .transport_segments import Segment, Written
from .transport_wire import KvGivenUp, KvReady, KvRefused, KvSegment, KvSent


class SenderDesk(TransferDesk):
    """See `transport_worker`."""

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
            remember(self._written, transfer_id, known)
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
