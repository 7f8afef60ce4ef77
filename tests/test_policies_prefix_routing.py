"""Routing by prefixes, sessions and hashes, on views computed by hand; and where each differs from its nearest neighbour."""

from __future__ import annotations

from collections import Counter
from math import exp
from typing import Any

import pytest

from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import Stage
from tests.policy_views import SIZES, context, fleet_of, generation, made, prompt, report, send


def asked(fleet: Any) -> Any:
    """The index is idle until it is asked."""
    for pool in fleet.at(0).pools:
        pool.prefix_match(prompt((1,)))
    return fleet


# ---- cache_aware -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_cache_aware_follows_a_prefix_that_is_good_enough(n: int) -> None:
    policy, fleet = made("cache_aware"), asked(fleet_of("c" * n))
    send(fleet, policy, prompt((1, 2, 3, 4)), 3)
    assert context(policy, fleet, prompt((1, 2, 7, 8))) == 3  # 2 of 4 blocks: above 0.3
    # 1 of 4 blocks is not: to who holds least, in turn
    assert {context(policy, fleet, prompt((1, 7, 8, 9))) for _ in range(n)} == set(range(1, n + 1)) - {3}


@pytest.mark.parametrize("n", SIZES)
def test_cache_aware_forgets_prefixes_while_load_is_unbalanced(n: int) -> None:
    policy, fleet = made("cache_aware", balance_abs=2, balance_rel=1.5), asked(fleet_of("c" * n))
    for executor in range(1, n + 1):
        send(fleet, policy, prompt(), executor)
    send(fleet, policy, prompt((1, 2)), 2)
    send(fleet, policy, prompt((1, 2)), 2)
    assert context(policy, fleet, prompt((1, 2))) == 2  # 3 - 1 is not above 2
    send(fleet, policy, prompt((1, 2)), 2)
    assert context(policy, fleet, prompt((1, 2))) != 2  # 4 - 1 is, and 4 > 1.5 x 1


def test_cache_aware_unbalanced_needs_the_ratio_too() -> None:
    policy, fleet = made("cache_aware", balance_abs=1, balance_rel=2), asked(fleet_of("cc"))
    for executor, number in ((1, 3), (2, 5)):
        for _ in range(number):
            send(fleet, policy, prompt((1,)) if executor == 2 else prompt(), executor)
    assert context(policy, fleet, prompt((1,))) == 2  # 5 - 3 > 1, but 5 < 2 x 3


def test_cache_aware_and_kv_cache_aware_differ_on_a_busy_executor_that_holds_half_the_prompt() -> None:
    fleet = asked(fleet_of("cc", max_batch_size=4))
    one, other = made("cache_aware"), made("kv_cache_aware")
    for _ in range(3):
        send(fleet, one, prompt((1, 2)), 1)
    request = prompt((1, 2, 3, 4))  # 20 of 45 tokens on 1, which has 3 of 4 slots taken
    assert context(one, fleet, request) == 1
    assert context(other, fleet, request) == 2  # 3/4 - 20/45 > 0


# ---- kv_cache_aware, conversation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_kv_cache_aware_weighs_the_share_matched_against_the_share_of_slots_taken(n: int) -> None:
    policy, fleet = made("kv_cache_aware"), asked(fleet_of("c" * n, max_batch_size=10))
    send(fleet, policy, prompt((1, 2, 3, 4)), 2)
    for executor in range(1, n + 1):
        send(fleet, policy, prompt(), executor)
    # 2: 2/10 - 40/45 < 0; the others 1/10
    assert context(policy, fleet, prompt((1, 2, 3, 4))) == 2
    for _ in range(9):
        send(fleet, policy, prompt(), 2)
    assert context(policy, fleet, prompt((1, 2, 3, 4))) != 2  # 11/10 - 40/45 = 0.21


@pytest.mark.parametrize("n", SIZES)
def test_a_conversation_stays_where_it_is_however_loaded(n: int) -> None:
    policy, fleet = made("conversation"), asked(fleet_of("c" * n))
    send(fleet, policy, prompt(tokens=100_000, session="a"), 2)
    assert context(policy, fleet, prompt(tokens=50, session="a")) == 2
    assert context(policy, fleet, prompt(tokens=50, session="b")) != 2
    fleet.lost(2)
    assert context(policy, fleet, prompt(tokens=50, session="a")) != 2


