"""What reaches the thread that owns a core: messages, reports of the engine, dead ranks, and what the user asks for."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from ..policies.vocabulary import Request
from .wire import Body

# The classes of the tie key: within an instant messages, transfers and timers come first, then step ends.
MESSAGE: Final = 0
STEP_END: Final = 1


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message from MPI rank `rank`; this rank's own number where it told itself."""

    rank: int
    body: Body


@dataclass(frozen=True, slots=True)
class RankDown:
    rank: int
    error: str | None = None  # it sent something that cannot be read


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the engine: its tokens, or why it failed. `applied`: the plan's delta is in the engine's batch."""

    plan: int
    step: int
    tokens: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    applied: bool = True
    duration: int = 0  # picoseconds


@dataclass(frozen=True, slots=True)
class Asked:
    """An event from within this process: of its user, or of its own driver. `sender` is its rank in the tie key."""

    event: Any  # ExecutorEvent or OrchestratorEvent, as its core takes
    sender: int = 0


@dataclass(frozen=True, slots=True)
class Submitted:
    """A user's request with its scripted output length, if it has one; `executor` where it goes past the core's routes."""

    request: Request
    output_length: int | None = None
    executor: int | None = None


class Inbox:
    """Many threads put, one takes everything there is."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()

    def put(self, item: Any) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def take(self, timeout_s: float | None) -> list[Any]:
        """All items, in order of arrival, after waiting for the first; none when the time is up."""
        with self._changed:
            if not self._items and (timeout_s is None or timeout_s > 0):
                self._changed.wait(timeout_s)
            items = list(self._items)
            self._items.clear()
        return items
