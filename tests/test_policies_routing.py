"""What each routing policy answers on views computed by hand, in pools of lists and in pools of arrays."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.config import ExecutorConfig, SchedulerConfig
from disagg.core.events import Report
from disagg.core.fleet import Fleet
from disagg.policies.interfaces import PolicyError, ScoringPolicy
from disagg.policies.registry import create
from disagg.policies.views import COLUMNS, VECTORISE_FROM, ExecutorPool
from disagg.policies.vocabulary import Request, Role, Route, RouteMixed

REQUEST = Request(1, 100, 32)
SMALL, LARGE = 4, VECTORISE_FROM
EVERY_ROUTER = ["round_robin", "random", "least_requests", "least_tokens", "power_of_two", "least_kv"]


def a_fleet(role: Role, n: int, num_blocks: int = 100) -> Fleet:
    """`n` executors of one role with ids 1 to n and blocks of 10 tokens."""
    return Fleet([ExecutorConfig(i, role, num_blocks, tokens_per_block=10) for i in range(1, n + 1)], 0)


def report(fleet: Fleet, executor: int, **columns: Any) -> None:
    """The executor reports; what it was sent before is no longer on the wire."""
    sent_requests, sent_tokens = fleet._sent[executor]
    columns = {"seen_requests": sent_requests, "seen_tokens": sent_tokens, "blocks_free": 100, **columns}
    fleet.reported(Report(executor, **columns), 0)


def router(name: str, **params: Any) -> Any:
    return create(name, "routing", params, seed="7")


def contexts(policy: Any, fleet: Fleet, times: int) -> list[int]:
    """The executors of the next `times` context phases, with nothing dispatched between them."""
    return [policy.route_context(REQUEST, fleet.at(0)).context for _ in range(times)]


def generations(policy: Any, fleet: Fleet, times: int) -> list[int]:
    return [policy.route_generation(REQUEST, fleet.at(0)).generation for _ in range(times)]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_round_robin_serves_each_executor_in_turn_and_each_stage_by_its_own_count(n: int) -> None:
    policy, fleet = router("round_robin"), a_fleet(Role.CONTEXT, n)
    assert contexts(policy, fleet, n + 2) == [*range(1, n + 1), 1, 2]
    assert generations(policy, a_fleet(Role.GENERATION, n), 2) == [1, 2]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_random_is_uniform_and_repeats_with_its_seed(n: int) -> None:
    fleet = a_fleet(Role.CONTEXT, n)
    chosen = contexts(router("random"), fleet, 200 * n)
    assert chosen == contexts(router("random"), fleet, 200 * n)
    counts = Counter(chosen)
    assert set(counts) == set(range(1, n + 1))
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_squared < n + 5 * (2 * n) ** 0.5


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_requests_takes_the_fewest_unanswered_and_equals_in_turn(n: int) -> None:
    policy, fleet = router("least_requests"), a_fleet(Role.CONTEXT, n)
    assert contexts(policy, fleet, n + 1) == [*range(1, n + 1), 1]
    for executor in range(1, n + 1):
        for _ in range({2: 1, 4: 1}.get(executor, 2)):
            fleet.dispatched(executor, 100)
    assert contexts(policy, fleet, 4) == [2, 4, 2, 4]
    fleet.answered(3)
    fleet.answered(3)
    assert contexts(policy, fleet, 2) == [3, 3]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_requests_counts_its_own_dispatches_whatever_the_reports_say(n: int) -> None:
    policy, fleet = router("least_requests"), a_fleet(Role.CONTEXT, n)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_requests=0 if executor == 1 else 50)
    fleet.dispatched(1, 100)
    assert contexts(policy, fleet, 1) == [2]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_tokens_of_a_context_phase_adds_queued_begun_and_wire_tokens(n: int) -> None:
    policy, fleet = router("least_tokens"), a_fleet(Role.CONTEXT, n)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=1000, inflight_prefill_tokens=1000, decode_kv_tokens=0)
    report(fleet, 2, queued_prefill_tokens=900, inflight_prefill_tokens=200, decode_kv_tokens=10**6)  # 1100
    report(fleet, 3, queued_prefill_tokens=100, inflight_prefill_tokens=950)  # 1050
    assert contexts(policy, fleet, 1) == [3]
    fleet.dispatched(3, 60)  # 1110 with what is on the wire
    assert contexts(policy, fleet, 1) == [2]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_tokens_of_a_generation_phase_adds_kv_and_wire_tokens(n: int) -> None:
    policy, fleet = router("least_tokens"), a_fleet(Role.GENERATION, n)
    for executor in range(1, n + 1):
        report(fleet, executor, decode_kv_tokens=500)
    report(fleet, 2, decode_kv_tokens=300, queued_prefill_tokens=10**6)
    assert generations(policy, fleet, 1) == [2]
    fleet.dispatched(2, 201)
    assert generations(policy, fleet, 1) == [3]  # the first of the equals after the one served last


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_tokens_of_a_mixed_executor_counts_prompts_and_kv(n: int) -> None:
    policy, fleet = router("least_tokens"), a_fleet(Role.MIXED, n)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=100, inflight_prefill_tokens=100, decode_kv_tokens=100)
    report(fleet, 2, decode_kv_tokens=299)
    report(fleet, 4, queued_prefill_tokens=298)
    assert policy.route_context(REQUEST, fleet.at(0)) == RouteMixed(4)
    fleet.dispatched(4, 2)
    assert policy.route_context(REQUEST, fleet.at(0)) == RouteMixed(2)
    assert policy.route_generation(REQUEST, fleet.at(0)) == Route(generation=2)


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_least_kv_takes_the_least_share_of_blocks_not_free(n: int) -> None:
    policy, fleet = router("least_kv"), a_fleet(Role.GENERATION, n)
    for executor in range(1, n + 1):
        report(fleet, executor, blocks_free=40)
    report(fleet, 3, blocks_free=50)
    assert generations(policy, fleet, 1) == [3]
    fleet.dispatched(3, 101)  # 10.1 blocks of 10 tokens on their way there
    assert generations(policy, fleet, 1) == [4]


def test_least_kv_compares_shares_of_pools_of_different_sizes() -> None:
    fleet = Fleet([ExecutorConfig(1, Role.GENERATION, 100), ExecutorConfig(2, Role.GENERATION, 1000)], 0)
    report(fleet, 1, blocks_free=50)  # half of it is taken
    report(fleet, 2, blocks_free=600)  # four times as many blocks, but less than half of it
    assert generations(router("least_kv"), fleet, 1) == [2]


def test_least_tokens_and_least_requests_differ_where_few_prompts_are_long() -> None:
    fleet = a_fleet(Role.CONTEXT, 2)
    fleet.dispatched(1, 30_000)
    for _ in range(3):
        fleet.dispatched(2, 100)
    assert contexts(router("least_requests"), fleet, 1) == [1]
    assert contexts(router("least_tokens"), fleet, 1) == [2]


def test_round_robin_goes_on_to_a_busy_executor_where_least_requests_and_random_need_not() -> None:
    fleet = a_fleet(Role.CONTEXT, 2)
    fleet.dispatched(1, 100)
    assert contexts(router("round_robin"), fleet, 4) == [1, 2, 1, 2]
    assert contexts(router("least_requests"), fleet, 4) == [2, 2, 2, 2]
    assert contexts(router("random"), fleet, 40) != [1, 2] * 20


def test_least_kv_and_least_tokens_differ_on_pools_of_different_sizes() -> None:
    """Of 100 blocks 50 are taken, by 500 tokens; of 1,000 blocks 400, by 4,000."""
    fleet = Fleet([ExecutorConfig(1, Role.GENERATION, 100), ExecutorConfig(2, Role.GENERATION, 1000)], 0)
    report(fleet, 1, blocks_free=50, decode_kv_tokens=500)
    report(fleet, 2, blocks_free=600, decode_kv_tokens=4000)
    assert generations(router("least_kv"), fleet, 1) == [2]
    assert generations(router("least_tokens"), fleet, 1) == [1]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_power_of_two_never_takes_the_busiest_and_random_does(n: int) -> None:
    fleet = a_fleet(Role.CONTEXT, n)
    fleet.dispatched(3, 100)
    assert 3 not in contexts(router("power_of_two"), fleet, 100)
    assert 3 in contexts(router("random"), fleet, 100)


def test_power_of_d_over_the_whole_pool_is_least_requests() -> None:
    fleet = a_fleet(Role.CONTEXT, SMALL)
    for executor in (1, 2, 4):
        fleet.dispatched(executor, 1)
    assert contexts(router("power_of_two", d=SMALL), fleet, 20) == [3] * 20
    assert contexts(router("power_of_two", d=99), fleet, 20) == [3] * 20


@pytest.mark.parametrize("d", [0, -1, 1.5, "2"])
def test_power_of_two_refuses_a_number_it_cannot_draw(d: Any) -> None:
    with pytest.raises(PolicyError, match="d must be a whole number of at least 1"):
        router("power_of_two", d=d)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("name", EVERY_ROUTER)
def test_an_unhealthy_executor_is_never_chosen(name: str, n: int) -> None:
    policy, fleet = router(name), a_fleet(Role.CONTEXT, n)
    for executor in range(1, n + 1):
        if executor not in (2, 3):
            fleet.dispatched(executor, 100)
            report(fleet, executor, queued_prefill_tokens=100, blocks_free=50)
    fleet.lost(2)
    report(fleet, 3, healthy=False)
    assert not {2, 3} & set(contexts(policy, fleet, 5 * n))
    report(fleet, 3, healthy=True)
    assert 3 in contexts(policy, fleet, 50 * n)
    report(fleet, 2, healthy=True)  # a report that was on the wire when its executor died
    assert 2 not in contexts(policy, fleet, 5 * n)


@pytest.mark.parametrize("name", EVERY_ROUTER)
def test_without_executors_of_a_stage_the_mixed_ones_serve_it(name: str) -> None:
    configs = [ExecutorConfig(1, Role.CONTEXT, 100), ExecutorConfig(2, Role.MIXED, 100)]
    fleet = Fleet(configs, 0)
    policy = router(name)
    assert policy.route_context(REQUEST, fleet.at(0)) == Route(context=1)
    assert policy.route_generation(REQUEST, fleet.at(0)) == Route(generation=2)
    fleet.lost(1)
    assert policy.route_context(REQUEST, fleet.at(0)) == RouteMixed(2)


# ---- one expression, two paths --------------------------------------------------------------------------------------


def as_arrays(pool: ExecutorPool) -> ExecutorPool:
    """The same pool as one that keeps arrays, however few its executors are."""
    arrays = ExecutorPool(pool.role, [row.executor_id for row in pool], vectorised=True)
    arrays.change_health(-pool.num_unhealthy)
    for mine, row in zip(arrays, pool, strict=True):
        mine.write(0, row.values())
    return arrays


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, VECTORISE_FROM - 1),
    role=st.sampled_from((Role.CONTEXT, Role.GENERATION, Role.MIXED)),
)
def test_lists_and_arrays_give_the_same_choice(seed: int, n: int, role: Role) -> None:
    draw = Random(seed)
    for name in ("least_requests", "least_tokens", "least_kv"):
        fleet = a_fleet(role, n)
        for executor in range(1, n + 1):
            for _ in range(draw.randrange(3)):
                fleet.dispatched(executor, draw.choice([7, 10, 2**53]))
            report(
                fleet,
                executor,
                seen_requests=0,
                seen_tokens=draw.choice([0, 7]),
                queued_prefill_tokens=draw.randrange(3),
                inflight_prefill_tokens=draw.randrange(3),
                decode_kv_tokens=draw.randrange(3),
                blocks_free=draw.randrange(97, 101),
                healthy=executor == 1 or draw.random() < 0.7,
            )
        view = fleet.at(0)
        pool = {Role.CONTEXT: view.context, Role.GENERATION: view.generation, Role.MIXED: view.mixed}[role]
        arrays = as_arrays(pool)
        one, other = router(name), router(name)
        for _ in range(n + 2):
            chosen = one.select(REQUEST, pool)
            assert chosen.healthy
            assert other.select(REQUEST, arrays).index == chosen.index


class Constant(ScoringPolicy):
    def score(self, request: Request, executors: Any) -> Any:
        return 0


class NotANumber(ScoringPolicy):
    def score(self, request: Request, executors: Any) -> Any:
        return np.where(executors.queued_requests == 1, np.nan, 0.0)


class Never(ScoringPolicy):
    def score(self, request: Request, executors: Any) -> Any:
        return executors.active_requests + float("inf")


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_score_that_is_one_number_for_all_is_round_robin(n: int) -> None:
    policy, fleet = Constant(rng=Random(0)), a_fleet(Role.CONTEXT, n)
    assert contexts(policy, fleet, n + 1) == [*range(1, n + 1), 1]
    fleet.lost(2)
    assert contexts(policy, fleet, 3) == [3, 4, 5] if n > 4 else [3, 4, 1]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_score_that_is_not_a_number_is_an_error_that_names_the_executor(n: int) -> None:
    policy, fleet = NotANumber(rng=Random(0)), a_fleet(Role.CONTEXT, n)
    fleet.lost(1)
    report(fleet, 3, queued_requests=1)
    with pytest.raises(PolicyError, match="NotANumber: the score of executor 3 is not a number"):
        policy.route_context(REQUEST, fleet.at(0))


@pytest.mark.parametrize("turn", [1, 4])
def test_a_score_of_a_large_pool_that_is_not_a_number_is_seen_on_either_side_of_the_turn(turn: int) -> None:
    policy, fleet = NotANumber(rng=Random(0)), a_fleet(Role.CONTEXT, LARGE)
    assert contexts(policy, fleet, turn) == [*range(1, turn + 1)]
    report(fleet, 3, queued_requests=1)
    with pytest.raises(PolicyError, match="NotANumber: the score of executor 3 is not a number"):
        policy.route_context(REQUEST, fleet.at(0))


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_infinite_scores_do_not_make_an_unhealthy_executor_equal(n: int) -> None:
    policy, fleet = Never(rng=Random(0)), a_fleet(Role.CONTEXT, n)
    fleet.lost(1)
    assert contexts(policy, fleet, 1) == [2]


# ---- what the view shows --------------------------------------------------------------------------------------------


def test_what_is_on_the_wire_is_what_was_sent_less_what_a_report_has_seen() -> None:
    fleet = a_fleet(Role.CONTEXT, 2)
    row = fleet.at(0).executor(1)
    for tokens in (100, 200, 300):
        fleet.dispatched(1, tokens)
    assert (row.active_requests, row.wire_requests, row.wire_tokens) == (3, 3, 600)
    fleet.reported(Report(1, seen_requests=2, seen_tokens=300, queued_requests=2, queued_prefill_tokens=300), 5)
    assert fleet.at(5).executor(1) is row
    assert (row.active_requests, row.wire_requests, row.wire_tokens) == (3, 1, 300)
    assert (row.queued_requests, row.queued_prefill_tokens) == (2, 300)
    fleet.answered(1)
    assert (row.active_requests, row.wire_requests, row.wire_tokens) == (2, 1, 300)
    assert fleet.at(0).executor(2).wire_tokens == 0


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_row_and_the_columns_show_the_same(n: int) -> None:
    scheduler = SchedulerConfig(max_batch_size=3, max_num_tokens=500)
    configs = [ExecutorConfig(10 + i, Role.CONTEXT, 50 + i, scheduler=scheduler, device_weight=0.5) for i in range(n)]
    fleet = Fleet(configs, 7)
    report(fleet, 11, queued_requests=4, step_time=123, blocks_held=9)
    fleet.dispatched(11, 5)
    pool = fleet.at(40).context
    row = pool[1]
    for name in COLUMNS:
        assert list(getattr(pool, name))[1] == getattr(row, name)
        assert len(getattr(pool, name)) == n
    assert (row.executor_id, row.kv_blocks_total, row.max_batch_size, row.max_num_tokens) == (11, 51, 3, 500)
    assert (row.step_time_ps, row.kv_blocks_held, row.device_weight, row.num_reports) == (123, 9, 0.5, 1)
    assert (row.age, pool[0].age, pool.age(0)) == (40, 33, 33)
    with pytest.raises(KeyError, match="no executor 99"):
        fleet.at(40).executor(99)


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_policy_cannot_write_into_its_view(n: int) -> None:
    pool = a_fleet(Role.CONTEXT, n).at(0).context
    for name in COLUMNS:
        with pytest.raises((TypeError, ValueError)):
            getattr(pool, name)[0] = 1
        with pytest.raises(AttributeError):
            setattr(pool[0], name, 1)
    row: Any = pool[0]
    before = row.values()
    for change in (
        lambda: row.append(1),
        lambda: row.extend([1]),
        lambda: row.insert(0, 1),
        lambda: row.pop(),
        lambda: row.remove(1),
        lambda: row.clear(),
        lambda: row.sort(),
        lambda: row.reverse(),
        lambda: row.__delitem__(0),
        lambda: row.__iadd__([1]),
        lambda: row.__imul__(2),
        lambda: row.__setitem__(slice(0, 2), ()),
    ):
        with pytest.raises((TypeError, AttributeError)):
            change()
    assert row.values() == before
    assert pool.active_requests[0] == 0
