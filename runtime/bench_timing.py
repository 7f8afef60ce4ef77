"""How long work takes on its device, for benchmarks: by events on a GPU, by the clock of the host elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def device_seconds(work: Callable[[], Any], device: torch.device, *, graph: bool = False, repeats: int = 7) -> float:
    """Median seconds of `work` on `device`, warm; with `graph`, of a CUDA graph of it."""
    with torch.inference_mode():
        work()
        if device.type != "cuda":
            return statistics.median(_by_the_host(work) for _ in range(repeats))
        torch.cuda.synchronize(device)
        call = work
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                work()
            call = recorded.replay
        call()
        return statistics.median(_by_events(call) for _ in range(repeats))


def _by_events(work: Callable[[], Any]) -> float:
    start: Any = torch.cuda.Event(enable_timing=True)
    end: Any = torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _by_the_host(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
