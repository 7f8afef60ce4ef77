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
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from .mpi_world import MpiWorld
from .progress_messages import MessageDesk
from .progress_pace import Bell, Pace, wake_promptly
from .progress_types import (
    CHANNELS,
    CONTROL_CHANNEL,
    LIFE_CHANNEL,
    MAX_BUFFER_BYTES,
    TRANSFER_CHANNEL,
    BufferTransfer,
    DoneHandler,
    FrameHandler,
    PeerDownError,
    ProgressError,
    num_bytes_of,
)
from .wire import MAX_FRAME_BYTES

__all__ = ("CONTROL_CHANNEL", "MAX_BUFFER_BYTES", "TRANSFER_CHANNEL", "PeerDownError", "Progress", "ProgressError")

_WATCH_INTERVAL_S: Final = 0.01


class Progress(MessageDesk):
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
        super().__init__(world, on_message, on_peer_down, silence_limit_s)
        self._switch_interval_s = switch_interval_s
        self._pace = Pace()
        self._pollers: list[Callable[[], bool]] = []
        self._commands: deque[tuple[str, Any]] = deque()
        self._num_queued_frames = 0  # of the commands: none may overtake them
        self._bell = Bell()
        self._gate = threading.Lock()  # between queueing and the end

        self._stopping = False
        self._is_failing = False  # what is left of transfers is being told that it will not happen
        self._drain_until = 0.0
        self._goodbye_wait_s = 0.0
        self._goodbye_until: float | None = None
        self._finished = threading.Event()
        self.is_expecting = False  # somebody waits for a frame: look more often. Any thread may set it
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)

    # ---- any thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        sys.setswitchinterval(min(self._switch_interval_s, sys.getswitchinterval()))
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether what is queued will be carried out."""
        return self._thread.is_alive() and not self._finished.is_set()

    @property
    def is_own_thread(self) -> bool:
        """Whether this is called by a callback."""
        return threading.current_thread() is self._thread

    def subscribe(self, channel: int, handler: FrameHandler) -> None:
        """Give the frames of `channel` to `handler`. Before `start`, or before any peer uses the channel."""
        if channel not in CHANNELS or channel in self._handlers:
            raise ValueError(f"channel {channel} is taken or not in {CHANNELS.start} to {CHANNELS.stop - 1}")
        self._handlers[channel] = handler

    def poll(self, poller: Callable[[], bool]) -> None:
        """Call `poller` in every round from now on, on the progress thread. True: something happened there."""
        self._pollers.append(poller)

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
        # From a callback at once, as a KV message: it must not wait until the callback has done all that it has to do.
        if (
            self._may_begin_at_once()
            and not self._num_queued_frames
            and self._sent_at_once(rank, channel, bytes(frame))
        ):
            return True
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
        if self.is_own_thread:
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
        num_bytes = num_bytes_of(buffer)
        if not 0 < num_bytes <= MAX_BUFFER_BYTES:
            raise ValueError(f"a buffer of {num_bytes} bytes for rank {rank}; allowed: 1 to {MAX_BUFFER_BYTES}")
        if not 0 <= tag <= self._world.max_tag:
            raise ValueError(f"tag {tag} for rank {rank}; allowed: 0 to {self._world.max_tag}")
        transfer = BufferTransfer(is_send, rank, tag, buffer, num_bytes, on_done)
        # From a callback at once: a message that is ready must not wait for what else its round has to do.
        if not self._may_begin_at_once() or not self._begun_at_once(transfer):
            self._queue("transfer", transfer)
        return transfer

    def _may_begin_at_once(self) -> bool:
        return self.is_own_thread and not self._said_goodbye and not self._is_failing

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
            if kind == "frame":
                self._num_queued_frames += 1
            self._bell.ring()

    # ---- the progress thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._pace.can_spin:
            wake_promptly()
        try:
            while True:
                busy = self._obey()
                busy = self._receive() or busy
                for poller in self._pollers:
                    busy = self._polled(poller) or busy
                busy = self._obey() or busy  # what those have just asked for need not wait for another round
                busy = self._advance_sends() or busy
                busy = self._advance_transfers() or busy
                now = time.monotonic()
                if now - self._last_watch >= _WATCH_INTERVAL_S:
                    self._watch(now)
                if self._stopping and self._may_leave(now):
                    break
                in_transfer = bool(self.is_expecting or self._transfers or self._incoming or self._sending)
                sleep_s = self._pace.rest(busy, in_transfer, now)
                if sleep_s is None:
                    continue
                if sleep_s == 0.0:
                    os.sched_yield()
                    continue
                self._bell.wait(sleep_s)
        except BaseException as error:
            self._keep(error)
        finally:
            stopped = ProgressError(f"rank {self._world.rank} has stopped its MPI progress")
            self._is_failing = True
            for transfer in self._transfers:
                self._finish(transfer, self.failure or stopped)
            with self._gate:  # from here on nobody queues anything more
                self._finished.set()
            while self._commands:
                kind, what = self._commands.popleft()
                if kind == "transfer":
                    self._finish(what, self.failure or stopped)
                elif kind == "call":  # it will see that nothing can be sent any more
                    self._call(what)

    def _polled(self, poller: Callable[[], bool]) -> bool:
        try:
            return poller()
        except Exception as error:
            self._keep(error)
            return False

    def _obey(self) -> bool:
        """Carry out what other threads, and callbacks, asked for."""
        busy = False
        while self._commands:  # this thread alone takes
            busy = True
            self._carry_out(*self._commands.popleft())
        return busy

    def _carry_out(self, kind: str, what: Any) -> None:
        if kind == "frame":
            self._begin_send(*what)
            with self._gate:
                self._num_queued_frames -= 1
        elif kind == "transfer":
            self._begin_transfer(what)
        elif kind == "cancel":
            self._cancel(what)
        elif kind == "call":
            self._call(what)
        else:
            self._stopping = True
            self._drain_until, self._goodbye_wait_s = what

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
                    self._begin_send(rank, LIFE_CHANNEL, b"\0")
                elif rank in self._departed and rank not in self._down:
                    # It waits for our goodbye, and is still listening.
                    self._say_goodbye_to_departed(rank)
            return False
        waiting = bool(self._sending) or any(r not in self._down and r not in self._departed for r in self._peers)
        return not waiting or (self._goodbye_until is not None and now > self._goodbye_until)

    def _say_goodbye_to_departed(self, rank: int) -> None:
        try:
            request = self._control.Isend([b"\0", self._mpi.BYTE], rank, LIFE_CHANNEL)
        except self._mpi.Exception:
            return
        self._sending.setdefault(rank, deque()).append((request, b"\0"))
