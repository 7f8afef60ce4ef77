"""What a router remembers of sessions: where each was served last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from .vocabulary import Request, Stage

_MOST_SESSIONS: Final = 1 << 17


class SessionMemory:
    """The executor that last served each session, by stage; the sessions that were silent longest are forgotten."""

    def __init__(self, most: int = _MOST_SESSIONS) -> None:
        self._most = most
        self._executors: OrderedDict[tuple[bool, str], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._executors)

    def dispatched(self, request: Request, stage: Stage, executor: int) -> None:
        if request.session is None:
            return
        key = (stage is Stage.GENERATION, request.session)
        self._executors[key] = executor
        self._executors.move_to_end(key)
        if len(self._executors) > self._most:
            self._executors.popitem(last=False)

    def executor_of(self, request: Request, is_generation: bool) -> int | None:
        if request.session is None:
            return None
        return self._executors.get((is_generation, request.session))
