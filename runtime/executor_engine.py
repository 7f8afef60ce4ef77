"""The thread on which an engine runs, and with it every collective of its executor. It runs what was granted, no more.

On a device that works by itself the thread launches all that is granted, and a second one waits for the tokens: the
device then finds its next step launched when it ends one.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import msgspec
import torch

from .clock import PS_PER_NS
from .engine import Engine, EngineError, PendingStep
from .executor_inbox import StepReport
from .model_batch import PlanFeed
from .wire import PlanGrant

_feed_decoder: Final = msgspec.msgpack.Decoder(PlanFeed)


class EngineThread:
    """`on_report` is told of each step, in order, on a thread of this class. `use` an engine before the first grant.

    `device`: where the engine's tensors are; a CUDA device is made the threads' own.
    """

    def __init__(self, on_report: Callable[[StepReport], None], device: str = "cpu") -> None:
        self._on_report = on_report
        self._device = torch.device(device)
        self._engine: Engine | None = None
        self._work: queue.SimpleQueue[tuple[str, Any, Any] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[PlanGrant, int, int, PendingStep] | None] = queue.SimpleQueue()
        self._launches_ahead = self._device.type == "cuda"
        self._failed_plan = -1
        self._last_end = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if self._launches_ahead:
            threading.Thread(target=self._collect, name="engine-results", daemon=True).start()

    def use(self, engine: Engine) -> None:
        """Run the grants that follow on `engine`."""
        self._work.put(("use", engine, None))

    def grant(self, grant: PlanGrant, feed: PlanFeed | None = None) -> None:
        """Run these steps. `feed` is decoded from the grant where it is not given."""
        self._work.put(("grant", grant, feed))

    def stop(self, timeout_s: float = 5.0) -> None:
        """After the work before it. A thread stuck in a collective is left behind."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._take_device()
        while (item := self._work.get()) is not None:
            kind, what, feed = item
            if kind == "use":
                self._engine, self._failed_plan = what, -1
            elif self._engine is not None:
                self._steps(self._engine, what, feed)
        self._launched.put(None)

    def _take_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _steps(self, engine: Engine, grant: PlanGrant, feed: PlanFeed | None) -> None:
        if grant.run is not None:
            try:
                engine.begin(grant.run, feed if feed is not None else _feed_decoder.decode(grant.feed))
            except EngineError as error:
                self._fail(grant, grant.first_step, str(error), applied=False)
            except Exception as error:
                self._failed_half_way(grant, grant.first_step, error)
        for step in range(grant.first_step, grant.last_step + 1):
            if grant.plan == self._failed_plan:
                return
            began = time.monotonic_ns()
            try:
                pending = engine.launch()
            except Exception as error:
                self._failed_half_way(grant, step, error)
                return
            if self._launches_ahead:
                self._launched.put((grant, step, began, pending))
            else:
                self._report(grant, step, began, pending)

    def _collect(self) -> None:
        self._take_device()
        while (item := self._launched.get()) is not None:
            self._report(*item)

    def _report(self, grant: PlanGrant, step: int, began: int, pending: PendingStep) -> None:
        """Wait for a step and tell of it. What it took counts from when the device was free for it."""
        if grant.plan == self._failed_plan:
            return
        try:
            tokens = pending.result()
        except Exception as error:
            self._failed_half_way(grant, step, error)
            return
        now = time.monotonic_ns()
        duration = (now - max(began, self._last_end)) * PS_PER_NS
        self._last_end = now
        self._on_report(StepReport(grant.plan, step, tuple(tokens), duration=duration))

    def _failed_half_way(self, grant: PlanGrant, step: int, error: Exception) -> None:
        traceback.print_exc(file=sys.stderr)
        self._fail(grant, step, f"{type(error).__name__}: {error}", applied=True)

    def _fail(self, grant: PlanGrant, step: int, error: str, *, applied: bool) -> None:
        self._failed_plan = grant.plan
        self._on_report(StepReport(grant.plan, step, error=error, applied=applied))
