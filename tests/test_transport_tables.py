"""Block tables in a ring: what is in use is never written over, and what does not fit gets memory of its own."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest
import torch

from disagg.runtime.transport_tables import TableRing, Tables


class HostRing(TableRing):
    """A ring whose device is host memory: the same book-keeping."""

    def __init__(self, num_ids: int) -> None:
        super().__init__(torch.device("cpu"), 7, num_ids)
        self._device: Any = type("Device", (), {"type": "played"})()
        self._memory = [torch.zeros(num_ids, dtype=torch.int32) for _ in range(2)]

        def copy(destination: int, source: int, num_bytes: int, stream: int) -> None:
            assert stream == 7
            ctypes.memmove(destination, source, num_bytes)

        self._use(*(each.data_ptr() for each in self._memory), copy)

    def _apart(self, tables: Any) -> Tables:
        made = [torch.tensor(table, dtype=torch.int32) for table in tables]
        return Tables(tuple(each.data_ptr() for each in made), made)


def read(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def test_tables_that_are_in_use_keep_their_ids_whatever_is_put_and_released_meanwhile() -> None:
    rng = random.Random(1)
    ring = HostRing(64)
    in_use: list[tuple[Tables, list[list[int]]]] = []
    num_apart = 0
    for _ in range(3000):
        if in_use and rng.random() < 0.5:
            in_use.pop(rng.randrange(len(in_use)))[0].release()
        else:
            tables = [[rng.randrange(1 << 30) for _ in range(rng.randrange(1, 20))] for _ in range(rng.choice((1, 2)))]
            made = ring.put(*tables)
            num_apart += made.kept is not None
            in_use.append((made, tables))
        for made, tables in in_use:
            assert [read(at, len(t)) for at, t in zip(made.addresses, tables, strict=True)] == tables
    assert 0 < num_apart < 1500


def test_released_tables_make_room_again() -> None:
    ring = HostRing(16)
    for _ in range(100):
        made = ring.put(range(5), range(5))
        assert made.kept is None
        made.release()


@pytest.mark.parametrize("count", [17, 40])
def test_more_ids_than_the_ring_has_get_memory_of_their_own(count: int) -> None:
    ring = HostRing(16)
    made = ring.put(range(count))
    assert made.kept is not None
    assert read(made.addresses[0], count) == list(range(count))
