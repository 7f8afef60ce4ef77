"""The thread on which an engine runs, and with it every collective of its executor. It runs what was granted, no more."""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import msgspec

from .clock import PS_PER_NS
from .engine import Engine, EngineError
from .executor_inbox import StepReport
from .model_batch import PlanFeed
from .wire import PlanGrant

_feed_decoder: Final = msgspec.msgpack.Decoder(PlanFeed)


class EngineThread:
    """`on_report` is told of each step, on this thread. `use` an engine before the first grant."""

    def __init__(self, on_report: Callable[[StepReport], None]) -> None:
        self._on_report = on_report
        self._engine: Engine | None = None
        self._work: queue.SimpleQueue[tuple[str, Any, Any] | None] = queue.SimpleQueue()
        self._failed_plan = -1
        self._plan_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

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
        while (item := self._work.get()) is not None:
            kind, what, feed = item
            if kind == "use":
                self._engine, self._failed_plan = what, -1
            elif self._engine is not None:
                self._steps(self._engine, what, feed)

    def _steps(self, engine: Engine, grant: PlanGrant, feed: PlanFeed | None) -> None:
        if grant.run is not None:
            try:
                engine.begin(grant.run, feed if feed is not None else _feed_decoder.decode(grant.feed))
            except EngineError as error:
                self._fail(grant, grant.first_step, str(error), applied=False)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self._fail(grant, grant.first_step, f"{type(error).__name__}: {error}", applied=True)
        for step in range(grant.first_step, grant.last_step + 1):
            if grant.plan == self._failed_plan:
                return
            began = time.monotonic_ns()
            try:
                tokens = engine.step()
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self._fail(grant, step, f"{type(error).__name__}: {error}", applied=True)
                return
            duration = (time.monotonic_ns() - began) * PS_PER_NS
            self._on_report(StepReport(grant.plan, step, tuple(tokens), duration=duration))

    def _fail(self, grant: PlanGrant, step: int, error: str, *, applied: bool) -> None:
        self._failed_plan = grant.plan
        self._on_report(StepReport(grant.plan, step, error=error, applied=applied))
