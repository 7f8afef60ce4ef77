"""A KvTransport between ranks of one process, for tests and examples: memory to memory, no MPI, no thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from ..core.kv_layout import Piece, Range
from .kv_pages import KvPages
from .transport import (
    OutcomeHandler,
    TransferOutcome,
    TransportCapabilities,
    checksum_bytes,
    first_difference,
    pack_pieces,
    packed_bytes,
    ranges_of,
    unpack_pieces,
)
from .transport_segments import Outgoing, Outline, Written


class _Part:
    """One end of a transfer that waits for the other, or has met it."""

    def __init__(
        self,
        owner: LocalKvTransport,
        transfer_id: int,
        peer_rank: int,
        is_sender: bool,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self.owner = owner
        self.transfer_id = transfer_id
        self.peer_rank = peer_rank
        self.is_sender = is_sender
        self.ranges = ranges_of(pieces)
        self.blocks = tuple(blocks)
        self.num_tokens = num_tokens
        self.on_done = on_done
        self.began = time.monotonic_ns()
        self.outgoing = Outgoing(Outline(self.ranges, num_tokens, 1))
        self.written: Written | None = None  # None: a sender's pages are all written

    def is_ready(self) -> bool:
        return self.written is None or self.outgoing.is_written(self.written)

    def finish(self, num_bytes: int, error: str | None, own: bytes = b"", sent: bytes = b"") -> None:
        duration = 1000 * (time.monotonic_ns() - self.began)
        self.on_done(
            TransferOutcome(self.transfer_id, self.peer_rank, self.is_sender, num_bytes, duration, error, own, sent)
        )


class LocalHub:
    """What the transports of one process share. `fail_transfers_of(rank)` plays that rank's death."""

    def __init__(self) -> None:
        self.lock: Final = threading.Lock()
        self.waiting: Final[dict[tuple[int, int, int], _Part]] = {}  # (transfer, source rank, destination rank)
        self.unwritten: Final[list[tuple[_Part, _Part]]] = []  # senders and receivers that met too early
        self.lost_ranks: Final[set[int]] = set()

    def fail_transfers_of(self, rank: int) -> None:
        with self.lock:
            self.lost_ranks.add(rank)
            lost = [key for key in self.waiting if rank in key[1:]]
            parts = [self.waiting.pop(key) for key in lost]
            for pair in [pair for pair in self.unwritten if rank in (pair[0].peer_rank, pair[1].peer_rank)]:
                self.unwritten.remove(pair)
                parts += pair
        for part in parts:
            part.finish(0, f"rank {rank} is down")


