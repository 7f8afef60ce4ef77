"""KV transfers of one rank, and of one executor: who has which part, and when all parts are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from ..core.commands import PrepareReceive, ReceiveKv, ServeKv
from ..core.events import ExecutorEvent, KvReceived, KvTaken
from ..core.kv_layout import Piece, Range, transfer_plan
from .executor_spec import Roster
from .transport import KvTransport, TransferOutcome
from .wire import AbortKvOrder, KvPart, KvWrittenOrder, ReceiveKvOrder, ServeKvOrder

KvOrder = ServeKvOrder | KvWrittenOrder | ReceiveKvOrder | AbortKvOrder
NO_TRANSPORT: Final = "this executor has no KV transport"


class ChecksumRow(Struct, frozen=True, array_like=True):
    """One end of one pair's part of a transfer: the checksums of its pieces, in order of (layers, heads)."""

    transfer_id: int
    rank: int
    peer_rank: int
    is_sender: bool
    pieces: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    checksums: bytes


class Pairs:
    """Which ranks of two executors have to do with each other, and in which pieces; computed once a pair."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._plans: dict[tuple[int, int], tuple[tuple[int, int, Piece], ...]] = {}

    def plan(self, source: int, reader: int) -> tuple[tuple[int, int, Piece], ...]:
        """(world rank that sends, world rank that receives, piece) of each piece."""
        known = self._plans.get((source, reader))
        if known is None:
            roster = self._roster
            senders, readers = roster.placements[source].participant_ids, roster.placements[reader].participant_ids
            pieces = transfer_plan(roster.layouts[source], roster.layouts[reader])
            known = tuple((senders[p.source_rank], readers[p.destination_rank], p) for p in pieces)
            self._plans[source, reader] = known
        return known

    def parts(self, source: int, reader: int, rank: int) -> dict[int, list[Piece]]:
        """The pieces of `rank` by its peers, at whichever end it is."""
        found: dict[int, list[Piece]] = {}
        for sender, receiver, piece in self.plan(source, reader):
            if rank in (sender, receiver):
                found.setdefault(receiver if rank == sender else sender, []).append(piece)
        return found

    def ranks(self, source: int, reader: int, *, senders: bool) -> set[int]:
        """The world ranks that have a part at one end."""
        return {sender if senders else receiver for sender, receiver, _ in self.plan(source, reader)}


@dataclass(slots=True)
class _Part:
    """This rank's part of one transfer: all its peers together."""

    request_id: int
    is_sender: bool
    transfer_id: int
    peers: set[int]
    num_bytes: int = 0
    duration: int = 0
    num_checked: int = 0
    error: str | None = None
    early_tokens: int | None = None  # all of them, if it is sent while its context phase still runs


