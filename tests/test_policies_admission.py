"""Admission policies and queue orders: the decision on views computed by hand, beside the nearest neighbour's."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import Hold
from tests.policy_views import SIZES, fleet_of, made, prompt, report

# ---- admission -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_held_while_every_executor_is_full_and_admitted_with_the_first_free_slot(n: int) -> None:
    policy, fleet = made("hold_when_full", "admission"), fleet_of("c" * n, max_batch_size=2)
    for executor in range(1, n + 1):
        for _ in range(2):
            assert not isinstance(policy.admit(prompt(), fleet.at(0)), Hold)
            fleet.dispatched(executor, 1)
    assert policy.admit(prompt(), fleet.at(0)) == Hold()
    fleet.answered(2)
    assert not isinstance(policy.admit(prompt(), fleet.at(0)), Hold)
    fleet.lost(2)
    assert policy.admit(prompt(), fleet.at(0)) == Hold()


def test_a_wait_has_an_end_that_comes_with_time_alone() -> None:
    policy, fleet = made("hold_when_full", "admission", max_active=1, max_wait_ms=5), fleet_of("c")
    fleet.dispatched(1, 1)
    request = replace(prompt(), arrival=100)
    end = 100 + 5 * 10**9
    assert policy.admit(request, fleet.at(100)) == Hold(until=end)
    assert policy.admit(request, fleet.at(end - 1)) == Hold(until=end)
    assert "waited 5 ms" in policy.admit(request, fleet.at(end)).reason


@pytest.mark.parametrize("n", SIZES)
def test_rejected_at_the_limit_where_hold_when_full_holds(n: int) -> None:
    fleet = fleet_of("c" * n)
    policy, neighbour = (
        made("reject_at_limit", "admission", max_active=n),
        made("hold_when_full", "admission", max_active=1),
    )
    for executor in range(1, n + 1):
        assert made("accept_all", "admission").admit(prompt(), fleet.at(0)) == policy.admit(prompt(), fleet.at(0))
        fleet.dispatched(executor, 1)
    assert policy.admit(prompt(), fleet.at(0)).reason == f"{n} requests are active, the limit"
    assert neighbour.admit(prompt(), fleet.at(0)) == Hold()


def test_only_sheddable_requests_are_shed_with_the_fifth_power_of_saturation() -> None:
    policy, fleet = made("shed_sheddable", "admission", classes=["batch"], queue_limit=100), fleet_of("cg")
    sheddable = [prompt(priority=0.4), prompt(priority=0.9, traffic_class="batch")]
    report(fleet, 1, queued_requests=40)
    assert policy.saturation(fleet.at(0)) == 0.2  # the mean of 0.4 and 0
    for request in sheddable:
        rejected = sum(not _admits(policy, request, fleet) for _ in range(4000)) / 4000
        assert rejected == pytest.approx(300 * 0.2**5, abs=0.02)
    assert all(_admits(policy, prompt(priority=0.5), fleet) for _ in range(100))
    report(fleet, 2, blocks_free=60)  # 0.4 as well: 300 x 0.4^5 > 1
    assert not any(_admits(policy, sheddable[0], fleet) for _ in range(100))
    report(fleet, 1)
    report(fleet, 2)
    assert all(_admits(policy, sheddable[0], fleet) for _ in range(100))


def test_who_is_shed_rejected_at_a_limit_or_early_depends_on_class_count_or_prediction() -> None:
    """One request of 15 prompt tokens, 150 ps of compute, where two executors have 99 others waiting between them."""
    fleet = fleet_of("cg", predicts=True)
    for executor in (1, 2):
        report(fleet, executor, queued_requests=99)
    shed, limit = (
        made("shed_sheddable", "admission", queue_limit=100),
        made("reject_at_limit", "admission", max_active=1),
    )
    early = made("early_rejection", "admission")
    assert not _admits(shed, prompt(tokens=15, priority=0.4), fleet)  # of a low priority, at saturation 0.99
    assert _admits(limit, prompt(tokens=15, priority=0.4), fleet)  # nobody counts what was not dispatched
    assert _admits(early, prompt(tokens=15, priority=0.4), fleet)  # no objective to miss
    hasty = prompt(tokens=15, priority=0.9, ttft_objective=149)
    assert _admits(shed, hasty, fleet)
    assert _admits(limit, hasty, fleet)
    assert not _admits(early, hasty, fleet)
    fleet.dispatched(1, 15)
    assert not _admits(limit, prompt(tokens=15, priority=0.9), fleet)
    assert _admits(shed, prompt(tokens=15, priority=0.9), fleet)
    assert _admits(early, prompt(tokens=15, priority=0.9), fleet)


def _admits(policy: Any, request: Any, fleet: Any) -> bool:
    return type(policy.admit(request, fleet.at(0))).__name__ == "Admit"


# ---- queue order -----------------------------------------------------------------------------------------------------


def served(name: str, requests: list[Any], **params: Any) -> list[int]:
    """The ids in the order in which they would be served, all waiting; request i joins at instant i."""
    order = made(name, "queue_order", **params)
    keys = {request.id: (order.key(request, i), i) for i, request in enumerate(requests)}
    return sorted(keys, key=lambda id: keys[id])


FOUR = [
    prompt(id=1, tokens=400, priority=0.5, arrival=0, ttft_objective=900),
    prompt(id=2, tokens=100, priority=0.1, arrival=1, ttft_objective=None),
    prompt(id=3, tokens=200, priority=0.9, arrival=2, ttft_objective=950),
    prompt(id=4, tokens=100, priority=0.5, arrival=3, ttft_objective=100),
]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("fcfs", [1, 2, 3, 4]),
        ("lcfs", [4, 3, 2, 1]),
        ("priority", [3, 1, 4, 2]),
        ("shortest_prompt_first", [2, 4, 3, 1]),
        ("wspt", [4, 3, 1, 2]),  # 800, 1000, 222, 200 tokens a unit of weight
        ("edf", [4, 1, 3, 2]),  # 900, never, 952, 103
    ],
)
def test_each_order_serves_the_same_four_requests_in_its_own_way(name: str, order: list[int]) -> None:
    assert served(name, FOUR) == order


def test_last_come_first_served_keeps_those_of_one_instant_in_order() -> None:
    order = made("lcfs", "queue_order")
    assert order.key(FOUR[0], 7) == order.key(FOUR[1], 7) > order.key(FOUR[2], 8)


def test_deficit_round_robin_gives_each_class_a_quantum_of_tokens_a_round() -> None:
    many = [prompt(id=i, tokens=50, traffic_class="a") for i in range(1, 7)]
    few = [prompt(id=i, tokens=100, traffic_class="b") for i in range(11, 14)]
    assert served("deficit_round_robin", many + few, quantum=100) == [1, 2, 11, 3, 4, 12, 5, 6, 13]
    assert served("deficit_round_robin", many + few, quantum=100, weights={"a": 2}) == [1, 2, 3, 4, 11, 5, 6, 12, 13]
    assert served("fcfs", many + few) == [1, 2, 3, 4, 5, 6, 11, 12, 13]


def test_a_prompt_of_many_quanta_waits_for_as_many_rounds() -> None:
    requests = [prompt(id=1, tokens=250, traffic_class="a")] + [prompt(id=i, tokens=100) for i in range(2, 6)]
    assert served("deficit_round_robin", requests, quantum=100) == [2, 3, 1, 4, 5]


def test_a_class_that_was_away_saves_nothing_up() -> None:
    order = made("deficit_round_robin", "queue_order", quantum=100)
    for i in range(50):  # class a alone, each request served at once
        request = prompt(id=i, tokens=100, traffic_class="a")
        order.on_served(request, order.key(request, i), i)
    late = [order.key(prompt(id=100 + i, tokens=100, traffic_class="b"), 50) for i in range(3)]
    more = [order.key(prompt(id=200 + i, tokens=100, traffic_class="a"), 50) for i in range(3)]
    assert late == [49, 50, 51]
    assert more == [50, 51, 52]  # not behind fifty rounds of b


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("hold_when_full", {"max_active": 0}, "max_active must be a whole number"),
        ("hold_when_full", {"max_wait_ms": -1}, "max_wait_ms must be a number"),
        ("reject_at_limit", {}, "max_active"),
        ("shed_sheddable", {"classes": "batch"}, "classes must list traffic classes"),
    ],
)
def test_nonsense_admission_is_refused(name: str, params: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        made(name, "admission", **params)


@pytest.mark.parametrize("params", [{"quantum": 0}, {"weights": [1]}, {"weights": {"a": 0}}])
def test_nonsense_rounds_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="deficit_round_robin"):
        made("deficit_round_robin", "queue_order", **params)
