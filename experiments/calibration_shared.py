"""What reading KV costs that is read again in the same step, since sequences share its blocks: it is nearer at hand then.

Told from steps that share KV alone, beside the fit of those that share none: the part of reading a token that is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .calibration_points import LEAST_SAMPLES, Floats, keep_near, residual_of_samples
from .measured_profile import Residual

_PARTS: Final = np.linspace(0.0, 1.0, 101)
_LEAST_TELLING: Final = 20  # steps
_LEAST_SHARE: Final = 0.1  # of a step's KV: below it, sharing is lost in what else differs


def shares_kv(columns: dict[str, Any]) -> NDArray[np.bool_]:
    """Which of the steps share KV."""
    return np.asarray(columns["num_shared_kv"] > 0)


def kv_read(columns: dict[str, Any], part: float) -> Floats:
    """KV tokens of each step, one that is read again counted as 1 - `part` of one."""
    return np.asarray(columns["num_kv_tokens"] - part * columns["num_shared_kv"])


def saved_part(columns: dict[str, Any], chosen: NDArray[np.bool_], fitted: Callable[[Floats], Floats]) -> float:
    """The part for which `fitted(KV tokens)`, in nanoseconds for each step, is nearest the steps `chosen`, by the mean of
    how far off it is in proportion; 0 where few of them share enough to tell.
    """
    telling = chosen & (columns["num_shared_kv"] >= _LEAST_SHARE * columns["num_kv_tokens"]) & shares_kv(columns)
    if telling.sum() < _LEAST_TELLING:
        return 0.0
    ns = columns["duration_ps"][telling] / 1000.0
    off = [float(np.abs(ns / fitted(kv_read(columns, part))[telling] - 1).mean()) for part in _PARTS]
    return round(float(_PARTS[int(np.argmin(off))]), 6)


def curve_at(knots: Sequence[int], increments: Floats) -> Callable[[Floats], Floats]:
    """The piecewise linear function from 0 with these increments, its last slope going on."""
    heights = np.concatenate(([0.0], np.cumsum(increments)))
    slope = increments[-1] / (knots[-1] - knots[-2])
    return lambda values: np.interp(values, knots, heights) + np.maximum(values - knots[-1], 0.0) * slope


def without_shared(columns: dict[str, Any], chosen: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of the steps `chosen`, those that share no KV and those that do; where nearly all do, all of them and none."""
    apart = chosen & ~shares_kv(columns)
    if apart.sum() < max(LEAST_SAMPLES, chosen.sum() // 4):
        return chosen, np.zeros(len(chosen), dtype=bool)
    return apart, chosen & ~apart


def residuals_of_shared(family: str, ns: Floats, fitted: Floats, shared: NDArray[np.bool_]) -> list[Residual]:
    if shared.sum() < LEAST_SAMPLES:
        return []
    kept = np.flatnonzero(shared)
    kept = kept[keep_near(ns[kept] / fitted[kept])]
    return [residual_of_samples(family, ns[kept], fitted[kept], int(shared.sum()))]
