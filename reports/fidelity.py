"""The fidelity table: every experiment, simulated and measured, beside goals and beside what hardware differs from itself.

An experiment is what runs of equal name, sweep point, repeat and seed have in common: one simulated run and one hardware
run or more. With several, the measured value is their mean and the floor their spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from .prediction_intervals import Interval, Prediction
from .run_errors import ATTAINMENT_RANGE, ErrorRow, RunPair
from .runs import ReportError, Run, find_runs


class Goal(Struct, frozen=True):
    """How far off a metric may be. `key` is a summary's, `metric` the name in the table; `limit` in shares or points."""

    metric: str
    key: str
    limit: float
    least_requests: int = 0
    when: str = ""


_WIDE: Final = "interval wider than the goal"
_AT_CAPACITY: Final = "closed loop or past saturation"
_SAME: Final = 1e-6  # relative: of one prediction, written down twice
_IN_RANGE: Final = f"hardware between {ATTAINMENT_RANGE[0]:.0%} and {ATTAINMENT_RANGE[1]:.0%}"
GOALS: Final = (
    Goal("throughput", "throughput", 0.03, when=_AT_CAPACITY),
    Goal("mean_ttft", "mean_ttft_s", 0.05),
    Goal("p50_ttft", "p50_ttft_s", 0.05),
    Goal("p99_ttft", "p99_ttft_s", 0.10, least_requests=1000),
    Goal("mean_tpot", "mean_tpot_s", 0.03),
    Goal("p50_tpot", "p50_tpot_s", 0.03),
    Goal("p99_tpot", "p99_tpot_s", 0.10, least_requests=1000),
    Goal("p50_e2e_latency", "p50_e2e_latency_s", 0.05),
    Goal("p90_e2e_latency", "p90_e2e_latency_s", 0.05),
    Goal("slo_attainment", "slo_attainment", 0.02, when=_IN_RANGE),
)


class FidelityRow(Struct, frozen=True):
    """One metric of one experiment, times in seconds. `error` is relative and signed, of slo_attainment a difference.

    `floor`: largest difference between two hardware runs in the same measure, None with a single run. `limit` is the
    larger of goal and floor. `met` None where the goal does not apply; `note` says why. `low`, `high`: 95 % interval of
    the first hardware run, `n` its observations. `interval`: 5 to 95 % of the noisy simulations, None where they are not
    known; `inside`: whether `measured` lies in it. Neither has a say in `met`.
    """

    experiment: str
    metric: str
    simulated: float | None
    measured: float | None
    error: float | None
    floor: float | None
    goal: float
    limit: float
    met: bool | None
    note: str = ""
    n: int = 0
    low: float | None = None
    high: float | None = None
    interval: tuple[float, float] | None = None
    inside: bool | None = None

    @property
    def within_goal(self) -> bool:
        """Whether it is met, and would be with a floor of nothing."""
        return bool(self.met) and self.error is not None and abs(self.error) <= self.goal


class Verdicts(Struct, frozen=True):
    """How many figures were judged, how many of them are within their limit, and how many of these within the goal itself."""

    num_judged: int
    num_met: int
    num_within_goal: int

    @classmethod
    def of(cls, rows: Sequence[FidelityRow]) -> Verdicts:
        judged = [row for row in rows if row.met is not None]
        return cls(len(judged), sum(bool(row.met) for row in judged), sum(row.within_goal for row in judged))

    @property
    def num_by_floor_alone(self) -> int:
        """Met only since hardware differs from itself by as much."""
        return self.num_met - self.num_within_goal

    @property
    def text(self) -> str:
        return (
            f"{self.num_met} of {self.num_judged} judged figures are within their limit, {self.num_within_goal} within the"
            f" goal itself and {self.num_by_floor_alone} by their floor alone"
        )


class Group:
    """The runs of one experiment in both worlds. Raises ReportError if they do not belong together."""

    def __init__(self, title: str, simulated: Run | None, measured: Sequence[Run]) -> None:
        self.title = title
        self.simulated = simulated
        self.measured = sorted(measured, key=lambda run: str(run.manifest.get("started_at") or ""))
        self.pairs = [] if simulated is None else [RunPair(simulated, run) for run in self.measured]

    @property
    def was_predicted(self) -> bool | None:
        """Whether the simulation was run before the first hardware run began; None where that is not known."""
        starts = [run.manifest.get("started_at") for run in (self.simulated, *self.measured[:1]) if run is not None]
        if len(starts) < 2 or not all(starts):
            return None
        return str(starts[0]) < str(starts[1])

    @property
    def missing(self) -> str | None:
        """Why there is nothing to compare, if so."""
        if self.simulated is None:
            return "no simulated run"
        return None if self.measured else "no hardware run"


