"""Which executor holds which prompt blocks: hash chains, heard from executors, or learnt from the orchestrator's dispatches.

An executor that reuses blocks tells which came and went, in its reports: what is known of it is exact, and as old as
its last report. Of any other there is an approximation, as SGLang's router has it: it is believed to hold the blocks of
every prompt it was sent, the least recently used dropped beyond its pool.

A hash names the whole prefix up to the end of its block. Whoever holds a block holds those before it: a prompt's blocks
are used last block first, so a block is never older than those behind it, and the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from .prefix_names import Name


class PrefixIndex:
    """Of dispatches idle, at no cost, until it is asked for the first time: it knows those from then on."""

    def __init__(self, num_blocks: Mapping[int, int], reporting: Iterable[int] = ()) -> None:
        """`num_blocks`: the size of each executor's KV pool by id; `reporting` are those that tell of their blocks."""
        self.version = 0  # grows with every change
        self.is_asked = False
        self._num_blocks = dict(num_blocks)
        self._reporting = frozenset(reporting)
        self._place = {executor: i for i, executor in enumerate(num_blocks)}
        self._holders: dict[Name, int] = {}  # block hash: bit set of executors' places
        # of those that do not report: what each was sent, oldest use first
        self._sent: dict[int, OrderedDict[Name, None]] = {
            executor: OrderedDict() for executor in num_blocks if executor not in self._reporting
        }
        self._num_reported = dict.fromkeys(self._reporting, 0)  # blocks of those that do

    def place(self, executor: int) -> int:
        """The executor's bit in the sets of `levels`."""
        return self._place[executor]

    def num_blocks(self, executor: int) -> int:
        """Blocks it is believed to hold."""
        sent = self._sent.get(executor)
        return self._num_reported[executor] if sent is None else len(sent)

    def levels(self, hashes: Sequence[Name]) -> list[tuple[int, int]]:
        """(depth, bit set of the executors that hold at least the first `depth` blocks), deeper each time, sets shrinking.

        A binary search for each depth at which somebody drops out: a long prompt costs few look-ups.
        """
        self.is_asked = True
        get = self._holders.get
        found: list[tuple[int, int]] = []
        least, most = 1, len(hashes)
        holders = get(hashes[0], 0) if hashes else 0
        while holders:
            low, high = least, most
            while low < high:
                middle = (low + high + 1) // 2
                if get(hashes[middle - 1], 0) & holders == holders:
                    low = middle
                else:
                    high = middle - 1
            found.append((low, holders))
            if low == most:
                break
            holders &= get(hashes[low], 0)
            least = low + 1
        return found

    def used(self, executor: int, hashes: Sequence[Name]) -> None:
        """`executor` was sent a prompt of these blocks."""
        if not (self.is_asked and hashes) or executor in self._reporting:
            return
        self.version += 1
        sent, room = self._sent[executor], self._num_blocks[executor]
        holders, bit = self._holders, 1 << self._place[executor]
        for block in reversed(hashes[:room]):
            if block in sent:
                sent.move_to_end(block)
            else:
                sent[block] = None
                holders[block] = holders.get(block, 0) | bit
        while len(sent) > room:
            self._drop(sent.popitem(last=False)[0], bit)

    def heard(self, executor: int, events: Sequence[Name]) -> None:
        """It has reported these `cache_events`."""
        self.version += 1
        holders, bit = self._holders, 1 << self._place[executor]
        first_stored, change = 1 + events[0], 0
        for block in events[1:first_stored]:
            if holders.get(block, 0) & bit:
                change -= 1
                self._drop(block, bit)
        for block in events[first_stored:]:
            known = holders.get(block, 0)
            if not known & bit:
                change += 1
                holders[block] = known | bit
        self._num_reported[executor] += change

    def lost(self, executor: int) -> None:
        """It is gone, and its blocks with it."""
        self.version += 1
        bit = 1 << self._place[executor]
        for block in [block for block, executors in self._holders.items() if executors & bit]:
            self._drop(block, bit)
        if executor in self._num_reported:
            self._num_reported[executor] = 0
        else:
            self._sent[executor].clear()

    def _drop(self, block: Name, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
