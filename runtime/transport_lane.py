"""Where copies of a transport are carried out, in order, beside everything else: a stream of its own, or this thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .transport_ends import Done

Post = Callable[..., None]


class Lane(Protocol):
    """Called on the transport's thread, and answers there."""

    @property
    def stream(self) -> int:
        """For the driver; 0 without a device."""

    def run(self, work: Callable[[], Any], then: Done) -> None:
        """Start `work`, and call `then` when the device has done it. What `work` returns is kept until then."""

    def wait(self, work: Callable[[], bytes]) -> bytes:
        """`work`, in the lane's order, waited for."""

    def close(self) -> None: ...


class InlineLane:
    """Host memory: done when it is asked for."""

    @property
    def stream(self) -> int:
        return 0

    def run(self, work: Callable[[], Any], then: Done) -> None:
        try:
            work()
        except (ValueError, RuntimeError) as error:
            then(str(error))
            return
        then(None)

    def wait(self, work: Callable[[], bytes]) -> bytes:
        return work()

    def close(self) -> None:
        pass


class CudaLane:
    """A stream of `device` and a thread that waits for its events, so that nobody else has to."""

    def __init__(self, device: torch.device, post: Post) -> None:
        self._device = device
        self._post = post
        self._stream: Any = torch.cuda.Stream(device=device)
        self._events: queue.SimpleQueue[tuple[Any, Any, Done] | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._wait_for_events, name="kv-copies", daemon=True)
        self._waiter.start()

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def run(self, work: Callable[[], Any], then: Done) -> None:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                kept = work()
                event: Any = torch.cuda.Event()
                event.record(self._stream)
        except (ValueError, RuntimeError) as error:
            then(str(error))
            return
        self._events.put((event, kept, then))

    def wait(self, work: Callable[[], bytes]) -> bytes:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            result = work()
            self._stream.synchronize()
        return result

    def close(self) -> None:
        self._events.put(None)
        self._waiter.join(5.0)

    def _wait_for_events(self) -> None:
        torch.cuda.set_device(self._device)
        while (item := self._events.get()) is not None:
            event, kept, then = item
            error: str | None = None
            try:
                event.synchronize()  # without the GIL
            except RuntimeError as problem:  # of this device, not of this transfer: nothing works there any more
                error = str(problem).strip().partition("\n")[0]
            del kept
            self._post(then, error)