class RankTransfers:
    """Carries out its leader's orders on this rank's transport; `on_part` hears the end of each, on any thread."""

    def __init__(
        self,
        roster: Roster,
        rank: int,
        transport: KvTransport | None,
        on_part: Callable[[KvPart], None],
        keep_checksums: bool = False,
    ) -> None:
        self._pairs = Pairs(roster)
        self._executor = roster.executor_of[rank]
        self._rank = rank
        participants = roster.placements[self._executor].participant_ids
        self._layers = roster.layouts[self._executor].layers_of(participants.index(rank))
        self._transport = transport
        self._on_part = on_part
        self._keep_checksums = keep_checksums
        self._open: dict[tuple[bool, int], _Part] = {}
        self._lock = threading.Lock()
        self.checksums: list[ChecksumRow] = []

    def serve(self, order: ServeKvOrder) -> None:
        """Send this rank's part. How much of an early one is written only this rank's own engine knows: a chunk that
        yields no token is reported by the leader's stage before the stages behind it have computed it.
        """
        parts = self._pairs.parts(self._executor, order.reader, self._rank)
        early_tokens = order.num_tokens if order.is_early else None
        self._begin(order.request_id, True, order.reader_id, parts, order.blocks, order.num_tokens, early_tokens)

    def written(self, order: KvWrittenOrder) -> None:
        """All KV of an early transfer is there: what the engine said of single layers may have come before its order."""
        with self._lock:
            part = self._open.get((True, order.request_id))
            num_tokens = None if part is None else part.early_tokens
        if num_tokens is not None:
            self._advance(order.request_id, self._layers, num_tokens)

    def on_layers(self, first: int, end: int, written: tuple[tuple[int, int], ...]) -> None:
        """The engine has written local layers [first, end) of the first so many tokens of these requests; any thread."""
        if not self._open:
            return
        layers = (self._layers[0] + first, self._layers[0] + end)
        for request_id, num_tokens in written:
            self._advance(request_id, layers, num_tokens)

    def _advance(self, request_id: int, layers: Range, num_tokens: int) -> None:
        transport, key = self._transport, (True, request_id)
        with self._lock:
            part = self._open.get(key)
        if transport is None or part is None or part.early_tokens is None:
            return
        transport.advance(part.transfer_id, layers, num_tokens)
        with self._lock:
            is_over = self._open.get(key) is not part
        if is_over:  # it ended meanwhile: nobody else will ask for what was just said
            transport.forget(part.transfer_id)

    def receive(self, order: ReceiveKvOrder) -> None:
        parts = self._pairs.parts(order.source, self._executor, self._rank)
        self._begin(order.request_id, False, order.request_id, parts, order.blocks, order.num_tokens)

    def abort(self, order: AbortKvOrder) -> None:
        with self._lock:
            parts = [self._open.get((is_sender, order.request_id)) for is_sender in (True, False)]
            peers = [(part.transfer_id, peer) for part in parts if part is not None for peer in part.peers]
        if self._transport is not None:
            for transfer_id, peer in peers:
                self._transport.abort(transfer_id, peer, order.reason)

    def _begin(
        self,
        request_id: int,
        is_sender: bool,
        transfer_id: int,
        parts: dict[int, list[Piece]],
        blocks: tuple[int, ...],
        num_tokens: int,
        early_tokens: int | None = None,
    ) -> None:
        transport = self._transport
        if transport is None or not parts:
            error = NO_TRANSPORT if transport is None else None
            self._on_part(KvPart(request_id, is_sender, error is None, error=error))
            return
        part = _Part(request_id, is_sender, transfer_id, set(parts), early_tokens=early_tokens)
        with self._lock:
            self._open[is_sender, request_id] = part
        for peer, pieces in parts.items():
            handler = self._ended_handler(part, tuple(sorted((piece.layers, piece.heads) for piece in pieces)))
            if not is_sender:
                transport.receive(transfer_id, peer, pieces, blocks, num_tokens, handler)
            elif early_tokens is None:
                transport.send(transfer_id, peer, pieces, blocks, num_tokens, handler)
            else:
                transport.send(transfer_id, peer, pieces, blocks, num_tokens, handler, is_written=False)

    def _ended_handler(
        self, part: _Part, ranges: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    ) -> Callable[[TransferOutcome], None]:
        return lambda outcome: self._ended(part, ranges, outcome)

    def _ended(
        self,
        part: _Part,
        ranges: tuple[tuple[tuple[int, int], tuple[int, int]], ...],
        outcome: TransferOutcome,
    ) -> None:
        with self._lock:
            part.peers.discard(outcome.peer_rank)
            part.num_bytes += outcome.num_bytes
            part.duration = max(part.duration, outcome.duration)
            part.num_checked += outcome.num_checked
            part.error = part.error or outcome.error
            if self._keep_checksums and outcome.error is None:
                peer, own = outcome.peer_rank, outcome.own_checksums
                self.checksums.append(ChecksumRow(part.transfer_id, self._rank, peer, part.is_sender, ranges, own))
            if part.peers:
                return
            del self._open[part.is_sender, part.request_id]
        if part.early_tokens is not None and self._transport is not None:
            self._transport.forget(part.transfer_id)
        self._on_part(
            KvPart(
                part.request_id,
                part.is_sender,
                part.error is None,
                part.num_bytes,
                part.duration,
                part.num_checked,
                part.error,
            )
        )


