"""Predictions with an interval: what the draws of a noisy simulation make of each metric, and the file that holds them.

The file is that of `disagg interval --output` and of benchmarks/h200/predict.py. Under `predictions` it has, by title of an
experiment, its metrics by key of a summary, and under `interval` [low, median, high] of each that has any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from .runs import ReportError

BOUNDS: Final = (5.0, 50.0, 95.0)  # percent of the draws
NOMINAL: Final = (BOUNDS[2] - BOUNDS[0]) / 100
METRICS: Final = (
    *("throughput", "mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "mean_tpot_s", "p50_tpot_s", "p99_tpot_s"),
    *("p50_e2e_latency_s", "p90_e2e_latency_s", "slo_attainment", "num_completed"),
)


class Interval(Struct, frozen=True, array_like=True):
    """The 5th, 50th and 95th percentile of the draws, in the metric's own unit."""

    low: float
    median: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"{[self.low, self.median, self.high]}: must be low, median and high")

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


class Prediction(Struct, frozen=True):
    """What a simulation without noise says of an experiment, by key of a summary, and its intervals by the same keys."""

    values: Mapping[str, float | None]
    intervals: Mapping[str, Interval]

    def plain(self) -> dict[str, Any]:
        return {**self.values, "interval": msgspec.to_builtins(self.intervals)}


def predicted(quiet: Mapping[str, Any], draws: Sequence[Mapping[str, Any]]) -> Prediction:
    """Of the summary without noise and those of the draws. What any draw has no value for has no interval."""
    intervals: dict[str, Interval] = {}
    for key in METRICS:
        values = [draw.get(key) for draw in draws]
        known = [float(value) for value in values if value is not None]
        if known and len(known) == len(values):
            intervals[key] = Interval(*map(float, np.percentile(known, BOUNDS)))
    return Prediction({key: quiet.get(key) for key in METRICS}, intervals)


class _File(Struct):
    predictions: dict[str, dict[str, Any]]


def read_predictions(path: Path) -> dict[str, Prediction]:
    """By title, from a file of predictions; those without intervals are left out. Raises ReportError if all are, and for any
    other file, with the key that is to blame.
    """
    try:
        predictions = msgspec.json.decode(path.read_bytes(), type=_File).predictions
        found = {title: _prediction(title, each) for title, each in predictions.items() if "interval" in each}
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(
            f"{path}: not a file of predictions: {error}; allowed: what `disagg interval --output` writes"
        ) from error
    if not found:
        raise ReportError(f"{path}: its predictions have no interval; `disagg interval --output` writes them with one")
    return found


def _prediction(title: str, plain: dict[str, Any]) -> Prediction:
    """Raises msgspec.ValidationError, with the title, for what is none."""
    values = {key: value for key, value in plain.items() if key != "interval"}
    try:
        return Prediction(
            msgspec.convert(values, dict[str, float | None]), msgspec.convert(plain["interval"], dict[str, Interval])
        )
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(f"of {title}: {error}") from error
