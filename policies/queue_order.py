"""Queue orders: which of the waiting requests is served first."""

from __future__ import annotations

from typing import Any

from .interfaces import QueueOrder
from .registry import register
from .vocabulary import Request


@register("fcfs", kind="queue_order", source="every system's default")
class FirstComeFirstServed(QueueOrder):
    """In order of arrival at the queue."""

    def key(self, request: Request, now: int) -> Any:
        return 0
