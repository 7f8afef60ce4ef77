"""`disagg bench transfer`: its table, and the measurement itself on a machine without a GPU."""

from __future__ import annotations

import pytest

from disagg.runtime import bench_transfer
from disagg.runtime.bench_transfer import Measured, TransferJob, TransferResult, rows_of
from disagg.runtime.bench_transfer_marks import EndPair, Step, steps_of
from disagg.runtime.launcher import LaunchError


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


def test_the_data_path_is_judged_by_itself_beside_the_whole_and_control_is_the_rest() -> None:
    steps = (Step("reader", "launching", 20e-6),)
    item = Measured("transfer", 1024, 134 << 20, 0.0005, 0.00038, data_seconds=0.0004, steps=steps)
    found = rows_of(TransferResult(job(), "", "a plain copy", (item,)))
    assert [(row.name.partition(": ")[2], row.goal, row.met) for row in found] == [
        ("transfer", 0.93, False),
        ("data path alone, without control messages", 0.93, True),
        ("control messages", None, None),
        ("reader, launching", None, None),
    ]
    assert found[2].measured == pytest.approx(100.0)
    assert found[3].measured == pytest.approx(20.0)


def test_a_transfer_begins_when_both_ends_were_called_and_its_data_with_the_first_work_on_pages() -> None:
    sender = (("called", 1000), ("packing", 5000), ("packing", 7000), ("told", 20_000))
    reader = (("called", 3000), ("begun", 3500), ("whole", 15_000), ("told", 16_000))
    pair = EndPair(sender, reader)
    assert pair.whole_seconds == pytest.approx(13e-6)
    assert pair.data_seconds == pytest.approx(10e-6)
    assert pair.last_data_seconds == pytest.approx(8e-6)
    steps = steps_of([pair, pair])
    assert [(step.who, step.what) for step in steps] == [
        ("reader", "called"),
        ("reader", "begun"),
        ("sender", "packing"),
        ("sender", "packing, the last"),
        ("reader", "whole"),
        ("reader", "told"),
        ("sender", "told"),
    ]
    assert steps[2].seconds == pytest.approx(2e-6)


@pytest.mark.mpi
@pytest.mark.parametrize("variant", ["same", "relayout"])
def test_the_measurement_runs_without_a_gpu(variant: str) -> None:
    small = TransferJob("mpi", "cpu", variant, (64,), 64 if variant == "same" else 0, repeats=1)
    result = bench_transfer._in_world(small)
    assert [item.name for item in result.measured] == ["transfer", "layer-wise"][: 2 if variant == "same" else 1]
    assert 0 < result.measured[0].data_seconds < result.measured[0].seconds
    assert result.measured[0].num_bytes == 64 * (131072 if variant == "same" else 65536)
    assert all(item.seconds > 0 and item.plain_seconds > 0 for item in result.measured)
    assert result.description == "MPI messages from host memory"


@pytest.mark.mpi
def test_a_measurement_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_transfer, "_TIMEOUT_S", 0.2)
    with pytest.raises(LaunchError, match=r"of mpi did not end within 0\.2 s; allowed: --quick"):
        bench_transfer._in_world(TransferJob("mpi", "cpu", "same", (64,), 0))
