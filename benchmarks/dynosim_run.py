"""One run of NVIDIA's DynoSim, in an interpreter that has it: pip install ai-dynamo-runtime. Imports nothing of disagg.

    python benchmarks/dynosim_run.py '{"requests": 5000, "rate": 20, "context": 2, "generation": 2, …}'

Reads one JSON object and prints another. `simulator_speed.py` says what is in them, and starts this.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from typing import Any

os.environ.setdefault("DYN_LOG", "error")  # its router would log each choice, and pay for it


def engine(task: dict[str, Any], worker_type: str) -> dict[str, Any]:
    """An engine as vLLM would be configured: its defaults, but for what the other simulator is told too."""
    return {
        "engine": {
            "worker_type": worker_type,
            "num_gpu_blocks": task["num_blocks"],
            "block_size": task["tokens_per_block"],
            "max_num_seqs": task["max_batch_size"],
            "max_num_batched_tokens": task["max_num_tokens"],
            "enable_prefix_caching": task["prefix_caching"],
            "enable_chunked_prefill": True,
            "kv_transfer_bytes_per_token": task["kv_bytes_per_token"],
            "kv_transfer_bandwidth": task["link_gb_per_s"],
        }
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    from dynamo._core import run_mocker_synthetic_trace_replay

    if task["mixed"]:
        executors = {"extra_engine_args": engine(task, "aggregated"), "num_workers": task["mixed"]}
    else:
        executors = {
            "prefill_engine_args": engine(task, "prefill"),
            "decode_engine_args": engine(task, "decode"),
            "num_prefill_workers": task["context"],
            "num_decode_workers": task["generation"],
        }
    began = time.process_time()
    result = run_mocker_synthetic_trace_replay(
        task["prompt"],
        task["output"],
        task["requests"],
        request_rate=task["rate"],
        router_mode=task["router"],
        shared_prefix_ratio=task["shared_prefix"],
        num_prefix_groups=task["prefix_groups"],
        capture_per_request=True,
        **executors,
    )
    cpu_s = time.process_time() - began
    summary = result.summary
    if summary["completed_requests"] != task["requests"]:
        raise SystemExit(f"DynoSim completed {summary['completed_requests']} of {task['requests']} requests")
    return {
        "version": importlib.metadata.version("ai-dynamo-runtime"),
        "cpu_s": cpu_s,
        "requests_per_cpu_s": task["requests"] / cpu_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mean_ttft_ms": summary["mean_ttft_ms"],
        "mean_tpot_ms": summary["mean_tpot_ms"],
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
