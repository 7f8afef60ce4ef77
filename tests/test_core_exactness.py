"""Spans against single steps, and both against a naive simulator that knows neither: equal in exact integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_

from disagg.core.commands import RunSteps, Send, ServeKv
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec
from disagg.core.cost import ConstantCost, CostModel, RooflineCost, StepFeatures, end_of_step, roofline
from disagg.core.devices import DEVICES
from disagg.core.epoch_times import EpochTimes
from disagg.core.event_log import Frame, read_log
from disagg.core.events import FirstTokens, Report, Response, StepsDone
from disagg.core.model_shapes import preset
from disagg.policies.vocabulary import Request, Role
from tests.core_cases import (
    NEVER,
    Case,
    Trace,
    core_of,
    make_case,
    make_early_case,
    make_ordered_case,
    make_priced_case,
    make_reuse_case,
    simulate,
)
from tests.core_reference import run_reference

cases = st.randoms(use_true_random=False).map(make_case)
early_cases = st.randoms(use_true_random=False).map(make_early_case)
reuse_cases = st.randoms(use_true_random=False).map(make_reuse_case)
priced_cases = st.randoms(use_true_random=False).map(make_priced_case)
thorough = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def heard_by_orchestrator(trace: Trace) -> list[tuple[int, Any]]:
    """Every message with its instant and all its fields, but the texts of errors and what comes after all has ended."""
    heard = []
    for at, event in trace.heard:
        if isinstance(event, Response) and event.error is not None:
            event = with_(event, error="some error")
        if at < NEVER // 1000:
            heard.append((at, _sorted_news(event)))
    return heard


def _sorted_news(event: Any) -> Any:
    """With the hashes of evicted blocks in order: they went one by one, and no order of theirs means anything."""
    report = event if isinstance(event, Report) else getattr(event, "report", None)
    if report is None or not report.cache_events:
        return event
    num_gone, *names = report.cache_events
    report = with_(report, cache_events=(num_gone, *sorted(names[:num_gone]), *names[num_gone:]))
    return report if isinstance(event, Report) else with_(event, report=report)


def assert_equal_lives(one: Trace, other: Trace) -> None:
    for executor in one.steps.keys() | other.steps.keys():
        for i, (a, b) in enumerate(zip(one.steps[executor], other.steps[executor])):
            assert a == b, f"executor {executor}, step {i}"
    assert one.steps == other.steps
    for a, b in zip(heard_by_orchestrator(one), heard_by_orchestrator(other)):
        assert a == b
    assert len(heard_by_orchestrator(one)) == len(heard_by_orchestrator(other))
    assert sorted(one.stays, key=repr) == sorted(other.stays, key=repr)


@thorough
@given(cases)
def test_the_simulator_does_what_a_naive_step_by_step_reference_does(case: Case) -> None:
    assert_equal_lives(simulate(case), run_reference(case))


def test_two_hundred_seeded_cases_equal_the_reference_and_exercise_what_is_hard() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        case = make_case(Random(seed))
        trace = simulate(case, check=False)
        assert_equal_lives(trace, run_reference(case))
        seen["preemptions"] += trace.num_preemptions
        seen["ties"] += trace.num_ties
        seen["cut spans"] += trace.num_cut
        seen["cut on a boundary"] += trace.num_cut_on_boundary
    # the cases are worth something only while they reach these corners
    assert seen["preemptions"] > 50, seen
    assert seen["ties"] > 200, seen
    assert seen["cut spans"] > 500, seen
    assert seen["cut on a boundary"] > 20, seen


@settings(thorough, max_examples=40)
@given(priced_cases)
def test_costs_with_bends_and_fractions_give_the_same_steps_to_the_picosecond(case: Case) -> None:
    assert_equal_lives(simulate(case), run_reference(case))


@thorough
@given(early_cases)
def test_early_binding_with_cancels_is_what_the_reference_does(case: Case) -> None:
    assert_equal_lives(simulate(case), run_reference(case))


def test_two_hundred_seeded_early_bindings_equal_the_reference_and_exercise_what_is_hard() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        case = make_early_case(Random(seed))
        trace = simulate(case, check=False)
        assert_equal_lives(trace, run_reference(case))
        for core, log in trace.logs.items():
            for frame in read_log(log)[1]:
                for command in frame.commands:
                    message = command.message if isinstance(command, Send) else command
                    is_early = isinstance(message, ServeKv) and message.is_early
                    seen["early serves" if is_early else type(message).__name__] += 1
                seen["tokens first"] += core > 0 and any(isinstance(event, FirstTokens) for event in frame.events)
    assert seen["PrepareReceive"] > 1000, seen
    assert seen["early serves"] > 400, seen
    assert seen["FirstTokens"] > 1000, seen
    assert seen["ContextStarted"] > 400, seen
    assert seen["KvWithdrawn"] > 20, seen
    assert seen["AbortKv"] > 10, seen


@settings(thorough, max_examples=30)
@given(st.randoms(use_true_random=False).map(make_ordered_case))
def test_queues_of_executors_that_learn_whom_they_serve_are_the_reference_s(case: Case) -> None:
    assert_equal_lives(simulate(case), run_reference(case))


@settings(thorough, max_examples=30)
@given(reuse_cases)
def test_prefix_caching_is_what_the_reference_does(case: Case) -> None:
    assert_equal_lives(simulate(case), run_reference(case))


def test_sixty_seeded_clusters_with_prefix_caching_equal_the_reference_and_exercise_what_is_hard() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        case = make_reuse_case(Random(seed))
        trace = simulate(case, check=False)
        assert_equal_lives(trace, run_reference(case))
        seen["preemptions"] += trace.num_preemptions
        for _, event in trace.heard:
            if isinstance(event, Response):
                seen["partly transferred" if event.kv_usable and event.num_cached_tokens else "other"] += 1
                seen["partly computed"] += event.num_cached_tokens > 0 and event.transfer_start is None
            news = getattr(getattr(event, "report", None) or event, "cache_events", ())
            seen["evicted"] += news[0] if news else 0
            seen["stored"] += len(news) - 1 - news[0] if news else 0
        plans = [c for core in trace.logs if core for frame in read_log(trace.logs[core])[1] for c in frame.commands]
        seen["plans with shared KV"] += sum(isinstance(c, RunSteps) and c.num_shared_kv > 0 for c in plans)
        seen["cheaper with shared KV"] += any(getattr(cost, "shared", 0) > 0 for cost in case.costs.values())
    assert seen["partly computed"] > 100, seen
    assert seen["partly transferred"] > 30, seen
    assert seen["evicted"] > 300, seen
    assert seen["stored"] > 2000, seen
    assert seen["plans with shared KV"] > 60, seen
    assert seen["cheaper with shared KV"] > 20, seen
    assert seen["preemptions"] > 20, seen


@settings(thorough, max_examples=30)
@given(reuse_cases)
def test_spans_of_any_length_change_nothing_with_prefix_caching(case: Case) -> None:
    whole = simulate(case, check=False)
    assert_equal_lives(whole, simulate(case.with_executors(max_span_steps=1), check=False))


@thorough
@given(cases)
def test_spans_of_any_length_change_nothing(case: Case) -> None:
    whole = simulate(case, check=False)
    assert_equal_lives(whole, simulate(case.with_executors(max_span_steps=1), check=False))
    assert_equal_lives(whole, simulate(case.with_executors(max_span_steps=3), check=False))


@settings(thorough, max_examples=20)
@given(cases)
def test_interval_reports_do_not_depend_on_how_far_a_span_has_run(case: Case) -> None:
    case = case.with_executors(report_interval=37, report_on_batch_change=False)
    assert_equal_lives(simulate(case), simulate(case.with_executors(max_span_steps=1), check=False))


@thorough
@given(cases, st.randoms(use_true_random=False))
def test_spurious_stops_change_no_bit(case: Case, rng: Random) -> None:
    undisturbed = simulate(case, check=False)
    assert_equal_lives(undisturbed, simulate(case, check=False, disturb=lambda cluster: _stop_at_random(cluster, rng)))


def _stop_at_random(cluster: Any, rng: Random) -> None:
    """Ask for the end of whatever span is running, again and again, at instants of no meaning."""

    def stop(executor: Any) -> None:
        core = core_of(cluster, executor.id)
        if core.scheduler.running is not None:
            executor._stop()

    for _ in range(40):
        executor = rng.choice(list(cluster.executors.values()))
        timeout = cluster.env.timeout(rng.randint(0, 1500))
        timeout.callbacks.append(lambda _, executor=executor: stop(executor))


@settings(thorough, max_examples=25)
@given(cases, st.integers(1, 40))
def test_hidden_lengths_change_no_command_before_the_world_first_ends_a_sequence(case: Case, more: int) -> None:
    longer = replace(case, arrivals=tuple((at, request, length + more) for at, request, length in case.arrivals))
    one, other = simulate(case, check=False), simulate(longer, check=False)
    for core in one.logs:
        first = _first_end(one)
        assert _before(first, one.logs[core]) == _before(first, other.logs[core])


def _first_end(trace: Trace) -> int:
    """The first instant at which the world ended a sequence."""
    frames = (frame for log in trace.logs.values() for frame in read_log(log)[1])
    return min(
        (frame.now for frame in frames for event in frame.events if isinstance(event, StepsDone) and event.stopped),
        default=NEVER,
    )


def _before(instant: int, log: bytes) -> list[Frame]:
    return [frame for frame in read_log(log)[1] if frame.now < instant]


def test_a_step_that_ends_as_a_message_comes_hears_the_message_first() -> None:
    """Two steps of 10 ps from 5 ps on; an arrival heard at 15 ps, where the first ends, runs in the second."""
    trace = simulate(_one_mixed_executor(((0, 1, 3), (10, 1, 3))))
    assert [(step.start, step.decodes, step.chunks) for step in trace.steps[1][:2]] == [
        (5, (), ((1, 0, 1),)),
        (15, (1,), ((2, 0, 1),)),
    ]


def test_simultaneous_arrivals_are_planned_together() -> None:
    trace = simulate(_one_mixed_executor(tuple((0, 1, 2) for _ in range(64))))
    assert len(trace.steps[1][0].chunks) == 64
    assert len(trace.steps[1]) == 2


def test_an_epoch_keeps_its_origin_through_continuations() -> None:
    """Steps of 7 + 0.5 ps: re-based at each of its continuations the clock would lose half a picosecond every time."""
    case = replace(_one_mixed_executor(((0, 1, 21),)), costs={1: _HalfPicosecond()})
    for max_span_steps in (1, 4, 1000):
        trace = simulate(case.with_executors(max_span_steps=max_span_steps))
        assert trace.steps[1][0].end == 5 + 7
        assert trace.steps[1][-1].end == 12 + 150, max_span_steps


class _HalfPicosecond:
    def step_time(self, features: StepFeatures) -> int:
        return 15 << 19

    def span_time(self, features: StepFeatures, num_steps: int) -> int:
        return num_steps * self.step_time(features)


def _one_mixed_executor(arrivals: tuple[tuple[int, int, int], ...]) -> Case:
    """Steps of 10 ps, messages of 5 ps; (instant, prompt, length) of each arrival."""
    executor = ExecutorConfig(1, Role.MIXED, 4000, tokens_per_block=4, report_interval=NEVER)
    config = OrchestratorConfig((executor,), mixed_router=PolicySpec("round_robin"))
    requests = tuple((at, Request(1001 + i, p, 100, arrival=at), n) for i, (at, p, n) in enumerate(arrivals))
    return Case(config, {1: ConstantCost(10)}, 5, 0, 1, requests)


# ---- the cost model -------------------------------------------------------------------------------------------------

small = st.integers(0, 10**6)
constants: st.SearchStrategy[CostModel] = st.builds(ConstantCost, st.integers(1, 1000), small, small, small)
rooflines: st.SearchStrategy[CostModel] = st.builds(
    RooflineCost, st.integers(1, 10**9), small, small, small, small, small, small
)
features = st.builds(
    StepFeatures,
    st.integers(1, 500),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000), st.booleans()), max_size=3).map(tuple),
)


@given(st.one_of(constants, rooflines), features, st.integers(0, 200))
def test_the_time_of_a_span_is_the_sum_of_its_steps(model: CostModel, first: StepFeatures, num_steps: int) -> None:
    assert model.span_time(first, num_steps) == sum(model.step_time(first.after(i)) for i in range(num_steps))


def test_the_time_of_a_span_is_the_sum_of_its_steps_on_a_real_device() -> None:
    model = roofline(preset("llama-3.1-8b"), DEVICES["h200"], tp=2, pp=2)
    first = StepFeatures(17, 12345)
    assert model.span_time(first, 3000) == sum(model.step_time(first.after(i)) for i in range(3000))


@given(
    st.one_of(constants, rooflines),
    features,
    st.integers(1, 300),
    st.integers(-5, 10**6),
    st.integers(0, 300),
    st.sampled_from((1 << 20, (1 << 20) - 77777, (1 << 20) + 3)),
)
def test_the_step_at_an_instant_is_the_first_to_end_at_or_after_it(
    model: CostModel, first: StepFeatures, at_most: int, offset: int, k: int, factor: int
) -> None:
    """Asked at arbitrary instants and, for the ties, at the very ends of steps and one picosecond beside them."""
    for elapsed in {offset, *(end_of_step(model, first, max(1, k), factor) + d for d in (-1, 0, 1))}:
        ends = (j for j in range(1, at_most) if end_of_step(model, first, j, factor) >= elapsed)
        step = next(ends, at_most)
        assert EpochTimes(model, first, factor).step_by(elapsed, at_most) == step
        assert EpochTimes(model, first, factor).step_by(elapsed, at_most) == step


@pytest.mark.parametrize("seed", range(3))
def test_a_run_is_repeated_to_the_byte(seed: int) -> None:
    case = make_case(Random(seed))
    assert simulate(case).logs == simulate(case).logs
