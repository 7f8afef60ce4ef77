"""Where an error comes from: which stage of a request, and whether timing or decisions that diverged.

By stage, the mean differences of one pair of runs sum to that of the e2e latency, request by request. By cause, a metric's
error is split over runs that lie between simulation and hardware: the simulation on the hardware's routes, and the same
with the client as late as it was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from .comparison import Case, Pair, agreement
from .metric_table import STAGES
from .run_errors import RunPair
from .runs import Run

ATTRIBUTED: Final = ("dispatch_delay_s", *STAGES)
SPLIT: Final = (
    "mean_ttft_s",
    "p50_ttft_s",
    "p99_ttft_s",
    "mean_tpot_s",
    "p50_tpot_s",
    "p99_tpot_s",
    "mean_e2e_latency_s",
    "p50_e2e_latency_s",
    "p90_e2e_latency_s",
    "throughput",
    "slo_attainment",
)


class StageDifference(Struct, frozen=True):
    """Means over the requests that completed in both runs, in seconds; `difference` is simulated − measured."""

    stage: str
    simulated: float
    measured: float
    difference: float


def stage_differences(pair: RunPair) -> list[StageDifference]:
    """The stages' differences, then `e2e_latency_s`, which is their sum; empty if no request completed in both."""
    both = pair.both
    if not len(both):
        return []
    found: list[StageDifference] = []
    for stage in (*ATTRIBUTED, "e2e_latency_s"):
        simulated, measured = (both[f"{stage}{side}"].to_numpy(np.float64) for side in (".sim", ".hw"))
        found.append(
            StageDifference(
                stage, float(simulated.mean()), float(measured.mean()), float((simulated - measured).mean())
            )
        )
    return found


class SplitRow(Struct, frozen=True):
    """One metric's error, simulated − measured in its own unit: the sum of its three parts.

    `diverged`: free simulation − simulation on the hardware's routes. `client`: what the client's delays change then,
    None where they were not replayed. `timing`: what is left to the measured value, on equal decisions.
    """

    key: str
    simulated: float
    measured: float
    diverged: float
    client: float | None
    timing: float

    @property
    def total(self) -> float:
        return self.simulated - self.measured


class Split(Struct, frozen=True):
    """`share_forced`: of the requests, those that the replay served on the very executors of the hardware run.

    Anything but 1 would mean that the parts are not what they are called.
    """

    rows: tuple[SplitRow, ...]
    share_routed_differently: float | None
    share_forced: float | None


def split_errors(pair: RunPair, replayed: Run, replayed_late: Run | None = None, keys: Sequence[str] = SPLIT) -> Split:
    """`replayed` is the simulation on the routes of the measured run; `replayed_late` with its client's delays too."""
    routes = Case(replayed, "", {}).summary
    late = None if replayed_late is None else Case(replayed_late, "", {}).summary
    rows: list[SplitRow] = []
    for key in keys:
        values = [
            summary.get(key) for summary in (pair.simulated.summary, routes, late or routes, pair.measured.summary)
        ]
        if any(value is None for value in values):
            continue
        free, forced, delayed, measured = (float(value) for value in values if value is not None)
        client = None if late is None else forced - delayed
        rows.append(SplitRow(key, free, measured, free - forced, client, delayed - measured))
    served = agreement(Pair(Case(replayed, "", {}), pair.measured))
    return Split(tuple(rows), pair.share_routed_differently, None if served is None else served.same_route)
