"""`disagg bench transfer`: its table, and the measurement itself on a machine without a GPU."""

from __future__ import annotations

import pytest

from disagg.runtime import bench_transfer
from disagg.runtime.bench_transfer import Measured, TransferJob, TransferResult, rows_of


def job(backend: str = "cuda_ipc", device: str = "cuda", variant: str = "same") -> TransferJob:
    return TransferJob(backend, device, variant, (1024,), 4096)


def rows(*measured: Measured, job: TransferJob) -> list[tuple[str, float | None, float | None, bool | None]]:
    result = TransferResult(job, "", "a plain copy", measured)
    return [(row.name, row.ratio and round(row.ratio, 3), row.goal, row.met) for row in rows_of(result)]


def test_a_transfer_is_judged_by_a_plain_copy_of_the_same_size() -> None:
    fast, slow = (
        Measured("copy", 1024, 134 << 20, 0.0004, 0.00038),
        Measured("transfer", 1024, 134 << 20, 0.0005, 0.00038),
    )
    assert rows(fast, slow, job=job()) == [
        ("cuda_ipc, 1,024 tokens: copy alone", 0.95, 0.93, True),
        ("cuda_ipc, 1,024 tokens: transfer", 0.76, 0.93, False),
    ]


def test_a_layer_wise_transfer_is_judged_by_what_is_left_at_the_end() -> None:
    item = Measured("layer-wise", 4096, 1000, 0.3, 0.9, left_bytes=50, blocking_seconds=1.0)
    assert [row[1:] for row in rows(item, job=job())] == [(0.05, 0.10, True), (0.3, 0.25, False)]


def test_goals_are_those_of_gpus() -> None:
    item = Measured("layer-wise", 4096, 1000, 0.3, 0.9, left_bytes=50, blocking_seconds=1.0)
    moved = Measured("transfer", 1024, 1000, 0.5, 0.4)
    assert {row[2:] for row in rows(item, moved, job=job("mpi", "cpu"))} == {(None, None)}


@pytest.mark.mpi
@pytest.mark.parametrize("variant", ["same", "relayout"])
def test_the_measurement_runs_without_a_gpu(variant: str) -> None:
    small = TransferJob("mpi", "cpu", variant, (64,), 64 if variant == "same" else 0, repeats=1)
    result = bench_transfer._in_world(small)
    assert [item.name for item in result.measured] == ["transfer", "layer-wise"][: 2 if variant == "same" else 1]
    assert result.measured[0].num_bytes == 64 * (131072 if variant == "same" else 65536)
    assert all(item.seconds > 0 and item.plain_seconds > 0 for item in result.measured)
    assert result.description == "MPI messages from host memory"
