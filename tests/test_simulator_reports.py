"""What policies see is as old as the messages that brought it."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.core.cost import ConstantCost
from disagg.policies import ExecutorRow, FleetView, Hold, Request, Role, Route, RoutingPolicy, Stage
from tests.simulation_helpers import World, executors, named

LATENCY = 300
INTERVAL = 10_000
STEP = 1000


class Watching(RoutingPolicy):
    """Sends everything to executors 1 and 2 and notes what it saw."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reports: list[tuple[int, int, int]] = []  # (received at, executor, active prefill tokens)
        self.seen: list[
            tuple[int, int, int, int]
        ] = []  # (now, age, reports, wire requests) of executor 1 at each question

    def route_context(self, request: Request, fleet: FleetView) -> Route:
        row = fleet.executor(1)
        self.seen.append((fleet.now, row.age, row.num_reports, row.wire_requests))
        return Route(context=1)

    def route_generation(self, request: Request, fleet: FleetView) -> Route | Hold:
        return Route(generation=2)

    def on_report(self, executor: ExecutorRow, fleet: FleetView) -> None:
        assert executor.age == 0
        waiting = executor.queued_prefill_tokens + executor.inflight_prefill_tokens
        self.reports.append((fleet.now, executor.executor_id, waiting))


def watched(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[World, Watching]:
    fleet = executors("cg", **{"report_interval": INTERVAL, "report_on_batch_change": False, **settings})
    world = World(fleet, router=named(monkeypatch, Watching), cost=ConstantCost(STEP), latency=LATENCY)
    core: Any = world.cluster.core
    return world, core.core.routers.by_stage[Stage.CONTEXT]


def test_the_age_of_a_view_is_the_time_since_its_report_was_received(monkeypatch: pytest.MonkeyPatch) -> None:
    world, policy = watched(monkeypatch)
    for i, at in enumerate((0, 250, 700, 5000), 1):
        world.submit(i, at, 100, 1, max_tokens=1)
    world.run()
    # request 1 reaches the executor at 300; its first report leaves then and is there at 600; with the response of the
    # step that ends at 1300, the second is there at 1600; requests 2 and 3 run in the step 1300-2300: received at 2600
    assert policy.seen == [(0, 0, 0, 0), (250, 250, 0, 1), (700, 100, 1, 1), (5000, 2400, 3, 0)]
    ages = [row.max_age_ps for row in world.table("Decision")]
    assert ages == [0, 250, 100, 2400]
    assert [row.view_versions for row in world.table("Decision")] == [(0,), (0,), (1,), (3,)]


def test_without_responses_reports_come_once_an_interval_while_there_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    world, policy = watched(monkeypatch, max_num_tokens=10, report_interval=9700)
    world.submit(1, 0, 455, 1, max_tokens=1)  # 46 steps of at most ten tokens, the first from 300 to 1300
    world.run()
    # news begins with the request at 300, and a report leaves every interval from then; the last rides on the response
    assert [(at - LATENCY, waiting) for at, executor, waiting in policy.reports if executor == 1] == [
        (300, 455),
        (10_000, 365),
        (19_700, 265),
        (29_400, 165),
        (39_100, 75),
        (46_300, 0),
    ]


def test_reports_at_batch_changes_come_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    world, policy = watched(monkeypatch, max_num_tokens=10, report_on_batch_change=True)
    world.submit(1, 0, 500, 1, max_tokens=1)
    world.run()
    received = [at for at, executor, _ in policy.reports if executor == 1]
    assert received == [LATENCY + 300 + k * STEP for k in range(51)]


def test_the_number_of_steps_in_a_span_does_not_change_what_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def reports(max_span_steps: int) -> Any:
        world, policy = watched(monkeypatch, max_span_steps=max_span_steps)
        for i in range(1, 6):
            world.submit(i, i * 7000, 50, 30)
        world.run()
        seen = policy.reports, policy.seen
        return seen, len(
            [frame for frame in world.frames(2) if any(type(e).__name__ == "StepsDone" for e in frame.events)]
        )

    whole, few = reports(1 << 20)
    single, many = reports(1)
    assert whole == single
    assert many > 2 * few


def test_a_request_on_the_wire_is_counted_until_a_report_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world, policy = watched(monkeypatch)
    for i in range(1, 5):
        world.submit(i, 0, 100, 1, max_tokens=1)
    world.submit(5, 599, 100, 1, max_tokens=1)
    world.submit(6, 601, 100, 1, max_tokens=1)
    world.run()
    # the report that left at 300 and came at 600 had seen the first four of them
    assert [wire for _, _, _, wire in policy.seen] == [0, 1, 2, 3, 4, 1]


def test_an_executor_s_role_stands_in_the_view() -> None:
    core: Any = World("cgm").cluster.core
    view = core.core.fleet.at(0)
    assert [view.executor(i).role for i in (1, 2, 3)] == [Role.CONTEXT, Role.GENERATION, Role.MIXED]
