"""Generation phases whose KV is where they run: an executor that computed a prompt and now serves generation as well.

Nothing travels: the blocks that were held for a reader become the request's own, and only those that its answer will be
written to are new. They are looked at before any transfer, since they free nothing by waiting.
"""

from __future__ import annotations

import heapq
from typing import Any

from .blocks import BlockManager
from .life_cycle import Cause, State
from .visit import Visit


class LocalKv:
    """Those that wait, in queue order. `visits` are all of the executor's, by request id."""

    def __init__(self, blocks: BlockManager, visits: dict[int, Visit]) -> None:
        self._blocks = blocks
        self._visits = visits
        self._queue: list[tuple[Any, int, Visit]] = []

    def __bool__(self) -> bool:
        return bool(self._queue)

    def put(self, visit: Visit) -> None:
        """`visit.num_blocks` becomes what it needs beside the blocks that are held for it."""
        heapq.heappush(self._queue, (visit.order_key, visit.serial, visit))
        source = self.source_of(visit)
        if source is not None:
            visit.num_blocks -= len(self._blocks.blocks_of(source.id))

    def source_of(self, visit: Visit) -> Visit | None:
        """The context phase whose KV it continues; None if that is not held any more, or somebody else reads it."""
        params = visit.request.context_phase_params
        source = None if params is None else self._visits.get(params.req_id)
        if source is None or source.state is not State.CONTEXT_DONE or source.doom is not None:
            return None
        return None if source.pinned_by is not None or source.reader is not None else source

    def renew(self, lease_until: int) -> bool:
        """The KV of those that wait is still wanted; whether any is."""
        waiting = [visit for _, _, visit in self._queue if visit.state is State.GENERATION_QUEUED]
        for visit in waiting:
            source = self.source_of(visit)
            if source is not None:
                source.lease_until = lease_until
        return bool(waiting)

    def sources(self) -> set[int]:
        """The context phases that those that wait go on from."""
        params = (v.request.context_phase_params for _, _, v in self._queue if v.state is State.GENERATION_QUEUED)
        return {each.req_id for each in params if each is not None}

    def first(self) -> Visit | None:
        while self._queue and self._queue[0][2].state is not State.GENERATION_QUEUED:
            heapq.heappop(self._queue)
        return self._queue[0][2] if self._queue else None

    def last(self) -> Visit:
        """The youngest of those that wait; there is a first."""
        return max(entry for entry in self._queue if entry[2].state is State.GENERATION_QUEUED)[2]

    def take_over(self, visit: Visit, source: Visit) -> None:
        """`visit`, the first, now owns the blocks of `source`, whose stay is over, and what it needs beside them."""
        heapq.heappop(self._queue)
        self._blocks.hand_on(source.id, visit.id)
        if visit.num_blocks > 0:
            self._blocks.extend(visit.id, visit.num_blocks)
        visit.num_blocks = 0
        source.advance(Cause.FINISH)
        del self._visits[source.id]

    def drop_first(self) -> None:
        heapq.heappop(self._queue)
