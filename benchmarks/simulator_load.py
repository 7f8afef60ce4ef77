"""The clusters and loads that the simulator's benchmarks share, and one simulation of them with its costs.

Llama 3.1 8B on executors of one H200 each, with the shipped measured profile: its steps, message latencies, links with
contention and gaps between plans. Reports, leases and every row of every request are on, event logs off.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from disagg.core import executor
from disagg.experiments.config import Experiment, validate_mapping
from disagg.experiments.load_source import LoadSource
from disagg.experiments.run_directory import RunDirectory
from disagg.experiments.run_point import NoProgress, RunPoint
from disagg.experiments.run_simulation import build_cluster, run_simulation
from disagg.experiments.simulated_load import SimulatedLoad
from disagg.experiments.workload import Workload
from disagg.policies.registry import available

PROMPT, OUTPUT, MAX_TOKENS = 1000, 200, 512
TOKENS_PER_BLOCK, MAX_BATCH_SIZE, MAX_NUM_TOKENS, MIXED_MAX_NUM_TOKENS = 32, 256, 8192, 2048
SHARED, GROUPS = 500, 20  # tokens of a shared prefix (half of the prompt), and how many there are
WORKLOADS: Final = {
    "disaggregated": "context and generation executors, the least loaded one of each",
    "prefixes": "the same, half of each prompt being one of 20 shared prefixes; kv_cache_aware for the context phase",
    "mixed": "mixed executors with chunked prefill of 2048 tokens a step, the least loaded one",
}


def experiment(workload: str, num_requests: int, rate: float, executors: int = 4) -> Experiment:
    """`executors` in all, half of them for the context phase where the phases are apart."""
    dataset: dict[str, Any] = {"type": "synthetic", "isl": PROMPT, "osl": OUTPUT}
    policy = {"context_router": "least_tokens", "generation_router": "least_kv"}
    cache = {"tokens_per_block": TOKENS_PER_BLOCK, "enable_block_reuse": workload == "prefixes"}
    half = max(1, executors // 2)
    scheduler = {"max_batch_size": MAX_BATCH_SIZE, "max_num_tokens": MAX_NUM_TOKENS}
    cluster: dict[str, Any] = {
        "context_servers": {"num_instances": half, "kv_cache": cache, "scheduler": scheduler},
        "generation_servers": {"num_instances": max(1, executors - half), "kv_cache": cache, "scheduler": scheduler},
        "cache_transceiver": {"backend": "auto"},
    }
    if workload == "mixed":
        mixed = {"max_batch_size": MAX_BATCH_SIZE, "max_num_tokens": MIXED_MAX_NUM_TOKENS}
        cluster = {"mixed_servers": {"num_instances": executors, "kv_cache": cache, "scheduler": mixed}}
        policy = {"mixed_router": "least_tokens"}
    elif workload == "prefixes":
        dataset |= {"isl": PROMPT - SHARED, "shared_prefixes": {"groups": GROUPS, "length": SHARED}}
        policy["context_router"] = "kv_cache_aware"
    return validate_mapping(
        {
            "schema_version": 1,
            "name": workload,
            "seed": 1,
            "model": {"id": "llama-3.1-8b"},
            "cluster": {"profile": "h200-llama-3.1-8b", **cluster},
            "policy": policy,
            "workload": {
                "dataset": dataset,
                "max_tokens": MAX_TOKENS,
                "phases": [{"name": "profiling", "type": "poisson", "rate": rate, "requests": num_requests}],
            },
        },
        {},
    )


def simulate(config: Experiment) -> dict[str, Any]:
    """One simulation in this process; its rows stay in memory. Building the cluster and drawing the load count."""
    available()  # policies are imported when first asked for, and imports do not count
    began = time.process_time()
    rows: list[Any] = []
    source = LoadSource(Workload(config))
    load = SimulatedLoad(source, config, NoProgress())
    cluster = build_cluster(config, records=rows.append, delivered=load.delivered)
    load.start(cluster)
    cluster.run()
    cpu_s = time.process_time() - began
    if not source.finished or load.num_failed:
        raise RuntimeError(f"{source.num_ended} of {source.num_requests} requests ended, {load.num_failed} failed")
    return _costs(source.num_requests, cpu_s, cluster.count_events())


def simulate_into_files(config: Experiment) -> dict[str, Any]:
    """The same as `disagg run` does it: rows streamed into Parquet, then summary and timeline, in a temporary folder."""
    num_requests = config.workload.phases[0].requests or 0
    with tempfile.TemporaryDirectory(prefix="disagg-benchmark-") as folder:
        point = RunPoint("", 0, {}, Path(folder) / "run", config, Path("benchmark"))
        began = time.process_time()
        with RunDirectory(point) as writer:
            outcome = run_simulation(config, point, writer, NoProgress())
            run_s = time.process_time() - began
            writer.finish(outcome)
        cpu_s = time.process_time() - began
        size = sum(file.stat().st_size for file in point.directory.iterdir())
    if outcome.exit_code or outcome.num_failed:
        raise RuntimeError(f"the run ended with {outcome.exit_code}, {outcome.num_failed} failed: {outcome.message}")
    found = _costs(num_requests, cpu_s, outcome.manifest["simulator_events"])
    return found | {"finish_cpu_s": cpu_s - run_s, "run_directory_mb": size / 1e6}


def _costs(num_requests: int, cpu_s: float, num_events: int) -> dict[str, Any]:
    return {
        "requests": num_requests,
        "cpu_s": cpu_s,
        "requests_per_cpu_s": num_requests / cpu_s,
        "events_per_request": num_events / num_requests,
        "compiled": not str(executor.__file__).endswith(".py"),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
