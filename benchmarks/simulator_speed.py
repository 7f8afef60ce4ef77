"""How fast the simulator is: 2 context + 2 generation executors, prompt 1000, output 200, event logs off.

    python benchmarks/simulator_speed.py --requests 5000 --rate 20 [--json]

Prints simulated requests per CPU second, SimPy events per request, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from random import Random
from typing import Any

from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.cost import roofline
from disagg.core.devices import DEVICES
from disagg.core.model_shapes import preset
from disagg.policies.vocabulary import PS_PER_S, Request, Role
from disagg.simulator import ModelTiming, SimulatedCluster

PROMPT, OUTPUT, MAX_TOKENS = 1000, 200, 512


def measure(num_requests: int, rate: float) -> dict[str, Any]:
    """Simulate `num_requests` Poisson arrivals at `rate` a second."""
    roles = (Role.CONTEXT, Role.CONTEXT, Role.GENERATION, Role.GENERATION)
    executors = tuple(
        ExecutorConfig(id=i, role=role, num_blocks=20_000, scheduler=SchedulerConfig(max_batch_size=256))
        for i, role in enumerate(roles, 1)
    )
    config = OrchestratorConfig(
        executors, context_router=PolicySpec("least_tokens"), generation_router=PolicySpec("least_kv")
    )
    shape, device = preset("llama-3.1-8b"), DEVICES["h200"]
    cost = roofline(shape, device)
    rows: list[Any] = []
    cluster = SimulatedCluster(
        config,
        ModelTiming({e.id: cost for e in executors}, round(device.message_latency_s * PS_PER_S)),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        link_bytes_per_s=device.link_bandwidth * device.link_efficiency,
        link_latency=round(device.link_latency_s * PS_PER_S),
        records=rows.append,
    )
    chance, at = Random(1), 0.0
    for i in range(num_requests):
        at += chance.expovariate(rate)
        arrival = round(at * PS_PER_S)
        cluster.submit_at(arrival, Request(i + 1, PROMPT, MAX_TOKENS, arrival=arrival), OUTPUT)
    began = time.process_time()
    cluster.run()
    cpu_s = time.process_time() - began
    return {
        "requests": num_requests,
        "rate": rate,
        "requests_per_cpu_s": num_requests / cpu_s,
        "events_per_request": cluster.count_events() / num_requests,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.requests, options.rate)
    print(json.dumps(found) if options.json else "\n".join(f"{key}: {value:,.1f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
