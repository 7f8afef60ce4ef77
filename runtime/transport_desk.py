"""What both halves of a transport share: its tables, its peers, and how an end of a transfer ends. One thread only."""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from .kv_pages import KvPages
from .progress import TRANSFER_CHANNEL, Progress, ProgressError
from .transport_ends import Carrier, End, Key, Receiving, Sending
from .transport_segments import Written
from .transport_throttle import Throttle
from .transport_wire import MAX_TRANSFER_ID, KvMessage, KvReady, encode

MIN_SEGMENT_BYTES: Final = 8 << 20
_REMEMBERED: Final = 1 << 16  # early questions, given-up transfers and written layers kept for whoever is late


class TransferDesk:
    """The `Desk` of a carrier, but for what only a sender does."""

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

    def post(self, what: Callable[..., None], *args: Any) -> None:
        """Call `what(*args)` on the transport's thread; from any thread."""
        self._inbox.put((what, args))

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


def remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
