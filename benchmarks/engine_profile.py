"""What lies between a step and its floor: `python benchmarks/engine_profile.py [--model …] [--json FILE]`. Needs a GPU.

Reads torch's profiler. Of each kind of work a step's time stands beside what the floor grants it: matrix products alone,
KV bytes over the bandwidth of a copy (decode) or the best attention kernel alone (prefill), nothing for the rest. Kernels
may overlap their predecessors' ends, which counts against the sum of their times.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from disagg.core.model_shapes import PRESETS
from disagg.runtime.bench_engine import CONTEXT, EngineBench
from disagg.runtime.collectives import SingleRank
from disagg.runtime.kernel_intervals import DeviceWork, device_work, length, merged, short
from disagg.runtime.model_place import Place

PRODUCTS, ATTENTION, GAPS, OVERLAP = "matrix products", "attention", "gaps between kernels", "kernels that overlap"
KINDS = (
    ("rope and KV write", ("_rope_write",)),
    ("norms", ("_add_rms_norm",)),
    ("activation", ("_silu_mul",)),
    ("argmax", ("argmax", "_advance")),
    (PRODUCTS, ("gemm", "nvjet", "cutlass", "gemv", "splitk", "cublas", "xmma", "kernel2")),
    (ATTENTION, ("_split", "_merge", "flash", "fmha", "cudnn", "sdpa", "_gather_pages")),
    ("copies and fills", ("memcpy", "memset", "copy", "cat", "fill", "index", "arange", "elementwise")),
)


def kind_of(name: str) -> str:
    """By the kernel's own name: flash attention has CUTLASS among its template's arguments."""
    lowered = short(name).lower()
    return next((kind for kind, words in KINDS if any(word in lowered for word in words)), "other: " + short(name))


@dataclass(frozen=True)
class Breakdown:
    """One step. Microseconds; `kinds`: (kernels, time) by kind."""

    name: str
    step_us: float
    kinds: dict[str, tuple[float, float]]
    gap_us: float
    overlap_us: float
    floor_us: dict[str, float]

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(what, kernels, µs, µs beyond the floor), the greatest excess first."""
        found = [(kind, number, us, us - self.floor_us.get(kind, 0.0)) for kind, (number, us) in self.kinds.items()]
        found.append((GAPS, 0, self.gap_us, self.gap_us))
        if self.overlap_us > 0:
            found.append((OVERLAP, 0, -self.overlap_us, -self.overlap_us))
        return sorted(found, key=lambda row: -row[3])

    def table(self) -> str:
        floor = sum(self.floor_us.values())
        lines = [
            f"{self.name}: {self.step_us:.0f} µs, floor {floor:.0f} µs, {self.step_us - floor:.0f} µs between",
            f"    {'':36s} {'kernels':>8s} {'µs':>10s} {'floor':>10s} {'beyond':>10s} {'of the gap':>10s}",
        ]
        for what, number, us, beyond in self.rows():
            share = beyond / (self.step_us - floor) if self.step_us > floor else 0.0
            granted = self.floor_us.get(what, 0.0)
            lines.append(f"    {what:36s} {number:8.0f} {us:10.1f} {granted:10.1f} {beyond:10.1f} {share:10.1%}")
        return "\n".join(lines)


def breakdown(
    name: str, work: Sequence[DeviceWork], num_steps: int, floor_us: dict[str, float], start: float | None = None
) -> Breakdown:
    """Of `work`, which lasts from `start`, or its own beginning, to the end of the last of `num_steps` steps."""
    by_kind: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item in work:
        entry = by_kind[kind_of(item.name)]
        entry[0] += 1
        entry[1] += item.end - item.start
    window = (work[0].start if start is None else start, max(item.end for item in work))
    busy = length(merged((item.start, item.end) for item in work))
    summed = sum(us for _, us in by_kind.values())
    return Breakdown(
        name,
        (window[1] - window[0]) / num_steps,
        {kind: (number / num_steps, us / num_steps) for kind, (number, us) in by_kind.items()},
        (window[1] - window[0] - busy) / num_steps,
        (summed - busy) / num_steps,
        floor_us,
    )


def whole_steps(work: Sequence[DeviceWork]) -> tuple[list[DeviceWork], int, float]:
    """What lies between the first and the last copy of a step's tokens to the host, how many steps, and since when."""
    ends = [i for i, item in enumerate(work) if "DtoH" in item.name]
    if len(ends) < 2:
        raise RuntimeError(f"{len(ends)} copies to the host in a profile of decode steps; expected: one a step")
    return list(work[ends[0] + 1 : ends[-1] + 1]), len(ends) - 1, work[ends[0]].end


def profiled(run: Callable[[], Any]) -> list[DeviceWork]:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return device_work(seen)


def decode(bench: EngineBench, batch: int, num_steps: int = 8) -> Breakdown:
    kv_bytes = batch * bench.context * bench.pages.layout.kv_bytes_per_token(0, bench.shape.dtype_bytes)
    floor = {PRODUCTS: bench.gemms(batch) * 1e6, ATTENTION: kv_bytes / bench.copy_rate * 1e6}
    work, count, start = whole_steps(profiled(lambda: bench.decode_step(batch, bench.context, num_steps=num_steps)))
    return breakdown(f"decode step, batch {batch}, context {bench.context}", work, count, floor, start)


def prefill(bench: EngineBench, prompts: int, tokens: int) -> Breakdown:
    attention, kernel = bench.best_attention(prompts, tokens)
    floor = {PRODUCTS: bench.gemms(prompts * tokens, head_rows=prompts) * 1e6, ATTENTION: attention * 1e6}
    bench.prefill_step(prompts, tokens, repeats=1)
    work = profiled(lambda: bench.prefill_step(prompts, tokens, repeats=1))
    return breakdown(f"prefill, {prompts} × {tokens} tokens (floor: {kernel})", work, 1, floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(PRESETS))
    parser.add_argument("--json")
    options = parser.parse_args()
    shape = PRESETS[options.model]
    bench = EngineBench(shape, Place.of(shape), SingleRank(), "cuda:0", context=CONTEXT)
    found = [decode(bench, batch) for batch in (1, 64, 256)]
    found += [prefill(bench, 1, 8192), prefill(bench, 8, 1024)]
    for each in found:
        print(each.table())
    if options.json:
        plain = [
            {
                "name": each.name,
                "step_us": each.step_us,
                "floor_us": each.floor_us,
                "rows": [dict(zip(("what", "kernels", "us", "beyond_us"), row, strict=True)) for row in each.rows()],
            }
            for each in found
        ]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(plain, file, indent=1)


if __name__ == "__main__":
    main()
