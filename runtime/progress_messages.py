"""The messages of the progress thread: frames out and in, in the order of each sender, and KV messages in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .mpi_world import MpiWorld
from .progress_peers import PeerWatch
from .progress_types import (
    CONTROL_CHANNEL,
    LIFE_CHANNEL,
    BufferTransfer,
    FrameHandler,
    IncomingFrame,
    PeerDownError,
    ProgressError,
)
from .wire import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from mpi4py import MPI

_MESSAGES_A_ROUND: Final = 64


class MessageDesk(PeerWatch):
    """Part of `Progress`; all of it runs on the progress thread."""

    def __init__(
        self,
        world: MpiWorld,
        on_message: FrameHandler,
        on_peer_down: Callable[[int], None],
        silence_limit_s: float | None,
    ) -> None:
        super().__init__(world, on_peer_down, silence_limit_s)
        self._data = world.data
        self._status = self._mpi.Status()
        self._handlers: dict[int, FrameHandler] = {CONTROL_CHANNEL: on_message}
        self._sending: dict[int, deque[tuple[MPI.Request, bytes]]] = {}  # by destination, oldest first
        self._incoming: dict[int, deque[IncomingFrame]] = {}  # by source, in the order in which MPI matched them
        self._transfers: list[BufferTransfer] = []
        self._abandoned: list[tuple[Any, Any]] = []  # requests that MPI may still act on, with their buffers
        self.num_dropped_frames = 0  # to ranks that were gone

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

    def _sent_at_once(self, rank: int, channel: int, frame: bytes) -> bool:
        """Whether MPI has it; as `_begun_at_once`."""
        try:
            request = self._control.Isend([frame, self._mpi.BYTE], rank, channel)
        except self._mpi.Exception:
            return False
        self._sending.setdefault(rank, deque()).append((request, frame))
        return True

    def _begin_transfer(self, transfer: BufferTransfer) -> None:
        rank = transfer.rank
        if self._is_gone_for(transfer):
            self._finish(transfer, PeerDownError(f"rank {rank} is gone"))
            return
        try:
            self._give_to_mpi(transfer)
        except self._mpi.Exception as error:
            self._finish(transfer, PeerDownError(f"rank {rank}: {error.Get_error_string()}"))
            self._see_error(rank, error)

    def _begun_at_once(self, transfer: BufferTransfer) -> bool:
        """Whether MPI has it. What it refuses is for the loop to see, where a lost rank disturbs no callback."""
        if self._is_gone_for(transfer):
            return False
        try:
            self._give_to_mpi(transfer)
        except self._mpi.Exception:
            return False
        return True

    def _is_gone_for(self, transfer: BufferTransfer) -> bool:
        # What a rank sent before its goodbye may still be taken: a small message is over for it before we have it.
        rank = transfer.rank
        return rank in self._down or (rank in self._departed and transfer.is_send)

    def _give_to_mpi(self, transfer: BufferTransfer) -> None:
        begin = self._data.Isend if transfer.is_send else self._data.Irecv
        transfer.request = begin([transfer.buffer, self._mpi.BYTE], transfer.rank, transfer.tag)
        self._transfers.append(transfer)

    def _receive(self) -> bool:
        """Match what has arrived, and hand over what is complete, in the order of each sender."""
        mpi = self._mpi
        status = self._status
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
        for source in list(self._incoming) if self._incoming else ():
            queue = self._incoming.get(source, deque())
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
        self._incoming.setdefault(source, deque()).append(IncomingFrame(channel, frame, request))

    def _deliver(self, source: int, channel: int, frame: bytes) -> None:
        if source in self._down:
            return
        self._heard[source] = time.monotonic()
        if channel == LIFE_CHANNEL:
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
        for rank in list(self._sending) if self._sending else ():
            queue = self._sending.get(rank, deque())
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

    # ---- what a rank leaves behind -----------------------------------------------------------------------------------

    def _drop_frames(self, rank: int) -> None:
        self._incoming.pop(rank, None)
        for request, frame in self._sending.pop(rank, ()):
            self._abandoned.append((request, frame))

    def _fail_transfers(self, rank: int, error: BaseException) -> None:
        """Fail what is in flight with `rank`. Buffers stay referenced here: MPI may still touch them."""
        for transfer in list(self._transfers):
            if transfer.rank == rank and transfer.on_done is not None:
                if transfer.request is not None and not transfer.is_send:
                    try:
                        transfer.request.Cancel()
                    except self._mpi.Exception:
                        pass
                self._abandoned.append((transfer.request, transfer.buffer))
                self._finish(transfer, error)
