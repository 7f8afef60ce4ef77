"""The receiving half of a transport: asks, takes every segment that is announced, knows when all has come."""

from __future__ import annotations

from collections.abc import Callable

from .transport import first_difference
from .transport_desk import TransferDesk
from .transport_ends import Receiving
from .transport_segments import Segment, SegmentError
from .transport_wire import KvGivenUp, KvReady, KvSegment, KvTaken


class ReceiverDesk(TransferDesk):
    """See `transport_worker`."""

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
