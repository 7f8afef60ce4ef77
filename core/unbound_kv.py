"""KV of finished context phases whose generation phase is held back: while no executor is bound, its lease is ours to renew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .commands import Send
from .events import LeaseRenewed
from .task import Task
from .timers import Timers

TIMER: Final = "renew"


class UnboundKv:
    """`lease`: the shortest of any executor. `emit` takes commands."""

    def __init__(self, lease: int, timers: Timers, emit: Callable[[Send], object]) -> None:
        self._lease = lease
        self._timers = timers
        self._emit = emit
        self._tasks: dict[int, Task] = {}  # by the user's id
        self._is_armed = False

    def add(self, task: Task, now: int) -> None:
        self._tasks[task.request.id] = task
        self._arm(now)

    def discard(self, task: Task) -> None:
        """It is bound, or over."""
        self._tasks.pop(task.request.id, None)

    def held_by(self, executor: int) -> list[Task]:
        return [task for task in self._tasks.values() if task.context_executor == executor]

    def renew(self, now: int) -> None:
        """One message to each executor that holds any."""
        self._is_armed = False
        held: dict[int, list[int]] = {}
        for task in self._tasks.values():
            if task.context_executor is not None and task.context_id is not None:
                held.setdefault(task.context_executor, []).append(task.context_id)
        for executor, ids in held.items():
            self._emit(Send(executor, LeaseRenewed(tuple(ids))))
        if held:
            self._arm(now)

    def _arm(self, now: int) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._timers.set(now + self._lease // 3, TIMER)