@dataclass(slots=True)
class _Transfer:
    """One transfer as the leader sees it: the ranks of its executor that still have to do with it."""

    request_id: int
    is_sender: bool
    peer: int  # the other executor
    ranks: set[int]
    order: ServeKvOrder | ReceiveKvOrder
    error: str | None = None
    aborted: bool = False
    waiting: set[int] = field(default_factory=set)


class ExecutorTransfers:
    """All transfers of one executor, in its leader. Completion is collective: when every rank has done its part.

    `order(rank, body)` tells a rank of this executor what to do.
    """

    def __init__(self, roster: Roster, executor: int, order: Callable[[int, KvOrder], None]) -> None:
        self._pairs = Pairs(roster)
        self._executor = executor
        self._order = order
        self._open: dict[tuple[bool, int], _Transfer] = {}

    def __len__(self) -> int:
        return len(self._open)

    def receive(self, command: ReceiveKv | PrepareReceive) -> None:
        order = ReceiveKvOrder(
            command.request_id, command.source, command.source_id, command.num_tokens, command.blocks
        )
        ranks = self._pairs.ranks(command.source, self._executor, senders=False)
        self._begin(_Transfer(command.request_id, False, command.source, ranks, order))

    def serve(self, command: ServeKv) -> None:
        order = ServeKvOrder(
            command.request_id,
            command.reader,
            command.reader_id,
            command.num_tokens,
            command.blocks,
            command.is_early,
        )
        ranks = self._pairs.ranks(self._executor, command.reader, senders=True)
        self._begin(_Transfer(command.request_id, True, command.reader, ranks, order))

    def _begin(self, transfer: _Transfer) -> None:
        transfer.waiting = set(transfer.ranks)
        self._open[transfer.is_sender, transfer.request_id] = transfer
        for rank in sorted(transfer.ranks):
            self._order(rank, transfer.order)

    def written(self, request_id: int) -> None:
        """The last token of a prompt is out: what of its KV is being sent early is all there. Harmless for any other."""
        transfer = self._open.get((True, request_id))
        if transfer is not None and isinstance(transfer.order, ServeKvOrder) and transfer.order.is_early:
            for rank in sorted(transfer.waiting):
                self._order(rank, KvWrittenOrder(request_id))

    def abort(self, is_sender: bool, request_id: int, reason: str) -> None:
        """Give one up; it is over when its ranks say so. Harmless for one that has ended."""
        transfer = self._open.get((is_sender, request_id))
        if transfer is None or transfer.aborted:
            return
        transfer.aborted = True
        transfer.error = transfer.error or reason
        for rank in sorted(transfer.waiting):
            self._order(rank, AbortKvOrder(request_id, reason))

    def abort_with(self, executor: int, reason: str) -> None:
        """Give up all transfers with another executor."""
        for transfer in [t for t in self._open.values() if t.peer == executor]:
            self.abort(transfer.is_sender, transfer.request_id, reason)

    def any_with(self, executor: int) -> bool:
        return any(transfer.peer == executor for transfer in self._open.values())

    def part_done(self, rank: int, part: KvPart) -> tuple[ExecutorEvent, int] | None:
        """The event for the core, and the sender of its tie key, if this was the transfer's last part."""
        transfer = self._open.get((part.is_sender, part.request_id))
        if transfer is None:
            return None
        transfer.waiting.discard(rank)
        if not part.ok:
            error = part.error or f"rank {rank} could not move its part"
            transfer.error = transfer.error or error
            if transfer.waiting:
                self.abort(part.is_sender, part.request_id, error)
        if transfer.waiting:
            return None
        del self._open[part.is_sender, part.request_id]
        ok = transfer.error is None
        if transfer.is_sender:
            return KvTaken(transfer.request_id, ok), self._executor
        return KvReceived(transfer.request_id, ok, transfer.error), transfer.peer
