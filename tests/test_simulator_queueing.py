"""One context-only executor is a single server: its waiting times are those of queueing theory.

Requests arrive by a Poisson process of rate λ, a prompt takes a time in proportion to its tokens, and each ends with its
context phase (`max_tokens` 1). Theory, for service times S: mean wait E[W] = λ E[S²] / (2 (1 - ρ)) (Pollaczek-Khinchine),
mean response E[W] + E[S], to which the simulation adds one message each way.

Averages of plain waits converge slowly: a half-width of 1 % at ρ = 0.7 needs two million requests. With X = S - T (T the
time to the next arrival, m = E[T] - E[S] > 0), I = max(0, T - W - S) the idle time before it and g = exp(-λ (W + S)) / λ,
four more averages have the mean zero whatever the queue does, because W is settled before S and T are drawn, and because
what is left of an exponential T is exponential again:

    W (X + m),    X² - E[X²],    I² - 2 g / λ,    (X + m) + (I - g)

They are control variates: each is subtracted with the weight that Lindley's recursion W' = max(0, W + X) gives it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from disagg.core.config import PolicySpec
from disagg.core.cost import ConstantCost
from disagg.policies import Request
from disagg.policies.vocabulary import PS_PER_S, PS_PER_US
from tests.simulation_helpers import World, executors

MEAN_TOKENS = 10_000
TOKEN = PS_PER_US  # picoseconds a token: 10 ms a mean prompt
MEAN_SERVICE = MEAN_TOKENS * TOKEN
LATENCY = 50 * PS_PER_US
NUM_REQUESTS = 24_000
NUM_BATCHES = 12


def one_server(step_overhead: int = 0) -> World:
    fleet = executors(
        "c",
        num_blocks=1 << 20,
        max_batch_size=1,
        max_num_tokens=1 << 40,
        report_on_batch_change=False,
        report_interval=10**6 * PS_PER_S,
    )
    return World(fleet, cost=ConstantCost(step_overhead, d=TOKEN), latency=LATENCY)


def simulate(load: float, exponential: bool, seed: int, step_overhead: int = 0) -> tuple[Any, Any, Any, Any]:
    """(T, S, W, response) of each request in picoseconds, int64 arrays of shape (NUM_REQUESTS,)."""
    draw = random.Random(seed)
    world = one_server(step_overhead)
    gaps, prompts = [], []
    at = 0
    for i in range(1, NUM_REQUESTS + 1):
        prompts.append(max(1, round(draw.expovariate(1 / MEAN_TOKENS))) if exponential else MEAN_TOKENS)
        gaps.append(round(draw.expovariate(load / MEAN_SERVICE)))
        world.submit(i, at, prompts[-1], 1, max_tokens=1)
        at += gaps[-1]
    world.cluster.run()
    rows = world.table("Request")
    assert [row.request_id for row in rows] == list(range(1, NUM_REQUESTS + 1))
    waits = [row.context_start_ps - row.arrival_ps - LATENCY for row in rows]
    responses = [row.end_ps - row.arrival_ps for row in rows]
    return np.array(gaps), np.array(prompts) * TOKEN, np.array(waits), np.array(responses)


def mean_and_half_width(samples: Any) -> tuple[float, float]:
    """Mean and half of its 95 % interval, by batch means (2.20 is t of 11 degrees of freedom)."""
    batches = samples.reshape(NUM_BATCHES, -1).mean(axis=1)
    return float(samples.mean()), 2.20 * float(batches.std(ddof=1)) / NUM_BATCHES**0.5


def controlled(gaps: Any, services: Any, waits: Any, load: float, service_variance: float) -> Any:
    """The waits less the control variates of the module's docstring, all in units of the mean service time."""
    gaps, services, waits = gaps / MEAN_SERVICE, services / MEAN_SERVICE, waits / MEAN_SERVICE
    m = 1 / load - 1
    mean_square = 1 / load**2 + service_variance + m * m
    x = services - gaps
    idle = np.maximum(0, gaps - waits - services)
    g = np.exp(-load * (waits + services)) / load
    zero = 2 * waits * (x + m) + (x * x - mean_square) - (idle**2 - 2 * g / load) + (2 / load) * (x + m + idle - g)
    return waits - zero / (2 * m)


