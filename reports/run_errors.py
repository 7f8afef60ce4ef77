"""How far one run was off another of equal configuration: simulation against hardware, or hardware against itself.

The second run is the measured one. Errors of times and rates are relative to it, errors of shares are differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct

from .case_labels import flat_keys
from .comparison import Agreement, Case, Pair, agreement, estimate
from .metric_table import STAGES
from .metrics import window_s
from .runs import ReportError, Run, find_runs
from .statistics import kendall_tau, min_observations

if TYPE_CHECKING:
    import pandas as pd

LATENCIES: Final = ("ttft_s", "tpot_s", "e2e_latency_s")
COMPARED: Final = (
    *(f"{name}_{key}" for key in LATENCIES for name in ("mean", "p50", "p90", "p99")),
    "throughput",
    "request_throughput",
    "slo_attainment",
    *(f"mean_{stage}" for stage in ("dispatch_delay_s", *STAGES)),
)
# what two runs that are set against each other may differ in: hardware has its own noise
_NOISE: Final = ("cluster.step_jitter", "cluster.step_error", "cluster.noise_seed")
NOT_COMPARED: Final = ("backend", "name", "sweep", "repeats", "report", "schema_version", "cluster.profile", *_NOISE)
ATTAINMENT_RANGE: Final = (0.40, 0.95)  # outside it attainment hardly moves, whatever the times do
MOST_KEYS_NAMED: Final = 5
_LEAST_OF_OWN_RATE: Final = 0.97  # below it the cluster did not keep up with the load
_LEAST_SHARED: Final = 0.95  # of the requests, for two runs to have been given the same ones


class ErrorRow(Struct, frozen=True):
    """One metric of a pair of runs. `key` is a summary's; `error` is (simulated − measured)/measured.

    For a share it is the plain difference (`in_points`). `low`, `high`: 95 % interval of the measured value, from its
    order statistics where it is a percentile; `n` its observations. `notes` say what speaks against reading it.
    """

    key: str
    simulated: float | None
    measured: float | None
    error: float | None
    in_points: bool = False
    n: int = 0
    low: float | None = None
    high: float | None = None
    notes: tuple[str, ...] = ()


class RunPair:
    """Two runs of equal configuration and seed. Raises ReportError if they are not, naming what differs."""

    def __init__(self, simulated: Run, measured: Run) -> None:
        if measured.backend != "hardware" and simulated.backend == "hardware":
            raise ReportError(f"{measured.path}: is a simulation; the run that others are held against comes last")
        check_comparable(simulated, measured)
        self.simulated = Case(simulated, "", {})
        self.measured = Case(measured, "", {})

    @property
    def title(self) -> str:
        """Name of the experiment, and of its sweep's point."""
        run = self.measured.run
        point = str(run.manifest.get("point") or "")
        repeat = f" repeat {run.repeat}" if run.repeat else ""
        return f"{run.name} {point}".strip() + repeat

    @cached_property
    def both(self) -> pd.DataFrame:
        """Requests that completed in both runs, matched by id: columns end in `_s` as ever, then `.sim` and `.hw`."""
        sides = [case.rows[case.rows["completed"]] for case in (self.simulated, self.measured)]
        found: pd.DataFrame = sides[0].merge(sides[1], on="request_id", suffixes=(".sim", ".hw"))
        return found

    @cached_property
    def agreement(self) -> Agreement | None:
        """Shares of requests served by the same executors."""
        return agreement(Pair(self.simulated, self.measured))

    @property
    def share_routed_differently(self) -> float | None:
        return None if self.agreement is None else 1.0 - self.agreement.same_route

    @cached_property
    def kv_blocks(self) -> dict[int, tuple[int, int]]:
        """KV blocks of each executor that had a different number in the two runs: (simulated, measured)."""
        ours, theirs = (_kv_blocks(case.run) for case in (self.simulated, self.measured))
        return {e: (ours[e], theirs[e]) for e in ours if e in theirs and ours[e] != theirs[e]}

    def errors(self, keys: Sequence[str] = COMPARED) -> list[ErrorRow]:
        """A row per metric that both runs know, in order."""
        rows = [error_row(self.simulated, self.measured, key) for key in keys]
        return [row for row in rows if row.simulated is not None and row.measured is not None]


