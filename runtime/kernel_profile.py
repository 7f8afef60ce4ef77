"""How busy a rank's GPU is while it serves: the union of all kernel intervals in a window of the run, from torch's profiler.

Asked for by the environment variable DISAGG_KERNEL_PROFILE="FOLDER,AFTER_S,SECONDS": every rank on a GPU then leaves
FOLDER/rank-N.json, of at most a few hundred kilobytes. Off otherwise; `disagg bench idle` says what the profiler costs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from .kernel_intervals import (
    EDGE,
    GAP_NAMES,
    KV_COPY,
    PLACES,
    DeviceWork,
    Interval,
    common,
    device_work,
    gap_class,
    gaps,
    length,
    merged,
    neighbours,
    short,
)

VARIABLE: Final = "DISAGG_KERNEL_PROFILE"
LONG_GAP_US: Final = 50.0
_SAMPLE_S: Final = 0.002
_MOST_GAPS: Final = 10_000
_MOST_KERNELS: Final = 20


class KernelProfile:
    """The profile that the environment asks for, of one rank; nothing where it asks for none.

    The window is taken by a thread of its own and ends early with the run; what was seen is read in `finish`, since reading
    it holds the interpreter for seconds. `num_decodes` is the engine's batch, which keeps the last sequences until its next
    plan; who knows the run's tables gives `idle_share` better intervals, for which `origin_ns` tells the run's clock.
    """

    def __init__(
        self, rank: int, device: str, num_decodes: Callable[[], int], origin_ns: Callable[[], int] | None = None
    ) -> None:
        self._thread: threading.Thread | None = None
        asked = os.environ.get(VARIABLE)
        if not asked or not device.startswith("cuda"):
            return
        folder, after, seconds = asked.rsplit(",", 2)
        self._path = Path(folder) / f"rank-{rank}.json"
        self._device = torch.device(device)
        self._found: dict[str, Any] = {"rank": rank, "device": device}
        self._origin_ns = origin_ns
        self._began_ns = 0  # CLOCK_REALTIME, the profiler's own clock
        self._seen: Any = None
        self._over = threading.Event()
        args = (float(after), float(seconds), num_decodes)
        self._thread = threading.Thread(target=self._try, args=args, name="kernel-profile", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """End the window, if it is open, and write what was seen."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        if self._seen is not None and "window_us" in self._found:
            window = (0.0, float(self._found["window_us"]))
            self._found |= summary(self._work(window), window)
        else:
            self._found.setdefault("error", "the run ended before the window began")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._found, indent=1))

    def _work(self, window: Interval) -> list[DeviceWork]:
        """What ran on this rank's device, in µs of the window."""
        own = self._device.index or 0
        for origin_ns in (self._began_ns, None):  # None: of a profiler that does not count CLOCK_REALTIME
            work = [item for item in device_work(self._seen, origin_ns) if item.device == own]
            if any(window[0] <= item.start < window[1] for item in work):
                break
        return work

    def _try(self, after: float, seconds: float, num_decodes: Callable[[], int]) -> None:
        try:
            self._profile(after, seconds, num_decodes)
        except Exception as error:  # a profiler that this machine forbids must not cost the run
            self._found["error"] = f"{type(error).__name__}: {error}"

    def _profile(self, after: float, seconds: float, num_decodes: Callable[[], int]) -> None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.set_device(self._device)
        if self._over.wait(after):
            return
        seen = profile(activities=[ProfilerActivity.CUDA])
        seen.start()
        self._began_ns, began = time.time_ns(), time.monotonic_ns()
        samples: list[tuple[float, int]] = []
        now = 0.0
        while now < seconds * 1e6:
            samples.append((now, num_decodes()))
            over = self._over.wait(_SAMPLE_S)
            now = (time.monotonic_ns() - began) / 1e3
            if over:
                break
        seen.stop()
        self._seen = seen
        self._found |= {
            "window_us": now,
            "began_monotonic_ns": began,
            "origin_ns": None if self._origin_ns is None else self._origin_ns(),
            "mean_decodes": sum(num for _, num in samples) / len(samples),
            "sampled_decoding": rounded(_stretches(samples, now)),
        }


