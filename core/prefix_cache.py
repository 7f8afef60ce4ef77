"""KV blocks that outlive their request: found again by the hash of the prefix that they end, shared, evicted when needed.

A block is *registered* under a hash once its tokens are written; a hash names the whole prefix up to the block's end, so
equal hashes are equal KV. Whoever needs the same prefix refers to the same block. A registered block that nobody refers to
is `cached`: still there to be matched, and the first to go when an empty block is wanted, least recently released first.

Two rules keep chains whole. The registered blocks of a table are its leading ones: where two requests have computed the
same block, the later one takes over the other's and gives its own back. And a table is released last block first. So whoever
refers to a block refers to all before it, a block is never evicted before those behind it, and depths can be searched by
halving.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from .batch_view import WaitingPrompts
from .blocks import BlockError, BlockManager
from .life_cycle import State
from .visit import Visit

_ASSIGNED: Final = 0
_HELD: Final = 1
_QUARANTINED: Final = 2
_CACHED: Final = 3  # no references


class PrefixCache(BlockManager):
    """A BlockManager in which owners share registered blocks.

    A shared block counts once, in the first of the states used, held, quarantined, cached that one of its references
    is in. `num_free` is what can be had: empty blocks and cached ones.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        super().__init__(num_blocks)
        self._tokens_per_block = tokens_per_block
        self._block_of: dict[int, int] = {}  # by hash
        self._hash_of: dict[int, int] = {}  # by registered block
        self._references: dict[int, list[int]] = {}  # of a registered block: assigned, held, quarantined
        self._cached: OrderedDict[int, None] = OrderedDict()  # registered blocks without references, first to go first
        self._num_registered: dict[int, int] = {}  # leading blocks of an owner's table
        self._num_arriving: dict[int, int] = {}  # of those, whose owner waits for the KV of its other blocks
        self._stored: dict[int, None] = {}  # hashes, since the last take_events
        self._removed: dict[int, None] = {}
        self.num_in_use = 0  # registered blocks that an assigned owner refers to
        self.num_written_references = 0  # references of assigned owners, but for those that wait for KV

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_empty(self) -> int:
        """Blocks that can be had without evicting anything."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_assigned(self) -> int:
        return super().num_assigned - len(self._cached)

    # ---- what a request would find here -----------------------------------------------------------------------------

    def look(self, visit: Visit, num_blocks: int) -> None:
        """Say of a visit that has no blocks, and is to get `num_blocks`, what it would find: `num_kv_tokens` of its
        prompt, and in `num_blocks` how many blocks fewer there would be to be had. At least one token is left to compute.
        """
        hashes = visit.request.block_hashes
        depth = self._depth(hashes, min(len(hashes), (visit.num_to_compute - 1) // self._tokens_per_block))
        visit.num_kv_tokens = depth * self._tokens_per_block
        visit.num_blocks = num_blocks - self._depth(hashes, depth, in_use=True)

    def _depth(self, hashes: Sequence[int], most: int, in_use: bool = False) -> int:
        """How many of the first `most` blocks are here (`in_use`: and referred to)."""
        low, block_of, cached = 0, self._block_of, self._cached
        while low < most:
            middle = (low + most + 1) // 2
            block = block_of.get(hashes[middle - 1])
            if block is None or (in_use and block in cached):
                most = middle - 1
            else:
                low = middle
        return low

    # ---- tables -----------------------------------------------------------------------------------------------------

    def share(self, visit: Visit, num_blocks: int, is_arriving: bool = False) -> None:
        """Give the visit, as its first blocks, those that `look` has found since the last change; in `visit.num_blocks`,
        how many of `num_blocks` it still lacks. `is_arriving`: the KV of its other blocks will come from elsewhere.
        """
        num_shared = visit.num_kv_tokens // self._tokens_per_block
        visit.num_blocks = num_blocks - num_shared
        if not num_shared:
            return
        blocks = tuple(self._block_of[name] for name in visit.request.block_hashes[:num_shared])
        for block in blocks:
            self._refer(block)
        self._assigned[visit.id] = blocks
        self._num_registered[visit.id] = num_shared
        if is_arriving:
            self._num_arriving[visit.id] = num_shared
        else:
            self.num_written_references += num_shared

    def allocate(self, owner: int, n: int) -> tuple[int, ...]:
        """`n` blocks for `owner`, who has none but those that it shares; its whole table."""
        had = self._assigned.get(owner, ())
        if len(had) != self._num_registered.get(owner, 0):
            raise BlockError(f"{n} blocks for {owner}, which has {had}")
        return had + self.extend(owner, n)

    def extend(self, owner: int, n: int) -> tuple[int, ...]:
        if n > self.num_free:
            raise BlockError(f"{n} more blocks for {owner}: {self.num_free} are free")
        while len(self._free) < n:
            self._evict()
        had = self._assigned.pop(owner, ())
        more = super().allocate(owner, n)
        self._assigned[owner] = had + more
        return more

    def register(self, owner: int, hashes: Sequence[int], num_full: int, may_exchange: bool) -> None:
        """The first `num_full` blocks of `owner` are written, and `hashes` names them.

        A block that is here already takes the place of the owner's own, if it `may_exchange` them; else what follows of
        its table stays its own.
        """
        done = self._num_registered.get(owner, 0)
        num_full = min(num_full, len(hashes))
        if num_full <= done:
            return
        table = self._assigned[owner]
        changed: list[int] = []
        for i in range(done, num_full):
            known = self._block_of.get(hashes[i])
            if known is None:
                self._store(table[i], hashes[i])
            elif may_exchange:
                self._refer(known)
                changed.append(i)
            else:
                num_full = i
                break
        if changed:
            blocks = list(table)
            for i in changed:
                self._free.append(blocks[i])
                blocks[i] = self._block_of[hashes[i]]
            self._assigned[owner] = tuple(blocks)
        if num_full > done:
            self._num_registered[owner] = num_full
            self.num_written_references += num_full - done

    def arrived(self, owner: int) -> None:
        """The KV of the other blocks is there too."""
        self.num_written_references += self._num_arriving.pop(owner, 0)

    def hold(self, owner: int) -> None:
        super().hold(owner)
        self._move(owner, self._held[owner], _ASSIGNED, _HELD)

    def hand_on(self, owner: int, heir: int) -> None:
        super().hand_on(owner, heir)
        num_registered = self._num_registered.pop(owner, 0)
        if num_registered:
            self._num_registered[heir] = num_registered
            self.num_written_references += num_registered
        self._move(heir, self._assigned[heir], _HELD, _ASSIGNED)

    def quarantine(self, owner: int) -> None:
        before = _HELD if owner in self._held else _ASSIGNED
        super().quarantine(owner)
        self._move(owner, self._quarantined[owner], before, _QUARANTINED)

    def _move(self, owner: int, blocks: tuple[int, ...], before: int, after: int) -> None:
        """The owner's table has changed its state; the counts of states know it as if all of it were its own."""
        num_registered = self._num_registered.get(owner, 0)
        if not num_registered:
            return
        self._count(before, num_registered)  # as they were
        self._count(after, -num_registered)
        if before == _ASSIGNED:
            self.num_written_references -= num_registered - self._num_arriving.pop(owner, 0)
        for block in blocks[:num_registered]:
            references = self._references[block]
            was = _state(references)
            references[before] -= 1
            references[after] += 1
            self._change(block, was, _state(references))

    def free(self, owner: int) -> int:
        """Let go of whatever `owner` has, in any state: its own blocks are empty, of those it shares the last one's
        reference makes them cached. How many it had."""
        num_registered = self._num_registered.pop(owner, 0)
        if not num_registered:
            return super().free(owner)
        tables = (self._assigned, self._held, self._quarantined)
        state = next(i for i, table in enumerate(tables) if owner in table)
        blocks = tables[state].pop(owner)
        own = blocks[num_registered:]
        self._count(state, -len(own))
        self._free.extend(reversed(own))
        if state == _ASSIGNED:
            self.num_written_references -= num_registered - self._num_arriving.pop(owner, 0)
        for block in reversed(blocks[:num_registered]):
            references = self._references[block]
            was = _state(references)
            references[state] -= 1
            self._change(block, was, _state(references))
        return len(blocks)

    # ---- registered blocks ------------------------------------------------------------------------------------------

    def _refer(self, block: int) -> None:
        references = self._references[block]
        was = _state(references)
        references[_ASSIGNED] += 1
        self._change(block, was, _ASSIGNED)

    def _change(self, block: int, was: int, now: int) -> None:
        if was == now:
            return
        if was == _CACHED:
            del self._cached[block]
        elif was == _ASSIGNED:
            self.num_in_use -= 1
        else:
            self._count(was, -1)
        if now == _CACHED:
            self._cached[block] = None
        elif now == _ASSIGNED:
            self.num_in_use += 1
        else:
            self._count(now, 1)

    def _count(self, state: int, n: int) -> None:
        if state == _HELD:
            self.num_held += n
        elif state == _QUARANTINED:
            self.num_quarantined += n

    def _store(self, block: int, name: int) -> None:
        self._block_of[name] = block
        self._hash_of[block] = name
        self._references[block] = [1, 0, 0]
        self.num_in_use += 1
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        name = self._hash_of.pop(block)
        del self._block_of[name], self._references[block]
        self._free.append(block)
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def take_events(self) -> tuple[int, ...]:
        """The hashes that came and went since the last call, as `Report.cache_events` has them."""
        if not self._stored and not self._removed:
            return ()
        events = (len(self._removed), *self._removed, *self._stored)
        self._removed.clear()
        self._stored.clear()
        return events

    def check(self) -> None:
        """BlockError unless each block is in exactly one place, the counts agree, and chains are whole."""
        references: dict[int, list[int]] = {block: [0, 0, 0] for block in self._hash_of}
        seen = [*self._free, *self._hash_of]
        own = [0, 0, 0]
        for state, tables in enumerate((self._assigned, self._held, self._quarantined)):
            for owner, blocks in tables.items():
                num_registered = self._num_registered.get(owner, 0)
                for block in blocks[:num_registered]:
                    references[block][state] += 1
                own[state] += len(blocks) - num_registered
                seen.extend(blocks[num_registered:])
        if sorted(seen) != list(range(self.num_blocks)):
            raise BlockError(f"blocks lost or given out twice: {len(seen)} accounted for of {self.num_blocks}")
        if references != self._references or {self._hash_of[b]: b for b in self._hash_of} != self._block_of:
            raise BlockError(f"references {self._references}, counted {references}")
        states = [_state(counts) for counts in references.values()]
        if {b for b, counts in references.items() if _state(counts) == _CACHED} != set(self._cached):
            raise BlockError(f"cached {list(self._cached)}; references {references}")
        found = (states.count(_ASSIGNED), own[_HELD] + states.count(_HELD), own[2] + states.count(_QUARANTINED))
        if found != (self.num_in_use, self.num_held, self.num_quarantined):
            raise BlockError(
                f"in use, held, quarantined are {found}, counted"
                f" {(self.num_in_use, self.num_held, self.num_quarantined)}"
            )
        written = sum(counts[_ASSIGNED] for counts in references.values()) - sum(self._num_arriving.values())
        if written != self.num_written_references:
            raise BlockError(f"{written} references to written tables, counted {self.num_written_references}")


class MatchedPrompts(WaitingPrompts):
    """Waiting prompts that show, while a batch policy looks at them, what they would find cached."""

    def __init__(
        self, heap: list[tuple[int, Any, int, Visit]], cache: PrefixCache, blocks_to_admit: Callable[[Visit], int]
    ) -> None:
        super().__init__(heap)
        self._cache = cache
        self._blocks_to_admit = blocks_to_admit

    def __iter__(self) -> Iterator[Visit]:
        for visit in super().__iter__():
            self._cache.look(visit, self._blocks_to_admit(visit))
            yield visit

    def put_back(self) -> None:
        for entry in self._seen:
            if entry[3].state is State.QUEUED:
                entry[3].num_kv_tokens = 0
        super().put_back()


def _state(references: list[int]) -> int:
    for state, number in enumerate(references):
        if number:
            return state
    return _CACHED
