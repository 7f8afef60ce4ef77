"""From samples to coefficients: least squares with none negative, on points, each the mean of samples that agree.

Samples of equal features make a point: their mean, less those far from their median, since the simulator is to be right
on average and one compilation is no average. Points that lie far off are left out of a second fit, and counted. Errors
count in proportion, so that short steps are as well told as long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .measured_profile import CurveFit, Residual

Floats = NDArray[np.float64]
LEAST_SAMPLES: Final = 3  # of a family that is to be fitted
_FAR: Final = 5.0  # standard deviations, by the median of deviations
_LEAST_FAR: Final = 0.05  # of the value: nearer than this nothing is an outlier
_STALLED: Final = 10.0  # times the median
SHORTEST: Final = 50.0  # times shorter than the median is no time of a device
_ROUNDS: Final = 5
_LEAST_RATIO: Final = 1.05  # of a knot to the one before


class Points(NamedTuple):
    """`features` [points, columns], mean `ns` [points], `weights` [points], `point_of` [samples], `is_kept` [samples]."""

    features: Floats
    ns: Floats
    weights: Floats
    point_of: NDArray[np.int64]
    is_kept: NDArray[np.bool_]


class Fitted(NamedTuple):
    """The fit of one family: nanoseconds for one of each feature."""

    coefficients: Floats
    residual: Residual


def keep_near(values: Floats) -> NDArray[np.bool_]:
    """Which values are no outliers: near the median, by the median deviation."""
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    return np.asarray(np.abs(values - median) <= max(_FAR * spread, _LEAST_FAR * abs(median)))


def usual(values: Sequence[float]) -> Floats:
    """All but the largest hundredth, and what is ten times the median or more: of times with a long tail that is part of
    them, and a few accidents that are not. One stall of 20 ms is in many messages of a second, and in none of the next.
    """
    ordered = np.sort(np.array(values, dtype=float))
    kept = ordered[: max(1, len(ordered) - len(ordered) // 100)]
    return np.asarray(kept[kept <= _STALLED * max(float(np.median(kept)), 1.0)])


def points_of(keys: Sequence[NDArray[Any]], features: Floats, ns: Floats) -> Points:
    """Group samples by `keys`; each group is a point at the mean of its features and of its time, less outliers."""
    _, point_of = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    point_of = point_of.reshape(-1)
    is_kept = np.ones(len(ns), dtype=bool)
    order = np.argsort(point_of, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(point_of[order])) + 1):
        if len(group) >= LEAST_SAMPLES:
            is_kept[group] = keep_near(ns[group])
    count = np.bincount(point_of[is_kept], minlength=point_of.max() + 1).astype(float)
    mean = np.bincount(point_of[is_kept], ns[is_kept], minlength=len(count)) / count
    columns = [np.bincount(point_of[is_kept], column[is_kept], minlength=len(count)) / count for column in features.T]
    return Points(np.stack(columns, axis=1), mean, np.sqrt(np.minimum(count, 30)), point_of, is_kept)


def fit_points(points: Points, ns: Floats, features: Floats, family: str) -> Fitted:
    """Non-negative coefficients of the features; `ns` and `features` are the samples that the points come from."""
    from scipy.optimize import nnls

    # A host that is held up sees two steps end at once, the second after nothing: in proportion to that all else is nothing.
    keep = points.ns * SHORTEST >= np.median(points.ns)
    scale = np.maximum(points.ns, 1.0)
    largest = np.maximum(points.features.max(axis=0), 1e-12)  # columns of like size: far quicker, and better told
    coefficients = np.zeros(points.features.shape[1])
    for _ in range(_ROUNDS):
        weights = points.weights[keep] / scale[keep]
        system = points.features[keep] / largest * weights[:, None]
        coefficients = nnls(system, points.ns[keep] * weights, maxiter=50 * system.shape[1])[0] / largest
        # in proportion to the fit, not to the sample: that would take the short ones of noisy samples for the truth
        scale = np.maximum(points.features @ coefficients, 1.0)
        relative = points.ns / scale - 1
        spread = 1.4826 * np.median(np.abs(relative[keep]))
        keep = np.abs(relative) <= max(_FAR * spread, 3 * _LEAST_FAR)
        if keep.sum() < len(coefficients):
            keep[:] = True
    kept = points.is_kept & keep[points.point_of]
    return Fitted(coefficients, _residual(family, points, keep, kept, ns, features, coefficients))


def _residual(
    family: str,
    points: Points,
    keep: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    ns: Floats,
    features: Floats,
    coefficients: Floats,
) -> Residual:
    relative = np.abs(points.ns[keep] / np.maximum(points.features[keep] @ coefficients, 1.0) - 1)
    fitted = features[kept] @ coefficients
    return Residual(
        family,
        num_points=int(keep.sum()),
        num_samples=len(ns),
        num_outliers=int((~kept).sum()),
        mean=rounded(relative.mean()),
        p90=rounded(np.quantile(relative, 0.9)),
        max=rounded(relative.max()),
        bias=rounded(fitted.sum() / ns[kept].sum() - 1),
        jitter=rounded(np.std(ns[kept] / np.maximum(fitted, 1.0))),
    )


def rounded(x: Any) -> float:
    return round(float(x), 6)


def knots_for(values: NDArray[Any], candidates: Sequence[int]) -> list[int]:
    """From 0 to the largest value, each at a value: the last one up to each candidate, so that it is held by samples.

    Knots that are nearly alike would tell noise from noise: one of them stays.
    """
    distinct = np.unique(values[values > 0])
    knots = [0]
    for candidate in [*candidates, int(distinct[-1]) if len(distinct) else 1]:
        below = distinct[distinct <= candidate]
        knot = int(below[-1]) if len(below) else 0
        if knot <= knots[-1]:
            continue
        if knots[-1] and knot < knots[-1] * _LEAST_RATIO:
            knots[-1] = knot
        else:
            knots.append(knot)
    return knots if len(knots) > 1 else [0, 1]


def ramps(values: NDArray[Any], knots: Sequence[int]) -> Floats:
    """[values, knots - 1]: how far each value is through each interval, 0 to 1; the last one goes on beyond.

    Coefficients of these are the increments of a piecewise linear function: none negative, it never falls.
    """
    columns = []
    for i, (low, high) in enumerate(pairwise(knots)):
        part = (values - low) / (high - low)
        columns.append(np.maximum(part, 0.0) if i == len(knots) - 2 else np.clip(part, 0.0, 1.0))
    return np.stack(columns, axis=1)


def curve_fit(start: float, knots: Sequence[int], increments: Floats) -> CurveFit:
    """The piecewise linear function that begins at `start`. Beyond the last knot the mean slope of its outer half goes on:
    that of the last interval alone is as much noise as time where knots lie close.
    """
    ns = [float(start)]
    for increment in increments:
        ns.append(ns[-1] + float(increment))
    inner = max(i for i, knot in enumerate(knots[:-1]) if knot <= max(knots[-1] // 2, knots[0]))
    beyond = (ns[-1] - ns[inner]) / (knots[-1] - knots[inner])
    return CurveFit(tuple(int(k) for k in knots), tuple(round(x, 3) for x in ns), round(beyond, 9))


def residual_of_samples(family: str, ns: Floats, fitted: Floats, num_samples: int) -> Residual:
    """Of samples that are points by themselves; `num_samples`: with those that were left out."""
    fitted = np.maximum(fitted, 1.0)
    relative = np.abs(ns / fitted - 1)
    return Residual(
        family,
        num_points=len(ns),
        num_samples=num_samples,
        num_outliers=num_samples - len(ns),
        mean=rounded(relative.mean()),
        p90=rounded(np.quantile(relative, 0.9)),
        max=rounded(relative.max()),
        bias=rounded(fitted.sum() / ns.sum() - 1),
        jitter=rounded(np.std(ns / fitted)),
    )
