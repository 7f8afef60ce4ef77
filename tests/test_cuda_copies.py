"""How runs are handed to the copy engines, with a driver that copies in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from disagg.runtime.cuda_ipc import AT_ONCE, SUBMISSIONS, CudaError, Driver
from disagg.runtime.kv_runs import Run

STREAM, SIZE = 5, 24


class HostDriver:
    """The driver's two copies; `handed`: how many runs came in each call. The call after `num_good` of them fails."""

    def __init__(self, *, has_batches: bool = True, num_good: int = 1000) -> None:
        self.handed: list[int] = []

        def batch(goals: Any, sources: Any, sizes: Any, count: int, *rest: int) -> int:
            assert rest[-1] == STREAM
            if len(self.handed) == num_good:
                return 700
            self.handed.append(count)
            for goal, source, size in list(zip(goals, sources, sizes, strict=True))[:count]:
                ctypes.memmove(goal, source, size)
            return 0

        def one(goal: int, source: int, size: int, stream: int) -> int:
            return batch([goal], [source], [size], 1, stream)

        self.cuMemcpyAsync = one
        if has_batches:
            self.cuMemcpyBatchAsync = batch

    def cuGetErrorString(self, code: int, text: Any) -> None:
        pass


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, list[Run]]:
    source, target = torch.rand(count, SIZE // 4), torch.zeros(count, SIZE // 4)
    return source, target, [(source[i].data_ptr(), target[i].data_ptr(), SIZE) for i in range(count)]


@pytest.mark.parametrize("submissions", [SUBMISSIONS, AT_ONCE, (1,), (3, 1, 2), (1000,)])
@pytest.mark.parametrize("has_batches", [True, False])
def test_every_run_is_copied_once_however_they_are_handed_over(submissions: tuple[int, ...], has_batches: bool) -> None:
    library = HostDriver(has_batches=has_batches)
    driver = Driver(library)
    for count in (0, 1, 2, 5, 64, 7):
        source, target, runs = rows(count)
        library.handed.clear()
        driver.copy_runs(runs, STREAM, submissions)
        assert target.equal(source)
        assert sum(library.handed) == count


def test_the_engines_have_work_before_most_runs_are_worked_out_and_get_more_at_a_time_later() -> None:
    library = HostDriver()
    _source, _target, runs = rows(64)
    handed_before: list[int] = []

    def worked_out() -> Iterator[Run]:
        for run in runs:
            handed_before.append(sum(library.handed))
            yield run

    Driver(library).copy_runs(worked_out(), STREAM)
    first = SUBMISSIONS[0]
    assert handed_before[: first + 1] == [0] * first + [first]
    assert first < 8
    assert library.handed[:-1] == sorted(library.handed[:-1])
    assert len(library.handed) <= 8


def test_what_the_driver_refuses_is_told_by_name_and_nothing_more_is_handed_over() -> None:
    library = HostDriver(num_good=2)
    _source, _target, runs = rows(64)
    with pytest.raises(CudaError, match="cuMemcpyBatchAsync failed with 700"):
        Driver(library).copy_runs(runs, STREAM, (1, 2, 4))
    assert library.handed == [1, 2]
