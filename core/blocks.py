"""The KV blocks of one executor: who has which, and in what state.

Each block is in exactly one state. Of the blocks assigned to running requests, `used` are written and `reserved` are not
yet; `held` wait for a reader, `quarantined` may still be touched by a transfer that nobody wants any more, `cached` are
nobody's and can be found again (only a `PrefixCache` has any). free + reserved + used + held + quarantined + cached = total.

Block ids are handed out last freed, first reused: a total order, so that two runs of the same events agree.
"""

from __future__ import annotations

from .errors import BlockError
from .free_blocks import FreeBlocks


class BlockManager:
    """Hands out block ids 0 to num_blocks - 1 to owners (request ids)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = FreeBlocks(num_blocks)
        self._assigned: dict[int, tuple[int, ...]] = {}
        self._held: dict[int, tuple[int, ...]] = {}
        self._quarantined: dict[int, tuple[int, ...]] = {}
        self.num_held = 0
        self.num_quarantined = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_assigned(self) -> int:
        """Reserved and used ones together."""
        return self.num_blocks - len(self._free) - self.num_held - self.num_quarantined

    def allocate(self, owner: int, n: int) -> tuple[int, ...]:
        """Give `owner`, who has none, `n` blocks."""
        if n > len(self._free) or owner in self._assigned:
            raise BlockError(f"{n} blocks for {owner}: {len(self._free)} are free, it has {self._assigned.get(owner)}")
        blocks = self._assigned[owner] = self._free.take(n)
        return blocks

    def extend(self, owner: int, n: int) -> tuple[int, ...]:
        """`n` more blocks at the end of what `owner` has; the new ones."""
        had = self._assigned.pop(owner)
        try:
            more = self.allocate(owner, n)
        finally:
            self._assigned[owner] = had
        self._assigned[owner] = had + more
        return more

    def trim(self, owner: int, keep: int) -> int:
        """Free all but the first `keep` blocks of `owner`; how many that were."""
        had = self._assigned[owner]
        surplus = had[keep:]
        if surplus:
            self._assigned[owner] = had[:keep]
            self._free.extend(surplus[::-1])
        return len(surplus)

    def blocks_of(self, owner: int) -> tuple[int, ...]:
        """The block table of `owner`, in token order; empty if it has none."""
        return self._assigned.get(owner) or self._held.get(owner) or self._quarantined.get(owner) or ()

    def hold(self, owner: int) -> None:
        """Its blocks now wait for a reader."""
        blocks = self._held[owner] = self._assigned.pop(owner)
        self.num_held += len(blocks)

    def hand_on(self, owner: int, heir: int) -> None:
        """The blocks that are held for a reader of `owner` are `heir`'s own, who has none yet."""
        if heir in self._assigned:
            raise BlockError(f"{heir} is given the blocks of {owner} and has {self._assigned[heir]}")
        blocks = self._assigned[heir] = self._held.pop(owner)
        self.num_held -= len(blocks)

    def quarantine(self, owner: int) -> None:
        """Its blocks wait for a transfer to fall silent; nobody will use what is in them."""
        blocks = self._held.pop(owner, None)
        if blocks is None:
            blocks = self._assigned.pop(owner)
        else:
            self.num_held -= len(blocks)
        self._quarantined[owner] = blocks
        self.num_quarantined += len(blocks)

    def free(self, owner: int) -> int:
        """Take back whatever `owner` has, in any state; how many blocks that were."""
        blocks = self._assigned.pop(owner, None)
        if blocks is None:
            blocks = self._held.pop(owner, None)
            if blocks is not None:
                self.num_held -= len(blocks)
            else:
                blocks = self._quarantined.pop(owner, ())
                self.num_quarantined -= len(blocks)
        self._free.extend(blocks[::-1])
        return len(blocks)

    def check(self) -> None:
        """BlockError unless each block is in exactly one place and the counts agree."""
        seen = list(self._free)
        for table in (self._assigned, self._held, self._quarantined):
            for blocks in table.values():
                seen.extend(blocks)
        if sorted(seen) != list(range(self.num_blocks)):
            raise BlockError(f"blocks lost or given out twice: {len(seen)} accounted for of {self.num_blocks}")
        held = sum(map(len, self._held.values()))
        quarantined = sum(map(len, self._quarantined.values()))
        if (held, quarantined) != (self.num_held, self.num_quarantined):
            raise BlockError(
                f"held {held} counted {self.num_held}; quarantined {quarantined} counted {self.num_quarantined}"
            )