def groups_of(folder: Path) -> list[Group]:
    """Every experiment below `folder`, by name. Raises ReportError, also for two simulated runs of one experiment."""
    found: dict[tuple[str, str, int, int | None], list[Run]] = {}
    for run in find_runs([folder]):
        key = run.name, str(run.manifest.get("point") or ""), run.repeat, run.seed
        found.setdefault(key, []).append(run)
    seeds = {(name, point): {key[2:] for key in found if key[:2] == (name, point)} for name, point, _, _ in found}
    groups: list[Group] = []
    for (name, point, repeat, seed), runs in sorted(found.items(), key=lambda item: tuple(map(str, item[0]))):
        title = f"{name} {point}".strip() + (f" seed {seed}" if len(seeds[name, point]) > 1 else "")
        simulated = [run for run in runs if run.backend == "simulation"]
        if len(simulated) > 1:
            raise ReportError(
                f"{title} repeat {repeat} was simulated twice, in {simulated[0].path} and {simulated[1].path}; one"
                " prediction is allowed"
            )
        measured = [run for run in runs if run.backend == "hardware"]
        starts = [run.manifest.get("started_at") for run in measured]
        if len(set(starts)) < len(starts) and None not in starts:
            raise ReportError(
                f"{title}: one hardware run is there twice, under {', '.join(str(r.path) for r in measured)}"
            )
        groups.append(Group(title, simulated[0] if simulated else None, measured))
    return groups


def fidelity_rows(
    group: Group, goals: Sequence[Goal] = GOALS, intervals: Mapping[str, Interval] | None = None
) -> list[FidelityRow]:
    """A row per goal that both worlds have a value for; none for an experiment that lacks one of them.

    `intervals` are those of the prediction, by key of a summary.
    """
    intervals = intervals or {}
    keys = [goal.key for goal in goals]
    errors = [{row.key: row for row in pair.errors(keys)} for pair in group.pairs]
    if not errors:
        return []
    return [
        _beside(
            _row(group.title, goal, [each[goal.key] for each in errors if goal.key in each]), intervals.get(goal.key)
        )
        for goal in goals
    ]


def _beside(row: FidelityRow, interval: Interval | None) -> FidelityRow:
    """The row with the interval of its prediction, which changes nothing of its judgement."""
    if interval is None or row.measured is None:
        return row
    scale = 1.0 if row.metric == "slo_attainment" else row.measured
    notes = [row.note] if row.note else []
    if interval.high - interval.low > 2 * row.goal * scale:  # the goal is a band as wide to either side
        notes.append(_WIDE)
    bounds = interval.low, interval.high
    return replace(row, note="; ".join(notes), interval=bounds, inside=interval.holds(row.measured))


def _row(title: str, goal: Goal, errors: Sequence[ErrorRow]) -> FidelityRow:
    values = [row.measured for row in errors if row.measured is not None]
    if not values or errors[0].simulated is None:
        return FidelityRow(title, goal.metric, None, None, None, None, goal.limit, goal.limit, None, "not recorded")
    first = errors[0]
    simulated = float(first.simulated or 0.0)
    measured = sum(values) / len(values)
    scale = 1.0 if first.in_points else measured
    error = (simulated - measured) / scale if scale > 0 else None
    floor = (max(values) - min(values)) / scale if len(values) > 1 and scale > 0 else None
    limit = max(goal.limit, floor or 0.0)
    notes = list(first.notes)
    if goal.least_requests and first.n < goal.least_requests:
        notes.insert(0, f"n = {first.n}, judged from {goal.least_requests} on")
    applies = not notes and error is not None
    return FidelityRow(
        title,
        goal.metric,
        simulated,
        measured,
        error,
        floor,
        goal.limit,
        limit,
        abs(error) <= limit if applies and error is not None else None,
        "; ".join(notes),
        first.n,
        first.low,
        first.high,
    )


def summary_excerpt(run: Run, folder: Path) -> dict[str, Any]:
    """What a reader wants of a run directory: where it lies, what it ran on, its counts and the table's metrics."""
    from .summary import summary_of

    summary = summary_of(run)
    wanted = ["num_requests", "num_completed", "num_failed", "duration_s", *(goal.key for goal in GOALS)]
    manifest = run.manifest
    return {
        "directory": _relative(run.path, folder),
        "backend": run.backend,
        "device": manifest.get("device"),
        "profile": manifest.get("profile"),
        "profile_hash": manifest.get("profile_hash"),
        "git_commit": manifest.get("git_commit"),
        "started_at": manifest.get("started_at"),
        "experiment_file": file_name(run),
        **{key: summary.get(key) for key in wanted},
    }


def mismatch(group: Group, prediction: Prediction) -> str:
    """How `prediction` differs from the simulated run, whose intervals it then does not hold; empty where it does not."""
    if not group.pairs:
        return ""
    summary = group.pairs[0].simulated.summary
    for goal in GOALS:
        ours, theirs = summary.get(goal.key), prediction.values.get(goal.key)
        if ours is not None and theirs is not None and not isclose(ours, theirs, rel_tol=_SAME):
            return f"{goal.metric} {theirs:.6g} is predicted and {ours:.6g} simulated"
    return ""


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.name


def file_name(run: Run) -> str:
    """The experiment file as somebody with the same repository would name it."""
    path = Path(str(run.manifest.get("experiment_file") or ""))
    parts = path.parts
    return "/".join(parts[parts.index("benchmarks") :]) if "benchmarks" in parts else path.name
