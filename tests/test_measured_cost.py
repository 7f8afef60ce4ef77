"""The measured cost model: exact sums, monotone in every feature, sane outside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from disagg.core.chunk_sums import chunk_pairs
from disagg.core.cost import StepFeatures, end_of_step
from disagg.core.epoch_times import EpochTimes
from disagg.core.measured_cost import Curve, MeasuredCost
from disagg.core.measured_range import Measured
from disagg.core.step_sizes import graph_sizes, padded_rows

SMALL = st.integers(0, 1 << 40)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    knots = [0, *sorted(draw(st.sets(st.integers(1, 5000), max_size=6)))]
    return Curve.of(draw(SMALL), knots, [draw(SMALL) for _ in knots])


@st.composite
def costs(draw: st.DrawFn) -> MeasuredCost:
    shared = draw(st.integers(0, 1 << 20))
    return MeasuredCost(
        graph_sizes=draw(st.sampled_from([(), graph_sizes(16), graph_sizes(300)])),
        row_multiple=draw(st.sampled_from([1, 64])),
        decode_rows=draw(curves()),
        decode_kv=draw(curves()),
        decode=draw(SMALL),
        chunk_rows=draw(curves()),
        pair=draw(SMALL),
        cached_token=draw(SMALL),
        chunk=draw(SMALL),
        sample=draw(SMALL),
        mixed_kv=draw(curves()),
        mixed_decode=draw(SMALL),
        measured=Measured(),
        graph_pair=draw(st.just(-1) | SMALL),
        graph_cached_token=draw(SMALL),
        longest_token=draw(SMALL),
        decode_shared=shared,
        full_batch=draw(st.just(0) | st.integers(1, 200)),
        full_kv=draw(SMALL),
        full_shared=draw(st.integers(0, shared)),
        mixed_shared=draw(st.integers(0, 1 << 20)),
    )


CHUNKS = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 3000), st.booleans()), max_size=3).map(tuple)


@st.composite
def step_features(draw: st.DrawFn) -> StepFeatures:
    num_kv = draw(st.integers(0, 9000))
    return StepFeatures(draw(st.integers(0, 300)), num_kv, draw(CHUNKS), draw(st.integers(0, num_kv)))


FEATURES = step_features()


@given(curves(), st.integers(0, 6000), st.integers(0, 900), st.integers(1, 60))
def test_the_total_of_a_curve_is_the_sum_of_its_terms(curve: Curve, first: int, stride: int, num: int) -> None:
    assert curve.total(first, stride, num) == sum(curve.at(first + stride * i) for i in range(num))


def with_graphs(cost: MeasuredCost) -> MeasuredCost:
    return replace(cost, chunk_graphs=bool(cost.graph_sizes), launch_floor=3 << 40)


@given(costs() | costs().map(with_graphs), FEATURES, st.integers(1, 50))
def test_a_span_takes_exactly_the_sum_of_its_steps(cost: MeasuredCost, features: StepFeatures, num: int) -> None:
    assert cost.span_time(features, num) == sum(cost.step_time(features.after(i)) for i in range(num))


def runs_alike(cost: MeasuredCost, features: StepFeatures, more: StepFeatures) -> bool:
    """Whether both run as graphs, or neither: other kernels may well be quicker, as they are on H200s behind long KV."""
    ways = {
        cost.runs_by_kernels(each.num_decodes, len(each.chunks), sum(length for _, length, _ in each.chunks))
        for each in (features, more)
    }
    return len(ways) == 1


@given(costs() | costs().map(with_graphs), FEATURES, st.integers(0, 40), st.integers(0, 5000))
def test_a_step_never_gets_cheaper_by_more_decodes_or_kv(
    cost: MeasuredCost, features: StepFeatures, decodes: int, kv: int
) -> None:
    more = structs.replace(
        features, num_decodes=features.num_decodes + decodes, num_kv_tokens=features.num_kv_tokens + kv
    )
    assume(not features.chunks or runs_alike(cost, features, more))
    assert cost.step_time(more) >= cost.step_time(features)


@given(costs(), FEATURES)
def test_kv_that_is_read_again_costs_no_more_than_kv_that_is_not_and_no_less_than_none(
    cost: MeasuredCost, features: StepFeatures
) -> None:
    apart = structs.replace(features, num_shared_kv=0)
    without = structs.replace(apart, num_kv_tokens=features.num_kv_tokens - features.num_shared_kv)
    assert cost.step_time(without) <= cost.step_time(features) <= cost.step_time(apart)


@given(
    costs() | costs().map(with_graphs), FEATURES.filter(lambda f: f.chunks), st.integers(0, 2000), st.integers(0, 2000)
)
def test_a_step_never_gets_cheaper_by_longer_or_later_or_more_chunks_in_the_same_kernels(
    cost: MeasuredCost, features: StepFeatures, longer: int, later: int
) -> None:
    (before, length, _), *others = features.chunks
    grown = structs.replace(features, chunks=((before + later, length + longer, True), *others))
    again = structs.replace(features, chunks=(*features.chunks, (later, longer + 1, False)))
    for more in (grown, again):
        if runs_alike(cost, features, more):
            assert cost.step_time(more) >= cost.step_time(features)


def test_a_step_with_short_prompts_costs_the_rows_of_its_graph_and_one_without_a_graph_the_hosts_time() -> None:
    cost = MeasuredCost(
        graph_sizes=graph_sizes(64),
        row_multiple=64,
        decode_rows=Curve.line(0, 1),
        decode_kv=Curve.line(0, 0),
        decode=0,
        chunk_rows=Curve.line(0, 10),
        pair=0,
        cached_token=0,
        chunk=0,
        sample=0,
        mixed_kv=Curve.line(0, 0),
        mixed_decode=0,
        measured=Measured(rows=8192, chunks=32, pairs=1 << 40, cached_tokens=1 << 20, mixed_decodes=65),
        chunk_graphs=True,
        launch_floor=5000,
    )

    def rows(decodes: int, *chunks: tuple[int, int]) -> float:
        features = StepFeatures(decodes, 0, tuple((before, length, True) for before, length in chunks))
        assert cost.covers(features)
        return cost.step_time(features) / 10

    assert rows(0, (0, 1)) == rows(0, (0, 64)) == 64
    assert rows(0, (0, 65)) == rows(0, (0, 40), (0, 88)) == 128
    assert rows(0, (0, 900)) == rows(0, (0, 1000)) == 1024
    assert rows(1, (0, 56)) == rows(8, (0, 56)) == 64  # room for eight decodes
    assert rows(9, (0, 56)) == 128  # for sixteen
    assert rows(33, (0, 960)) == rows(64, (0, 960)) == 1024
    assert rows(0, (32, 1)) == rows(0, *[(0, 2)] * 32) == 64  # behind KV, as many as there is room for
    # kernel by kernel: more decodes than there are graphs for, too many rows
    assert rows(65, (0, 1)) == 500
    assert rows(0, (0, 1025)) == 1088
    assert rows(0, (4096, 2000)) == 2048


def test_chunks_of_a_graph_are_walked_through_side_by_side_and_kernel_by_kernel_by_a_sum_and_the_longest() -> None:
    rows, zero = Curve.line(0, 0), Curve.line(0, 0)
    cost = MeasuredCost(
        graph_sizes=graph_sizes(64),
        row_multiple=64,
        decode_rows=zero,
        decode_kv=zero,
        decode=0,
        chunk_rows=rows,
        pair=1,
        cached_token=100,
        chunk=0,
        sample=0,
        mixed_kv=zero,
        mixed_decode=0,
        measured=Measured(),
        chunk_graphs=True,
        graph_pair=2,
        graph_cached_token=300,
    )

    def time(*chunks: tuple[int, int]) -> int:
        return cost.step_time(StepFeatures(0, 0, tuple((before, length, True) for before, length in chunks)))

    assert time((1000, 10)) == 300 * 1000
    assert time((1000, 10), (400, 10)) == time((1000, 10), (1000, 10)) == 300 * 1000
    assert time((1000, 400)) == 2 * chunk_pairs(1000, 400)
    assert time((1000, 90), (1000, 90)) == 2 * 2 * chunk_pairs(1000, 90)
    by_a_sum = sum(chunk_pairs(1000, n) + 100 * 1000 for n in (1000, 100))
    assert time((1000, 1000), (1000, 100)) == by_a_sum
    cost = replace(cost, longest_token=7)
    assert time((1000, 1000), (1000, 100)) == by_a_sum + 7 * 1000
    assert time((1000, 1000), (400, 100)) == chunk_pairs(1000, 1000) + chunk_pairs(400, 100) + 100 * 1400 + 7 * 1000


@given(costs().map(with_graphs), st.integers(1, 400), st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 3000))
def test_in_a_graph_no_step_gets_cheaper_by_kv_before_its_chunks(
    cost: MeasuredCost, length: int, before: int, more: int, other: int
) -> None:
    def time(before: int) -> int:
        return cost.step_time(StepFeatures(0, 0, ((before, length, True), (other, 7, False))))

    assert time(before) <= time(before + more)


def test_a_decode_batch_runs_as_the_next_graph_and_chunks_in_whole_rows() -> None:
    rows = Curve.line(0, 1)
    zero = Curve.line(0, 0)
    cost = MeasuredCost(graph_sizes(128), 64, rows, zero, 0, rows, 0, 0, 0, 0, zero, 0, Measured(128, 10))
    assert [cost.step_time(StepFeatures(n, 0)) for n in (1, 3, 9, 65, 128)] == [1, 4, 16, 80, 128]
    assert [cost.step_time(StepFeatures(0, 0, ((0, n, True),))) for n in (1, 64, 65, 129)] == [1, 64, 128, 192]
    assert cost.step_time(StepFeatures(3, 0, ((0, 62, True),))) == 128


def test_beyond_the_measured_range_the_outermost_slope_goes_on_and_is_told() -> None:
    kv = Curve.of(5, (0, 100), (1, 3))
    zero = Curve.line(0, 0)
    cost = MeasuredCost((), 1, zero, kv, 0, zero, 2, 0, 0, 0, zero, 0, Measured(8, 200, 50, 1, 3000, 30))
    assert cost.step_time(StepFeatures(1, 1100)) == 5 + 100 + 3 * 1000
    assert cost.covers(StepFeatures(8, 200))
    assert not cost.covers(StepFeatures(8, 201))
    assert not cost.covers(StepFeatures(9, 100))
    assert cost.covers(StepFeatures(0, 0, ((30, 50, True),)))
    for features in (
        StepFeatures(0, 0, ((0, 51, True),)),
        StepFeatures(0, 0, ((31, 5, True),)),
        StepFeatures(0, 0, ((0, 5, True), (0, 5, True))),
        StepFeatures(1, 5, ((0, 5, True),)),
    ):
        assert not cost.covers(features)


def test_pairs_are_those_of_causal_attention() -> None:
    assert chunk_pairs(0, 4) == 1 + 2 + 3 + 4
    assert chunk_pairs(10, 3) == 11 + 12 + 13


@pytest.mark.parametrize(
    ("start", "knots", "slopes"),
    [
        (0, (), ()),
        (0, (1,), (1,)),
        (0, (0, 5, 5), (1, 1, 1)),
        (0, (0, 9, 5), (1, 1, 1)),
        (-1, (0,), (1,)),
        (0, (0,), (-1,)),
    ],
)
def test_what_is_no_monotone_curve_is_refused(start: int, knots: tuple[int, ...], slopes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"knots|negative"):
        Curve.of(start, knots, slopes)


def test_steps_with_chunks_are_padded_above_the_first_multiple() -> None:
    assert [padded_rows(rows) for rows in (1, 63, 64, 65, 128, 129, 8191)] == [1, 63, 64, 65, 128, 256, 8192]


@settings(deadline=None)
@given(costs(), FEATURES, st.integers(1, 400), st.integers(0, 400), st.sampled_from([1 << 20, (1 << 20) - 77777]))
def test_the_times_of_an_epoch_are_those_of_its_spans(
    cost: MeasuredCost, features: StepFeatures, at_most: int, k: int, factor: int
) -> None:
    times = EpochTimes(cost, features, factor)
    at = end_of_step(cost, features, max(1, k), factor)
    assert times.end_of(max(1, k)) == at
    for elapsed in (at - 1, at, at + 1):
        step = times.step_by(elapsed, at_most)
        assert step == at_most or end_of_step(cost, features, step, factor) >= elapsed
        assert step == 1 or end_of_step(cost, features, step - 1, factor) < elapsed
