"""Composed, conditional, pooled, length-, memory- and place-aware routing on views computed by hand, beside neighbours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from disagg.core.prediction import LinkTimes
from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import PS_PER_S, Route, RouteMixed, Stage
from tests.policy_views import SIZES, context, fleet_of, generation, made, prompt, report, send

# ---- weighted_scorers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_scorers_are_summed_by_weight(n: int) -> None:
    fleet = fleet_of("c" * n)
    request = prompt((1, 2, 3, 4))
    fleet.at(0).context.prefix_match(request)
    policy = made("weighted_scorers", scorers={"prefix": 1, "queue": 1})
    send(fleet, policy, prompt((1, 2)), 2)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_requests=10)
    report(fleet, 2, queued_requests=8)  # prefix 0.5 + queue 0.2
    report(fleet, 3, queued_requests=0)  # queue 1
    assert context(policy, fleet, request) == 3
    assert context(made("weighted_scorers", scorers={"prefix": 2, "queue": 1}), fleet, request) == 2  # 1.2 > 1
    assert context(made("weighted_scorers", scorers={"prefix": 1}), fleet, request) == 2


@pytest.mark.parametrize("n", SIZES)
def test_kv_active_and_load_scorers(n: int) -> None:
    fleet = fleet_of("c" * n)
    for executor in range(1, n + 1):
        report(fleet, executor, blocks_free=50, queued_requests=64)
        fleet.dispatched(executor, 10)
    report(fleet, 2, blocks_free=51, queued_requests=64)
    assert context(made("weighted_scorers", scorers={"kv": 1}), fleet, prompt()) == 2
    report(fleet, 3, queued_requests=63, blocks_free=50)
    assert context(made("weighted_scorers", scorers={"load": 1}), fleet, prompt()) == 3
    fleet.answered(4)
    assert context(made("weighted_scorers", scorers={"active": 1}), fleet, prompt()) == 4


def test_the_session_scorer_is_a_preference_and_conversation_is_a_rule() -> None:
    fleet = fleet_of("cc")
    weighted = made("weighted_scorers", scorers={"session": 1, "queue": 2})
    sticky = made("conversation")
    for policy in (weighted, sticky):
        policy.on_dispatched(prompt(session="a"), Stage.CONTEXT, 1, fleet.at(0))
    assert context(weighted, fleet, prompt(session="a")) == 1
    report(fleet, 1, queued_requests=5)
    assert context(weighted, fleet, prompt(session="a")) == 2  # queue 2 > session 1
    assert context(sticky, fleet, prompt(session="a")) == 1


@pytest.mark.parametrize("picker", ["max", "random", "weighted"])
@pytest.mark.parametrize("n", SIZES)
def test_filters_leave_candidates_and_all_if_nobody_passes(n: int, picker: str) -> None:
    fleet = fleet_of("c" * n)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_requests=9, blocks_free=10)
    report(fleet, 2, queued_requests=3, blocks_free=10)
    policy = made("weighted_scorers", scorers={"queue": 1}, filters={"max_queue": 5}, picker=picker)
    assert {context(policy, fleet, prompt()) for _ in range(20)} == {2}
    policy = made("weighted_scorers", scorers={"kv": 1}, filters={"max_kv": 0.5, "max_active": 9}, picker=picker)
    assert {context(policy, fleet, prompt()) for _ in range(40 * n)} == set(range(1, n + 1))
    request = prompt((1, 2))
    fleet.at(0).context.prefix_match(request)
    send(fleet, policy, request, 4)
    policy = made("weighted_scorers", scorers={"queue": 1}, filters={"min_prefix": 0.5}, picker=picker)
    assert {context(policy, fleet, request) for _ in range(20)} == {4}


def test_pickers_draw_uniformly_or_by_rating() -> None:
    fleet = fleet_of("cc")
    report(fleet, 1, blocks_free=25)
    report(fleet, 2, blocks_free=75)

    def share(picker: str) -> float:
        policy = made("weighted_scorers", scorers={"kv": 1}, picker=picker)
        return Counter(context(policy, fleet, prompt()) for _ in range(4000))[2] / 4000

    assert share("max") == 1
    assert share("random") == pytest.approx(0.5, abs=0.04)
    assert share("weighted") == pytest.approx(0.75, abs=0.04)


# ---- bucket ----------------------------------------------------------------------------------------------------------


def test_buckets_are_cut_so_that_each_holds_an_equal_share_of_tokens() -> None:
    policy, fleet = made("bucket", interval_s=1), fleet_of("cc")
    assert {context(policy, fleet, prompt(tokens=10)) for _ in range(4)} == {1, 2}  # nothing to cut by yet
    for length in (100, 200, 300, 600):  # half of 1200 tokens lies in prompts of at most 300
        policy.on_dispatched(prompt(tokens=length), Stage.CONTEXT, 1, fleet.at(0))
    assert context(policy, fleet, prompt(tokens=250), now=PS_PER_S) == 1
    assert context(policy, fleet, prompt(tokens=301), now=PS_PER_S) == 2
    for _ in range(20):
        policy.on_dispatched(prompt(tokens=100), Stage.CONTEXT, 1, fleet.at(0))
    assert context(policy, fleet, prompt(tokens=250), now=PS_PER_S) == 1  # not cut again within the interval
    assert context(policy, fleet, prompt(tokens=250), now=2 * PS_PER_S) == 2  # 1600 of 3200 lie below 100


def test_bucket_and_least_requests_differ_for_a_short_prompt_beside_a_long_one() -> None:
    bucket, neighbour, fleet = made("bucket", interval_s=1), made("least_requests"), fleet_of("cc")
    context(bucket, fleet, prompt(tokens=10))
    for length in (10, 1000):
        bucket.on_dispatched(prompt(tokens=length), Stage.CONTEXT, 1, fleet.at(0))
    fleet.dispatched(1, 10)
    fleet.dispatched(1, 10)
    fleet.dispatched(2, 1000)
    assert context(bucket, fleet, prompt(tokens=20), now=PS_PER_S) == 1  # among its like, though more of them
    assert context(neighbour, fleet, prompt(tokens=20)) == 2


@pytest.mark.parametrize("n", SIZES)
def test_equal_prompts_are_spread_over_all_buckets(n: int) -> None:
    policy, fleet = made("bucket", interval_s=1), fleet_of("c" * n)
    context(policy, fleet, prompt(tokens=100))
    served = []
    for _ in range(2 * n):
        policy.on_dispatched(prompt(tokens=100), Stage.CONTEXT, 1, fleet.at(0))
        executor = context(policy, fleet, prompt(tokens=100), now=PS_PER_S)
        fleet.dispatched(executor, 100)
        served.append(executor)
    assert set(Counter(served).values()) == {2}


def test_an_unbalanced_load_overrides_the_buckets() -> None:
    policy, fleet = made("bucket", interval_s=1, balance_abs=2), fleet_of("cc")
    context(policy, fleet, prompt(tokens=10))
    for length in (100, 300, 400):
        policy.on_dispatched(prompt(tokens=length), Stage.CONTEXT, 1, fleet.at(0))
    assert context(policy, fleet, prompt(tokens=50), now=PS_PER_S) == 1
    for _ in range(3):
        fleet.dispatched(1, 100)
    assert context(policy, fleet, prompt(tokens=50), now=PS_PER_S) == 2


# ---- remaining_steps, adaptive_decode --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_remaining_steps_takes_most_free_blocks_per_request_and_idle_executors_first(n: int) -> None:
    policy, fleet = made("remaining_steps"), fleet_of("g" * n)
    for executor in range(1, n + 1):
        report(fleet, executor, running_requests=4, blocks_free=40)
    report(fleet, 2, running_requests=2, blocks_free=24)  # 12 each
    assert generation(policy, fleet, prompt(), source=99) == 2
    fleet.dispatched(2, 100)  # (24 - 10) / 3 < 10
    assert generation(policy, fleet, prompt(), source=99) != 2
    report(fleet, 3, blocks_free=1)
    assert generation(policy, fleet, prompt(), source=99) == 3


def test_remaining_steps_and_least_kv_differ_on_few_long_and_many_short_requests() -> None:
    one, other, fleet = made("remaining_steps"), made("least_kv"), fleet_of("gg")
    report(fleet, 1, running_requests=2, blocks_free=30)
    report(fleet, 2, running_requests=20, blocks_free=60)
    assert generation(one, fleet, prompt()) == 1
    assert generation(other, fleet, prompt()) == 2


@pytest.mark.parametrize("n", SIZES)
def test_adaptive_decode_fills_a_batch_up_to_the_bound_and_then_balances(n: int) -> None:
    policy, fleet = made("adaptive_decode", compute_bound_batch_size=8), fleet_of("g" * n)
    for executor in range(1, n + 1):
        report(fleet, executor, running_requests=12)
    report(fleet, 2, running_requests=6)  # load 2
    report(fleet, 3, running_requests=1)  # load 7
    report(fleet, 4, running_requests=0)  # load 8
    assert generation(policy, fleet, prompt()) == 2
    report(fleet, 2, running_requests=8)  # load 8
    assert generation(policy, fleet, prompt()) == 3
    report(fleet, 3, running_requests=9)
    report(fleet, 4, running_requests=9)
    assert generation(policy, fleet, prompt()) == 2
    report(fleet, 2, running_requests=10)
    assert {generation(policy, fleet, prompt()) for _ in range(4)} == {3, 4}


def test_adaptive_decode_and_remaining_steps_differ_on_an_idle_executor() -> None:
    one, other, fleet = made("adaptive_decode"), made("remaining_steps"), fleet_of("gg")
    report(fleet, 1, running_requests=10, blocks_free=50)
    assert generation(one, fleet, prompt()) == 1
    assert generation(other, fleet, prompt()) == 2


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["remaining_steps", "adaptive_decode"])
def test_k_draws_among_the_k_best(name: str, n: int) -> None:
    policy, fleet = made(name, k=2), fleet_of("g" * n)
    for executor in range(1, n + 1):
        report(fleet, executor, running_requests=30 - executor, blocks_free=20 + executor)
    best = {generation(policy, fleet, prompt()) for _ in range(100)}
    assert best == ({n, n - 1} if name == "remaining_steps" else {1, 2})
    fleet.lost(n)
    fleet.lost(1)
    assert not {1, n} & {generation(policy, fleet, prompt()) for _ in range(100)}


# ---- topology --------------------------------------------------------------------------------------------------------


def test_the_generation_phase_stays_near_its_kv_while_that_is_worth_it() -> None:
    policy, fleet = made("topology", link_cost=0.5), fleet_of("ccgg", domains="abab")
    assert generation(policy, fleet, prompt(), source=1) == 3
    assert generation(policy, fleet, prompt(), source=2) == 4
    report(fleet, 3, blocks_free=45)  # 0.55 > 0.5
    assert generation(policy, fleet, prompt(), source=1) == 4
    assert generation(made("topology", limit=True), fleet, prompt(), source=1) == 3
    assert generation(made("least_kv"), fleet, prompt(), source=1) == 4
    fleet.lost(3)
    assert generation(made("topology", limit=True), fleet, prompt(), source=1) == 4


@pytest.mark.parametrize("n", SIZES)
def test_by_link_the_generation_phase_goes_where_its_kv_is_soonest_and_by_domain_where_it_is_near(n: int) -> None:
    """A token is 100 ps on a link within a domain and 400 on one between: 15 tokens take 1,500 and 6,000 ps."""
    links = (LinkTimes(1e12), LinkTimes(0.25e12))
    fleet = fleet_of("c" + "gg" * (n // 2), domains="a" + "ab" * (n // 2), links=links)
    by_link, by_domain = made("topology", by="link"), made("topology")
    request = prompt(tokens=15)
    for executor in range(4, n + 2):
        report(fleet, executor, blocks_free=0)
    # in use + half of the share of the longest time: 0 + 0.125 against 0 + 0.5
    assert generation(by_link, fleet, request, source=1) == generation(by_domain, fleet, request, source=1) == 2
    fleet.links.sent(1, 2, 60, 0)  # 6,000 ps lie before it: 7,500 against 6,000, or 0.5 against 0.4
    assert generation(by_link, fleet, request, source=1) == 3
    assert generation(by_domain, fleet, request, source=1) == 2
    assert generation(made("topology", by="link", link_cost=0), fleet, request, source=1) in (2, 3)
    assert generation(by_link, fleet, request, source=1, now=4500) == 2  # three quarters of them are through


def test_a_canned_context_phase_is_near_everybody() -> None:
    policy, fleet = made("topology"), fleet_of("gg", domains="ab")
    assert {generation(policy, fleet, prompt(), source=None) for _ in range(4)} == {1, 2}


def test_topology_is_vectorised_too() -> None:
    n = 16
    policy, fleet = made("topology"), fleet_of("c" + "g" * n, domains="b" + "ab" * (n // 2))
    chosen = {generation(policy, fleet, prompt(), source=1) for _ in range(2 * n)}
    assert chosen == set(range(3, n + 2, 2))


# ---- mixed_pool ------------------------------------------------------------------------------------------------------


def test_each_pool_serves_its_own_and_an_overloaded_one_borrows_until_drained() -> None:
    policy, fleet = made("mixed_pool", max_prompt_tokens=100, max_kv=0.5), fleet_of("mmmm")
    request = prompt(tokens=50)
    assert policy.route_context(request, fleet.at(0)) == Route(context=1)
    for executor in (1, 2):
        report(fleet, executor, queued_prefill_tokens=101)
    report(fleet, 3, blocks_free=90)
    assert context(policy, fleet, request) == 3  # a lender: the least prompt tokens
    send(fleet, policy, request, 3)
    report(fleet, 3, queued_prefill_tokens=50, blocks_free=90)
    assert context(policy, fleet, request) == 3  # the mixed pool comes before another lender
    assert generation(policy, fleet, request, source=1) == 4  # and the token pool does not count on it
    policy.on_finished(request, Stage.CONTEXT, 3, True, fleet.at(0))
    report(fleet, 4, blocks_free=40)
    assert generation(policy, fleet, request, source=1) == 3  # it has returned


def test_generation_borrows_prompt_executors_when_memory_runs_out() -> None:
    policy, fleet = made("mixed_pool", max_kv=0.5), fleet_of("mmmm")
    report(fleet, 3, blocks_free=20)
    report(fleet, 4, blocks_free=30)
    assert generation(policy, fleet, prompt(), source=1) == 2  # not 1, which has the KV: it is left to prompts
    neighbour = made("least_kv")
    assert generation(neighbour, fleet, prompt(), source=1) in (1, 2)
    for executor in (1, 2):
        report(fleet, executor, blocks_free=10)
    assert generation(policy, fleet, prompt(), source=1) == 4  # everybody is overloaded: the least of all


def test_roles_that_are_fixed_are_homes_that_cannot_be_lent() -> None:
    policy, fleet = made("mixed_pool", max_prompt_tokens=10), fleet_of("cgm", predicts=False)
    report(fleet, 1, queued_prefill_tokens=100)
    assert context(policy, fleet, prompt(tokens=5)) == 3
    assert generation(policy, fleet, prompt(tokens=5), source=1) == 2


def test_a_single_mixed_executor_serves_requests_whole() -> None:
    assert made("mixed_pool").route_context(prompt(), fleet_of("m").at(0)) == RouteMixed(1)


# ---- disaggregate or not ---------------------------------------------------------------------------------------------


def held(fleet: Any, policy: Any, hashes: tuple[int, ...], executor: int) -> None:
    fleet.at(0).mixed.prefix_match(prompt(hashes))
    send(fleet, policy, prompt(hashes), executor, Stage.MIXED)


def test_tensorrt_llm_s_rule_wants_a_match_and_few_tokens_left() -> None:
    policy, fleet = made("conditional_tensorrt_llm", max_local_prefill_length=20), fleet_of("cgmm")
    assert policy.route_context(prompt((1,)), fleet.at(0)) == Route(context=1)  # short, but nothing matched
    held(fleet, policy, (1, 2, 3), 4)
    assert policy.route_context(prompt((1, 2, 3, 4)), fleet.at(0)) == RouteMixed(4)  # 15 tokens left
    assert policy.route_context(prompt((1, 2, 3, 4, 5)), fleet.at(0)) == Route(context=1)  # 25


def test_llm_d_s_rule_counts_uncached_tokens_only() -> None:
    policy, fleet = made("conditional_llm_d", threshold=25), fleet_of("cgm")
    neighbour = made("conditional_tensorrt_llm", max_local_prefill_length=24)
    assert policy.route_context(prompt((1,)), fleet.at(0)) == RouteMixed(3)  # 15 < 25
    assert neighbour.route_context(prompt((1,)), fleet.at(0)) == Route(context=1)
    assert policy.route_context(prompt((1, 2)), fleet.at(0)) == Route(context=1)  # 25
    held(fleet, policy, (1,), 3)
    assert policy.route_context(prompt((1, 2)), fleet.at(0)) == RouteMixed(3)


def test_dynamo_s_rule_wants_few_tokens_and_a_small_share_or_a_backlog_and_never_full_kv() -> None:
    policy = made("conditional_dynamo", max_tokens=30, max_share=0.7, max_backlog=1000, max_kv=0.5)
    fleet = fleet_of("cgm")
    request = prompt((1, 2, 3))  # 35 tokens
    assert policy.route_context(prompt((1,)), fleet.at(0)) == Route(context=1)  # 15 tokens, but all of it
    held(fleet, policy, (1, 2), 3)
    report(fleet, 3)
    assert policy.route_context(request, fleet.at(0)) == RouteMixed(3)  # 15 of 35
    assert made("conditional_llm_d", threshold=15).route_context(request, fleet.at(0)) == Route(context=1)
    long = prompt((1, 2, 3, 4, 5, 6))  # 45 of 65 left, more than 30
    assert policy.route_context(long, fleet.at(0)) == Route(context=1)
    report(fleet, 1, queued_prefill_tokens=1001)
    assert policy.route_context(long, fleet.at(0)) == RouteMixed(3)
    report(fleet, 3, blocks_free=49)
    assert policy.route_context(long, fleet.at(0)) == Route(context=1)


@pytest.mark.parametrize("name", ["conditional_tensorrt_llm", "conditional_llm_d", "conditional_dynamo"])
def test_without_one_kind_of_executor_there_is_nothing_to_decide(name: str) -> None:
    policy = made(name)
    assert policy.route_context(prompt(tokens=9999), fleet_of("mm").at(0)) == RouteMixed(1)
    assert policy.route_context(prompt(tokens=1), fleet_of("cg").at(0)) == Route(context=1)
    fleet = fleet_of("cgm")
    fleet.lost(1)
    assert policy.route_context(prompt(tokens=9999), fleet.at(0)) == RouteMixed(3)
    assert generation(policy, fleet, prompt()) == 2


def test_the_wrapped_policies_are_chosen_by_name_and_told_of_their_own_phases() -> None:
    policy = made("conditional_llm_d", threshold=100, local={"name": "power_of_two", "d": 1}, remote="conversation")
    assert (type(policy.local).__name__, policy.local.d) == ("PowerOfTwo", 1)
    fleet = fleet_of("ccggm")
    request = prompt(tokens=500, session="a")
    send(fleet, policy, request, 2)
    assert context(policy, fleet, request) == 2
    send(fleet, policy, request, 4, Stage.GENERATION)
    assert generation(policy, fleet, request) == 4


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("conditional_llm_d", {"local": "mooncake"}, "'mooncake' chooses more than one executor"),
        ("conditional_llm_d", {"remote": "nobody"}, "there is no routing policy 'nobody'"),
        ("conditional_llm_d", {"remote": {"d": 2}}, "a policy is given as its name"),
        ("weighted_scorers", {"scorers": {"kw": 1}}, "there is no 'kw' among scorers; allowed: queue, active, kv"),
        ("weighted_scorers", {"scorers": ["kv"]}, "scorers must map names to numbers"),
        ("weighted_scorers", {"filters": {"max_kv": "x"}}, r"filters\.max_kv must be a number"),
        ("weighted_scorers", {"filters": {"max_kv": 90}}, r"filters\.max_kv must be .* at most 1, got 90"),
        ("weighted_scorers", {"scorers": {"kv": float("inf")}}, r"scorers\.kv must be .* at most 1e\+06, got inf"),
        ("weighted_scorers", {"picker": "best"}, "picker must be one of max, random, weighted"),
        ("remaining_steps", {"k": 0}, "k must be a whole number"),
        ("bucket", {"window": 0}, "window must be a whole number"),
        ("mixed_pool", {"prompt_share": 1.5}, "prompt_share must be a number"),
        ("mixed_pool", {"max_kv": 0}, "max_kv must be a number of at least 0.01"),
        ("topology", {"by": "rack"}, "by must be one of domain, link, got 'rack'"),
        ("topology", {"limit": "no"}, "limit must be true or false, got 'no'"),
    ],
)
def test_nonsense_parameters_are_refused_by_name(name: str, params: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        made(name, **params)
