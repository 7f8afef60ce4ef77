"""Intervals and comparisons: what a number of a run is worth.

Order-statistic intervals take observations as independent; a queue's are not, which makes them too narrow in one run.
Means of one run therefore use batch means, and repeats with seeds of their own use Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from msgspec import Struct, structs
from numpy.typing import ArrayLike, NDArray

CONFIDENCE: Final = 0.95
NUM_BATCHES: Final = 20
BOOTSTRAP_RESAMPLES: Final = 1000
_BOOTSTRAP_WORK: Final = 20_000_000  # resampled values at most: long runs get fewer resamples, not longer waits

Floats = NDArray[np.float64]


class Estimate(Struct, frozen=True):
    """A value with its two-sided 95 % interval; a bound that the data cannot give is None.

    `method` says how the interval was made; `too_few` that there were not enough observations for one.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: str = ""
    too_few: bool = False

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None

    def from_zero(self) -> Estimate:
        """Of what cannot be negative: an interval that is symmetric about its mean is cut at 0."""
        return self if self.low is None or self.low >= 0 else structs.replace(self, low=0.0)

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is distinguishable from none."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def t_quantile(degrees: int, probability: float = 0.5 + CONFIDENCE / 2) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


# ---- percentiles ----------------------------------------------------------------------------------------------------


def min_observations(percentile: float, confidence: float = CONFIDENCE) -> int:
    """Fewest independent observations whose extremes bound the percentile on both sides: 368 for p99 at 95 %.

    The largest of n lies above the quantile p with probability 1 − pⁿ, the smallest under it with 1 − (1 − p)ⁿ.
    """
    p = percentile / 100.0
    if not 0.0 < p < 1.0:
        raise ValueError(f"percentile {percentile} is outside (0, 100)")
    tail = (1.0 - confidence) / 2.0
    return math.ceil(math.log(tail) / math.log(max(p, 1.0 - p)))


def order_ranks(n: int, percentile: float, confidence: float = CONFIDENCE) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that bound the percentile, each missing its side with (1 − confidence)/2.

    B, the number of observations under the quantile p, is binomial(n, p): the lower rank l is the largest with
    P(B ≤ l − 1) ≤ tail, the upper rank u the smallest with P(B ≤ u − 1) ≥ 1 − tail. None where no rank will do.
    """
    from scipy.special import bdtr

    p = percentile / 100.0
    tail = (1.0 - confidence) / 2.0
    cumulative = np.asarray(bdtr(np.arange(n, dtype=np.float64), n, p))  # entry k: P(B ≤ k), k from 0 to n − 1
    lower = int(np.searchsorted(cumulative, tail, side="right"))
    upper = int(np.searchsorted(cumulative, 1.0 - tail, side="left")) + 1
    return (lower if lower >= 1 else None), (upper if upper <= n else None)


def percentile(values: ArrayLike, percentile: float, confidence: float = CONFIDENCE) -> Estimate:
    """The percentile (linear between order statistics) with its order-statistic interval.

    `too_few` under `min_observations` values: a bound is then missing.
    """
    sorted_values = np.sort(_finite(values))
    n = len(sorted_values)
    if n == 0:
        return Estimate(None, too_few=True)
    lower, upper = order_ranks(n, percentile, confidence)
    return Estimate(
        value=float(np.percentile(sorted_values, percentile)),
        low=None if lower is None else float(sorted_values[lower - 1]),
        high=None if upper is None else float(sorted_values[upper - 1]),
        n=n,
        method="order statistics",
        too_few=n < min_observations(percentile, confidence),
    )


def weighted_percentiles(values: ArrayLike, weights: ArrayLike, percentiles: Sequence[float]) -> list[float | None]:
    """The smallest values at which the cumulated weight reaches each percentile; None without weight.

    Equal to `numpy.percentile(…, method="inverted_cdf")` of the values repeated by their weights.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.asarray(weights, dtype=np.float64)
    keep = w > 0
    v, w = v[keep], w[keep]
    if not len(v):
        return [None for _ in percentiles]
    order = np.argsort(v, kind="stable")
    v, cumulated = v[order], np.cumsum(w[order])
    targets = np.asarray(percentiles, dtype=np.float64) / 100.0 * cumulated[-1]
    index = np.searchsorted(cumulated, targets * (1.0 - 1e-12), side="left")
    return [float(value) for value in v[np.minimum(index, len(v) - 1)]]


