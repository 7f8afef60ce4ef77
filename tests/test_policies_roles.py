"""Role policies on views computed by hand, and beside their nearest relatives."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import ChangeRole, Request, Role, Route
from tests.policy_views import fleet_of, generation, made, prompt, report

CONTEXT, GENERATION, MIXED, PARKED = Role


def roles(name: str, **params: Any) -> Any:
    return made(name, "roles", **params)


def changes(policy: Any, fleet: Any) -> list[tuple[int, Role]]:
    return [(change.executor, change.role) for change in policy.change_roles(fleet.at(0))]


def arrivals(policy: Any, fleet: Any, number: int, tokens: int, max_tokens: int, **fields: Any) -> None:
    for i in range(number):
        policy.on_arrival(Request(i, tokens, max_tokens, **fields), fleet.at(0))


def loaded(*, prompts: tuple[int, int], free: tuple[int, int]) -> Any:
    """Context executors 1 and 2 with so many tokens pending, generation executors 3 and 4 with so many of 100 blocks free."""
    fleet = fleet_of("ccgg")
    for executor, tokens in enumerate(prompts, 1):
        report(fleet, executor, queued_prefill_tokens=tokens)
    for executor, blocks in enumerate(free, 3):
        report(fleet, executor, blocks_free=blocks)
    return fleet


# ---- pools: thresholds of 100 prompt tokens and of half the blocks ----------------------------------------------------


def pools(name: str = "mixed_pool") -> Any:
    return roles(name, max_prompt_tokens=100, max_kv=0.5)


def test_an_overloaded_pool_borrows_the_other_s_least_loaded_until_its_work_is_done() -> None:
    policy, fleet = pools(), loaded(prompts=(150, 120), free=(90, 95))
    assert changes(policy, fleet) == [(4, MIXED)]
    fleet.change_role(4, MIXED)
    assert changes(policy, fleet) == []  # prompts still wait, and it has room for them
    report(fleet, 1, queued_prefill_tokens=50)
    report(fleet, 4, queued_prefill_tokens=30)
    assert changes(policy, fleet) == []  # it has a prompt yet
    report(fleet, 4, blocks_free=90)
    assert changes(policy, fleet) == [(4, GENERATION)]


def test_generation_borrows_too_and_nobody_lends_what_it_needs() -> None:
    assert changes(pools(), loaded(prompts=(20, 10), free=(50, 40))) == [(2, MIXED)]
    assert changes(pools(), loaded(prompts=(20, 10), free=(51, 40))) == []
    assert changes(pools(), loaded(prompts=(150, 120), free=(50, 40))) == []  # both are overloaded
    fleet = fleet_of("cg")
    report(fleet, 1, queued_prefill_tokens=150)
    assert changes(pools(), fleet) == []  # the last of its pool


def test_the_router_of_the_same_name_sends_to_what_is_lent_only_what_its_own_pool_has_no_room_for() -> None:
    router, fleet = made("mixed_pool", max_prompt_tokens=100, max_kv=0.5), loaded(prompts=(150, 120), free=(90, 95))
    fleet.change_role(4, MIXED)
    assert router.route_context(prompt(tokens=5), fleet.at(0)) == Route(context=4)
    assert generation(router, fleet, prompt(tokens=5), source=1) == 3
    report(fleet, 2, queued_prefill_tokens=99)
    assert router.route_context(prompt(tokens=5), fleet.at(0)) == Route(context=2)
    report(fleet, 3, blocks_free=40)
    assert generation(router, fleet, prompt(tokens=5), source=1) == 4


def test_switching_is_for_good_and_goes_by_the_mean_where_borrowing_goes_by_the_least() -> None:
    fleet = loaded(prompts=(150, 120), free=(90, 95))  # 1.35 and 0.15
    assert changes(pools("switch_by_load"), fleet) == [(4, CONTEXT)]
    assert changes(pools(), fleet) == [(4, MIXED)]
    busy = loaded(prompts=(150, 120), free=(60, 65))  # 1.35 and 0.75: not idle enough to give one up, enough to lend it
    assert changes(pools("switch_by_load"), busy) == []
    assert changes(pools(), busy) == [(4, MIXED)]
    uneven = loaded(prompts=(250, 10), free=(90, 95))  # 1.3 and 0.15, but executor 2 has room
    assert changes(pools("switch_by_load"), uneven) == [(4, CONTEXT)]
    assert changes(pools(), uneven) == []


def test_one_executor_at_a_time_switches() -> None:
    fleet = loaded(prompts=(10, 20), free=(30, 40))
    assert changes(pools("switch_by_load"), fleet) == [(1, GENERATION)]
    fleet.view.draining = {1: 3}
    assert changes(pools("switch_by_load"), fleet) == []


# ---- planning: a prompt token takes 10 ps, a decode step 100 ps + 5 a request + 1 a KV token; 1000 KV tokens each --------


def test_rates_are_matched_by_the_split_that_serves_the_most() -> None:
    """Prompts of 100, 11 tokens out: context 1/1000 requests/ps. Generation: 9 requests fit (9 x 111 tokens), their step takes
    100 + 45 + 950 = 1095 ps, ten of them a request: 9/10950. One context executor of three: min(1/1000, 18/10950) = 1/1000;
    two: min(2/1000, 9/10950) = 9/10950, which is less.
    """
    policy, fleet = roles("rate_matching"), fleet_of("ccg", predicts=True)
    report(fleet, 1, queued_prefill_tokens=70)
    arrivals(policy, fleet, 2, tokens=100, max_tokens=11)
    assert changes(policy, fleet) == [(2, GENERATION)]
    assert changes(policy, fleet) == []  # nobody has arrived since
    assert changes(roles("switch_by_load"), fleet) == []  # nothing waits yet: load says nothing


def test_short_answers_to_long_prompts_want_more_context_executors() -> None:
    """Prompts of 900, 2 tokens out: context 1/9000; generation one request, one step of 105 + 901 ps: 1/1006."""
    policy, fleet = roles("rate_matching"), fleet_of("cgg", predicts=True)
    report(fleet, 2, blocks_free=10)
    arrivals(policy, fleet, 1, tokens=900, max_tokens=2)
    assert changes(policy, fleet) == [(3, CONTEXT)]


def test_output_lengths_are_learnt_from_requests_that_have_ended() -> None:
    """The bound of 1000 tokens would take all but one for generation; the 2 that came out do not."""
    policy, fleet = roles("rate_matching"), fleet_of("ccgg", predicts=True)
    arrivals(policy, fleet, 1, tokens=900, max_tokens=90)
    assert changes(policy, fleet) == [(1, GENERATION)]
    arrivals(policy, fleet, 1, tokens=900, max_tokens=90)
    policy.on_ended(Request(1, 900, 90), 2, fleet.at(0))
    assert changes(policy, fleet) == [(3, CONTEXT)]


def planner(**params: Any) -> Any:
    """Asked every 10⁶ ps."""
    return roles("planner", interval_s=1e-6, **params)


def test_the_floor_is_what_the_forecast_needs_and_the_others_are_parked() -> None:
    """Three prompts of 50,000 tokens are 1,500,000 ps in 1,000,000: two executors. Nine tokens of 50,107 ps: one."""
    policy, fleet = planner(), fleet_of("cccgg", predicts=True)
    arrivals(policy, fleet, 3, tokens=50_000, max_tokens=3)
    assert changes(policy, fleet) == [(3, PARKED), (5, PARKED)]
    for executor in (3, 5):
        fleet.change_role(executor, PARKED)
    arrivals(policy, fleet, 5, tokens=50_000, max_tokens=3)  # 2,500,000 ps: three
    assert changes(policy, fleet) == [(3, CONTEXT)]  # which is at home there
    matching = roles("rate_matching")
    arrivals(matching, fleet, 3, tokens=50_000, max_tokens=3)
    assert all(role is not PARKED for _, role in changes(matching, fleet))


def test_the_busiest_keep_their_role() -> None:
    policy, fleet = planner(), fleet_of("ccg", predicts=True)
    fleet.dispatched(2, 10)
    arrivals(policy, fleet, 1, tokens=100, max_tokens=3)
    assert changes(policy, fleet) == [(1, PARKED)]


@pytest.mark.parametrize(
    ("ttft_ps", "expected"),
    [
        (10_000, [(2, CONTEXT)]),
        (20_000, []),
        (30_000, []),
    ],  # 11,000 misses; is neither; is below half, and one is the floor
)
def test_one_more_if_all_estimates_miss_the_objective(ttft_ps: int, expected: list[Any]) -> None:
    """1,000 tokens wait and 100 come: 11,000 ps."""
    policy, fleet = planner(), fleet_of("ccg", predicts=True)
    fleet.change_role(2, PARKED)
    report(fleet, 1, queued_prefill_tokens=1000)
    arrivals(policy, fleet, 1, tokens=100, max_tokens=3, ttft_objective=ttft_ps)
    assert changes(policy, fleet) == expected


def test_one_fewer_only_if_all_estimates_are_well_below_it() -> None:
    """Steps: executor 2 takes 100 + 5 + 395 = 500 ps, executor 3 105 at least; the objective is 1,200, then 900."""
    fleet = fleet_of("cgg", predicts=True)
    report(fleet, 2, running_requests=1, decode_kv_tokens=395)
    for tpot_ms, expected in ((1.2e-6, [(3, PARKED)]), (0.9e-6, [])):
        policy = planner(tpot_ms=tpot_ms)
        fleet.dispatched(2, 0)
        arrivals(policy, fleet, 1, tokens=100, max_tokens=3)
        assert changes(policy, fleet) == expected


def test_steps_that_miss_the_tpot_objective_make_batches_smaller_and_the_floor_higher() -> None:
    """11,000 tokens in 10⁶ ps, behind prompts of 100. Batches of 9 take 1095 / 9 ps a token, of 2 (100 + 10 + 211) / 2, of
    1 100 + 5 + 106: 1.3, 1.8 and 2.3 executors.
    """
    for tpot_ms, floor in ((None, 2), (0.321e-6, 2), (0.3205e-6, 3)):
        policy, fleet = planner(tpot_ms=tpot_ms, down=0.0), fleet_of("cggggg", predicts=True)
        for executor in (3, 4, 5, 6):
            fleet.change_role(executor, PARKED)
        arrivals(policy, fleet, 1000, tokens=100, max_tokens=11)
        assert changes(policy, fleet) == [(executor, GENERATION) for executor in range(3, floor + 2)]


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("mixed_pool", {"max_kv": 2}, "mixed_pool: max_kv must be a number"),
        ("switch_by_load", {"low": -1}, "switch_by_load: low must be a number"),
        ("rate_matching", {"interval_s": 0}, "rate_matching: interval_s must be a number"),
        ("planner", {"ttft_ms": "fast"}, "planner: ttft_ms must be a number"),
    ],
)
def test_nonsense_parameters_are_refused_by_name(name: str, params: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        roles(name, **params)


def test_a_change_of_roles_is_a_plain_value() -> None:
    assert ChangeRole(1, Role.MIXED) == ChangeRole(1, Role("mixed"))