@pytest.mark.parametrize("load", [0.5, 0.7])
@pytest.mark.parametrize("exponential", [True, False], ids=["M/M/1", "M/D/1"])
def test_mean_waiting_and_response_times_are_those_of_theory(load: float, exponential: bool) -> None:
    gaps, services, waits, responses = simulate(load, exponential, seed=round(load * 10) + exponential)
    # every wait is Lindley's and every response its wait, its service and two messages, to the picosecond
    assert waits[0] == 0
    np.testing.assert_array_equal(waits[1:], np.maximum(0, waits[:-1] + services[:-1] - gaps[:-1]))
    np.testing.assert_array_equal(responses, waits + services + 2 * LATENCY)

    variance = 1.0 if exponential else 0.0
    expected = load * (1 + variance) / (2 * (1 - load))
    estimates = controlled(gaps, services, waits, load, variance)
    mean, half_width = mean_and_half_width(estimates)
    assert half_width < 0.01 * expected
    assert mean == pytest.approx(expected, rel=0.01)
    # the mean service time is known as well: 1
    mean, half_width = mean_and_half_width((responses - waits - services) / MEAN_SERVICE + estimates + 1)
    expected += 1 + 2 * LATENCY / MEAN_SERVICE
    assert half_width < 0.01 * expected
    assert mean == pytest.approx(expected, rel=0.01)


def test_the_estimate_sees_a_server_that_is_slower_than_said() -> None:
    # one part in fifty of overhead in each step: the controls must not hide it
    gaps, services, waits, _ = simulate(0.7, True, seed=8, step_overhead=MEAN_SERVICE // 50)
    mean, half_width = mean_and_half_width(controlled(gaps, services, waits, 0.7, 1.0))
    assert mean - half_width > 1.03 * 0.7 / 0.3


def test_little_s_law_holds_between_counts_and_records() -> None:
    """Area under the number in the system, counted by clients, against arrivals times mean time, from the records."""
    draw = random.Random(3)
    world = World("ccgg", context_router=PolicySpec("least_tokens"), generation_router=PolicySpec("least_kv"))
    cluster = world.cluster
    n, rate = 1500, 1 / (20 * PS_PER_US)
    inside, area, changed_at = 0, 0, 0
    samples: list[int] = []

    def change(by: int) -> None:
        nonlocal inside, area, changed_at
        area += inside * (cluster.env.now - changed_at)
        inside, changed_at = inside + by, cluster.env.now

    def client(i: int, at: int) -> Any:
        yield cluster.env.timeout(at)
        change(1)
        cluster.submit(Request(i, draw.randint(1, 400), 64, arrival=at), draw.randint(1, 30))
        yield cluster.finished(i)
        change(-1)

    def observer() -> Any:  # Poisson instants see time averages
        while len(world.table("Request")) < n:
            samples.append(inside)
            yield cluster.env.timeout(max(1, round(draw.expovariate(rate))))

    at = 0
    for i in range(1, n + 1):
        at += round(draw.expovariate(rate))
        cluster.env.process(client(i, at))
    cluster.env.process(observer())
    world.run()
    rows = world.table("Request")
    assert len(rows) == n
    assert inside == 0
    duration = max(row.end_ps for row in rows)
    arrival_rate = n / duration
    mean_time = sum(row.end_ps - row.arrival_ps for row in rows) / n
    assert area / duration == pytest.approx(arrival_rate * mean_time, rel=0.01)
    assert area == sum(row.end_ps - row.arrival_ps for row in rows)
    assert np.mean(samples) == pytest.approx(area / duration, rel=0.1)
