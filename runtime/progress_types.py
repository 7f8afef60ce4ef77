"""What the parts of `Progress` share: its limits, its errors, and messages in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mpi4py import MPI

MAX_BUFFER_BYTES: Final = (1 << 31) - 1  # MPI counts are 32-bit here
CONTROL_CHANNEL: Final = 0  # `on_message`
TRANSFER_CHANNEL: Final = 1  # for a KvTransport
LIFE_CHANNEL: Final = 15  # an empty message is a ping, one byte a goodbye
CHANNELS: Final = range(LIFE_CHANNEL)

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


class IncomingFrame:
    """A control message that MPI has matched and is receiving."""

    __slots__ = ("channel", "frame", "request")

    def __init__(self, channel: int, frame: bytearray, request: MPI.Request) -> None:
        self.channel = channel
        self.frame = frame
        self.request = request


def num_bytes_of(buffer: Any) -> int:
    """Bytes of a buffer-protocol object, a numpy array or a tensor."""
    if hasattr(buffer, "nbytes"):
        return int(buffer.nbytes)
    return memoryview(buffer).nbytes
