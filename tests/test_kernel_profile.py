"""What is read out of a profile of a GPU: gaps and where they lie, the share without a kernel while sequences decode."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.runtime.kernel_intervals import (
    AT_PLAN,
    BETWEEN_STEPS,
    EDGE,
    IN_STEP,
    DeviceWork,
    common,
    device_work,
    gap_class,
    gaps,
    length,
    merged,
    short,
)
from disagg.runtime.kernel_profile import VARIABLE, KernelProfile, idle_share, summary
from tests.profiled_steps import SERVING, TO_DEVICE, two_kernels


def test_unions_and_what_they_share() -> None:
    one = merged([(5, 9), (0, 2), (1, 3), (9, 10), (4, 4)])
    assert one == [(0, 3), (5, 10)]
    assert length(one) == 8
    assert common(one, [(2, 6), (8, 20)]) == [(2, 3), (5, 6), (8, 10)]
    assert common(one, []) == []


def test_gaps_are_told_apart_by_the_copies_in_them() -> None:
    found = [(gap.length, gap.place) for gap in gaps(SERVING, (0, 174))]
    assert found == [(2, IN_STEP), (8, BETWEEN_STEPS), (2, IN_STEP), (100, AT_PLAN), (2, IN_STEP)]


def test_kernels_that_overlap_leave_no_gap_and_a_copy_beside_a_kernel_tells_nothing() -> None:
    work = [
        DeviceWork(0, 20, "long"),
        DeviceWork(5, 6, TO_DEVICE),
        DeviceWork(8, 12, "short"),
        DeviceWork(25, 30, "next"),
    ]
    assert [(gap.start, gap.end, gap.place) for gap in gaps(work, (0, 30))] == [(20, 25, IN_STEP)]


def test_the_edges_of_the_window_count_as_gaps() -> None:
    found = gaps(two_kernels(10), (0, 50))
    assert [(gap.start, gap.end) for gap in found] == [(0, 10), (20, 22), (32, 50)]
    assert (found[0].before, found[-1].after) == (EDGE, EDGE)
    assert gaps([], (0, 50))[0].length == 50


@pytest.mark.parametrize(("us", "name"), [(4.9, "under"), (5.0, "5 to 50"), (50.0, "50 to 500"), (501.0, "over 500")])
def test_classes_of_length_begin_at_their_lower_bound(us: float, name: str) -> None:
    assert name in gap_class(us)


def test_a_summary_adds_up_to_its_window() -> None:
    found = summary(SERVING, (0, 200))
    idle = sum(entry["us"] for entry in found["gaps"].values())
    assert idle == pytest.approx(200 - 60)
    assert found["idle_share"] == pytest.approx(idle / 200)
    assert sum(entry["us"] for entry in found["places"].values()) == pytest.approx(idle)
    assert [place for *_, place in found["long_gaps"]] == [AT_PLAN]  # the last 26 µs are a short one
    assert found["short_gaps_us"] == pytest.approx(idle - 100)
    assert found["neighbours"] == [
        {"before": "_argmax_merge", "after": "gemm", "place": AT_PLAN, "number": 1, "us": 100}
    ]
    assert found["num_kernels"] == 6
    assert json.loads(json.dumps(found))["kernels"]["gemm"] == {"number": 3, "us": 30}


def test_kernels_that_receive_kv_count_as_kernels_and_the_share_without_them_is_told() -> None:
    work = sorted([*SERVING, DeviceWork(60, 150, "_copy_rows")], key=lambda item: item.start)
    found = summary(work, (0, 174))
    assert found["idle_share"] < 0.2
    assert found["idle_share_without_kv_copies"] == pytest.approx(summary(SERVING, (0, 174))["idle_share"])


def test_long_gaps_count_only_while_something_is_to_be_decoded() -> None:
    found = {"window_us": 174.0, **summary(SERVING, (0, 174))}
    always = idle_share(found, [(-5.0, 999.0)])
    assert always is not None
    assert always["idle"] == pytest.approx(114 / 174)
    assert always[AT_PLAN] == pytest.approx(100 / 174)
    with_a_pause = idle_share(found, [(0.0, 62.0), (142.0, 174.0)])  # 80 µs of the long gap lie in the pause
    assert with_a_pause is not None
    assert with_a_pause["idle"] == pytest.approx(34 / 94)
    assert idle_share(found, [(500.0, 600.0)]) is None


def test_records_of_the_profiler_are_read_in_order_and_those_of_the_host_are_left_out() -> None:
    def record(name: str, start: int, duration: int, device: str = "CUDA") -> Any:
        values: dict[str, Any] = {
            "name": name,
            "start_ns": start,
            "duration_ns": duration,
            "device_type": SimpleNamespace(name=device),
            "device_index": 1,
            "is_user_annotation": False,
        }
        return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})

    records = [record("b", 5000, 1000), record("a", 2000, 500), record("cudaLaunchKernel", 1000, 9, "CPU")]
    results = SimpleNamespace(trace_start_ns=lambda: 1000, events=lambda: records)
    seen = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert device_work(seen) == [DeviceWork(1.0, 1.5, "a", 1), DeviceWork(4.0, 5.0, "b", 1)]
    assert device_work(seen, 2000)[0].start == 0.0


def test_torch_still_offers_the_records_that_are_read() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.ones(2) + 1
    event = seen.profiler.kineto_results.events()[0]  # type: ignore[union-attr]
    assert event.device_type().name == "CPU"
    assert event.duration_ns() >= 0
    assert event.start_ns() >= seen.profiler.kineto_results.trace_start_ns()  # type: ignore[union-attr]
    assert event.device_index() is not None
    assert device_work(seen) == []


def test_names_are_short_enough_for_a_table() -> None:
    assert (
        short("void pytorch_flash::flash_fwd_kernel<Traits<128, cutlass::bfloat16_t>, true>(Params)")
        == "flash_fwd_kernel"
    )
    assert short("_split") == "_split"
    assert len(short("x" * 100)) == 48


def test_a_rank_without_a_gpu_leaves_no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, f"{tmp_path},0,1")
    KernelProfile(1, "cpu", lambda: 0).finish()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A rank that believes to be on cuda:1; the profiler runs, and sees no kernel here."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))
    return tmp_path / "profiles"


def test_a_window_that_the_run_outlives_says_what_it_saw_and_on_which_clock(
    as_on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"{as_on_a_gpu},0,30")
    asked: list[int] = []

    def num_decodes() -> int:
        asked.append(1)
        return 3 if len(asked) > 5 else 0

    profile = KernelProfile(4, "cuda:1", num_decodes, lambda: 77)
    deadline = time.monotonic() + 20
    while len(asked) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    profile.finish()  # ends the window of 30 s
    found = json.loads((as_on_a_gpu / "rank-4.json").read_text())
    assert found["origin_ns"] == 77
    assert 0 < found["window_us"] < 25e6
    start, end = found["sampled_decoding"][0]
    assert start > 0
    assert end == pytest.approx(found["window_us"], abs=1)
    assert found["num_kernels"] == 0
    assert found["idle_share"] == 1.0


def test_a_profiler_that_cannot_start_costs_nothing_but_its_profile(
    as_on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_asked = threading.Event()

    def refuse(activities: object) -> None:
        was_asked.set()
        raise RuntimeError("CUPTI: insufficient privileges")

    import torch

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    monkeypatch.setenv(VARIABLE, f"{as_on_a_gpu},0,0.2")
    profile = KernelProfile(4, "cuda:1", lambda: 0)
    assert was_asked.wait(20)
    profile.finish()
    assert "insufficient privileges" in json.loads((as_on_a_gpu / "rank-4.json").read_text())["error"]


def test_a_run_that_ends_before_the_window_leaves_a_word_about_it(
    as_on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"{as_on_a_gpu},30,30")
    KernelProfile(4, "cuda:1", lambda: 0).finish()
    assert "before the window" in json.loads((as_on_a_gpu / "rank-4.json").read_text())["error"]
