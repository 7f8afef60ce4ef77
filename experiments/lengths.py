"""Endless streams of token counts drawn from a length distribution of the experiment file."""

from __future__ import annotations

from collections.abc import Iterator
from math import log, sqrt

import numpy as np
import numpy.typing as npt

from .config_workload import (
    EmpiricalLength,
    ExponentialLength,
    FixedLength,
    LognormalLength,
    NormalLength,
    UniformLength,
)

LengthKeys = FixedLength | NormalLength | LognormalLength | UniformLength | ExponentialLength | EmpiricalLength
_DRAWS = 4096
_MOST = 1 << 24  # tokens; where no `max` is given


def token_counts(length: LengthKeys, rng: np.random.Generator) -> Iterator[int]:
    """Whole numbers ≥ 1, without end. Real draws are rounded to the nearest and clamped to [min, max]."""
    while True:
        yield from draw(length, rng, _DRAWS).tolist()


def draw(length: LengthKeys, rng: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
    """`size` token counts, int64."""
    if isinstance(length, FixedLength):
        return np.full(size, length.value, dtype=np.int64)
    if isinstance(length, UniformLength):
        return rng.integers(length.min, length.max, size=size, endpoint=True, dtype=np.int64)
    if isinstance(length, EmpiricalLength):
        values = np.asarray(length.values, dtype=np.int64)
        if length.weights is None:
            return np.take(values, rng.integers(0, len(values), size=size))
        cumulative = np.cumsum(np.asarray(length.weights, dtype=np.float64))
        chosen = np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right")
        return np.asarray(values[chosen], dtype=np.int64)
    if isinstance(length, NormalLength):
        real = length.mean + length.stddev * rng.standard_normal(size)
    elif isinstance(length, LognormalLength):
        # moments of the lognormal: mean = exp(mu + sigma²/2), (stddev/mean)² = exp(sigma²) - 1
        variance = log(1.0 + (length.stddev / length.mean) ** 2)
        real = np.exp(log(length.mean) - variance / 2 + sqrt(variance) * rng.standard_normal(size))
    else:
        real = length.mean * rng.standard_exponential(size)
    return np.clip(np.rint(real), length.min, length.max or _MOST).astype(np.int64)
