"""KV over MPI messages: one message per pair of ranks and transfer, packed by the sender, unpacked by the receiver.

    receiver                                sender
    receive()                               send()
    posts its receives under a free tag
    ────────── KvReady(tag, size) ────────▶ compares the size with its own
    ◀───────── data, checksums ───────────  packs, sends       (or KvRefused(error))
    unpacks, compares checksums

The receiver names the tag, so that tags cannot collide however ids are chosen, and no message is ever sent that nobody
waits for: what is given up leaves nothing in MPI. All state lives on one worker thread; callbacks run there.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import msgspec
import torch
from msgspec import Meta, Struct

from ..core.kv_layout import Piece, Range
from .kv_pages import KvPages
from .progress import TRANSFER_CHANNEL, BufferTransfer, Progress, ProgressError
from .transport import (
    OutcomeHandler,
    TransferOutcome,
    TransportCapabilities,
    checksum_bytes,
    first_difference,
    num_checksum_bytes,
    pack_pieces,
    packed_bytes,
    ranges_of,
    unpack_pieces,
)

_MESSAGE_BYTES: Final = 1 << 30  # a longer part goes in several messages, which MPI keeps in order
_REMEMBERED: Final = 1 << 16  # early KvReady and given-up transfers kept for a peer that is late
_INT64: Final = (1 << 63) - 1

_Id = Annotated[int, Meta(ge=0, le=_INT64)]
_Size = Annotated[int, Meta(ge=0, le=1 << 50)]
_Index = Annotated[int, Meta(ge=0, le=1 << 20)]
_Ranges = Annotated[tuple[tuple[tuple[_Index, _Index], tuple[_Index, _Index]], ...], Meta(max_length=1 << 16)]
_Text = Annotated[str, Meta(max_length=1 << 16)]
_Key = tuple[int, int]  # (peer rank, transfer id)


class _KvReady(Struct, frozen=True, tag="ready", array_like=True):
    """Receiver to sender: send `num_tokens` tokens of these (layers, heads) as `num_bytes` bytes under `tag`.

    `tokens_per_block` > 0 asks for checksums over blocks of that size, under the next tag.
    """

    transfer_id: _Id
    tag: _Size
    num_bytes: _Size
    num_tokens: _Size
    ranges: _Ranges
    tokens_per_block: Annotated[int, Meta(ge=0, le=1 << 30)]


class _KvRefused(Struct, frozen=True, tag="refused", array_like=True):
    """Sender to receiver: nothing was sent and nothing will be."""

    transfer_id: _Id
    error: _Text


class _KvGivenUp(Struct, frozen=True, tag="given_up", array_like=True):
    """Receiver to sender: the data is not wanted any more. Answered by _KvRefused, unless it is on its way."""

    transfer_id: _Id
    reason: _Text


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_KvReady | _KvRefused | _KvGivenUp)


class _Part:
    """One end of a transfer with one peer."""

    def __init__(
        self,
        key: _Key,
        is_sender: bool,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self.key = key
        self.is_sender = is_sender
        self.ranges: tuple[tuple[Range, Range], ...] = ranges_of(pieces)
        self.blocks = tuple(blocks)
        self.num_tokens = num_tokens
        self.on_done: OutcomeHandler | None = on_done
        self.began = time.monotonic_ns()
        self.num_bytes = 0
        self.messages: list[BufferTransfer] = []
        self.num_pending = 0
        self.data: Any = None  # uint8 tensor
        self.checksums: Any = None  # bytearray (receiver) or bytes (sender)
        self.own_checksums = b""
        self.tag = -1
        self.error: str | None = None


class MpiKvTransport:
    """See `KvTransport`. Made before `progress` is started, whose TRANSFER_CHANNEL it takes."""

    name: Final = "mpi"

    def __init__(
        self, progress: Progress, pages: KvPages, *, verify: bool = False, survives_peer_loss: bool = True
    ) -> None:
        self.capabilities: Final = TransportCapabilities(
            device_memory=pages.device.type != "cpu", survives_peer_loss=survives_peer_loss
        )
        self._progress = progress
        self._pages = pages
        self._verify = verify
        self._max_tag = progress.max_tag
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._sends: dict[_Key, _Part] = {}
        self._receives: dict[_Key, _Part] = {}
        self._given_up: dict[_Key, list[_Part]] = {}  # receives that are over here, but whose messages are not
        self._early: OrderedDict[_Key, _KvReady] = OrderedDict()  # asked for before `send` was called
        self._refusals: OrderedDict[_Key, str] = OrderedDict()  # transfers that this sender will not make
        self._tags_in_use: dict[int, set[int]] = {}
        self._next_tag = 0
        self._closed = False
        progress.subscribe(TRANSFER_CHANNEL, lambda rank, frame: self._post(self._on_frame, rank, frame))
        progress.watch_peers(lambda rank: self._post(self._on_peer_down, rank))
        self._worker = threading.Thread(target=self._run, name="kv-transport", daemon=True)
        self._worker.start()

    # ---- any thread --------------------------------------------------------------------------------------------------

    def send(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self._post(self._on_send, _Part((peer_rank, transfer_id), True, pieces, blocks, num_tokens, on_done))

    def receive(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Piece],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
    ) -> None:
        self._post(self._on_receive, _Part((peer_rank, transfer_id), False, pieces, blocks, num_tokens, on_done))

    def abort(self, transfer_id: int, peer_rank: int, reason: str) -> None:
        self._post(self._on_abort, (peer_rank, transfer_id), reason)

    def close(self) -> None:
        self._post(self._on_close)
        self._inbox.put(None)
        if threading.current_thread() is not self._worker:
            self._worker.join(10.0)

    def _post(self, what: Callable[..., None], *args: Any) -> None:
        self._inbox.put((what, args))

    # ---- the worker thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            what, args = item
            try:
                what(*args)
            except Exception as error:  # one bad frame or callback must not end all transfers
                traceback.print_exception(error)

    def _on_send(self, part: _Part) -> None:
        refusal = self._refusals.pop(part.key, None)
        problem = self._problem(part, self._sends)
        if refusal is not None or problem is not None:
            if problem is not None and part.key not in self._sends:
                self._refuse(part.key, problem)
            self._finish(part, refusal or problem)
            return
        self._sends[part.key] = part
        ready = self._early.pop(part.key, None)
        if ready is not None:
            self._start_sending(part, ready)

    def _on_receive(self, part: _Part) -> None:
        problem = self._problem(part, self._receives)
        if problem is not None:
            self._finish(part, problem)
            return
        peer, transfer_id = part.key
        self._receives[part.key] = part
        part.data = torch.empty(part.num_bytes, dtype=torch.uint8, device=self._pages.device)
        part.tag = self._take_tag(peer)
        try:
            self._begin(part, self._progress.irecv_buffer, part.data, part.tag)
            size = 0
            if self._verify:
                size = self._pages.tokens_per_block
                part.checksums = bytearray(num_checksum_bytes(part.ranges, part.num_tokens, size))
                self._begin(part, self._progress.irecv_buffer, part.checksums, part.tag + 1)
            ready = _KvReady(transfer_id, part.tag, part.num_bytes, part.num_tokens, part.ranges, size)
            delivered = self._progress.send(peer, _encoder.encode(ready), TRANSFER_CHANNEL)
        except (ProgressError, ValueError) as error:
            self._drop_receive(part, str(error))
            return
        if not delivered:
            self._drop_receive(part, f"rank {peer} is down")

    def _problem(self, part: _Part, table: dict[_Key, _Part]) -> str | None:
        """Why this transfer cannot be, or None; fills in `num_bytes`."""
        peer, transfer_id = part.key
        if self._closed:
            return "the transport was closed"
        if part.key in table:
            return f"transfer {transfer_id} with rank {peer} is already in flight"
        if not 0 <= transfer_id <= _INT64:
            return f"transfer id {transfer_id}; allowed: 0 to {_INT64}"
        if peer in self._progress.down_ranks:
            return f"rank {peer} is down"
        if part.num_tokens < 1 or not part.ranges:
            return f"transfer {transfer_id} with rank {peer} has {part.num_tokens} tokens of {len(part.ranges)} pieces"
        part.num_bytes = packed_bytes(self._pages, part.ranges, part.num_tokens)
        if part.num_bytes < 1:
            return f"transfer {transfer_id} with rank {peer} has no data: {part.ranges}"
        return None

    def _start_sending(self, part: _Part, ready: _KvReady) -> None:
        asked = (ready.ranges, ready.num_tokens, ready.num_bytes)
        have = (part.ranges, part.num_tokens, part.num_bytes)
        pages = self._pages
        error: str | None = None
        if asked != have:
            error = (
                f"transfer {ready.transfer_id}: rank {part.key[0]} expects {asked[2]} bytes, {asked[1]} tokens of "
                f"(layers, KV heads) {asked[0]}, but the sender has {have[2]} bytes, {have[1]} tokens of {have[0]}"
            )
        elif ready.tag + 1 > self._max_tag:
            error = f"transfer {ready.transfer_id}: tag {ready.tag}; allowed: below {self._max_tag}"
        else:
            try:
                part.data = pack_pieces(pages, part.ranges, part.blocks, part.num_tokens)
                if ready.tokens_per_block:
                    size = ready.tokens_per_block
                    part.own_checksums = checksum_bytes(pages, part.ranges, part.blocks, part.num_tokens, size)
                self._settle()
                self._begin(part, self._progress.isend_buffer, part.data, ready.tag)
                if part.own_checksums:
                    part.checksums = bytearray(part.own_checksums)
                    self._begin(part, self._progress.isend_buffer, part.checksums, ready.tag + 1)
                return
            except (ValueError, RuntimeError) as problem:
                error = f"transfer {ready.transfer_id}: {problem}"
        self._sends.pop(part.key, None)
        if not part.messages:
            self._tell(part.key[0], _KvRefused(ready.transfer_id, error))
        self._finish(part, error)

    def _begin(self, part: _Part, begin: Callable[..., BufferTransfer], data: Any, tag: int) -> None:
        buffer = _as_buffer(data)
        length = len(buffer)
        for start in range(0, length, _MESSAGE_BYTES):
            part.num_pending += 1
            piece = buffer if length <= _MESSAGE_BYTES else buffer[start : start + _MESSAGE_BYTES]
            done = self._done_handler(part)
            try:
                part.messages.append(begin(part.key[0], tag, piece, done))
            except BaseException:
                part.num_pending -= 1
                raise

    def _done_handler(self, part: _Part) -> Callable[[BaseException | None], None]:
        return lambda error: self._post(self._on_message_done, part, error)

    def _on_message_done(self, part: _Part, error: BaseException | None) -> None:
        part.num_pending -= 1
        if error is not None and part.error is None:
            part.error = f"transfer {part.key[1]}: {error}"
        if part.num_pending > 0:
            if error is not None and not part.is_sender:
                for message in part.messages:  # the others may never come
                    self._progress.cancel(message)
            return
        if part.is_sender:
            self._forget(self._sends, part)
            self._finish(part, part.error)
            return
        self._free_tag(part)
        if part.on_done is None:  # given up before
            waiting = self._given_up.get(part.key, [])
            if part in waiting:
                waiting.remove(part)
                if not waiting:
                    del self._given_up[part.key]
            return
        self._forget(self._receives, part)
        if part.error is None:
            self._take_in(part)
        self._finish(part, part.error)

    def _take_in(self, part: _Part) -> None:
        try:
            unpack_pieces(self._pages, part.data, part.ranges, part.blocks, part.num_tokens)
            if self._verify:
                size = self._pages.tokens_per_block
                part.own_checksums = checksum_bytes(self._pages, part.ranges, part.blocks, part.num_tokens, size)
                different = first_difference(
                    part.own_checksums, bytes(part.checksums), part.ranges, -(-part.num_tokens // size)
                )
                if different is not None:
                    part.error = f"transfer {part.key[1]}: checksum of {different}"
            self._settle()
        except (ValueError, RuntimeError) as error:
            part.error = f"transfer {part.key[1]}: {error}"

    # ---- what the peer says ------------------------------------------------------------------------------------------

    def _on_frame(self, rank: int, frame: bytes) -> None:
        try:
            message = _decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProgressError(f"rank {rank} sent a transfer message that cannot be read: {error}") from error
        key = (rank, message.transfer_id)
        if isinstance(message, _KvReady):
            part = self._sends.get(key)
            refusal = self._refusals.pop(key, None)
            if refusal is not None or self._closed:
                self._tell(rank, _KvRefused(message.transfer_id, refusal or "the sender was closed"))
            elif part is not None and not part.messages:
                self._start_sending(part, message)
            else:
                _remember(self._early, key, message)
        elif isinstance(message, _KvRefused):
            part = self._receives.get(key)
            if part is not None:
                self._drop_receive(part, message.error)
            for given_up in self._given_up.get(key, ()):
                self._cancel_messages(given_up)
        else:
            self._on_given_up(key, message.reason)

    def _on_given_up(self, key: _Key, reason: str) -> None:
        part = self._sends.get(key)
        if part is not None and part.messages:
            return  # on its way: the receiver still has its buffers out
        self._early.pop(key, None)
        self._tell(key[0], _KvRefused(key[1], reason))
        if part is not None:
            self._sends.pop(key)
            self._finish(part, reason)
        else:
            _remember(self._refusals, key, reason)

    def _on_peer_down(self, rank: int) -> None:
        for table in (self._sends, self._receives):
            for key in [key for key in table if key[0] == rank]:
                # Messages with that rank fail in Progress; without any, there is nothing to wait for.
                part = table.pop(key)
                self._finish(part, f"transfer {key[1]}: rank {rank} is down")
        for memory in (self._early, self._refusals):
            for key in [key for key in memory if key[0] == rank]:
                memory.pop(key)
        self._tags_in_use.pop(rank, None)

    # ---- giving up ---------------------------------------------------------------------------------------------------

    def _on_abort(self, key: _Key, reason: str) -> None:
        receiving = self._receives.pop(key, None)
        if receiving is not None:
            # The pages are ours again at once: only the staging buffer waits for MPI.
            self._given_up.setdefault(key, []).append(receiving)
            self._tell(key[0], _KvGivenUp(key[1], reason))
            self._finish(receiving, reason)
        sending = self._sends.pop(key, None)
        if sending is not None:
            if not sending.messages:
                self._refuse(key, reason)
            self._finish(sending, reason)

    def _drop_receive(self, part: _Part, error: str) -> None:
        """End a receive to which no data will come any more."""
        self._forget(self._receives, part)
        if part.num_pending:
            self._given_up.setdefault(part.key, []).append(part)
            self._cancel_messages(part)
        else:
            self._free_tag(part)
        self._finish(part, error)

    def _cancel_messages(self, part: _Part) -> None:
        for message in part.messages:
            try:
                self._progress.cancel(message)
            except ProgressError:
                return

    def _on_close(self) -> None:
        self._closed = True
        for key in [*self._sends, *self._receives]:
            self._on_abort(key, "the transport was closed")

    def _refuse(self, key: _Key, error: str) -> None:
        """Tell the receiver that nothing will come: now if it has asked, else when it asks."""
        if self._early.pop(key, None) is not None:
            self._tell(key[0], _KvRefused(key[1], error))
        else:
            _remember(self._refusals, key, error)

    def _tell(self, rank: int, message: Struct) -> None:
        try:
            self._progress.send(rank, _encoder.encode(message), TRANSFER_CHANNEL)
        except ProgressError:
            pass  # progress has stopped, and with it all that this could be about

    def _finish(self, part: _Part, error: str | None) -> None:
        on_done, part.on_done = part.on_done, None
        if on_done is None:
            return
        duration = 1000 * (time.monotonic_ns() - part.began)
        sent = part.own_checksums if part.is_sender else bytes(part.checksums or b"")
        num_bytes = part.num_bytes if error is None else 0
        peer, transfer_id = part.key
        own = part.own_checksums
        on_done(TransferOutcome(transfer_id, peer, part.is_sender, num_bytes, duration, error, own, sent))

    # ---- small helpers -----------------------------------------------------------------------------------------------

    def _take_tag(self, peer: int) -> int:
        """An even tag that no receive from `peer` uses; the odd one after it is for its checksums."""
        taken = self._tags_in_use.setdefault(peer, set())
        while True:
            tag = self._next_tag
            self._next_tag = tag + 2 if tag + 3 <= self._max_tag else 0
            if tag not in taken:
                taken.add(tag)
                return tag

    def _free_tag(self, part: _Part) -> None:
        self._tags_in_use.get(part.key[0], set()).discard(part.tag)

    def _forget(self, table: dict[_Key, _Part], part: _Part) -> None:
        if table.get(part.key) is part:
            del table[part.key]

    def _settle(self) -> None:
        """Wait until the device has done what pack and unpack asked of it: MPI knows no streams."""
        if self._pages.device.type == "cuda":
            torch.cuda.current_stream(self._pages.device).synchronize()


def _remember(memory: OrderedDict[_Key, Any], key: _Key, value: Any) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)


def _as_buffer(data: Any) -> Any:
    """What mpi4py takes as bytes: a numpy view of a tensor in host memory, a device's tensor as it is."""
    if isinstance(data, torch.Tensor) and data.device.type == "cpu":
        return data.numpy()
    return data