def test_a_new_conversation_follows_three_quarters_of_its_prompt_and_less_does_not_count() -> None:
    policy, fleet = made("conversation"), asked(fleet_of("cc"))
    send(fleet, policy, prompt((1, 2, 3, 4)), 1)
    assert context(policy, fleet, prompt((1, 2, 3, 9), session="x")) == 2  # 30 of 45 tokens
    assert context(policy, fleet, prompt((1, 2, 3, 4, 5), session="x")) == 2  # 40 of 55
    assert context(policy, fleet, prompt((1, 2, 3, 4), session="x")) == 1  # 40 of 45


def test_a_conversation_s_stages_have_homes_of_their_own() -> None:
    policy, fleet = made("conversation"), asked(fleet_of("ccgg"))
    send(fleet, policy, prompt(session="a"), 2)
    send(fleet, policy, prompt(session="a"), 4, Stage.GENERATION)
    assert context(policy, fleet, prompt(session="a")) == 2
    assert generation(policy, fleet, prompt(session="a")) == 4


def test_conversation_and_kv_cache_aware_differ_on_a_session_whose_home_is_full() -> None:
    one, other, fleet = made("conversation"), made("kv_cache_aware"), asked(fleet_of("cc", max_batch_size=2))
    request = prompt((1, 2), session="a")
    for _ in range(4):
        send(fleet, one, request, 1)
    assert context(one, fleet, request) == 1
    assert context(other, fleet, request) == 2  # 4/2 - 20/25 > 0


# ---- kv_cost, lmetric ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_kv_cost_adds_prefill_blocks_less_the_overlap_and_decode_blocks(n: int) -> None:
    policy, fleet = made("kv_cost"), asked(fleet_of("m" * n))
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=100, decode_kv_tokens=100)
    report(fleet, 2, queued_prefill_tokens=100, decode_kv_tokens=90)
    request = prompt((1, 2, 3))
    assert context(policy, fleet, request) == 2
    send(fleet, policy, request, 3)
    report(fleet, 3, queued_prefill_tokens=100, decode_kv_tokens=105)  # 105 + 100 + 5 < 90 + 100 + 35
    assert context(policy, fleet, request) == 3


def test_a_temperature_draws_by_the_softmax_of_normalised_costs() -> None:
    policy, fleet = made("kv_cost", temperature=0.5), asked(fleet_of("ccc"))
    report(fleet, 2, queued_prefill_tokens=50)
    report(fleet, 3, queued_prefill_tokens=100)
    counts = Counter(context(policy, fleet, prompt(tokens=10)) for _ in range(6000))
    weights = [1.0, exp(-0.5 / 0.5), exp(-1 / 0.5)]
    for executor, weight in enumerate(weights, 1):
        assert counts[executor] / 6000 == pytest.approx(weight / sum(weights), abs=0.03)


@pytest.mark.parametrize("n", SIZES)
def test_a_temperature_over_equal_costs_is_uniform(n: int) -> None:
    policy, fleet = made("kv_cost", temperature=0.1), asked(fleet_of("c" * n))
    counts = Counter(context(policy, fleet, prompt(tokens=10)) for _ in range(300 * n))
    assert min(counts.values()) > 200


@pytest.mark.parametrize("n", SIZES)
def test_lmetric_multiplies_work_ahead_by_requests_there(n: int) -> None:
    policy, fleet = made("lmetric"), asked(fleet_of("c" * n))
    for executor in range(1, n + 1):
        for _ in range(4):
            fleet.dispatched(executor, 100)
        report(fleet, executor, queued_prefill_tokens=100)  # (50 + 100) x 5
    for _ in range(2):
        fleet.answered(2)
    report(fleet, 2, queued_prefill_tokens=190)  # (50 + 190) x 3 = 720
    assert context(policy, fleet, prompt(tokens=50)) == 2
    report(fleet, 2, queued_prefill_tokens=201)  # 753
    assert context(policy, fleet, prompt(tokens=50)) != 2


