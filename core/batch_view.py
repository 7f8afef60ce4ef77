"""What the batch policy of an executor sees: its limits, the prompts that have begun, and those that wait."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

from ..policies.vocabulary import Role
from .config import SchedulerConfig
from .life_cycle import State
from .visit import Visit


class WaitingPrompts:
    """Waiting prompts in queue order, read lazily: what is looked at and not taken is put back afterwards."""

    def __init__(self, heap: list[tuple[int, Any, int, Visit]]) -> None:
        self._heap = heap
        self._seen: list[tuple[int, Any, int, Visit]] = []

    def __iter__(self) -> Iterator[Visit]:
        yield from [entry[3] for entry in self._seen]
        while self._heap:
            entry = heapq.heappop(self._heap)
            if entry[3].state is not State.QUEUED:
                continue  # cancelled meanwhile
            self._seen.append(entry)
            yield entry[3]

    def put_back(self) -> None:
        for entry in self._seen:
            if entry[3].state is State.QUEUED:
                heapq.heappush(self._heap, entry)
        self._seen.clear()

    def find(self, request_id: int) -> Visit | None:
        return next((entry[3] for entry in self._seen if entry[3].id == request_id), None)


class BatchView:
    """See `policies.interfaces.BatchView`."""

    __slots__ = (
        "begun",
        "chunked",
        "max_num_tokens",
        "now",
        "num_decodes",
        "num_free_blocks",
        "num_free_slots",
        "role",
        "waiting",
    )

    def __init__(
        self,
        role: Role,
        limits: SchedulerConfig,
        now: int,
        num_decodes: int,
        num_free_blocks: int,
        num_free_slots: int,
        begun: list[Visit],
        waiting: WaitingPrompts,
    ) -> None:
        self.now = now
        self.role = role
        self.num_decodes = num_decodes
        self.num_free_blocks = num_free_blocks
        self.num_free_slots = num_free_slots
        self.max_num_tokens = limits.max_num_tokens
        self.chunked = limits.chunked_context
        self.begun = begun
        self.waiting: Iterable[Visit] = waiting
