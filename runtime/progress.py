"""The one thread of a rank that makes MPI progress: it owns all control messages and all KV messages.

A rendezvous advances only inside MPI calls, so a rank that computes, or waits for its device, would stall its peers;
this thread keeps calling. It knows nothing of what messages mean. Callbacks run on it and must be quick.

One FIFO per ordered pair of ranks. A dead rank is seen by ULFM (within 0.1 s), or, if MPI does not notice, by its
silence; it is reported once, every transfer with it fails, and the others go on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .mpi_world import MpiWorld
from .wire import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from mpi4py import MPI

MAX_BUFFER_BYTES: Final = (1 << 31) - 1  # MPI counts are 32-bit here
CONTROL_CHANNEL: Final = 0  # `on_message`
TRANSFER_CHANNEL: Final = 1  # for a KvTransport
_LIFE_CHANNEL: Final = 15  # an empty message is a ping, one byte a goodbye
_CHANNELS: Final = range(_LIFE_CHANNEL)
_WATCH_INTERVAL_S: Final = 0.01
_SPINS: Final = 20  # idle rounds without a sleep
_FIRST_SLEEP_S: Final = 20e-6
_LONGEST_SLEEP_S: Final = 1e-3 if (os.cpu_count() or 1) < 8 else 1e-4  # half of it is added to a message's latency
_LONGEST_SLEEP_IN_TRANSFER_S: Final = 1e-4 if (os.cpu_count() or 1) < 8 else 2e-5
_MESSAGES_A_ROUND: Final = 64
_LATE_DATA_S: Final = 1.0  # data sent before a goodbye may complete after it

FrameHandler = Callable[[int, bytes], None]
DoneHandler = Callable[[BaseException | None], None]


class ProgressError(RuntimeError):
    """A transfer or a send that cannot happen: its peer is gone, or progress has stopped."""


class PeerDownError(ProgressError):
    """The peer of a transfer is dead, or has said goodbye."""


class BufferTransfer:
    """One KV message in flight. Made by `isend_buffer` and `irecv_buffer`."""

    __slots__ = ("buffer", "cancelled", "is_send", "num_bytes", "on_done", "rank", "request", "tag")

    def __init__(self, is_send: bool, rank: int, tag: int, buffer: Any, num_bytes: int, on_done: DoneHandler) -> None:
        self.is_send = is_send
        self.rank = rank
        self.tag = tag
        self.buffer = buffer
        self.num_bytes = num_bytes
        self.on_done: DoneHandler | None = on_done  # None: it has been told
        self.request: MPI.Request | None = None
        self.cancelled = False


class _Incoming:
    __slots__ = ("channel", "frame", "request")

    def __init__(self, channel: int, frame: bytearray, request: MPI.Request) -> None:
        self.channel = channel
        self.frame = frame
        self.request = request


class Progress:
    """`start()`s the thread; `send`, `isend_buffer`, `irecv_buffer` and `cancel` may be called from any thread.

    `on_message(rank, frame)` gets the frames of CONTROL_CHANNEL; `on_peer_down(rank)` each dead rank once. The error of
    a callback is printed, the first one is kept in `failure` and raised by `stop`; progress goes on.
    `silence_limit_s`: a rank that sent nothing for so long, not even a ping, is taken for dead; None turns that off.
    Starting changes the interpreter's thread switch interval, so that this thread gets its turn beside busy ones.
    """

    def __init__(
        self,
        world: MpiWorld,
        on_message: FrameHandler,
        on_peer_down: Callable[[int], None],
        *,
        silence_limit_s: float | None = 30.0,
        switch_interval_s: float = 0.0005,
    ) -> None:
        from mpi4py import MPI

        if silence_limit_s is not None and silence_limit_s <= 0:
            raise ValueError(f"silence_limit_s must be positive or None, not {silence_limit_s}")
        self._mpi = MPI
        self._world = world
        self._control = world.control
        self._data = world.data
        self._handlers: dict[int, FrameHandler] = {CONTROL_CHANNEL: on_message}
        self._down_handlers: list[Callable[[int], None]] = [on_peer_down]
        self._silence_limit_s = silence_limit_s
        self._ping_interval_s = 0.5 if silence_limit_s is None else min(0.5, silence_limit_s / 5)
        self._switch_interval_s = switch_interval_s

        self._commands: deque[tuple[str, Any]] = deque()
        self._wake = threading.Event()
        self._gate = threading.Lock()  # between queueing and the end
        self._sending: dict[int, deque[tuple[MPI.Request, bytes]]] = {}  # by destination, oldest first
        self._incoming: dict[int, deque[_Incoming]] = {}  # by source, in the order in which MPI matched them
        self._transfers: list[BufferTransfer] = []
        self._abandoned: list[tuple[Any, Any]] = []  # requests that MPI may still act on, with their buffers
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        self._down: set[int] = set()
        self._silent: set[int] = set()  # those of `_down` that MPI does not know to be dead
        self._departed: dict[int, float] = {}  # when they said goodbye
        self._num_acknowledged = 0  # dead ranks, in ULFM's own list
        self._said_goodbye = False
        now = time.monotonic()
        self._heard = dict.fromkeys(self._peers, now)
        self._last_watch = self._last_ping = now

        self._stopping = False
        self._drain_until = 0.0
        self._goodbye_wait_s = 0.0
        self._goodbye_until: float | None = None
        self._finished = threading.Event()
        self.failure: BaseException | None = None
        self.num_dropped_frames = 0  # to ranks that were gone
        self.is_expecting = False  # somebody waits for a frame: look more often. Any thread may set it
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)

    # ---- any thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        sys.setswitchinterval(self._switch_interval_s)
        self._thread.start()

    def subscribe(self, channel: int, handler: FrameHandler) -> None:
        """Give the frames of `channel` to `handler`. Before `start`, or before any peer uses the channel."""
        if channel not in _CHANNELS or channel in self._handlers:
            raise ValueError(f"channel {channel} is taken or not in {_CHANNELS.start} to {_CHANNELS.stop - 1}")
        self._handlers[channel] = handler

    def watch_peers(self, on_peer_down: Callable[[int], None]) -> None:
        """Tell one more listener of dead ranks; listeners are told in the order in which they came."""
        self._down_handlers.append(on_peer_down)

    @property
    def max_tag(self) -> int:
        """The largest tag of `isend_buffer` and `irecv_buffer`."""
        return self._world.max_tag

    @property
    def hostnames(self) -> tuple[str, ...]:
        """The host of each rank of the world."""
        return self._world.hostnames

    @property
    def down_ranks(self) -> frozenset[int]:
        return frozenset(self._down)

    @property
    def unheard_ranks(self) -> frozenset[int]:
        """Ranks that neither died nor said goodbye: after `stop`, those that MPI_Finalize may wait for."""
        return frozenset(self._peers) - self._down - self._departed.keys()

    @property
    def silent_ranks(self) -> frozenset[int]:
        """Ranks taken for dead whose death MPI has not confirmed: MPI_Finalize would wait for them."""
        return frozenset(self._silent)

    def send(self, rank: int, frame: bytes, channel: int = CONTROL_CHANNEL) -> bool:
        """Queue `frame` for `rank` and return at once. False: the rank is gone, and the frame dropped.

        Raises ValueError for a frame over MAX_FRAME_BYTES or an unknown rank, ProgressError after `stop`.
        """
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes for rank {rank}; allowed: at most {MAX_FRAME_BYTES}")
        self._check_peer(rank)
        if rank in self._down or rank in self._departed:
            self.num_dropped_frames += 1
            return False
        self._queue("frame", (rank, channel, bytes(frame)))
        return True

    def isend_buffer(self, rank: int, tag: int, buffer: Any, on_done: DoneHandler) -> BufferTransfer:
        """Send `buffer` (contiguous, anything that mpi4py takes as bytes) over the data communicator.

        It must not change until `on_done(error)`, which is called once, on the progress thread; error None is success.
        At most MAX_BUFFER_BYTES. Raises ValueError for a bad rank, tag or size, ProgressError after `stop`.
        """
        return self._queue_transfer(True, rank, tag, buffer, on_done)

    def irecv_buffer(self, rank: int, tag: int, buffer: Any, on_done: DoneHandler) -> BufferTransfer:
        """Receive a message of exactly the size of `buffer`; the rest as in `isend_buffer`."""
        return self._queue_transfer(False, rank, tag, buffer, on_done)

    def cancel(self, transfer: BufferTransfer) -> None:
        """Give up a receive that no message has reached; `on_done` gets an error. Any other is left to complete."""
        self._queue("cancel", transfer)

    def call(self, what: Callable[[], object]) -> None:
        """Call `what()` on the progress thread, once it runs. Raises ProgressError after `stop`."""
        self._queue("call", what)

    def stop(self, drain: bool = True, timeout_s: float = 10.0, goodbye_wait_s: float = 5.0) -> None:
        """End the thread. `drain`: first let sends and transfers complete, at most `timeout_s`.

        Then peers are told goodbye, and theirs are awaited for at most `goodbye_wait_s`, so that nobody leaves MPI
        while another still sends to it. What is left of transfers fails. Raises the first error of a callback.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of Progress must not stop it: it would wait for itself")
        if self._thread.is_alive():
            try:
                self._queue("stop", (time.monotonic() + (timeout_s if drain else 0.0), goodbye_wait_s))
            except ProgressError:  # another thread's `stop` is under way
                pass
            self._finished.wait(timeout_s + goodbye_wait_s + 5.0)
            self._thread.join(5.0)
        if self.failure is not None:
            raise self.failure

    def _queue_transfer(self, is_send: bool, rank: int, tag: int, buffer: Any, on_done: DoneHandler) -> BufferTransfer:
        self._check_peer(rank)
        num_bytes = _num_bytes(buffer)
        if not 0 < num_bytes <= MAX_BUFFER_BYTES:
            raise ValueError(f"a buffer of {num_bytes} bytes for rank {rank}; allowed: 1 to {MAX_BUFFER_BYTES}")
        if not 0 <= tag <= self._world.max_tag:
            raise ValueError(f"tag {tag} for rank {rank}; allowed: 0 to {self._world.max_tag}")
        transfer = BufferTransfer(is_send, rank, tag, buffer, num_bytes, on_done)
        self._queue("transfer", transfer)
        return transfer

    def _check_peer(self, rank: int) -> None:
        if not 0 <= rank < self._world.size or rank == self._world.rank:
            raise ValueError(
                f"rank {rank} is no peer of rank {self._world.rank}; allowed: the others of 0 to {self._world.size - 1}"
            )

    def _queue(self, kind: str, what: Any) -> None:
        with self._gate:
            if self._said_goodbye or self._finished.is_set():
                raise ProgressError(f"rank {self._world.rank} has stopped its MPI progress")
            self._commands.append((kind, what))
        self._wake.set()

    # ---- the progress thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        idle_rounds = 0
        sleep_s = _FIRST_SLEEP_S
        try:
            while True:
                busy = self._obey()
                busy = self._receive() or busy
                busy = self._advance_sends() or busy
                busy = self._advance_transfers() or busy
                now = time.monotonic()
                if now - self._last_watch >= _WATCH_INTERVAL_S:
                    self._watch(now)
                if self._stopping and self._may_leave(now):
                    break
                if busy:
                    idle_rounds, sleep_s = 0, _FIRST_SLEEP_S
                    continue
                idle_rounds += 1
                if idle_rounds <= _SPINS:
                    os.sched_yield()
                    continue
                self._wake.wait(sleep_s)
                self._wake.clear()
                in_transfer = self.is_expecting or self._transfers or self._incoming or self._sending
                sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_IN_TRANSFER_S if in_transfer else _LONGEST_SLEEP_S)
        except BaseException as error:
            self._keep(error)
        finally:
            stopped = ProgressError(f"rank {self._world.rank} has stopped its MPI progress")
            for transfer in self._transfers:
                self._finish(transfer, self.failure or stopped)
            with self._gate:  # from here on nobody queues anything more
                self._finished.set()
            while self._commands:
                kind, what = self._commands.popleft()
                if kind == "transfer":
                    self._finish(what, self.failure or stopped)

    def _obey(self) -> bool:
        """Carry out what other threads asked for."""
        busy = False
        while self._commands:
            busy = True
            kind, what = self._commands.popleft()
            if kind == "frame":
                self._begin_send(*what)
            elif kind == "transfer":
                self._begin_transfer(what)
            elif kind == "cancel":
                self._cancel(what)
            elif kind == "call":
                self._call(what)
            else:
                self._stopping = True
                self._drain_until, self._goodbye_wait_s = what
        return busy

    def _begin_send(self, rank: int, channel: int, frame: bytes) -> None:
        if rank in self._down or rank in self._departed:
            self.num_dropped_frames += 1
            return
        try:
            request = self._control.Isend([frame, self._mpi.BYTE], rank, channel)
        except self._mpi.Exception as error:
            self._see_error(rank, error)
            return
        self._sending.setdefault(rank, deque()).append((request, frame))

    def _begin_transfer(self, transfer: BufferTransfer) -> None:
        rank = transfer.rank
        # What a rank sent before its goodbye may still be taken: a small message is over for it before we have it.
        if rank in self._down or (rank in self._departed and transfer.is_send):
            self._finish(transfer, PeerDownError(f"rank {rank} is gone"))
            return
        begin = self._data.Isend if transfer.is_send else self._data.Irecv
        try:
            transfer.request = begin([transfer.buffer, self._mpi.BYTE], rank, transfer.tag)
        except self._mpi.Exception as error:
            self._finish(transfer, PeerDownError(f"rank {rank}: {error.Get_error_string()}"))
            self._see_error(rank, error)
            return
        self._transfers.append(transfer)

    def _receive(self) -> bool:
        """Match what has arrived, and hand over what is complete, in the order of each sender."""
        mpi = self._mpi
        status = mpi.Status()
        busy = False
        for _ in range(_MESSAGES_A_ROUND):
            try:
                message = self._control.Improbe(mpi.ANY_SOURCE, mpi.ANY_TAG, status)
            except mpi.Exception as error:
                if not (self._world.fault_tolerant and self._is_failure(error)):
                    raise
                # A rank has failed since the last look: acknowledge it, so that "any source" works again.
                self._watch(time.monotonic())
                break
            if message is None:
                break
            busy = True
            self._match(message, status.Get_source(), status.Get_tag(), status.Get_count(mpi.BYTE))
        for source in list(self._incoming):
            queue = self._incoming[source]
            while queue:
                head = queue[0]
                try:
                    if not head.request.Test():
                        break
                except mpi.Exception as error:
                    queue.clear()  # what follows a lost frame must not be delivered either
                    self._see_error(source, error)
                    break
                queue.popleft()
                busy = True
                self._deliver(source, head.channel, bytes(head.frame))
            if not self._incoming.get(source):
                self._incoming.pop(source, None)
        return busy

    def _match(self, message: Any, source: int, channel: int, num_bytes: int) -> None:
        if num_bytes > MAX_FRAME_BYTES:
            # Receiving it cut short crashes Open MPI 5.0.11, and receiving it whole is what the limit forbids.
            self._abandoned.append((message, None))
            self._keep(ProgressError(f"rank {source} sent {num_bytes} bytes; allowed: at most {MAX_FRAME_BYTES}"))
            self._lose(source, known_to_mpi=False)
            return
        frame = bytearray(num_bytes)
        try:
            request = message.Irecv([frame, self._mpi.BYTE])
        except self._mpi.Exception as error:
            self._see_error(source, error)
            return
        self._incoming.setdefault(source, deque()).append(_Incoming(channel, frame, request))

    def _deliver(self, source: int, channel: int, frame: bytes) -> None:
        if source in self._down:
            return
        self._heard[source] = time.monotonic()
        if channel == _LIFE_CHANNEL:
            if frame:
                self._departed.setdefault(source, time.monotonic())
            return
        handler = self._handlers.get(channel)
        if handler is None:
            self._keep(ProgressError(f"rank {source} sent a frame on channel {channel}, which nobody here handles"))
            return
        self._call(handler, source, frame)

    def _advance_sends(self) -> bool:
        busy = False
        for rank in list(self._sending):
            queue = self._sending[rank]
            try:
                while queue and queue[0][0].Test():
                    queue.popleft()
                    busy = True
            except self._mpi.Exception as error:
                queue.popleft()
                self._see_error(rank, error)
            if not queue:
                self._sending.pop(rank, None)
        return busy

    def _advance_transfers(self) -> bool:
        if not self._transfers:
            return False
        mpi = self._mpi
        status = mpi.Status()
        going = []
        ended: list[tuple[BufferTransfer, BaseException | None]] = []
        for transfer in self._transfers:
            if transfer.on_done is None:  # failed meanwhile, by a callback of this very round
                continue
            try:
                if transfer.request is None or not transfer.request.Test(status):
                    going.append(transfer)
                    continue
            except mpi.Exception as error:
                text = f"rank {transfer.rank}: {error.Get_error_string()}"
                ended.append((transfer, PeerDownError(text) if self._is_failure(error) else ProgressError(text)))
                continue
            if transfer.cancelled and status.Is_cancelled():
                ended.append((transfer, ProgressError(f"the receive from rank {transfer.rank} was cancelled")))
            elif not transfer.is_send and status.Get_count(mpi.BYTE) != transfer.num_bytes:
                count = status.Get_count(mpi.BYTE)
                text = f"rank {transfer.rank} sent {count} bytes where {transfer.num_bytes} were expected"
                ended.append((transfer, ProgressError(text)))
            else:
                ended.append((transfer, None))
        self._transfers = going
        for transfer, outcome in ended:
            self._finish(transfer, outcome)
        return bool(ended)

    def _cancel(self, transfer: BufferTransfer) -> None:
        if transfer.on_done is not None and transfer.request is not None and not transfer.is_send:
            transfer.cancelled = True
            transfer.request.Cancel()

    def _finish(self, transfer: BufferTransfer, error: BaseException | None) -> None:
        on_done, transfer.on_done = transfer.on_done, None
        if on_done is not None:
            self._call(on_done, error)

    # ---- who is alive ------------------------------------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        gap = now - self._last_watch
        self._last_watch = now
        for rank in self._failed_ranks():
            self._lose(rank, known_to_mpi=True)
        if now - self._last_ping >= self._ping_interval_s and not self._said_goodbye:
            self._last_ping = now
            for rank in self._peers:
                if rank not in self._down and rank not in self._departed:
                    self._begin_send(rank, _LIFE_CHANNEL, b"")
        for rank, since in self._departed.items():
            if now - since > _LATE_DATA_S and any(transfer.rank == rank for transfer in self._transfers):
                self._fail_transfers(rank, PeerDownError(f"rank {rank} has said goodbye"))
        limit = self._silence_limit_s
        if limit is None:
            return
        if gap > limit / 2:  # this process itself was stopped for a while: the silence was ours
            for rank in self._heard:
                self._heard[rank] = now
        for rank in self._peers:
            if now - self._heard[rank] > limit and rank not in self._down and rank not in self._departed:
                self._lose(rank, known_to_mpi=False)

    def _failed_ranks(self) -> list[int]:
        """Ranks that ULFM has newly found dead, acknowledged."""
        if not self._world.fault_tolerant:
            return []
        failed = self._control.Get_failed()
        try:
            if failed.Get_size() == self._num_acknowledged:
                return []
            self._num_acknowledged = failed.Get_size()
            self._control.Ack_failed()
            whole = self._control.Get_group()
            ranks = self._mpi.Group.Translate_ranks(failed, None, whole)
            whole.Free()
        finally:
            failed.Free()
        return [int(rank) for rank in ranks if int(rank) not in self._down - self._silent]

    def _is_failure(self, error: Any) -> bool:
        codes = [getattr(self._mpi, f"ERR_{name}", None) for name in ("PROC_FAILED", "PROC_FAILED_PENDING", "REVOKED")]
        return error.Get_error_class() in codes

    def _see_error(self, rank: int, error: Any) -> None:
        if self._is_failure(error):
            self._lose(rank, known_to_mpi=True)
        else:
            self._keep(ProgressError(f"MPI failed towards rank {rank}: {error.Get_error_string()}"))
            self._lose(rank, known_to_mpi=False)

    def _lose(self, rank: int, known_to_mpi: bool) -> None:
        if known_to_mpi:
            self._silent.discard(rank)
        elif rank not in self._down:
            self._silent.add(rank)
        if rank in self._down:
            return
        self._down.add(rank)
        self._incoming.pop(rank, None)
        for request, frame in self._sending.pop(rank, ()):
            self._abandoned.append((request, frame))
        self._fail_transfers(rank, PeerDownError(f"rank {rank} is down"))
        if rank in self._departed:  # it had said goodbye: its end is no news
            return
        for handler in list(self._down_handlers):
            self._call(handler, rank)

    def _fail_transfers(self, rank: int, error: BaseException) -> None:
        """Fail what is in flight with `rank`. Buffers stay referenced here: MPI may still touch them."""
        for transfer in self._transfers:
            if transfer.rank == rank and transfer.on_done is not None:
                if transfer.request is not None and not transfer.is_send:
                    try:
                        transfer.request.Cancel()
                    except self._mpi.Exception:
                        pass
                self._abandoned.append((transfer.request, transfer.buffer))
                self._finish(transfer, error)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _may_leave(self, now: float) -> bool:
        """Whether everything has been said: sends and transfers done, goodbyes exchanged, or the time is up."""
        if self._commands:
            return False
        pending = bool(self._transfers) or bool(self._sending)
        if not self._said_goodbye:
            if pending and now < self._drain_until:
                return False
            with self._gate:
                if self._commands:
                    return False
                self._said_goodbye = True
            self._goodbye_until = now + self._goodbye_wait_s
            for rank in self._peers:
                if rank not in self._down and rank not in self._departed:
                    self._begin_send(rank, _LIFE_CHANNEL, b"\0")
                elif rank in self._departed and rank not in self._down:
                    # It waits for our goodbye, and is still listening.
                    self._say_goodbye_to_departed(rank)
            return False
        waiting = bool(self._sending) or any(r not in self._down and r not in self._departed for r in self._peers)
        return not waiting or (self._goodbye_until is not None and now > self._goodbye_until)

    def _say_goodbye_to_departed(self, rank: int) -> None:
        try:
            request = self._control.Isend([b"\0", self._mpi.BYTE], rank, _LIFE_CHANNEL)
        except self._mpi.Exception:
            return
        self._sending.setdefault(rank, deque()).append((request, b"\0"))

    # ---- callbacks ---------------------------------------------------------------------------------------------------

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except BaseException as error:
            self._keep(error)

    def _keep(self, error: BaseException) -> None:
        traceback.print_exception(error)
        if self.failure is None:
            self.failure = error


def _num_bytes(buffer: Any) -> int:
    """Bytes of a buffer-protocol object, a numpy array or a tensor."""
    if hasattr(buffer, "nbytes"):
        return int(buffer.nbytes)
    return memoryview(buffer).nbytes