def test_lmetric_and_kv_cost_differ_where_many_short_prompts_wait() -> None:
    one, other, fleet = made("lmetric"), made("kv_cost"), asked(fleet_of("cc"))
    for _ in range(9):
        fleet.dispatched(1, 10)  # 9 requests of 10 tokens
    fleet.dispatched(2, 120)  # one of 120
    request = prompt(tokens=10)
    assert context(one, fleet, request) == 2  # (10 + 120) x 2 < (10 + 90) x 10
    assert context(other, fleet, request) == 1  # 100 tokens < 130


# ---- consistent hashing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["prefix_hash", "bounded_hash"])
def test_equal_prefixes_meet_and_others_spread_over_the_pool(name: str, n: int) -> None:
    policy, fleet = made(name, prefix_tokens=20), fleet_of("c" * n)
    for first in range(20):
        homes = {context(policy, fleet, prompt((first, first + 100, rest))) for rest in range(1000, 1010)}
        assert len(homes) == 1
    assert len({context(policy, fleet, prompt((first, first + 100))) for first in range(200)}) == n


def test_the_hash_counts_the_first_prefix_tokens_only() -> None:
    policy, fleet = made("prefix_hash", prefix_tokens=20), fleet_of("c" * 8)
    same = {context(policy, fleet, prompt((1, 2, third))) for third in range(50)}
    other = {context(policy, fleet, prompt((1, second))) for second in range(50)}
    assert len(same) == 1
    assert len(other) > 1


@pytest.mark.parametrize("name", ["prefix_hash", "bounded_hash"])
def test_an_executor_that_dies_moves_only_its_own_keys(name: str) -> None:
    policy, fleet = made(name), fleet_of("c" * 8)
    before = {i: context(policy, fleet, prompt((i,))) for i in range(100)}
    fleet.lost(3)
    after = {i: context(policy, fleet, prompt((i,))) for i in range(100)}
    assert {i for i in before if before[i] != after[i]} == {i for i in before if before[i] == 3}


@pytest.mark.parametrize("n", SIZES)
def test_an_overloaded_home_is_passed_over(n: int) -> None:
    policy, fleet = made("prefix_hash"), fleet_of("c" * n)
    home = context(policy, fleet, prompt((1,)))
    for executor in range(1, n + 1):
        for _ in range(4):
            fleet.dispatched(executor, 10)
    assert context(policy, fleet, prompt((1,))) == home  # 5 <= ceil(1.25 x (4 n + 1) / n)
    for _ in range(2):
        fleet.dispatched(home, 10)
    assert context(policy, fleet, prompt((1,))) != home


def test_bounded_hash_keeps_a_session_together_where_prefix_hash_keeps_a_prefix() -> None:
    one, other, fleet = made("bounded_hash"), made("prefix_hash"), fleet_of("c" * 8)
    prompts = [prompt((i,), session="a") for i in range(30)]
    assert len({context(one, fleet, request) for request in prompts}) == 1
    assert len({context(other, fleet, request) for request in prompts}) > 1
    sessions = [prompt((5,), session=str(i)) for i in range(30)]
    assert len({context(one, fleet, request) for request in sessions}) > 1
    assert len({context(other, fleet, request) for request in sessions}) == 1


@pytest.mark.parametrize("name", ["prefix_hash", "bounded_hash"])
def test_a_prompt_without_a_key_goes_to_the_least_loaded(name: str) -> None:
    policy, fleet = made(name), fleet_of("ccc")
    for executor in (1, 3):
        fleet.dispatched(executor, 10)
    assert context(policy, fleet, prompt(tokens=5)) == 2


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("cache_aware", {"cache_threshold": 2}, "cache_threshold must be a number of at least 0 and at most 1, got 2"),
        ("cache_aware", {"balance_rel": "x"}, "balance_rel must be a number"),
        ("kv_cost", {"temperature": -1}, "temperature must be a number of at least 0 .*got -1"),
        ("kv_cost", {"temperature": float("inf")}, "temperature must be a number of at least 0 and at most 1e"),
        ("kv_cost", {"overlap_weight": True}, "overlap_weight must be a number"),
        ("prefix_hash", {"load_factor": 0.5}, "load_factor must be a number of at least 1"),
        ("bounded_hash", {"prefix_tokens": 0}, "prefix_tokens must be a whole number of at least 1"),
        ("conversation", {"threshold": float("nan")}, "threshold must be a number"),
    ],
)
def test_nonsense_parameters_are_refused_by_name(name: str, params: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        made(name, **params)
