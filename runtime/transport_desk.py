"""What both halves of a transport share: its tables, its peers, and how an end of a transfer ends. One thread only."""

from __future__ import annotations

import functools
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from ..core.kv_layout import Range
from .kv_pages import KvPages
from .progress import TRANSFER_CHANNEL, Progress, ProgressError
from .transport_ends import Carrier, End, Key, Receiving, Sending
from .transport_segments import Written
from .transport_throttle import Throttle
from .transport_wire import MAX_TRANSFER_ID, KvAhead, KvMessage, KvOffer, KvReady, encode

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
        self._max_line = progress.max_tag // 2  # the rest is for messages that are sent before anybody asks
        self._next_tag = self._max_line
        self._last_ahead: Sending | None = None  # one transfer at a time, or buffers would lack for what was asked for
        self._aheads: dict[Key, list[KvAhead]] = {}  # of senders, that nobody here has asked for yet
        self._sends: dict[Key, Sending] = {}
        self._receives: dict[Key, Receiving] = {}
        self._out: dict[tuple[int, int], Sending] = {}  # (peer, line): sends that a receiver has asked for
        self._in: dict[tuple[int, int], Receiving] = {}  # (peer, line): until the sender's last word, and all is taken
        self._early: OrderedDict[Key, KvReady] = OrderedDict()  # asked for before `send` was called
        self._refusals: OrderedDict[Key, str] = OrderedDict()  # transfers that this sender will not make
        self._written: OrderedDict[int, Written] = OrderedDict()
        self._introduced: set[int] = set()  # peers that know this rank's pool
        self._next_line = 0
        self._offered: dict[tuple[int, int], Sending] = {}  # (peer, serial): until the receiver says KvOfferTaken
        self._offers: dict[Key, KvOffer] = {}  # of senders, that nobody here has asked for yet
        self._next_offer = 0
        self._held: set[End] = set()  # whose pages are being touched
        self._closed_at: float | None = None

    def post(self, what: Callable[..., None], *args: Any) -> None:
        """Call `what(*args)` on the transport's thread, which is that of MPI progress; from any thread."""
        try:
            self._progress.call(functools.partial(self._guarded, what, *args))
        except ProgressError:  # it has stopped, and nothing moves any more: let it fail where it is
            self._guarded(what, *args)

    def _guarded(self, what: Callable[..., None], *args: Any) -> None:
        try:
            what(*args)
        except Exception as error:  # one bad frame or callback must not end all transfers
            traceback.print_exception(error)
        self._note()

    def _note(self) -> None:
        """Tell progress how often to look. What is only offered is for its receiver to ask for, in its own time."""
        self._progress.is_expecting = bool(
            self._receives
            or self._out
            or self._in
            or self._carrier.is_busy
            or any(end.offer < 0 for end in self._sends.values())
        )

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
        self._held.add(end)

    def release(self, end: End) -> None:
        end.num_holding -= 1
        if end.num_holding == 0:
            self._held.discard(end)
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
            if end.tables is not None:
                end.tables.release()
            on_done(end.outcome())

    def _drop(self, table: dict[Key, Any], end: End) -> None:
        if table.get(end.key) is end:
            del table[end.key]

    def _introduce(self, peer: int) -> None:
        """Tell `peer` once where this rank's pages are, if its carrier must know. Raises ValueError or RuntimeError."""
        if peer in self._introduced:
            return
        pool = self._carrier.own_pool()
        if pool is not None:
            self._tell(peer, pool)
        self._introduced.add(peer)

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


Shape = tuple[tuple[tuple[Range, Range], ...], int, int]  # ranges, tokens, bytes


def mismatch(transfer_id: int, receiver: str, asked: Shape, sender: str, have: Shape) -> str:
    """What is wrong where the two ends of a transfer were told different things."""
    return (
        f"transfer {transfer_id}: {receiver} expects {asked[2]} bytes, {asked[1]} tokens of (layers, KV heads) "
        f"{asked[0]}, but {sender} has {have[2]} bytes, {have[1]} tokens of {have[0]}"
    )