# ---- means ----------------------------------------------------------------------------------------------------------


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of independent values (one per repeat) with Student's t interval; one value has no interval."""
    v = _finite(values)
    if len(v) == 0:
        return Estimate(None, too_few=True)
    mean = float(v.mean())
    if len(v) == 1:
        return Estimate(mean, n=1, method="one repeat", too_few=True)
    half = t_quantile(len(v) - 1, 0.5 + confidence / 2) * float(v.std(ddof=1)) / math.sqrt(len(v))
    return Estimate(mean, mean - half, mean + half, len(v), "t over repeats")


def batch_means(values: ArrayLike, num_batches: int = NUM_BATCHES, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of one run's values in order of arrival, with the t interval over means of consecutive batches.

    Batches carry the correlation between neighbours that independent observations would not have. Under two values
    a batch there is no interval.
    """
    v = _finite(values)
    if len(v) == 0:
        return Estimate(None, too_few=True)
    mean = float(v.mean())
    if len(v) < 2 * num_batches:
        return Estimate(mean, n=len(v), method="batch means", too_few=True)
    means = np.array([batch.mean() for batch in np.array_split(v, num_batches)])
    half = t_quantile(num_batches - 1, 0.5 + confidence / 2) * float(means.std(ddof=1)) / math.sqrt(num_batches)
    return Estimate(mean, mean - half, mean + half, len(v), f"{num_batches} batch means")


def share(hits: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Share of hits (0 or 1, in order of arrival): the wider of batch means and Wilson's interval, within [0, 1]."""
    h = _finite(hits)
    n = len(h)
    if n == 0:
        return Estimate(None, too_few=True)
    p = float(h.mean())
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high, method = centre - half, centre + half, "Wilson"
    batched = batch_means(h, confidence=confidence)
    if batched.low is not None and batched.high is not None and batched.high - batched.low > high - low:
        low, high, method = batched.low, batched.high, batched.method
    return Estimate(p, max(0.0, low), min(1.0, high), n, method)


# ---- paired differences ---------------------------------------------------------------------------------------------


def paired_over_repeats(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of ours − theirs over repeats with the same seed (common random numbers), Student's t.

    Raises ValueError if the two do not pair up.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    estimate = t_interval(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
    return Estimate(
        estimate.value, estimate.low, estimate.high, estimate.n, "paired by seed, t over repeats", estimate.too_few
    )


def paired_means(ours: ArrayLike, theirs: ArrayLike) -> Estimate:
    """Mean of ours − theirs over the same requests of one run each, in order of arrival, by batch means."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    estimate = batch_means(difference)
    return Estimate(
        estimate.value,
        estimate.low,
        estimate.high,
        estimate.n,
        f"paired by request, {estimate.method}",
        estimate.too_few,
    )


def paired_percentiles(ours: ArrayLike, theirs: ArrayLike, percentile: float, seed: int = 0) -> Estimate:
    """Difference of the percentile over the same requests of one run each: a paired moving-block bootstrap.

    Blocks of about √n consecutive requests keep the queue's correlation. Values (n,) in order of arrival; pairs with a
    missing side are dropped. `too_few` under `min_observations` pairs: no interval then.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    n = len(a)
    if n == 0:
        return Estimate(None, too_few=True)
    value = float(np.percentile(a, percentile) - np.percentile(b, percentile))
    method = "paired by request, moving-block bootstrap"
    if n < min_observations(percentile):
        return Estimate(value, n=n, method=method, too_few=True)
    rng = np.random.default_rng(seed)
    length = max(1, math.isqrt(n))
    num_blocks = -(-n // length)
    resamples = max(100, min(BOOTSTRAP_RESAMPLES, _BOOTSTRAP_WORK // n))
    differences = np.empty(resamples)
    offsets = np.arange(length)
    for i in range(resamples):
        starts = rng.integers(0, n - length + 1, num_blocks)
        rows = (starts[:, None] + offsets).ravel()[:n]
        differences[i] = np.percentile(a[rows], percentile) - np.percentile(b[rows], percentile)
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(differences, [tail, 100.0 - tail])
    return Estimate(value, float(low), float(high), n, method)


# ---- rank agreement -------------------------------------------------------------------------------------------------


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's τ-b, which allows for ties: (concordant − discordant) / √((pairs − ties in x)(pairs − ties in y)).

    None where one side is all ties, or with fewer than two items. Raises ValueError if the lengths differ.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} ranks cannot be compared with {len(y)}")
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    rows, columns = np.triu_indices(len(a), k=1)
    sign_a, sign_b = np.sign(a[rows] - a[columns]), np.sign(b[rows] - b[columns])
    untied = math.sqrt(float(np.count_nonzero(sign_a)) * float(np.count_nonzero(sign_b)))
    return float((sign_a * sign_b).sum()) / untied if untied else None
