"""How fast the simulator is: 2 context + 2 generation executors, prompt 1000, output 200, measured H200 profile.

    python benchmarks/simulator_speed.py [--requests 5000] [--rate 20] [--workload disaggregated|prefixes|mixed] [--json]
    python benchmarks/simulator_speed.py --peer dynosim [--peer-python PYTHON] [--rate 20 --rate 6] [--runs 5]

Prints simulated requests per CPU second, SimPy events per request, and the peak memory of the process.

With `--peer dynosim` NVIDIA's DynoSim runs the same load: as many executors, the same lengths and arrival rate, KV blocks,
batch limits, link rate, its router that matches ours (its KV router: the least loaded worker where nothing is shared), and
per-request records. Runs alternate, each in a fresh process whose CPU time is that of the simulation alone, not of imports.
The package `ai-dynamo-runtime` is imported by `--peer-python`, by default this interpreter. With PYTHONPATH=build/compiled
(`make compiled`) it is the compiled copy that is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from simulator_load import (
    GROUPS,
    MAX_BATCH_SIZE,
    MAX_NUM_TOKENS,
    MIXED_MAX_NUM_TOKENS,
    OUTPUT,
    PROMPT,
    SHARED,
    TOKENS_PER_BLOCK,
    WORKLOADS,
    experiment,
    simulate,
    simulate_into_files,
)

from disagg.experiments.cluster import cluster_of, link_of, profile_of, shape_of

HERE = Path(__file__).resolve().parent
RATES = (20.0, 6.0)


def measure(workload: str, requests: int, rate: float, executors: int = 4, *, files: bool = False) -> dict[str, Any]:
    """One simulation in this process."""
    config = experiment(workload, requests, rate, executors)
    found = simulate_into_files(config) if files else simulate(config)
    return {"workload": workload, "rate": rate, "executors": executors, **found}


def peer_task(workload: str, requests: int, rate: float, executors: int = 4) -> dict[str, Any]:
    """What DynoSim is told, read off the cluster that ours builds."""
    config = experiment(workload, requests, rate, executors)
    profile = profile_of(config)
    if profile is None:
        raise RuntimeError("the benchmark's cluster has a measured profile")
    mixed = workload == "mixed"
    return {
        "requests": requests,
        "rate": rate,
        "prompt": PROMPT,
        "output": OUTPUT,
        "mixed": executors if mixed else 0,
        "context": executors // 2,
        "generation": executors - executors // 2,
        "num_blocks": cluster_of(config).executors[-1].num_blocks,
        "tokens_per_block": TOKENS_PER_BLOCK,
        "max_batch_size": MAX_BATCH_SIZE,
        "max_num_tokens": MIXED_MAX_NUM_TOKENS if mixed else MAX_NUM_TOKENS,
        "kv_bytes_per_token": shape_of(config).kv_bytes_per_token,
        "link_gb_per_s": link_of(profile, config, [1, 1, 1, 1]).cost.bytes_per_s / 1e9,
        "router": "kv_router",
        "prefix_caching": workload == "prefixes",
        "shared_prefix": SHARED / PROMPT if workload == "prefixes" else 0.0,
        "prefix_groups": GROUPS if workload == "prefixes" else 0,
    }


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        hint = ""
        if "ModuleNotFoundError" in last:
            hint = f"\n{command[0]} has no DynoSim: pip install ai-dynamo-runtime there, or name another --peer-python"
        raise SystemExit(f"{' '.join(command[:2])} failed: {last}{hint}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def compare(workload: str, requests: int, rate: float, executors: int, python: str, runs: int) -> dict[str, Any]:
    """Alternating runs of both; medians, and the ratio of the medians with the least and the greatest of any pair."""
    own = [sys.executable, str(HERE / "simulator_speed.py"), "--workload", workload, "--requests", str(requests)]
    own += ["--rate", str(rate), "--executors", str(executors), "--json"]
    peer = [python, str(HERE / "dynosim_run.py"), json.dumps(peer_task(workload, requests, rate, executors))]
    ours, theirs = [], []
    for number in range(runs):
        for is_ours in (True, False) if number % 2 == 0 else (False, True):
            (ours if is_ours else theirs).append(_run(own if is_ours else peer))
    speeds = [[run["requests_per_cpu_s"] for run in each] for each in (ours, theirs)]
    medians = [statistics.median(each) for each in speeds]
    pairs = [a / b for a, b in zip(*speeds, strict=True)]
    return {
        "workload": workload,
        "requests": requests,
        "rate": rate,
        "executors": executors,
        "runs": runs,
        "requests_per_cpu_s": medians[0],
        "compiled": ours[0]["compiled"],
        "events_per_request": ours[0]["events_per_request"],
        "peak_rss_mb": max(run["peak_rss_mb"] for run in ours),
        "peer": "dynosim",
        "peer_version": theirs[0]["version"],
        "peer_requests_per_cpu_s": medians[1],
        "peer_peak_rss_mb": max(run["peak_rss_mb"] for run in theirs),
        "ratio": medians[0] / medians[1],
        "least_ratio": min(pairs),
        "greatest_ratio": max(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=_count, default=5000)
    parser.add_argument("--rate", type=_rate, action="append", help="requests/s, may be given again (default: 20)")
    parser.add_argument("--executors", type=_count, default=4, help="half of them for the context phase (default: 4)")
    parser.add_argument("--workload", choices=WORKLOADS, default="disaggregated")
    parser.add_argument("--files", action="store_true", help="with a run directory, as `disagg run` writes it")
    parser.add_argument("--peer", choices=["dynosim"])
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has ai-dynamo-runtime")
    parser.add_argument("--runs", type=_count, default=5, help="of each simulator, alternating (default: 5)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.executors < 2:
        parser.error("--executors: at least 2")
    if options.files and options.peer:
        parser.error("--files: what DynoSim does has no counterpart; leave out --peer")
    rates = options.rate or list(RATES if options.peer else RATES[:1])
    found = []
    for rate in rates:
        if options.peer:
            cost = (options.workload, options.requests, rate, options.executors, options.peer_python, options.runs)
            found.append(compare(*cost))
        else:
            found.append(measure(options.workload, options.requests, rate, options.executors, files=options.files))
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found))
        return
    for each in found:
        print("\n".join(f"{key}: {_shown(value)}" for key, value in each.items()), end="\n\n")


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("a rate above 0")
    return value


if __name__ == "__main__":
    main()
