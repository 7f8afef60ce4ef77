"""How busy a rank's GPU is while it serves: the union of all kernel intervals in a window of the run, from torch's profiler.

Asked for by the environment variable DISAGG_KERNEL_PROFILE="FOLDER,AFTER_S,SECONDS": every rank on a GPU then leaves
FOLDER/rank-N.json. Off otherwise; what the profiler itself costs is seen by comparing step times within and outside.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

VARIABLE: Final = "DISAGG_KERNEL_PROFILE"
_SAMPLE_S: Final = 0.002
_LONG_GAP_US: Final = 50.0


class KernelProfile:
    """The profile that the environment asks for, of one rank; nothing where it asks for none.

    The window is taken by a thread of its own; what was seen is read in `finish`, after the run, since reading it would
    hold the interpreter for seconds.
    """

    def __init__(self, rank: int, device: str, num_decodes: Callable[[], int]) -> None:
        self._thread: threading.Thread | None = None
        asked = os.environ.get(VARIABLE)
        if not asked or not device.startswith("cuda"):
            return
        folder, after, seconds = asked.rsplit(",", 2)
        self._path = Path(folder) / f"rank-{rank}.json"
        self._found: dict[str, Any] = {}
        self._seen: Any = None
        args = (float(after), float(seconds), device, num_decodes)
        self._thread = threading.Thread(target=self._profile, args=args, name="kernel-profile", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Write the summary, if there is one. Blocks while the window is open."""
        if self._thread is None:
            return
        self._thread.join()
        self._found |= busy_share(device_intervals(self._seen.events()))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._found, indent=1))

    def _profile(self, after: float, seconds: float, device: str, num_decodes: Callable[[], int]) -> None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.set_device(device)
        time.sleep(after)
        samples = []
        self._seen = profile(activities=[ProfilerActivity.CUDA])
        self._seen.start()
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            samples.append(num_decodes())
            time.sleep(_SAMPLE_S)
        self._found["window_monotonic_s"] = [began, time.monotonic()]
        self._seen.stop()
        self._found["mean_decodes"] = sum(samples) / max(1, len(samples))
        self._found["share_of_samples_without_decodes"] = samples.count(0) / max(1, len(samples))


def device_intervals(events: Any) -> list[tuple[float, float, str]]:
    """(start, end, name) in µs of everything that ran on the device, in order of start."""
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type.name == "CUDA")


def busy_share(intervals: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Share of the time from the first interval to the last in which none runs, and its gaps by length.

    `kernels`: number and time in µs by name, the largest 20.
    """
    busy = end = 0.0
    gaps: dict[str, list[float]] = {"short": [0, 0.0], "long": [0, 0.0]}
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for start, stop, name in intervals:
        if end and start > end:
            entry = gaps["long" if start - end > _LONG_GAP_US else "short"]
            entry[0] += 1
            entry[1] += start - end
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        by_name[name][0] += 1
        by_name[name][1] += stop - start
    span = end - intervals[0][0] if intervals else 0.0
    largest = sorted(by_name.items(), key=lambda item: -item[1][1])[:20]
    return {
        "span_us": span,
        "busy_us": busy,
        "idle_share": 1 - busy / span if span else None,
        "gaps_up_to_50_us": {"number": gaps["short"][0], "us": gaps["short"][1]},
        "gaps_over_50_us": {"number": gaps["long"][0], "us": gaps["long"][1]},
        "kernels": {name[:100]: {"number": n, "us": us} for name, (n, us) in largest},
    }
