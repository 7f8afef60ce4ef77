"""How long the progress thread rests: never long where somebody waits, and never at the price of a small machine."""

from __future__ import annotations

import threading

import pytest

from disagg.runtime.progress_pace import Bell, Pace


def rests(pace: Pace, rounds: int, *, in_transfer: bool, start: float = 0.0, round_s: float = 1e-6) -> list[float]:
    """What idle rounds of `round_s` each rest for, with the sleeps between them."""
    found, now = [], start
    for _ in range(rounds):
        now += round_s
        rest = pace.rest(False, in_transfer, now)
        assert rest is not None
        found.append(rest)
        now += rest
    return found


def test_with_many_cores_a_rank_in_a_transfer_looks_without_sleep_for_a_bounded_time() -> None:
    pace = Pace(num_cores=16)
    assert pace.rest(True, True, 0.0) is None
    found = rests(pace, 10_000, in_transfer=True)
    num_awake = found.index(next(rest for rest in found if rest > 0))
    assert 500 < num_awake < 5_000  # at a microsecond each
    assert all(rest > 0 for rest in found[num_awake:])
    assert max(found) <= 50e-6


def test_with_few_cores_nobody_looks_without_sleep_for_long() -> None:
    pace = Pace(num_cores=2)
    assert pace.rest(True, True, 0.0) is None
    found = rests(pace, 200, in_transfer=True)
    assert found.count(0.0) < 50
    assert max(found) <= 1e-4


@pytest.mark.parametrize("num_cores", [2, 16])
def test_an_idle_rank_sleeps_longer_and_longer_to_a_bound_and_anew_after_something_happened(num_cores: int) -> None:
    pace = Pace(num_cores)
    found = rests(pace, 100, in_transfer=False)
    assert found == sorted(found)
    assert found[-1] == found[-2] <= 1e-3
    assert pace.rest(True, False, 1.0) is None
    assert rests(pace, 100, in_transfer=False, start=1.0) == found


def test_a_bell_that_rang_before_the_sleep_ends_it_and_rings_once() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert bell.wait(60)
    assert not bell.wait(1e-6)


def test_a_bell_ends_the_sleep_of_another_thread() -> None:
    bell, woken = Bell(), []
    thread = threading.Thread(target=lambda: woken.append(bell.wait(60)))
    thread.start()
    bell.ring()
    thread.join(30)
    assert woken == [True]
