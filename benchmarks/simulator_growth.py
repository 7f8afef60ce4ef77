"""How the simulator's cost grows: CPU time and memory over the number of requests, and over the number of executors.

    python benchmarks/simulator_growth.py [--output docs/benchmarks/simulator] [--most-requests 1000000] [--resume]

Each point is a process of its own (`simulator_speed.py --files`): the load is drawn, simulated, streamed into Parquet and
summarised, as `disagg run` does. Executors get 5 requests/s each, whatever their number; for requests there are four, at 20/s.
Writes growth.json and, from it alone, requests.png and executors.png. `--resume` keeps the points that growth.json has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from simulator_load import WORKLOADS

HERE = Path(__file__).resolve().parent
REQUESTS: Final = (1_000, 10_000, 100_000, 1_000_000)
EXECUTORS: Final = (4, 16, 64, 256, 1_000)
RATE_PER_EXECUTOR: Final = 5.0
EXECUTORS_REQUESTS: Final = 20_000
TITLES: Final = {
    "disaggregated": "context and generation apart",
    "prefixes": "shared prefixes",
    "mixed": "mixed, chunked",
}


def points(most_requests: int, num_for_executors: int) -> Iterator[tuple[str, str, int, int]]:
    """(curve, workload, requests, executors); the second and third workload stop a decade earlier."""
    for workload in WORKLOADS:
        for requests in REQUESTS:
            if requests <= (most_requests if workload == "disaggregated" else most_requests // 10):
                yield "requests", workload, requests, 4
        for executors in EXECUTORS:
            yield "executors", workload, num_for_executors, executors


def measure(workload: str, requests: int, executors: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "simulator_speed.py"), "--files", "--json", "--workload", workload]
    command += ["--requests", str(requests), "--executors", str(executors)]
    command += ["--rate", str(RATE_PER_EXECUTOR * executors)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def draw(found: list[dict[str, Any]], curve: str, axis: str, target: Path) -> None:
    """CPU time and memory of one curve, a line a workload."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    per_request = curve == "executors"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for workload, marker in zip(WORKLOADS, "os^", strict=True):
        rows = sorted((r for r in found if (r["curve"], r["workload"]) == (curve, workload)), key=lambda r: r[curve])
        x = [r[curve] for r in rows]
        cost = [1e6 * r["cpu_s"] / r["requests"] if per_request else r["cpu_s"] for r in rows]
        left.plot(x, cost, marker=marker, label=TITLES[workload])
        right.plot(x, [r["peak_rss_mb"] for r in rows], marker=marker, label=TITLES[workload])
    if not per_request:
        ends = [r[curve] for r in found if r["curve"] == curve]
        first = min(
            (r for r in found if r["curve"] == curve and r["workload"] == "disaggregated"), key=lambda r: r[curve]
        )
        slope = first["cpu_s"] / first[curve]
        left.plot([min(ends), max(ends)], [slope * min(ends), slope * max(ends)], "k:", lw=1, label="in proportion")
        left.set_yscale("log")
    for axes, title in ((left, "CPU µs a request" if per_request else "CPU s"), (right, "peak memory, MB")):
        axes.set_xscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(title)
        axes.grid(True, which="major", alpha=0.3)
        axes.set_ylim(bottom=0 if axes is right or per_request else None)
        axes.legend(frameon=False)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "benchmarks" / "simulator")
    parser.add_argument("--most-requests", type=int, default=REQUESTS[-1], help="of the longest run (default: 1000000)")
    parser.add_argument(
        "--executors-requests", type=int, default=EXECUTORS_REQUESTS, help="of each run over executors (default: 20000)"
    )
    parser.add_argument("--resume", action="store_true", help="measure only what growth.json lacks")
    options = parser.parse_args()
    if options.most_requests < REQUESTS[0] or options.executors_requests < 1:
        parser.error(f"--most-requests: at least {REQUESTS[0]}; --executors-requests: at least 1")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "growth.json"
    found: list[dict[str, Any]] = json.loads(file.read_text()) if options.resume and file.is_file() else []
    have = {(r["curve"], r["workload"], r["requests"], r["executors"]) for r in found}
    for point in points(options.most_requests, options.executors_requests):
        if point in have:
            continue
        curve, workload, requests, executors = point
        row = {"curve": curve, **measure(workload, requests, executors)}
        found.append(row)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{workload}, {executors} executors, {requests:,} requests: {row['cpu_s']:.1f} CPU s, "
            f"{row['requests_per_cpu_s']:,.0f} requests/CPU s, {row['events_per_request']:.1f} events a request, "
            f"{row['peak_rss_mb']:,.0f} MB",
            flush=True,
        )
    draw(found, "requests", "requests", options.output / "requests.png")
    draw(found, "executors", "executors, 5 requests/s each", options.output / "executors.png")


if __name__ == "__main__":
    main()
