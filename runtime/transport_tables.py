"""Block ids where a kernel reads them: a ring of pinned memory with a twin on the device, written over and over.

Pinning memory for each transfer costs more than all its messages.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

_RING_IDS: Final = 1 << 18  # 1 MiB: hundreds of requests


class Tables:
    """The tables of one end. `addresses`: one for each; to be released once no kernel reads them."""

    __slots__ = ("addresses", "is_released", "kept", "stop")

    def __init__(self, addresses: tuple[int, ...], kept: Any = None, stop: int = 0) -> None:
        self.addresses = addresses
        self.kept = kept
        self.stop = stop
        self.is_released = False

    def release(self) -> None:
        self.is_released = True


class TableRing:
    """Makes `Tables` in the order of `stream`, the current one, without waiting for the device. For one thread.

    By the driver's own call: torch's costs ten times as much, and three times that after a rest.
    """

    def __init__(self, device: torch.device, stream: int = 0, num_ids: int = _RING_IDS) -> None:
        self._device = device
        self._stream = stream
        self._size = num_ids
        self._lent: deque[Tables] = deque()  # oldest first; each has the ids from the one before to its `stop`
        self._head = 0  # positions only grow; modulo the size they are places
        self._tail = 0
        if device.type != "cpu":
            from .cuda_ipc import Driver

            self._pinned = torch.empty(num_ids, dtype=torch.int32, pin_memory=True)
            self._twin = torch.empty(num_ids, dtype=torch.int32, device=device)
            self._use(int(self._pinned.data_ptr()), int(self._twin.data_ptr()), Driver().copy)

    def _use(self, pinned: int, twin: int, copy: Callable[[int, int, int, int], None]) -> None:
        """Two rings of `self._size` ids at these addresses, and what copies (destination, source, bytes, stream)."""
        self._ids: Any = (ctypes.c_int32 * self._size).from_address(pinned)
        self._from, self._to, self._copy = pinned, twin, copy

    def put(self, *tables: Sequence[int]) -> Tables:
        if self._device.type == "cpu":
            made = [torch.tensor(table, dtype=torch.int32) for table in tables]
            return Tables(tuple(each.data_ptr() for each in made), made)
        start = self._take(sum(map(len, tables)))
        if start is None:  # very many, or the oldest are still in use
            return self._apart(tables)
        addresses, at = [], start
        for table in tables:
            self._ids[at : at + len(table)] = table
            addresses.append(self._to + 4 * at)
            at += len(table)
        self._copy(self._to + 4 * start, self._from + 4 * start, 4 * (at - start), self._stream)
        lent = Tables(tuple(addresses), None, self._head)
        self._lent.append(lent)
        return lent

    def _apart(self, tables: Sequence[Sequence[int]]) -> Tables:
        made = [torch.tensor(table, dtype=torch.int32).pin_memory() for table in tables]
        there = [each.to(self._device, non_blocking=True) for each in made]
        return Tables(tuple(each.data_ptr() for each in there), (made, there))

    def _take(self, count: int) -> int | None:
        """A place for so many ids in a row, or None."""
        while self._lent and self._lent[0].is_released:
            self._tail = self._lent.popleft().stop
        if not self._lent:
            self._tail = self._head
        start = self._head
        if start % self._size + count > self._size:  # it would run over the end: begin anew
            start += self._size - start % self._size
        if start + count - self._tail > self._size:
            return None
        self._head = start + count
        return start % self._size
