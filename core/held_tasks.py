"""The requests that a policy holds: two queues, each in its order."""

from __future__ import annotations

import heapq
from typing import Any

from ..policies.vocabulary import Stage
from .task import Task


class HeldTasks:
    """Context and generation phases that wait to be routed. A task that has ended meanwhile is skipped."""

    def __init__(self) -> None:
        self._queues: dict[Stage, list[tuple[Any, int, Task]]] = {Stage.CONTEXT: [], Stage.GENERATION: []}
        self._size = 0

    def __len__(self) -> int:
        """How many are queued, those that ended meanwhile included."""
        return self._size

    def put(self, task: Task, stage: Stage, change: int) -> None:
        """Hold `task`, which was last asked about at the view's change number `change`."""
        task.held_for = stage
        task.held_at_change = change
        heapq.heappush(self._queues[stage], (task.order_key, task.serial, task))
        self._size += 1

    def first(self, stage: Stage) -> Task | None:
        queue = self._queues[stage]
        while queue and queue[0][2].held_for is not stage:
            heapq.heappop(queue)
            self._size -= 1
        return queue[0][2] if queue else None

    def take(self, stage: Stage) -> None:
        """Remove the first, as `first` has just shown it."""
        _, _, task = heapq.heappop(self._queues[stage])
        self._size -= 1
        task.held_for = None
