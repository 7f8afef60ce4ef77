"""What a decode step and a prefill spend their time on: `python benchmarks/engine_profile.py [--model …] [--json FILE]`.

Needs a GPU. Reads torch's profiler: time by kind of kernel, the union of all kernel intervals, and what lies between.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from disagg.core.model_shapes import PRESETS
from disagg.runtime.bench_engine import EngineBench
from disagg.runtime.collectives import SingleRank
from disagg.runtime.model_place import Place

KINDS = (
    ("matrix products", ("gemm", "nvjet", "cutlass", "gemv", "splitkreduce", "cublas", "sm90_xmma")),
    ("attention", ("_split", "flash", "fmha", "cudnn", "sdpa")),
    ("rope and KV write", ("_rope_write",)),
    ("norms", ("_add_rms_norm",)),
    ("activation", ("_silu_mul",)),
    ("copies", ("copy", "memcpy", "cat")),
    ("argmax", ("reduce", "argmax")),
)


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, words in KINDS if any(word in lowered for word in words)), "other: " + name[:60])


def summary(events: Any) -> dict[str, Any]:
    """Time by kind in µs, the union of the intervals, and the span from the first kernel to the last."""
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    by_kind: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy = end = 0.0
    for start, stop, name in spans:
        entry = by_kind[kind_of(name)]
        entry[0] += 1
        entry[1] += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = spans[-1][1] - spans[0][0]
    kinds = {kind: {"kernels": n, "us": us} for kind, (n, us) in sorted(by_kind.items(), key=lambda item: -item[1][1])}
    return {"kinds": kinds, "busy_us": busy, "span_us": whole, "gaps_us": whole - busy}


def profiled(work: Any) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return summary(seen.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(PRESETS))
    parser.add_argument("--json")
    options = parser.parse_args()
    shape = PRESETS[options.model]
    bench = EngineBench(shape, Place.of(shape), SingleRank(), "cuda:0")
    results: dict[str, Any] = {}
    for batch in (1, 64, 256):
        steps = 6
        found = profiled(lambda batch=batch, steps=steps: bench.decode_step(batch, 1024, num_steps=steps))
        results[f"decode, batch {batch}, {steps} steps"] = found
    results["prefill, 1 × 8192"] = profiled(lambda: bench.prefill_step(1, 8192, repeats=1))
    results["prefill, 1 × 256"] = profiled(lambda: bench.prefill_step(1, 256, repeats=1))
    for name, found in results.items():
        print(f"{name}: span {found['span_us']:.0f} us, gaps {found['gaps_us']:.0f} us")
        for kind, entry in found["kinds"].items():
            print(f"    {kind:40s} {entry['kernels']:6d} kernels {entry['us']:10.0f} us")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
