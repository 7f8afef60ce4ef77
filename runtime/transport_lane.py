"""Where copies of a transport are carried out, in order, beside everything else: a stream of its own, or a thread."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .transport_ends import Done

Post = Callable[..., None]
Computed = Callable[[bytes, str | None], None]  # with the result, or with an error


class Lane(Protocol):
    """Called on the transport's thread, and answers there: at once, or in `poll`."""

    @property
    def stream(self) -> int:
        """For the driver; 0 without a device."""

    @property
    def is_busy(self) -> bool:
        """Something was run and has not been answered: `poll` often."""

    def run(self, work: Callable[[], Any], then: Done) -> None:
        """Start `work`, and call `then` when the device has done it. What `work` returns is kept until then."""

    def compute(self, work: Callable[[], bytes], then: Computed) -> None:
        """`work` that takes long or waits for the device, in the lane's order, but not on the transport's thread."""

    def poll(self) -> bool:
        """Answer what the device has done. Whether there was any."""

    def close(self) -> None: ...


class InlineLane:
    """Host memory: done when it is asked for. For small things."""

    stream = 0
    is_busy = False

    def run(self, work: Callable[[], Any], then: Done) -> None:
        then(_try(work)[1])

    def compute(self, work: Callable[[], bytes], then: Computed) -> None:
        result, error = _try(work)
        then(b"" if error is not None else result, error)

    def poll(self) -> bool:
        return False

    def close(self) -> None:
        pass


class ThreadLane:
    """Host memory: a thread that copies and sums, one thing after the other, so that nobody else has to."""

    stream = 0
    is_busy = False  # it answers by `post`, which wakes

    def __init__(self, post: Post, name: str = "kv-copies") -> None:
        self._post = post
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Callable[..., None], bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def run(self, work: Callable[[], Any], then: Done) -> None:
        self._begin((work, then, False))

    def compute(self, work: Callable[[], bytes], then: Computed) -> None:
        self._begin((work, then, True))

    def poll(self) -> bool:
        return False

    def close(self) -> None:
        if self._thread.ident is not None:
            self._work.put(None)
            self._thread.join(5.0)

    def _begin(self, item: tuple[Callable[[], Any], Callable[..., None], bool]) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._work.put(item)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, then, with_result = item
            result, error = _try(work)
            if with_result:
                self._post(then, b"" if error is not None else result, error)
            else:
                self._post(then, error)


class CudaLane:
    """A stream of `device`. Work is launched on the transport's thread, which then asks the stream's events."""

    def __init__(self, device: torch.device, post: Post) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device=device)
        self._launched: deque[tuple[Any, Any, Done]] = deque()  # (event, what is kept, whom to tell), in stream order
        self._idle_events: list[Any] = []
        self._entered: int | None = None
        self._slow = ThreadLane(post)

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    @property
    def is_busy(self) -> bool:
        return bool(self._launched)

    def run(self, work: Callable[[], Any], then: Done) -> None:
        try:
            if self._entered != threading.get_ident():  # both belong to the thread, and cost 10 µs a time
                torch.cuda.set_device(self._device)
                torch.cuda.set_stream(self._stream)
                self._entered = threading.get_ident()
            kept, told = work(), then
        except Exception as error:  # of whatever kind a compiler or a driver has: it is this transfer's end
            kept, told = None, _with_error(then, error)
        try:
            event: Any = self._idle_events.pop() if self._idle_events else torch.cuda.Event()
            event.record(self._stream)
        except RuntimeError as error:  # nothing works on this device any more
            then(f"{type(error).__name__}: {error}")
            return
        self._launched.append((event, kept, told))  # of a failure too: what it had launched may still touch pages

    def compute(self, work: Callable[[], bytes], then: Computed) -> None:
        def in_stream() -> bytes:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                result = work()
                self._stream.synchronize()
            return result

        self._slow.compute(in_stream, then)

    def poll(self) -> bool:
        found = False
        while self._launched:
            event, _, then = self._launched[0]
            error: str | None = None
            try:
                if not event.query():
                    break
                self._idle_events.append(event)
            except RuntimeError as problem:  # of this device, not of this transfer: nothing works there any more
                error = str(problem).strip().partition("\n")[0]
            self._launched.popleft()
            found = True
            then(error)
        return found

    def close(self) -> None:
        self._slow.close()


def _with_error(then: Done, problem: Exception) -> Done:
    text = f"{type(problem).__name__}: {problem}"
    return lambda error: then(error or text)


def _try(work: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return work(), None
    except (ValueError, RuntimeError) as error:
        return None, str(error)
