"""A user's own SimPy processes beside the cluster: a client, a fault, an observer; and the integer clock they live on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from disagg.core.config import PolicySpec, RetryConfig
from disagg.policies import FinishReason, FleetView, Request, Route, RoutingPolicy
from disagg.policies.vocabulary import PS_PER_MS, PS_PER_US
from disagg.simulator import FloatDelayError
from disagg.simulator.calendar import Calendar
from tests.simulation_helpers import World, executors, named


def test_a_client_submits_waits_for_the_end_and_submits_again() -> None:
    world = World("cg")
    cluster = world.cluster
    seen: list[tuple[int, FinishReason | None, int]] = []

    def client() -> Any:
        for i in range(1, 6):
            cluster.submit(Request(i, 100, 64, arrival=cluster.env.now), 3 * i)
            deliver = yield cluster.finished(i)
            seen.append((cluster.env.now, deliver.finish_reason, deliver.num_output_tokens))
            yield cluster.sleep(1e-3)

    cluster.env.process(client())
    world.run()
    rows = world.table("Request")
    assert [(at, reason) for at, reason, _ in seen] == [(row.end_ps, FinishReason.STOP) for row in rows]
    assert [tokens for _, _, tokens in seen] == [3, 6, 9, 12, 15]
    assert [row.arrival_ps for row in rows[1:]] == [at + PS_PER_MS for at, _, _ in seen[:-1]]


def test_a_client_that_sends_in_the_instant_of_an_end_is_served_in_that_instant() -> None:
    world = World("m")
    cluster = world.cluster

    def client(first: int) -> Any:
        for i in range(first, first + 3):
            cluster.submit(Request(i, 100, 64, arrival=cluster.env.now), 5)
            yield cluster.finished(i)

    cluster.env.process(client(1))
    cluster.env.process(client(11))
    world.run()
    ends = {row.request_id: row.end_ps for row in world.table("Request")}
    assert len(ends) == 6
    for row in world.table("Decision"):
        assert row.at_ps == ends.get(row.request_id - 1, 0)


@pytest.mark.parametrize("is_late", [True, False])
def test_whoever_asks_late_for_an_end_never_sees_time_run_backwards(is_late: bool) -> None:
    world = World("cg", is_late=is_late)
    cluster = world.cluster
    for i, length in ((1, 5), (2, 60)):
        world.submit(i, 0, 100, length)
    seen: list[tuple[str, int]] = []

    def asker() -> Any:
        yield cluster.sleep(300e-6)  # request 1 ended at 255 us, which nobody had to hear
        seen.append(("asked", cluster.env.now))
        with pytest.raises(ValueError, match="request 1 is not under way"):
            cluster.finished(1)
        yield cluster.finished(2)
        seen.append(("ended", cluster.env.now))

    cluster.env.process(asker())
    world.run()
    ends = {row.request_id: row.end_ps for row in world.table("Request")}
    assert ends[1] < 300 * PS_PER_US < ends[2]
    assert seen == [("asked", 300 * PS_PER_US), ("ended", ends[2])]
    assert cluster.env.now >= ends[2]


def test_a_request_id_in_use_is_refused_and_the_first_of_that_id_is_served() -> None:
    world = World("cg")
    cluster = world.cluster
    world.submit(1, 0, 100, 5)
    world.submit(1, PS_PER_US, 100, 7)  # while it is in use
    seen: list[tuple[int, FinishReason | None]] = []

    def client() -> Any:
        yield cluster.env.timeout(1)
        deliver = yield cluster.finished(1)
        seen.append((deliver.num_output_tokens, deliver.finish_reason))

    cluster.env.process(client())
    world.submit(1, 5000 * PS_PER_US, 100, 9)  # it has ended, and may be used again
    world.run()
    assert seen == [(5, FinishReason.STOP)]
    ends = [(d.finish_reason, d.num_output_tokens) for d in world.delivered if d.finish_reason is not None]
    assert ends == [(FinishReason.ERROR, 0), (FinishReason.STOP, 5), (FinishReason.STOP, 9)]
    assert not cluster._hidden


def test_the_end_of_a_request_that_is_turned_away_at_once_can_be_waited_for() -> None:
    cluster = World("cg", admission=PolicySpec("reject_at_limit", {"max_active": 1})).cluster
    seen: list[tuple[int, FinishReason | None]] = []

    def client() -> Any:
        yield cluster.sleep(1e-3)
        for i in (1, 2):  # one more than is admitted
            cluster.submit(Request(i, 100, 64, arrival=cluster.env.now), 5)
        deliver = yield cluster.finished(2)
        seen.append((cluster.env.now, deliver.finish_reason))

    cluster.env.process(client())
    cluster.run()
    assert seen == [(PS_PER_MS, FinishReason.REJECTED)]


def test_a_fault_kills_an_executor_and_its_requests_run_again_elsewhere() -> None:
    world = World("ccg")
    cluster = world.cluster
    for i in range(1, 9):
        world.submit(i, 0, 500, 10)

    def fault() -> Any:
        yield cluster.env.timeout(51 * PS_PER_US)  # in the middle of its first step
        cluster.kill(1, notice_after=PS_PER_MS)

    cluster.env.process(fault())
    world.run()
    rows = {row.request_id: row for row in world.table("Request")}
    assert {row.finish_reason for row in rows.values()} == {"stop"}
    assert {i: row.num_attempts for i, row in rows.items()} == {i: 2 if i % 2 else 1 for i in range(1, 9)}
    assert {row.context_executor for row in rows.values()} == {2}
    retried = [row.at_ps for row in world.table("Decision") if row.stage == "context"][8:]
    assert retried == [51 * PS_PER_US + PS_PER_MS] * 4


def test_without_recomputation_a_fault_fails_the_requests_of_that_executor_only() -> None:
    world = World("ccg", retry=RetryConfig(on_failure="fail"))
    for i in range(1, 9):
        world.submit(i, 0, 500, 10)

    def fault() -> Any:
        yield world.cluster.sleep(51e-6)
        world.cluster.kill(1)

    world.cluster.env.process(fault())
    world.run()
    ends = {row.request_id: (row.finish_reason, row.error) for row in world.table("Request")}
    assert ends == {i: ("error", "executor 1 is gone") if i % 2 else ("stop", None) for i in range(1, 9)}


def test_an_observer_samples_the_cluster_without_disturbing_it() -> None:
    def run(with_observer: bool) -> tuple[World, list[int]]:
        world = World("cg")
        samples: list[int] = []

        def observer() -> Any:
            while len(samples) < 500:
                samples.append(len(world.delivered))
                yield world.cluster.sleep(7e-6)

        for i in range(1, 21):
            world.submit(i, i * 10 * PS_PER_US, 100, 20)
        if with_observer:
            world.cluster.env.process(observer())
        return world.run(), samples

    alone, _ = run(False)
    observed, samples = run(True)
    assert observed.digest() == alone.digest()
    assert samples == sorted(samples)
    assert len(set(samples)) > 10
    assert observed.cluster.count_events() >= alone.cluster.count_events() + 500


def test_a_cancelled_request_ends_once_and_frees_what_it_had() -> None:
    world = World("cg")
    for i in range(1, 4):
        world.submit(i, 0, 100, 60)

    def impatient() -> Any:
        yield world.cluster.sleep(150e-6)
        world.cluster.cancel(2)
        deliver = yield world.cluster.finished(2)
        assert deliver.finish_reason is FinishReason.CANCELLED
        world.cluster.cancel(2)

    process = world.cluster.env.process(impatient())
    world.run()
    assert process.ok
    ends = [(d.request_id, d.finish_reason) for d in world.delivered if d.finish_reason]
    assert sorted(ends) == [(1, "stop"), (2, "cancelled"), (3, "stop")]


@pytest.mark.parametrize("delay", [0.5, 1.0, float("nan"), np.int64(3), True])
def test_a_delay_that_is_no_whole_number_of_picoseconds_is_refused_where_it_is_made(delay: Any) -> None:
    world = World("m")
    with pytest.raises(FloatDelayError, match=r"use cluster\.sleep\(seconds\), the clock is integer"):
        world.cluster.env.timeout(delay)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_no_one_sleeps_for_a_time_that_is_not_one(seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot sleep for"):
        World("m").cluster.sleep(seconds)


def test_nothing_is_called_in_the_past_and_what_was_taken_back_is_not_the_next_call() -> None:
    calendar = Calendar()
    called: list[str] = []
    dropped = calendar.call_at(5, 0, called.append, "taken back")
    calendar.call_at(1000, 0, called.append, "made")
    calendar.take_back(dropped)
    assert calendar.peek() == 1000
    assert calendar.step()
    assert (calendar.now, called) == (1000, ["made"])
    with pytest.raises(ValueError, match="999 ps, before now, 1000 ps"):
        calendar.call_at(999, 0, called.append, "late")
    with pytest.raises(ValueError, match="999 ps, before now, 1000 ps"):
        calendar.call_in_place(999, 0, calendar.next_serial(), called.append, "late")
    assert not calendar.step()


def test_sleep_takes_seconds_and_rounds_to_picoseconds() -> None:
    cluster = World("m").cluster
    woken: list[int] = []

    def sleeper() -> Any:
        for seconds in (1e-12, 1.4e-12, 1.6e-12, 0.1, 0):
            yield cluster.sleep(seconds)
            woken.append(cluster.env.now)

    cluster.env.process(sleeper())
    cluster.run()
    assert woken == [1, 2, 4, 10**11 + 4, 10**11 + 4]
    assert type(cluster.env.now) is int
    assert cluster.now_s == pytest.approx(0.1)


def test_a_run_can_stop_and_go_on() -> None:
    def world() -> World:
        w = World("cg")
        for i in range(1, 9):
            w.submit(i, i * 10 * PS_PER_US, 100, 20)
        return w

    whole, parts = world().run(), world()
    for i in range(1, 10):
        parts.cluster.run(until_s=i * 50e-6)
        assert parts.cluster.env.now == i * 50 * PS_PER_US
    assert parts.run().digest() == whole.digest()


def test_kv_that_waits_to_be_read_outlives_the_response() -> None:
    world = World(executors("cg"), link_bytes_per_s=1e9)  # 100 tokens of 1000 bytes take 100 µs
    world.submit(1, 0, 100, 5)
    source = world.cluster.executors[1].core.core
    held: list[tuple[int, int]] = []

    def observer() -> Any:
        while not world.table("Request"):
            held.append((world.cluster.env.now, source.report().blocks_held))
            yield world.cluster.env.timeout(PS_PER_US)

    world.cluster.env.process(observer())
    world.run()
    (row,), (transfer,) = world.table("Request"), world.table("Transfer")
    assert transfer.start_ps > row.first_token_ps
    for at, blocks in held:
        answered = row.first_token_ps - 50 * PS_PER_US  # a message takes 50 µs
        assert blocks == (7 if answered <= at <= transfer.end_ps else 0), at
    assert sum(1 for at, blocks in held if blocks and at > row.first_token_ps) >= 100


def test_no_kv_comes_from_an_executor_that_died_in_mid_transfer() -> None:
    world = World("ccg", link_bytes_per_s=1e9)  # 100 tokens of 1000 bytes take 100 µs
    world.submit(1, 0, 100, 5)
    cluster = world.cluster

    def fault() -> Any:
        while not len(cluster.link(1, 3)):
            yield cluster.env.timeout(PS_PER_US)
        yield cluster.sleep(50e-6)
        cluster.kill(1, notice_after=PS_PER_MS)

    cluster.env.process(fault())
    world.run()
    lost, again = world.table("Transfer")
    assert (lost.source, lost.ok, lost.error) == (1, False, "executor 1, which held the KV, is gone")
    assert (again.source, again.ok) == (2, True)
    (row,) = world.table("Request")
    assert (row.finish_reason, row.num_attempts, row.context_executor) == ("stop", 2, 2)


def test_two_executors_that_hold_each_other_s_kv_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crossing(RoutingPolicy):
        """Each request's KV goes from one mixed executor to the other."""

        def route_context(self, request: Request, fleet: FleetView) -> Route:
            return Route(context=1 + request.id % 2, generation=2 - request.id % 2)

    fleet = executors("mm", num_blocks=8)
    world = World(fleet, router=named(monkeypatch, Crossing))
    for i in range(1, 5):  # four blocks of prompt each: both executors are full of what the other is to read
        world.submit(i, 0, 64, 5, max_tokens=16)
    world.cluster.run(until_s=3600)
    assert len(world.table("Request")) == 4
