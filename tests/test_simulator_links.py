"""Links shared fairly: times computed by hand in whole picoseconds, and a naive reference on random loads."""

from __future__ import annotations

from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.tables import TransferRow
from disagg.policies import FleetView, Request, Route, RoutingPolicy
from disagg.simulator import Environment, Link
from disagg.simulator.calls import MESSAGE
from tests.simulation_helpers import World, executors, named

BYTES_PER_S = 1e12  # a picosecond a byte


def arrivals(transfers: list[tuple[int, int]], bytes_per_s: float = BYTES_PER_S, latency: int = 0) -> list[int]:
    """When each of the transfers (start, bytes) over one link is done."""
    env = Environment()
    link = Link(env, bytes_per_s, latency, 1)
    done = [0] * len(transfers)

    def note(i: int) -> None:
        done[i] = env.now

    for i, (start, num_bytes) in enumerate(transfers):
        env.calendar.call_at(start, MESSAGE, lambda item: link.transfer(item[1], note, item[0]), (i, num_bytes))
    env.run()
    assert len(link) == 0
    return done


def test_a_transfer_alone_takes_its_bytes_over_the_rate_and_the_latency_once() -> None:
    assert arrivals([(5, 1000)]) == [1005]
    assert arrivals([(5, 1000)], latency=70) == [1075]
    assert arrivals([(5, 1000)], bytes_per_s=0.5e12) == [2005]


def test_two_equal_transfers_on_one_link_take_twice_as_long_as_one() -> None:
    assert arrivals([(0, 1_000_003)]) == [1_000_003]
    assert arrivals([(0, 1_000_003)] * 2) == [2_000_006] * 2
    assert arrivals([(0, 1_000_003)] * 2, latency=9) == [2_000_015] * 2


def test_transfers_one_after_the_other_do_not_slow_each_other() -> None:
    assert arrivals([(0, 500), (500, 500), (2000, 500)]) == [500, 1000, 2500]


def test_a_third_that_joins_half_way_gives_the_times_computed_by_hand() -> None:
    # 0-600: two at 1/2, 300 bytes each; 600-1500: three at 1/3, 300 more each, so the first two are over at 1500 with
    # 600 bytes; the third has 300 left, alone
    assert arrivals([(0, 600), (0, 600), (600, 600)]) == [1500, 1500, 1800]
    # 0-400: two, 200 each; 400-1000: three, 200 each: the second (400 bytes) is over; 1000-1800: two, 400 each: the
    # first (800) is over; the third has 600 of 1000 and goes on alone for 400
    assert arrivals([(0, 800), (0, 400), (400, 1000)]) == [1800, 1000, 2200]


def test_a_transfer_of_no_bytes_arrives_within_a_picosecond() -> None:
    assert arrivals([(7, 0)]) == [8]


def test_equal_transfers_are_done_in_the_order_of_their_start() -> None:
    env = Environment()
    link = Link(env, BYTES_PER_S, 0, 1)
    order: list[int] = []
    for i in (3, 1, 2):
        link.transfer(100, order.append, i)
    env.run()
    assert order == [3, 1, 2]
    assert env.now == 300


@pytest.mark.parametrize("rate", [0, -1e9])
def test_a_link_without_a_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="a link needs a positive rate"):
        Link(Environment(), rate, 0, 1)


def fair_shares(transfers: list[tuple[int, int]]) -> list[Fraction]:
    """The same by exact processor sharing, one interval between two changes at a time."""
    left = {i: Fraction(num_bytes) for i, (_, num_bytes) in enumerate(transfers)}
    waiting = sorted(left, key=lambda i: transfers[i][0])
    active: list[int] = []
    done = [Fraction(0)] * len(transfers)
    now = Fraction(0)
    while waiting or active:
        next_end = now + min((left[i] for i in active), default=Fraction(0)) * len(active) if active else None
        next_start = Fraction(transfers[waiting[0]][0]) if waiting else None
        then = min(t for t in (next_end, next_start) if t is not None)
        for i in active:
            left[i] -= (then - now) / len(active)
        now = then
        for i in [i for i in active if not left[i]]:
            active.remove(i)
            done[i] = now
        while waiting and transfers[waiting[0]][0] == now:
            active.append(waiting.pop(0))
    return done


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000) | st.sampled_from([0, 500, 1000]), st.integers(1, 10**6) | st.just(700)),
        min_size=1,
        max_size=25,
    )
)
def test_random_transfers_end_as_by_exact_processor_sharing(transfers: list[tuple[int, int]]) -> None:
    for got, exact in zip(arrivals(transfers), fair_shares(transfers), strict=True):
        # an end falls on a whole picosecond; each end before it may have passed on less than one
        assert 0 <= got - exact <= len(transfers)


# ---- in a cluster ---------------------------------------------------------------------------------------------------


class Fixed(RoutingPolicy):
    """Request i goes to the i-th pair of executors."""

    def __init__(self, *, rng: Random, pairs: list[tuple[int, int]]) -> None:
        super().__init__(rng=rng)
        self._pairs = pairs

    def route_context(self, request: Request, fleet: FleetView) -> Route:
        return Route(*self._pairs[request.id - 1])


def transfers_of(roles: str, pairs: list[tuple[int, int]], **options: Any) -> list[TransferRow]:
    """The transfers of one request per (context executor, generation executor), all sent at once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(executors(roles), router=named(monkeypatch, Fixed, pairs=pairs), latency=10, **options)
    for i in range(1, len(pairs) + 1):
        world.submit(i, 0, 100, 5)
    world.run()
    rows: list[TransferRow] = world.table("Transfer")
    assert len(rows) == len(pairs)
    return rows


def test_transfers_between_other_pairs_and_in_the_other_direction_do_not_share() -> None:
    asked_and_served = 10 + 100 * 1000  # a message, then 100 tokens of 1000 bytes
    alone = transfers_of("mm", [(1, 2)])
    assert [row.end_ps - row.start_ps for row in alone] == [asked_and_served]
    both_ways = transfers_of("mm", [(1, 2), (2, 1)])
    assert [row.end_ps - row.start_ps for row in both_ways] == [asked_and_served] * 2
    other_pair = transfers_of("mmm", [(1, 2), (3, 2)])
    assert [row.end_ps - row.start_ps for row in other_pair] == [asked_and_served] * 2
    one_way = transfers_of("mm", [(1, 2), (1, 2)])
    assert [row.end_ps - row.start_ps for row in one_way] == [asked_and_served + 100 * 1000] * 2


def test_a_link_may_have_a_rate_for_each_pair() -> None:
    def rate(source: int, reader: int) -> float:
        return BYTES_PER_S / reader

    rows = transfers_of("mmm", [(1, 2), (1, 3)], link_bytes_per_s=rate)
    assert {row.reader: row.end_ps - row.start_ps for row in rows} == {2: 10 + 200_000, 3: 10 + 300_000}