def _stretches(samples: Sequence[tuple[float, int]], end: float) -> list[Interval]:
    """When the batch was not empty, as far as samples tell."""
    ends = [at for at, _ in samples[1:]] + [end]
    return merged((at, then) for (at, num), then in zip(samples, ends, strict=True) if num)


def summary(work: Sequence[DeviceWork], window: Interval) -> dict[str, Any]:
    """How the time of `window` was spent, in µs: kernels, gaps by length and by place, what stands beside the long ones.

    `long_gaps`: (start, end, place) of those of 50 µs and more, at most the 10,000 longest; `kernels`: number and time by
    name, the largest 20; `idle_share` of the whole window.
    """
    span = window[1] - window[0]
    found = gaps(work, window)
    without_copies = gaps([item for item in work if KV_COPY not in item.name], window)
    idle = sum(gap.length for gap in found)
    by_length = {name: [0, 0.0] for name in GAP_NAMES}
    by_place = {name: [0, 0.0] for name in PLACES}
    for gap in found:
        for entry in (by_length[gap_class(gap.length)], by_place[gap.place]):
            entry[0] += 1
            entry[1] += gap.length
    long = [gap for gap in found if gap.length >= LONG_GAP_US]
    kept = sorted(sorted(long, key=lambda gap: -gap.length)[:_MOST_GAPS], key=lambda gap: gap.start)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    num_kernels = 0
    for item in work:
        num_kernels += item.is_kernel
        by_name[short(item.name) if item.is_kernel else item.name][0] += 1
        by_name[short(item.name) if item.is_kernel else item.name][1] += item.end - item.start
    largest = sorted(by_name.items(), key=lambda item: -item[1][1])[:_MOST_KERNELS]
    return {
        "num_kernels": num_kernels,
        "idle_share": idle / span if span else None,
        "idle_share_without_kv_copies": sum(gap.length for gap in without_copies) / span if span else None,
        "gaps": _shares(by_length, span),
        "places": _shares(by_place, span),
        "short_gaps_us": sum(gap.length for gap in found if gap.length < LONG_GAP_US),
        "long_gaps": [(round(gap.start, 1), round(gap.end, 1), gap.place) for gap in kept],
        "left_out_gaps": len(long) - len(kept),
        "neighbours": neighbours((gap for gap in found if EDGE not in (gap.before, gap.after)), LONG_GAP_US),
        "kernels": {name: {"number": number, "us": round(us, 1)} for name, (number, us) in largest},
    }


def _shares(sums: dict[str, list[float]], span: float) -> dict[str, dict[str, float]]:
    return {
        name: {"number": int(number), "us": round(us, 1), "share": us / span if span else 0.0}
        for name, (number, us) in sums.items()
    }


def rounded(intervals: Sequence[Interval]) -> list[Interval]:
    return [(round(start, 1), round(end, 1)) for start, end in intervals]


def idle_share(found: dict[str, Any], decoding: Sequence[Interval]) -> dict[str, float] | None:
    """Of the time in `decoding`, intervals in µs of the window: the part without a kernel, in all and by place.

    Short gaps lie inside steps and between them, so they count whole. None where the batch was empty all the time.
    """
    inside = common(merged(decoding), [(0.0, float(found["window_us"]))])
    span = length(inside)
    if not span:
        return None
    long = dict.fromkeys(PLACES, 0.0)
    for place in PLACES:
        own = merged((start, end) for start, end, where in found["long_gaps"] if where == place)
        long[place] = length(common(own, inside))
    all_long = sum(long.values())
    shares = {place: us / span for place, us in long.items()}
    return {"idle": (all_long + float(found["short_gaps_us"])) / span, "decoding_us": span, **shares}