class LocalKvTransport:
    """The transport of `rank`. Both ends' `on_done` run in the thread whose call completed the pair.

    A progressive send copies once, when everything is written.
    """

    name: Final = "local"
    description: Final = "memory of one process"
    capabilities: Final = TransportCapabilities(device_memory=True, survives_peer_loss=True)

    def __init__(self, hub: LocalHub, rank: int, pages: KvPages, *, verify: bool = False) -> None:
        self._hub = hub
        self._rank = rank
        self._pages = pages
        self._verify = verify
        self._written: dict[int, Written] = {}

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
        part = _Part(self, transfer_id, peer_rank, True, pieces, blocks, num_tokens, on_done)
        if not is_written:
            with self._hub.lock:
                part.written = self._written.setdefault(transfer_id, Written())
        self._meet(part)

    def advance(self, transfer_id: int, layers: Range, num_tokens: int) -> None:
        with self._hub.lock:
            self._written.setdefault(transfer_id, Written()).advance(layers, num_tokens)
            ready = [pair for pair in self._hub.unwritten if pair[0].owner is self and pair[0].is_ready()]
            for pair in ready:
                self._hub.unwritten.remove(pair)
        for sender, receiver in ready:
            self._copy(sender, receiver)

    def forget(self, transfer_id: int) -> None:
        with self._hub.lock:
            self._written.pop(transfer_id, None)

    def receive(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self._meet(_Part(self, transfer_id, peer_rank, False, pieces, blocks, num_tokens, on_done))

    def abort(self, transfer_id: int, peer_rank: int, reason: str) -> None:
        for key in ((transfer_id, self._rank, peer_rank), (transfer_id, peer_rank, self._rank)):
            with self._hub.lock:
                part = self._hub.waiting.pop(key, None)
            if part is not None:
                part.finish(0, reason)
        ends = {self._rank, peer_rank}
        self._give_up(lambda s, r: s.transfer_id == transfer_id and {s.peer_rank, r.peer_rank} == ends, reason)

    def close(self) -> None:
        with self._hub.lock:
            own = [key for key, part in self._hub.waiting.items() if part.owner is self]
            parts = [self._hub.waiting.pop(key) for key in own]
        for part in parts:
            part.finish(0, "the transport was closed")
        self._give_up(lambda s, r: self in (s.owner, r.owner), "the transport was closed")

    def _give_up(self, which: Callable[[_Part, _Part], bool], reason: str) -> None:
        """End both ends of transfers that wait for their pages to be written."""
        with self._hub.lock:
            pairs = [pair for pair in self._hub.unwritten if which(*pair)]
            for pair in pairs:
                self._hub.unwritten.remove(pair)
        for sender, receiver in pairs:
            sender.finish(0, reason)
            receiver.finish(0, reason)

    def _meet(self, part: _Part) -> None:
        ends = (self._rank, part.peer_rank) if part.is_sender else (part.peer_rank, self._rank)
        key = (part.transfer_id, *ends)
        hub = self._hub
        with hub.lock:
            lost = hub.lost_ranks.intersection(ends)
            other = None if lost else hub.waiting.get(key)
            if not lost and other is None:
                hub.waiting[key] = part
                return
            if other is not None and other.is_sender is not part.is_sender:
                del hub.waiting[key]
                pair = (part, other) if part.is_sender else (other, part)
                if not pair[0].is_ready():
                    hub.unwritten.append(pair)
                    return
        if lost:
            part.finish(0, f"rank {min(lost)} is down")
        elif other is not None and other.is_sender is part.is_sender:
            part.finish(0, f"transfer {part.transfer_id} with rank {part.peer_rank} is already in flight")
        elif other is not None:
            self._copy(*((part, other) if part.is_sender else (other, part)))

    def _copy(self, sender: _Part, receiver: _Part) -> None:
        source, destination = sender.owner._pages, receiver.owner._pages
        own = sent = b""
        num_bytes = 0
        error: str | None = None
        if not sender.ranges or sender.num_tokens < 1:
            error = f"transfer {sender.transfer_id} has no data"
        elif (sender.ranges, sender.num_tokens) != (receiver.ranges, receiver.num_tokens):
            error = (
                f"transfer {sender.transfer_id}: the receiver expects {receiver.num_tokens} tokens of "
                f"{receiver.ranges}, the sender has {sender.num_tokens} tokens of {sender.ranges}"
            )
        else:
            try:
                packed = pack_pieces(source, sender.ranges, sender.blocks, sender.num_tokens)
                num_bytes = packed_bytes(source, sender.ranges, sender.num_tokens)
                unpack_pieces(destination, packed, receiver.ranges, receiver.blocks, receiver.num_tokens)
                if receiver.owner._verify:
                    size = destination.tokens_per_block
                    sent = checksum_bytes(source, sender.ranges, sender.blocks, sender.num_tokens, size)
                    own = checksum_bytes(destination, receiver.ranges, receiver.blocks, receiver.num_tokens, size)
                    error = first_difference(own, sent, receiver.ranges, len(receiver.blocks))
            except (ValueError, RuntimeError) as problem:
                error = f"transfer {sender.transfer_id}: {problem}"
        sender.finish(num_bytes, error, own=sent, sent=sent)
        receiver.finish(num_bytes, error, own=own, sent=sent)