def _kv_blocks(run: Run) -> dict[int, int]:
    """KV blocks by executor: what its ranks found room for on hardware, else what its configuration comes to."""
    found = {int(e["id"]): int(e["num_blocks"]) for e in run.manifest.get("executors") or [] if "num_blocks" in e}
    real: dict[int, int] = {}
    for rank in run.manifest.get("ranks") or []:
        if rank.get("num_blocks") and rank.get("executor") is not None:
            executor, blocks = int(rank["executor"]), int(rank["num_blocks"])
            real[executor] = min(blocks, real.get(executor, blocks))
    return found | real


# ---- one metric -----------------------------------------------------------------------------------------------------


def error_row(simulated: Case, measured: Case, key: str) -> ErrorRow:
    """The error of one metric, with the interval of the measured side and what must be known of it."""
    s, m = simulated.summary.get(key), measured.summary.get(key)
    interval = estimate([measured], key)
    in_points = key == "slo_attainment"
    error = None
    if s is not None and m is not None and (in_points or m > 0):
        error = s - m if in_points else s / m - 1.0
    return ErrorRow(
        key,
        None if s is None else float(s),
        None if m is None else float(m),
        None if error is None else float(error),
        in_points,
        interval.n,
        interval.low,
        interval.high,
        tuple(_notes(key, measured, interval.n, m)),
    )


def _notes(key: str, measured: Case, n: int, value: float | None) -> Iterator[str]:
    if key.startswith("p99_") and n < min_observations(99.0):
        yield "n too small"
    if key in ("throughput", "request_throughput") and not is_at_capacity(measured):
        share = share_of_own_rate(measured.rows)
        if share < _LEAST_OF_OWN_RATE:
            yield f"hardware fell behind: {100 * share:.0f} % of the load's own rate"
        else:
            yield "below saturation: the load's own rate"
    if key == "slo_attainment" and value is not None and not ATTAINMENT_RANGE[0] <= value <= ATTAINMENT_RANGE[1]:
        low, high = (round(100 * bound) for bound in ATTAINMENT_RANGE)
        yield f"hardware outside {low}–{high} %"


def is_at_capacity(case: Case) -> bool:
    """Whether the rate of a run is the cluster's and not the load's: a closed loop, or a backlog that kept growing."""
    phases = (case.run.config.get("workload") or {}).get("phases") or []
    measured = [phase for phase in phases if not phase.get("exclude_from_results")]
    closed = bool(measured) and all(phase.get("type") == "concurrency" for phase in measured)
    return closed or backlog_grows(case.rows)


def share_of_own_rate(rows: pd.DataFrame) -> float:
    """The throughput of a run as a share of its load's own, (n,) rows of `metrics.measured`; 1 where it kept up.

    The load's own is that of the same requests had each taken the median time to its first token and the median time for
    each further one: a run ends when its last request does, also where none waited for another.
    """
    done = rows[rows["completed"]]
    start, end = window_s(rows)
    ttft, tpot = float(done["ttft_s"].median()), float(done["tpot_s"].median())
    further = done["num_output_tokens"].to_numpy(np.float64) - 1
    ends = done["arrival_s"].to_numpy(np.float64) + ttft + np.maximum(further, 0.0) * (0.0 if np.isnan(tpot) else tpot)
    return min(1.0, (float(ends.max()) - start) / (end - start)) if len(done) and end > start else 1.0


