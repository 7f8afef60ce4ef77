"""Free block ids, last freed first reused; those that were never used are a number, not a list."""

from __future__ import annotations

from collections.abc import Iterator


class FreeBlocks:
    """All of 0 … num_blocks - 1 are free at first, and are given out from 0 on."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._first_fresh = 0  # this one and those above it were never given out
        self._returned: list[int] = []
        # freed after those, each as it came: mostly the next request takes as many as the last one gave back
        self._tables: list[tuple[int, ...]] = []
        self._num_in_tables = 0

    def __len__(self) -> int:
        return len(self._returned) + self._num_in_tables + self._num_blocks - self._first_fresh

    def __iter__(self) -> Iterator[int]:
        self._take_apart()
        yield from self._returned
        yield from range(self._first_fresh, self._num_blocks)

    def take(self, n: int) -> tuple[int, ...]:
        """`n` blocks, of which there must be so many."""
        if self._tables:
            if len(self._tables[-1]) == n:
                self._num_in_tables -= n
                return self._tables.pop()
            self._take_apart()
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
        self._take_apart()
        self._returned.append(block)

    def extend(self, blocks: tuple[int, ...]) -> None:
        """The last of them is taken first."""
        if blocks:
            self._tables.append(blocks)
            self._num_in_tables += len(blocks)

    def _take_apart(self) -> None:
        for table in self._tables:
            self._returned.extend(table)
        self._tables.clear()
        self._num_in_tables = 0
