from __future__ import annotations

import math

import numpy as np
import pytest

from disagg.reports.statistics import (
    batch_means,
    kendall_tau,
    min_observations,
    order_ranks,
    paired_means,
    paired_over_repeats,
    paired_percentiles,
    percentile,
    share,
    t_interval,
    weighted_percentiles,
)


def covered(low: float | None, high: float | None, truth: float) -> bool:
    return (low is None or low <= truth) and (high is None or truth <= high)


def test_p99_needs_368_observations() -> None:
    assert min_observations(99) == 368
    assert percentile(np.arange(368), 99).high == 367
    few = percentile(np.arange(367), 99)
    assert few.too_few
    assert few.high is None


def test_the_median_of_six_is_bounded_by_its_extremes() -> None:
    # P(all six on one side) = 2 / 64 = 0.03 < 0.05, and no narrower pair will do
    assert order_ranks(6, 50) == (1, 6)
    assert min_observations(50) == 6


@pytest.mark.parametrize("p", [0, 100])
def test_extreme_percentiles_have_no_interval(p: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        min_observations(p)


@pytest.mark.parametrize(("p", "n"), [(50, 40), (90, 100), (99, 400), (99, 2000)])
def test_order_statistic_intervals_cover_at_least_95_percent_and_not_much_more(p: float, n: int) -> None:
    rng = np.random.default_rng(7)
    truth = -math.log(1 - p / 100)
    trials = 2000
    lower, upper = order_ranks(n, p)
    samples = np.sort(rng.exponential(size=(trials, n)), axis=1)
    assert lower is not None
    assert upper is not None
    hits = np.mean((samples[:, lower - 1] <= truth) & (truth <= samples[:, upper - 1]))
    assert 0.94 <= hits <= 0.995


def test_t_intervals_cover_95_percent() -> None:
    rng = np.random.default_rng(1)
    found = [t_interval(rng.normal(3.0, 2.0, 5)) for _ in range(2000)]
    assert 0.935 <= np.mean([covered(e.low, e.high, 3.0) for e in found]) <= 0.965


def test_one_repeat_has_a_mean_but_no_interval() -> None:
    only = t_interval([4.0])
    assert only.value == 4.0
    assert only.too_few
    assert not only.has_interval


def test_batch_means_cover_where_neighbours_are_correlated_and_plain_t_does_not() -> None:
    rng = np.random.default_rng(2)
    batched, plain = [], []
    for _ in range(400):
        noise = rng.normal(size=2000)
        series = np.empty(2000)
        level = rng.normal() / math.sqrt(1 - 0.8**2)
        for i, e in enumerate(noise):
            level = 0.8 * level + e
            series[i] = level
        b, t = batch_means(series), t_interval(series)
        batched.append(covered(b.low, b.high, 0.0))
        plain.append(covered(t.low, t.high, 0.0))
    assert np.mean(batched) >= 0.90
    assert np.mean(plain) < 0.75


def test_too_few_values_for_batches_are_marked() -> None:
    assert batch_means(np.arange(39)).too_few
    assert batch_means(np.arange(40)).has_interval


def test_shares_cover_95_percent_and_stay_within_bounds() -> None:
    rng = np.random.default_rng(3)
    found = [share(rng.random(200) < 0.9) for _ in range(1000)]
    assert np.mean([covered(e.low, e.high, 0.9) for e in found]) >= 0.94
    perfect = share(np.ones(100))
    assert perfect.high == 1.0
    assert perfect.low is not None
    assert 0.95 < perfect.low < 1.0


def test_weighted_percentiles_equal_those_of_repeated_values() -> None:
    rng = np.random.default_rng(4)
    values, weights = rng.random(30), rng.integers(0, 9, 30)
    repeated = np.repeat(values, weights)
    for p in (1, 25, 50, 90, 99, 100):
        assert weighted_percentiles(values, weights, [p]) == [np.percentile(repeated, p, method="inverted_cdf")]
    assert weighted_percentiles([1.0], [0.0], [50, 99]) == [None, None]


def test_common_random_numbers_tell_policies_apart_that_plain_intervals_cannot() -> None:
    rng = np.random.default_rng(5)
    base = rng.exponential(1.0, 1000)
    slower = base * 1.02 + rng.normal(0, 0.01, 1000)
    a, b = batch_means(slower), batch_means(base)
    assert a.low is not None
    assert b.high is not None
    assert a.low < b.high
    assert paired_means(slower, base).excludes_zero


def test_equal_policies_are_not_distinguished() -> None:
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(300):
        base = rng.exponential(1.0, 400)
        wrong += paired_means(base + rng.normal(0, 0.1, 400), base + rng.normal(0, 0.1, 400)).excludes_zero
    assert wrong / 300 <= 0.09


def test_paired_repeats_are_their_differences_t_interval() -> None:
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) = 4.302653
    found = paired_over_repeats([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.low == pytest.approx(2.0 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert not found.excludes_zero
    with pytest.raises(ValueError, match="paired"):
        paired_over_repeats([1.0], [1.0, 2.0])


def test_the_block_bootstrap_is_repeatable_and_covers_the_difference_of_p90() -> None:
    rng = np.random.default_rng(8)
    truth = 0.5 * math.log(10)
    hits = 0
    for _ in range(60):
        base = rng.exponential(1.0, 400)
        other = 1.5 * rng.exponential(1.0, 400)
        found = paired_percentiles(other, base, 90)
        hits += covered(found.low, found.high, truth)
    assert hits >= 52
    assert paired_percentiles(other, base, 90) == found


def test_the_bootstrap_refuses_p99_of_few_requests() -> None:
    few = paired_percentiles(np.arange(100.0), np.arange(100.0) + 1, 99)
    assert few.too_few
    assert few.value == pytest.approx(-1.0)
    assert not few.has_interval


def test_kendall_tau_counts_pairs_and_corrects_for_ties() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    # five concordant, no discordant, one tie in x: 5 / sqrt(5 * 6)
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30))
    assert kendall_tau([1, 1], [1, 2]) is None
    with pytest.raises(ValueError, match="compared"):
        kendall_tau([1], [1, 2])


def test_kendall_tau_equals_scipys_on_tied_data() -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(9)
    x, y = rng.integers(0, 5, 20), rng.integers(0, 5, 20)
    assert kendall_tau(list(x), list(y)) == pytest.approx(kendalltau(x, y).statistic)