def backlog_grows(rows: pd.DataFrame) -> bool:
    """Whether the number of requests in the system grew all along the arrivals, (n,) rows of `metrics.measured`.

    Of ten equal parts of the arrivals, the first two left out as the filling of the cluster: the mean backlog must rise
    with the part (Kendall's τ ≥ 0.7), to at least twice the third's.
    """
    arrival = np.sort(rows["arrival_s"].to_numpy(np.float64))
    if len(arrival) < 40:
        return False
    ended = np.searchsorted(np.sort(rows["end_s"].to_numpy(np.float64)), arrival, side="right")
    parts = [float(part.mean()) for part in np.array_split(np.arange(len(arrival)) - ended, 10)][2:]
    tau = kendall_tau(list(range(len(parts))), parts)
    return tau is not None and tau >= 0.7 and parts[-1] >= 2.0 * max(parts[0], 1.0)


# ---- which runs may be set against each other -----------------------------------------------------------------------


def differing_keys(one: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """Keys of the configurations that differ, with both values; those in NOT_COMPARED do not count, None is absent."""
    sides = [
        {
            key: value
            for key, value in flat_keys(run.config)
            if value is not None and not any(key == left or key.startswith(f"{left}.") for left in NOT_COMPARED)
        }
        for run in (one, other)
    ]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [(key, sides[0].get(key), sides[1].get(key)) for key in keys if sides[0].get(key) != sides[1].get(key)]


def check_comparable(one: Run, other: Run) -> None:
    """ReportError unless both ran the same experiment on the same requests."""
    differing = differing_keys(one, other)
    if differing:
        told = "; ".join(f"{key}: {json.dumps(a)} and {json.dumps(b)}" for key, a, b in differing[:MOST_KEYS_NAMED])
        more = f"; and {len(differing) - MOST_KEYS_NAMED} more" if len(differing) > MOST_KEYS_NAMED else ""
        raise ReportError(f"{one.path} and {other.path} are runs of different configuration: {told}{more}")
    columns = ["request_id", "num_prompt_tokens", "max_tokens"]
    both = one.requests[columns].merge(other.requests[columns], on="request_id")
    same = (both["num_prompt_tokens_x"] == both["num_prompt_tokens_y"]) & (both["max_tokens_x"] == both["max_tokens_y"])
    if len(both) < _LEAST_SHARED * max(len(one.requests), len(other.requests)) or not bool(same.all()):
        raise ReportError(
            f"{one.path} and {other.path} were given other requests ({int(same.sum())} of"
            f" {max(len(one.requests), len(other.requests))} are the same): is it the same trace?"
        )


class Matched(Struct, frozen=True):
    """Pairs of two trees of runs, and the runs of either that have no partner in the other."""

    pairs: tuple[RunPair, ...]
    alone: tuple[Run, ...]


def match_trees(simulated: Path, measured: Path) -> Matched:
    """Runs of two folders, matched by point and repeat; two single runs always match.

    Raises ReportError for folders without runs, for doubles, for pairs of different configuration, and if nothing
    matches.
    """
    sides = [find_runs([path]) for path in (simulated, measured)]
    if all(len(runs) == 1 for runs in sides):
        return Matched((RunPair(sides[0][0], sides[1][0]),), ())
    tables = [_by_point(runs, path) for runs, path in zip(sides, (simulated, measured))]
    shared = [point for point in tables[0] if point in tables[1]]
    if not shared:
        points = [", ".join(point or "(no sweep)" for point, _ in table) for table in tables]
        raise ReportError(f"{simulated} and {measured} have no point in common: {points[0]} and {points[1]}")
    alone = [run for table in tables for point, run in table.items() if point not in shared]
    return Matched(tuple(RunPair(tables[0][point], tables[1][point]) for point in shared), tuple(alone))


def _by_point(runs: Sequence[Run], path: Path) -> dict[tuple[str, int], Run]:
    found: dict[tuple[str, int], Run] = {}
    for run in runs:
        point = str(run.manifest.get("point") or ""), run.repeat
        if point in found:
            raise ReportError(
                f"{path}: holds two runs of {point[0] or 'one experiment'} repeat {point[1]}: {found[point].path} and"
                f" {run.path}; name the folder of one experiment in one world"
            )
        found[point] = run
    return found
