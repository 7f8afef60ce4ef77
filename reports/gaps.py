"""Gaps between output tokens, from stays and epochs, as (gap, weight) pairs: a run's gaps are never listed one by one.

Inside an epoch every gap is (end − start)/num_steps. A request's first gap, between the first token at rank 0 and the
first token of its generation phase, is what remains of e2e − TTFT, so that gaps sum to it exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .executors import Columns, by_executor

if TYPE_CHECKING:
    import pandas as pd

    from .runs import Run

Floats = NDArray[np.float64]

_STAYS: Final = ("request_id", "stage", "executor", "num_tokens", "first_step", "last_step", "num_preemptions")
STEP_TIMES: Final = ("executor", "first_step", "num_steps", "start_s", "end_s")


class Gaps(Struct, frozen=True):
    """Pooled inter-token gaps: `seconds` (m,) with `weights` (m,), how many gaps have that length.

    `num_left_out` completed requests gave no gaps: preempted, retried, or not found among the stays.
    """

    seconds: Floats
    weights: Floats
    num_left_out: int = 0

    @property
    def mean(self) -> float | None:
        total = float(self.weights.sum())
        return float((self.seconds * self.weights).sum()) / total if total else None


class Epochs:
    """Step times of one executor. Arrays (epochs,), by `first_step`, the running count from 1."""

    def __init__(self, steps: Columns) -> None:
        ran = np.flatnonzero(steps["num_steps"] > 0)
        ran = ran[np.argsort(steps["first_step"][ran], kind="stable")]
        self.first: NDArray[np.int64] = steps["first_step"][ran].astype(np.int64)
        self.count: NDArray[np.int64] = steps["num_steps"][ran].astype(np.int64)
        self.start: Floats = steps["start_s"][ran].astype(np.float64)
        self.end: Floats = steps["end_s"][ran].astype(np.float64)

    def time_of(self, step: NDArray[np.int64]) -> Floats:
        """End of each step in seconds, linear within its epoch; NaN for a step no epoch has."""
        index = np.searchsorted(self.first, step, side="right") - 1
        known = index >= 0
        index = np.maximum(index, 0)
        done = step - self.first[index] + 1
        known &= done <= self.count[index]
        time = self.start[index] + (self.end[index] - self.start[index]) * done / self.count[index]
        return np.where(known, time, np.nan)

    def pooled(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Gaps of stays that got a token at each step of [first, last]: one gap a step from first + 1 on."""
        if not len(self.first) or not len(first):
            return np.empty(0), np.empty(0)
        firsts, lasts = np.sort(first), np.sort(last)
        sums = [np.concatenate(([0], np.cumsum(side))) for side in (firsts, lasts)]

        def gaps_up_to(step: NDArray[np.int64]) -> Floats:
            # sum over stays of clip(min(step, last) − first, 0)
            begun = np.searchsorted(firsts, step, side="left")
            over = np.searchsorted(lasts, step, side="left")
            total = (step * begun - sums[0][begun]) - (step * over - sums[1][over])
            return np.asarray(total, dtype=np.float64)

        head = gaps_up_to(self.first) - gaps_up_to(self.first - 1)
        whole = gaps_up_to(self.first + self.count - 1) - gaps_up_to(self.first)
        interior = (self.end - self.start) / self.count
        before = np.concatenate(([np.nan], self.end[:-1]))
        # the gap that ends with an epoch's first step also holds the pause before the epoch
        across = self.start + interior - before
        seconds, weights = np.concatenate((across, interior)), np.concatenate((head, whole))
        keep = (weights > 0) & np.isfinite(seconds)
        return seconds[keep], weights[keep]


def visits(run: Run) -> pd.DataFrame:
    """The stay that gave each request its tokens after the first: the last one that was not a context phase."""
    stays = run.columns("stays", _STAYS)
    stays = stays[(stays["stage"] != "context") & stays["request_id"].notna()]
    return stays.drop_duplicates("request_id", keep="last")


def token_gaps(run: Run, completed: pd.DataFrame) -> Gaps:
    """Gaps of the `completed` requests, whose columns are those of `metrics.measure`.

    Requests whose token times do not follow from one stay (preempted, retried, moved) are left out and counted.
    """
    import pandas as pd

    wanted = completed.loc[
        completed["num_output_tokens"] >= 2,
        ["request_id", "num_output_tokens", "ttft_s", "e2e_latency_s", "num_attempts"],
    ]
    found = visits(run)
    if not len(wanted) or not len(found):
        return Gaps(np.empty(0), np.empty(0), len(wanted))
    rows = wanted.merge(found, on="request_id")
    del found
    whole = pd.to_numeric(rows["first_step"]).notna() & pd.to_numeric(rows["last_step"]).notna()
    rows = rows[whole & (rows["num_preemptions"] == 0) & (rows["num_attempts"] <= 1)]
    given = rows["num_output_tokens"] - (rows["stage"] == "generation")
    span = rows["last_step"].astype(np.int64) - rows["first_step"].astype(np.int64) + 1
    rows = rows[(rows["num_tokens"] == given) & (span == given)]
    seconds: list[Floats] = []
    weights: list[Floats] = []
    used = 0
    parts = rows[["executor", "first_step", "last_step"]].assign(
        outside_s=rows["e2e_latency_s"] - rows["ttft_s"], is_mixed=rows["stage"] == "mixed"
    )
    del rows
    visited = dict(by_executor(parts))
    for executor, steps in by_executor(run.columns("steps", STEP_TIMES)):
        epochs = Epochs(steps)
        if not len(epochs.first) or executor not in visited:
            continue
        group = visited.pop(executor)
        first, last = group["first_step"].astype(np.int64), group["last_step"].astype(np.int64)
        inside = epochs.time_of(last) - epochs.time_of(first)
        known = np.isfinite(inside)
        remains = group["outside_s"].astype(np.float64) - inside
        mixed = group["is_mixed"].astype(bool)
        pooled, counts = epochs.pooled(first[known], last[known])
        # a mixed visit holds the first token too: its gaps are all inside, and only a message's jitter remains
        hand_off = np.maximum(remains[known & ~mixed], 0.0)
        seconds += [pooled, hand_off]
        weights += [counts, np.ones(len(hand_off))]
        used += int(known.sum())
    if not seconds:
        return Gaps(np.empty(0), np.empty(0), len(wanted))
    return Gaps(np.concatenate(seconds), np.concatenate(weights), len(wanted) - used)
