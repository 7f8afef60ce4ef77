"""Predictions, and the policies that decide by them, on times computed by hand (see TIMES in `policy_views`)."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.core.cost import ConstantCost, StepFeatures, roofline
from disagg.core.devices import DEVICES
from disagg.core.model_shapes import preset
from disagg.core.prediction import PredictionConfig, TablePredictor, step_times
from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import Admit, Reject, Route, Stage
from tests.policy_views import SIZES, context, fleet_of, generation, made, prompt, report, send

# ---- tables ----------------------------------------------------------------------------------------------------------


def predictor_of(
    cost: Any, roles: str = "cg", max_num_tokens: int = 8192, max_batch_size: int = 256
) -> tuple[Any, Any]:
    fleet = fleet_of(roles, max_num_tokens=max_num_tokens, max_batch_size=max_batch_size)
    tables = (step_times(cost, max_num_tokens, max_batch_size),)
    ids = list(fleet.configs)
    return TablePredictor(PredictionConfig(tables, (0,) * len(ids)), ids), fleet.at(0)


def prompt_time(cost: Any, length: int, chunk: int, before: int = 0) -> float:
    """Exactly, chunk by chunk."""
    units = 0
    while length > 0:
        now = min(length, chunk)
        units += cost.step_time(StepFeatures(0, 0, ((before, now, True),)))
        before, length = before + now, length - now
    return units / 2**20


@pytest.mark.parametrize("length", [1, 50, 777, 8192, 20_000, 100_000])
def test_a_prompt_s_predicted_time_is_the_cost_model_s(length: int) -> None:
    cost = roofline(preset("llama-3.1-8b"), DEVICES["h200"])
    predictor, view = predictor_of(cost)
    assert predictor.prefill_time(view.context[0], length) == pytest.approx(prompt_time(cost, length, 8192), rel=0.02)


@pytest.mark.parametrize("d", [10**7, 3 * 10**12])  # picoseconds a token
def test_times_that_no_event_log_could_hold_are_left_to_the_last_slope(d: int) -> None:
    predictor, view = predictor_of(ConstantCost(a=0, d=d), max_num_tokens=64)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(predictor._config), type=PredictionConfig) == predictor._config
    length = 1 << 26
    assert predictor.prefill_time(view.context[0], length) == pytest.approx(length * d, rel=1e-6)


def test_what_is_cached_is_not_computed_but_attended_to() -> None:
    cost = roofline(preset("llama-3.1-8b"), DEVICES["h200"])
    predictor, view = predictor_of(cost)
    alone, behind = (predictor.prefill_time(view.context[0], 1000, cached) for cached in (0, 30_000))
    assert behind > alone
    assert behind == pytest.approx(prompt_time(cost, 1000, 8192, before=30_000), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 256), mean=st.integers(1, 4000))
def test_a_decode_step_s_predicted_time_is_the_cost_model_s(batch: int, mean: int) -> None:
    cost = roofline(preset("llama-3.1-8b"), DEVICES["h200"])
    predictor, view = predictor_of(cost)
    exact = cost.step_time(StepFeatures(batch, batch * mean)) / 2**20
    assert predictor.step_time(view.generation[0], batch, batch * mean) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("max_num_tokens", [1, 16, 100])
def test_small_steps_are_summed_without_going_through_them(max_num_tokens: int) -> None:
    cost = ConstantCost(a=1000, d=7)
    predictor, view = predictor_of(cost, max_num_tokens=max_num_tokens, max_batch_size=1)
    exact = prompt_time(cost, 1600, max_num_tokens)
    assert predictor.prefill_time(view.context[0], 1600) == pytest.approx(exact, rel=0.02)


def test_pools_of_arrays_are_predicted_each_by_its_own_table() -> None:
    n = 20
    fleet = fleet_of("c" * n)
    tables = tuple(step_times(ConstantCost(a=0, d=d), 100, 8) for d in (10, 30))
    predictor = TablePredictor(PredictionConfig(tables, tuple(i % 2 for i in range(n))), range(1, n + 1))
    pool = fleet.at(0).context
    report(fleet, 2, queued_prefill_tokens=50)
    assert list(predictor.prefill_time(pool, np.full(n, 100))) == pytest.approx([1000, 3000] * (n // 2), rel=0.01)
    assert list(predictor.queue_time(pool))[:3] == pytest.approx([0, 1500, 0])
    for row in pool:
        assert predictor.queue_time(row) == predictor.queue_time(pool)[row.index]
        assert predictor.prefill_time(row, 77, 5) == predictor.prefill_time(pool, 77, 5)[row.index]
        assert predictor.step_time(row, 3, 9) == predictor.step_time(pool, 3, 9)[row.index]


@pytest.mark.parametrize("n", SIZES)
def test_without_a_profile_reported_step_times_tell(n: int) -> None:
    fleet = fleet_of("c" * n, max_num_tokens=100)
    report(fleet, 2, step_time=500, queued_prefill_tokens=300)
    pool = fleet.at(0).context
    predictor = pool.predictor
    assert predictor.prefill_time(pool[1], 50) == 500  # a step at least
    assert predictor.prefill_time(pool[1], 250) == 1250
    assert predictor.queue_time(pool[1]) == 1500
    assert predictor.step_time(pool[1]) == 500
    assert predictor.step_time(pool[0]) == 1
    assert context(made("slo_headroom"), fleet, prompt(tokens=50)) != 2


# ---- slo_headroom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_who_meets_the_objective_comes_first_and_the_least_headroom_packs(n: int) -> None:
    fleet = fleet_of("c" * n, predicts=True)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=200)  # 2000 + 500 ps
    report(fleet, 2, queued_prefill_tokens=100)  # 1500 ps
    report(fleet, 3, queued_prefill_tokens=40)  # 900 ps
    request = prompt(tokens=50, ttft_objective=2000)
    assert context(made("slo_headroom"), fleet, request) == 2
    assert context(made("slo_headroom", strategy="most"), fleet, request) == 3
    assert context(made("slo_headroom"), fleet, replace(request, ttft_objective=1000)) == 3
    # 700 ps after its arrival the same request has 1300 left
    assert context(made("slo_headroom"), fleet, request, now=700) == 3


@pytest.mark.parametrize("n", SIZES)
def test_if_nobody_meets_it_an_idle_executor_and_else_the_least_damage(n: int) -> None:
    fleet = fleet_of("c" * n, predicts=True)
    request = prompt(tokens=50, ttft_objective=100)  # 500 ps alone
    for executor in range(1, n + 1):
        fleet.dispatched(executor, 10 if executor == 3 else 20)
    assert context(made("slo_headroom"), fleet, request) == 3
    fleet.answered(2)
    report(fleet, 2, queued_prefill_tokens=1000)  # nothing of ours is there, though it says that it has work
    assert context(made("slo_headroom"), fleet, request) == 2


def test_a_generation_phase_goes_by_its_tpot() -> None:
    fleet = fleet_of("cgg", predicts=True)
    report(fleet, 2, running_requests=9, decode_kv_tokens=100)  # 150 + 100 + 50 with it
    report(fleet, 3, running_requests=1, decode_kv_tokens=300)  # 110 + 300 + 50
    assert generation(made("slo_headroom"), fleet, prompt(tokens=50, tpot_objective=400)) == 2
    assert generation(made("slo_headroom"), fleet, prompt(tokens=50, tpot_objective=500)) == 3  # the tighter of two


def test_slo_headroom_and_mooncake_differ_where_two_meet_the_objective() -> None:
    fleet = fleet_of("ccg", predicts=True)
    report(fleet, 1, queued_prefill_tokens=100)
    request = prompt(tokens=50, ttft_objective=10_000)
    assert context(made("slo_headroom"), fleet, request) == 1
    assert context(made("mooncake"), fleet, request) == 2


# ---- mooncake --------------------------------------------------------------------------------------------------------


def test_mooncake_weighs_a_cached_prefix_against_a_queue_and_chooses_both_executors() -> None:
    policy, fleet = made("mooncake"), fleet_of("ccgg", predicts=True)
    request = prompt((1, 2, 3))  # 35 tokens
    fleet.at(0).context.prefix_match(request)
    send(fleet, policy, request, 1)
    report(fleet, 1, queued_prefill_tokens=29)  # 290 + 50 < 350
    report(fleet, 3, running_requests=5)
    assert policy.route_context(request, fleet.at(0)) == Route(1, 4)
    report(fleet, 1, queued_prefill_tokens=31)
    assert policy.route_context(request, fleet.at(0)) == Route(2, 4)


def test_mooncake_rejects_what_would_miss_an_objective_and_says_which() -> None:
    policy, fleet = made("mooncake"), fleet_of("cg", predicts=True)
    request = prompt(tokens=100)  # 1000 ps; a step of 205 ps
    for objectives, word in (({"ttft_objective": 999}, "TTFT"), ({"tpot_objective": 204}, "TPOT")):
        answer = policy.route_context(replace(request, **objectives), fleet.at(0))
        assert isinstance(answer, Reject)
        assert f"predicted {word}" in answer.reason
    fine = replace(request, ttft_objective=1000, tpot_objective=205)
    assert policy.route_context(fine, fleet.at(0)) == Route(1, 2)
    lenient = made("mooncake", rejects=False)
    assert lenient.route_context(replace(request, ttft_objective=1), fleet.at(0)) == Route(1, 2)


@pytest.mark.parametrize("n", SIZES)
def test_with_prefixes_fetched_an_idle_executor_may_take_a_busy_one_s_prefix(n: int) -> None:
    fleet = fleet_of("c" * n + "g", predicts=True)
    policy, fetching = made("mooncake"), made("mooncake", fetches_prefixes=True)
    request = prompt((1, 2, 3, 4, 5))  # 55 tokens: 50 of them cost 7 + 100 ps to move
    fleet.at(0).context.prefix_match(request)
    send(fleet, policy, request, 1)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=100)
    report(fleet, 1, queued_prefill_tokens=20)  # 200 + 50 there
    report(fleet, 2, queued_prefill_tokens=0)  # 550 alone, 107 + 50 with the prefix
    assert context(policy, fleet, request) == 1
    assert context(fetching, fleet, request) == 2


# ---- the oracle ------------------------------------------------------------------------------------------------------


def test_the_oracle_goes_where_the_present_requests_end_soon() -> None:
    policy, fleet = made("oracle"), fleet_of("cgg", predicts=True)
    for executor, length in ((2, 2), (3, 1000)):
        for i in range(3):
            request = prompt(tokens=10, id=10 * executor + i, true_output_tokens=length)
            send(fleet, policy, replace(request, max_tokens=2000), executor, Stage.GENERATION)
        report(fleet, executor, running_requests=3, decode_kv_tokens=30)
    # the views of 2 and 3 are equal: only who knows the lengths can tell
    long = replace(prompt(tokens=10, id=1, true_output_tokens=500), max_tokens=2000)
    assert [generation(policy, fleet, long) for _ in range(3)] == [2, 2, 2]
    neighbour = made("slo_headroom")
    assert {generation(neighbour, fleet, long) for _ in range(2)} == {2, 3}


def test_an_oracle_that_is_not_told_goes_by_the_declared_bound() -> None:
    policy, fleet = made("oracle"), fleet_of("gg", predicts=True)
    send(fleet, policy, prompt(tokens=10, id=5), 1, Stage.GENERATION)
    report(fleet, 1, running_requests=1, decode_kv_tokens=10)
    assert generation(policy, fleet, prompt(tokens=10)) == 2
    policy.on_finished(prompt(tokens=10, id=5), Stage.GENERATION, 1, True, fleet.at(0))
    assert not any(policy._present.values())


# ---- early rejection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_early_rejection_asks_whether_anybody_could_meet_the_objectives(n: int) -> None:
    policy, fleet = made("early_rejection", "admission"), fleet_of("c" * n + "g" * n, predicts=True)
    for executor in range(1, n + 1):
        report(fleet, executor, queued_prefill_tokens=1000)
    report(fleet, 2, queued_prefill_tokens=50)
    request = prompt(tokens=50, ttft_objective=1000)
    assert policy.admit(request, fleet.at(0)) == Admit()
    assert isinstance(policy.admit(request, fleet.at(1)), Reject)  # a picosecond later it is too late
    assert policy.admit(replace(request, ttft_objective=None), fleet.at(10**9)) == Admit()
    refused = policy.admit(replace(request, tpot_objective=154), fleet.at(0))  # 105 + 50
    assert isinstance(refused, Reject)
    assert "TPOT" in refused.reason
    assert policy.admit(replace(request, tpot_objective=155), fleet.at(0)) == Admit()
    lenient = made("early_rejection", "admission", slack=2.0)
    assert lenient.admit(request, fleet.at(1000)) == Admit()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("slo_headroom", {"strategy": "some"}),
        ("slo_headroom", {"ttft_weight": 1.1}),
        ("mooncake", {"rejects": "no"}),
        ("mooncake", {"fetches_prefixes": 1}),
    ],
)
def test_nonsense_parameters_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=name):
        made(name, **params)
