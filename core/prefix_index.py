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
        self._blocks: dict[int, OrderedDict[Name, None]] = {e: OrderedDict() for e in num_blocks}  # oldest use first

    def place(self, executor: int) -> int:
        """The executor's bit in the sets of `levels`."""
        return self._place[executor]

    def num_blocks(self, executor: int) -> int:
        """Blocks it is believed to hold."""
        return len(self._blocks[executor])

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
        blocks, room = self._blocks[executor], self._num_blocks[executor]
        self.stored(executor, hashes[:room])
        while len(blocks) > room:
            self._drop(executor, blocks.popitem(last=False)[0])

    def stored(self, executor: int, hashes: Sequence[Name]) -> None:
        """It holds these blocks, used just now; in the order in which they follow each other."""
        self.version += 1
        blocks, holders, bit = self._blocks[executor], self._holders, 1 << self._place[executor]
        for block in reversed(hashes):
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
                holders[block] = holders.get(block, 0) | bit

    def heard(self, executor: int, events: Sequence[Name]) -> None:
        """It has reported these `cache_events`."""
        first_stored = 1 + events[0]
        self.removed(executor, events[1:first_stored])
        self.stored(executor, events[first_stored:])

    def removed(self, executor: int, hashes: Sequence[Name]) -> None:
        """It holds these blocks no longer."""
        self.version += 1
        blocks = self._blocks[executor]
        for block in hashes:
            if block in blocks:
                del blocks[block]
                self._drop(executor, block)

    def lost(self, executor: int) -> None:
        """It is gone, and its blocks with it."""
        self.removed(executor, list(self._blocks[executor]))

    def _drop(self, executor: int, block: Name) -> None:
        left = self._holders[block] & ~(1 << self._place[executor])
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
