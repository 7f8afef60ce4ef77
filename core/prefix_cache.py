"""KV blocks that outlive their request: found again by the hash of the prefix that they end, shared, evicted when needed.

A block is *registered* under a hash once its tokens are written; a hash names the whole prefix up to the block's end, so
equal hashes are equal KV. Whoever needs the same prefix refers to the same block. A registered block that nobody refers to
is `cached`: still there to be matched, and the first to go when an empty block is wanted, least recently released first.

Two rules keep chains whole. The registered blocks of a table are its leading ones: where two requests have computed the
same block, the later one takes over the other's and gives its own back. And a table is released last block first. So whoever
refers to a block refers to all before it, a block is never evicted before those behind it, and depths can be searched by
halving. Names come from outside, and may be no chains: what was found is looked at block by block before it is shared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from msgspec.structs import replace

from .batch_view import WaitingPrompts
from .blocks import BlockManager
from .errors import BlockError
from .life_cycle import State
from .prefix_names import Name
from .visit import Visit

# the references to a block by state, counted in one number: who has it assigned, held, in quarantine; 0 is cached
_BITS: Final = 20  # all in 60, which compiled code computes with as a machine word
_ASSIGNED: Final = 1
_HELD: Final = 1 << _BITS
_QUARANTINED: Final = 1 << 2 * _BITS
_IN_USE: Final = _HELD - 1  # masks
_IN_HAND: Final = _IN_USE << _BITS


class PrefixCache(BlockManager):
    """A BlockManager in which owners share registered blocks.

    A shared block counts once, in the first of the states used, held, quarantined, cached that one of its references
    is in. `num_free` is what can be had: empty blocks and cached ones.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        super().__init__(num_blocks)
        self._tokens_per_block = tokens_per_block
        self._block_of: dict[Name, Name] = {}  # by hash
        self._hash_of: dict[Name, Name] = {}  # by registered block
        self._references: list[int] = []  # by block, as far as any was registered
        self._cached: OrderedDict[Name, None] = OrderedDict()  # registered blocks without references, first to go first
        self._num_registered: dict[int, int] = {}  # leading blocks of an owner's table
        self._num_arriving: dict[int, int] = {}  # of those, whose owner waits for the KV of its other blocks
        self._stored: dict[Name, None] = {}  # hashes, since the last forget_news
        self._removed: dict[Name, None] = {}
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

    @property
    def num_read_again(self) -> int:
        """References of requests with KV in hand to blocks that another of them refers to as well. Not exact while one
        waits for KV: a block that only such a one refers to is in use, and not written to the end of its table.
        """
        return max(0, self.num_written_references - self.num_in_use)

    # ---- what a request would find here -----------------------------------------------------------------------------

    def look(self, visit: Visit, num_blocks: int) -> None:
        """Say of a visit that has no blocks, and is to get `num_blocks`, what it would find: `num_kv_tokens` of its
        prompt, and in `num_blocks` how many blocks fewer there would be to be had. At least one token is left to compute.
        """
        hashes = visit.request.block_hashes
        depth = self._depth(hashes, min(len(hashes), (visit.num_to_compute - 1) // self._tokens_per_block))
        visit.num_kv_tokens = depth * self._tokens_per_block
        visit.num_blocks = num_blocks - self._depth(hashes, depth, in_use=True)

    def confirm(self, visit: Visit, num_blocks: int) -> bool:
        """Whether what `look` has found by halving is there block by block. If not its names are no prefix chain: they
        are forgotten, and nothing is found.
        """
        names = visit.request.block_hashes[: visit.num_kv_tokens // self._tokens_per_block]
        blocks = list(map(self._block_of.get, names))
        num_cached = sum(map(self._cached.__contains__, blocks))
        if None not in blocks and len(blocks) - num_cached == num_blocks - visit.num_blocks:
            return True
        visit.request = replace(visit.request, block_hashes=())
        visit.num_kv_tokens, visit.num_blocks = 0, num_blocks
        return False

    def _depth(self, hashes: Sequence[Name], most: int, in_use: bool = False) -> int:
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
        self._shift(blocks, _ASSIGNED)
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

    def register(self, owner: int, hashes: Sequence[Name], num_full: int, may_exchange: bool) -> None:
        """The first `num_full` blocks of `owner` are written, and `hashes` names them.

        A block that is here already takes the place of the owner's own, if it `may_exchange` them; else what follows of
        its table stays its own.
        """
        done = self._num_registered.get(owner, 0)
        num_full = min(num_full, len(hashes))
        if num_full <= done:
            return
        table: Sequence[Name] = self._assigned[owner]
        block_of = self._block_of
        there: list[int] = []  # places in the table
        for i in range(done, num_full):
            if hashes[i] not in block_of:
                self._store(table[i], hashes[i])
            elif may_exchange:
                there.append(i)
            else:
                num_full = i
                break
        if there:
            blocks = list(table)
            for i in there:
                self._free.append(blocks[i])
                blocks[i] = block_of[hashes[i]]
            self._shift([blocks[i] for i in there], _ASSIGNED)
            self._assigned[owner] = tuple(blocks)
        if num_full > done:
            self._num_registered[owner] = num_full
            self.num_written_references += num_full - done

    def arrived(self, owner: int) -> None:
        """The KV of the other blocks is there too."""
        self.num_written_references += self._num_arriving.pop(owner, 0)

    def hold(self, owner: int) -> None:
        super().hold(owner)
        self._move(owner, owner, self._held[owner], _ASSIGNED, _HELD)

    def hand_on(self, owner: int, heir: int) -> None:
        super().hand_on(owner, heir)
        self._move(owner, heir, self._assigned[heir], _HELD, _ASSIGNED)

    def quarantine(self, owner: int) -> None:
        before = _HELD if owner in self._held else _ASSIGNED
        super().quarantine(owner)
        self._move(owner, owner, self._quarantined[owner], before, _QUARANTINED)

    def _move(self, owner: int, heir: int, blocks: tuple[int, ...], before: int, after: int) -> None:
        """The table has changed its state; the counts of states know it as if all of it were its owner's own."""
        number = self._num_registered.pop(owner, 0)
        if not number:
            return
        self._num_registered[heir] = number
        self._count(before, number)  # as they were
        self._count(after, -number)
        if before == _ASSIGNED:
            self.num_written_references -= number - self._num_arriving.pop(owner, 0)
        elif after == _ASSIGNED:
            self.num_written_references += number
        self._shift(blocks[:number], after - before)

    def free(self, owner: int) -> int:
        """Let go of whatever `owner` has, in any state: its own blocks are empty, of those it shares the last one's
        reference makes them cached. How many it had."""
        num_registered = self._num_registered.pop(owner, 0)
        if not num_registered:
            return super().free(owner)
        state, tables = _ASSIGNED, self._assigned
        if owner not in tables:
            state, tables = (_HELD, self._held) if owner in self._held else (_QUARANTINED, self._quarantined)
        blocks = tables.pop(owner)
        own = blocks[num_registered:]
        self._count(state, -len(own))
        self._free.extend(own[::-1])
        if state == _ASSIGNED:
            self.num_written_references -= num_registered - self._num_arriving.pop(owner, 0)
        self._shift(blocks[num_registered - 1 :: -1], -state)
        return len(blocks)

    # ---- registered blocks ------------------------------------------------------------------------------------------

    def _shift(self, blocks: Sequence[int], change: int) -> None:
        """Change the references to each block by `change`, one by one: the order is that in which cached ones will go."""
        references, cached = self._references, self._cached
        in_use = held = quarantined = 0
        for block in blocks:
            was = references[block]
            now = references[block] = was + change
            if was & _IN_USE:
                if now & _IN_USE:
                    continue
                in_use -= 1
            elif was & _IN_HAND:
                held -= 1
            elif was:
                quarantined -= 1
            else:
                del cached[block]
            if now & _IN_USE:
                in_use += 1
            elif now & _IN_HAND:
                held += 1
            elif now:
                quarantined += 1
            else:
                cached[block] = None
        self.num_in_use += in_use
        self.num_held += held
        self.num_quarantined += quarantined

    def _count(self, state: int, n: int) -> None:
        if state == _HELD:
            self.num_held += n
        elif state == _QUARANTINED:
            self.num_quarantined += n

    def _store(self, block: int, name: Name) -> None:
        self._block_of[name] = block
        self._hash_of[block] = name
        references = self._references
        if block >= len(references):
            references += [0] * (block + 1 - len(references))
        references[block] = _ASSIGNED
        self.num_in_use += 1
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        name = self._hash_of.pop(block)
        del self._block_of[name]
        self._free.append(block)
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def news(self) -> tuple[int, ...]:
        """The hashes that came and went since `forget_news`, as `Report.cache_events` has them."""
        if not self._stored and not self._removed:
            return ()
        return (len(self._removed), *self._removed, *self._stored)

    def forget_news(self) -> None:
        """They were told."""
        self._removed.clear()
        self._stored.clear()

    def check(self) -> None:
        """BlockError unless each block is in exactly one place, the counts agree, and chains are whole."""
        references = dict.fromkeys(self._hash_of, 0)
        seen = [*self._free, *self._hash_of]
        own = {_ASSIGNED: 0, _HELD: 0, _QUARANTINED: 0}
        for state, tables in zip(own, (self._assigned, self._held, self._quarantined)):
            for owner, blocks in tables.items():
                num_registered = self._num_registered.get(owner, 0)
                for block in blocks[:num_registered]:
                    references[block] += state
                own[state] += len(blocks) - num_registered
                seen.extend(blocks[num_registered:])
        if sorted(seen) != list(range(self.num_blocks)):
            raise BlockError(f"blocks lost or given out twice: {len(seen)} accounted for of {self.num_blocks}")
        noted = {block: self._references[block] for block in self._hash_of}
        if references != noted or {name: b for b, name in self._hash_of.items()} != self._block_of:
            raise BlockError(f"references {noted}, counted {references}")
        if {block for block, number in references.items() if not number} != set(self._cached):
            raise BlockError(f"cached {list(self._cached)}; references {references}")
        in_use = sum(number & _IN_USE > 0 for number in references.values())
        held = own[_HELD] + sum(not number & _IN_USE and number & _IN_HAND > 0 for number in references.values())
        quarantined = own[_QUARANTINED] + sum(
            not number & (_HELD * _HELD - 1) and number > 0 for number in references.values()
        )
        if (in_use, held, quarantined) != (self.num_in_use, self.num_held, self.num_quarantined):
            raise BlockError(
                f"in use, held, quarantined are {(in_use, held, quarantined)}, counted"
                f" {(self.num_in_use, self.num_held, self.num_quarantined)}"
            )
        written = sum(number & _IN_USE for number in references.values()) - sum(self._num_arriving.values())
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
