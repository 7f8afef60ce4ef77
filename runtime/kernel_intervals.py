"""What ran on a GPU when, as torch's profiler saw it, and what lay between: intervals, gaps, overlap. Needs no device.

Times are microseconds of one origin; intervals are half-open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

Interval = tuple[float, float]

GAP_BOUNDS_US: Final = (5.0, 50.0, 500.0)
GAP_NAMES: Final = ("under 5 µs", "5 to 50 µs", "50 to 500 µs", "over 500 µs")
IN_STEP: Final = "inside a step"
BETWEEN_STEPS: Final = "between steps of a plan"
AT_PLAN: Final = "at a change of plan"
PLACES: Final = (IN_STEP, BETWEEN_STEPS, AT_PLAN)
EDGE: Final = "(the window's edge)"
KV_COPY: Final = "_copy_rows"


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """One kernel, copy or fill on a device."""

    start: float
    end: float
    name: str
    device: int = 0

    @property
    def is_kernel(self) -> bool:
        return not self.name.startswith(("Memcpy", "Memset"))


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch without a kernel; `before` and `after` are the kernels beside it, `place` is one of PLACES."""

    start: float
    end: float
    before: str
    after: str
    place: str

    @property
    def length(self) -> float:
        return self.end - self.start


def device_work(profile: Any, origin_ns: int | None = None) -> list[DeviceWork]:
    """All that a stopped torch profile saw on devices, in order of start. `origin_ns`: CLOCK_REALTIME at 0 µs.

    Without it times count from the beginning of the profile. Reads the profiler's own records: its Python events of a few
    seconds would take minutes and gigabytes.
    """
    results = profile.profiler.kineto_results
    origin = results.trace_start_ns() if origin_ns is None else origin_ns
    found = []
    for event in results.events():
        if event.device_type().name != "CUDA" or getattr(event, "is_user_annotation", bool)():
            continue
        start = (event.start_ns() - origin) / 1e3
        found.append(DeviceWork(start, start + event.duration_ns() / 1e3, event.name(), event.device_index()))
    found.sort(key=lambda work: work.start)
    return found


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, in order and disjoint."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            if end > found[-1][1]:
                found[-1] = (found[-1][0], end)
        elif end > start:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What two unions share."""
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > start:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def gaps(work: Sequence[DeviceWork], window: Interval) -> list[Gap]:
    """The stretches of `window` in which no kernel of `work` (in order of start) runs.

    A step ends with the copy of its tokens to the host, and a new plan begins with copies to the device: a gap with such a
    copy in it lies at a change of plan, or between two steps; one without lies inside a step.
    """
    found: list[Gap] = []
    end, last, copied = window[0], EDGE, 0
    for item in work:
        if item.start >= window[1]:
            break
        if not item.is_kernel:
            if item.end > end:  # else it lay beside a kernel
                copied |= 2 if "HtoD" in item.name else 1 if "DtoH" in item.name else 0
            continue
        if item.end <= window[0]:
            copied = 0
            continue
        if item.start > end:
            found.append(Gap(end, item.start, last, item.name, _place(copied)))
            copied = 0
        if item.end > end:
            end, last = item.end, item.name
            copied = 0
    if window[1] > end:
        found.append(Gap(end, window[1], last, EDGE, _place(copied)))
    return found


def _place(copied: int) -> str:
    return AT_PLAN if copied & 2 else BETWEEN_STEPS if copied else IN_STEP


def gap_class(microseconds: float) -> str:
    """The name of its class of length."""
    return GAP_NAMES[sum(microseconds >= bound for bound in GAP_BOUNDS_US)]


def neighbours(found: Iterable[Gap], at_least_us: float, most: int = 12) -> list[dict[str, Any]]:
    """What stands before and after the long gaps, by the time that they took."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for gap in found:
        if gap.length >= at_least_us:
            entry = sums[(short(gap.before), short(gap.after), gap.place)]
            entry[0] += 1
            entry[1] += gap.length
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])[:most]
    return [
        {"before": before, "after": after, "place": place, "number": int(number), "us": round(us, 1)}
        for (before, after, place), (number, us) in ranked
    ]


def short(name: str) -> str:
    """A kernel's name without its template's arguments and namespaces, at most 48 characters."""
    plain = name.removeprefix("void ").partition("<")[0].partition("(")[0].split("::")[-1]
    return (plain or name)[:48]
