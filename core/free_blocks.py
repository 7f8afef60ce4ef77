"""Free block ids, last freed first reused; those that were never used are a number, not a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class FreeBlocks:
    """All of 0 … num_blocks - 1 are free at first, and are given out from 0 on."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._first_fresh = 0  # this one and those above it were never given out
        self._returned: list[int] = []

    def __len__(self) -> int:
        return len(self._returned) + self._num_blocks - self._first_fresh

    def __iter__(self) -> Iterator[int]:
        yield from self._returned
        yield from range(self._first_fresh, self._num_blocks)

    def take(self, n: int) -> tuple[int, ...]:
        """`n` blocks, of which there must be so many."""
        returned = self._returned
        num_fresh = n - len(returned)
        if num_fresh <= 0:
            cut = len(returned) - n
            taken = tuple(returned[cut:])
            del returned[cut:]
            return taken
        first = self._first_fresh
        self._first_fresh += num_fresh
        taken = (*range(first + num_fresh - 1, first - 1, -1), *returned)
        returned.clear()
        return taken

    def append(self, block: int) -> None:
        self._returned.append(block)

    def extend(self, blocks: Sequence[int]) -> None:
        self._returned.extend(blocks)
