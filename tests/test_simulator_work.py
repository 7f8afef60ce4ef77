"""How much work a simulated request is, counted: calls of the event loop, and bytecodes of the cores and the simulator."""

from __future__ import annotations

import sys
from random import Random
from types import FrameType
from typing import Any

import pytest

from disagg.core.config import OrchestratorConfig, PolicySpec
from disagg.core.cost import ConstantCost, roofline
from disagg.core.devices import DEVICES
from disagg.core.model_shapes import preset
from disagg.policies.vocabulary import PS_PER_S, PS_PER_US, Request
from disagg.simulator import ModelTiming, SimulatedCluster
from tests.simulation_helpers import executors


def cluster_of(roles: str, cost: Any, records: Any = None, launch: Any = None, **settings: Any) -> SimulatedCluster:
    """Message latency, link contention, leases, reports and records are on."""
    fleet = executors(roles, **{"num_blocks": 20_000, "tokens_per_block": 32, "max_batch_size": 256, **settings})
    routers = {"context_router": PolicySpec("least_tokens"), "generation_router": PolicySpec("least_kv")}
    return SimulatedCluster(
        OrchestratorConfig(fleet, **routers),
        ModelTiming({e.id: cost for e in fleet}, 50 * PS_PER_US),
        kv_bytes_per_token=131_072,
        link_bytes_per_s=360e9,
        link_latency=5 * PS_PER_US,
        launch=None if launch is None else {e.id: launch for e in fleet},
        records=records,
    )


def load(cluster: SimulatedCluster, num: int, rate: float, prompt: int = 1000, output: int = 200) -> SimulatedCluster:
    chance, at = Random(1), 0.0
    for i in range(1, num + 1):
        at += chance.expovariate(rate)
        arrival = round(at * PS_PER_S)
        cluster.submit_at(arrival, Request(i, prompt, 512, arrival=arrival), output)
    return cluster


H200 = roofline(preset("llama-3.1-8b"), DEVICES["h200"])


@pytest.mark.parametrize("launch", [None, (1, 2, True)], ids=["steps one by one", "plans made ahead"])
@pytest.mark.parametrize("rate", [20, 6])
def test_a_request_of_a_thousand_and_two_hundred_tokens_is_at_most_nine_events(rate: float, launch: Any) -> None:
    rows: list[Any] = []
    cluster = load(cluster_of("ccgg", H200, rows.append, launch), 400, rate)
    cluster.run()
    assert sum(type(row).__name__ == "RequestRow" for row in rows) == 400
    assert cluster.count_events() / 400 <= 9


def test_events_a_request_do_not_depend_on_how_many_requests_or_executors_there_are() -> None:
    def events(executors_of_each: int, num: int) -> float:
        cluster = load(cluster_of("c" * executors_of_each + "g" * executors_of_each, H200), num, 10 * executors_of_each)
        cluster.run()
        return cluster.count_events() / num

    few = events(2, 100)
    assert events(2, 800) == pytest.approx(few, rel=0.03)
    assert events(20, 800) == pytest.approx(few, rel=0.05)


def test_a_request_in_a_batch_fifty_times_as_large_is_hardly_more_work() -> None:
    """In bytecodes, where one scan of the batch at each of its changes would be a tenth more."""

    def work(in_batch: int, num: int) -> float:
        step, output = 50 * PS_PER_US, 500
        cluster = cluster_of("cg", ConstantCost(step))
        for i in range(1, num + 1):
            at = i * step * output // in_batch
            cluster.submit_at(at, Request(i, 20, 512, arrival=at), output)
        return _bytecodes(cluster) / num

    assert work(200, 400) < 1.05 * work(4, 60)


def _bytecodes(cluster: SimulatedCluster) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        cluster.run()
    finally:
        sys.settrace(before)
    return count
