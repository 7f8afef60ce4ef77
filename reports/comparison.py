"""Which runs belong beside each other, and by how much they differ: policy and policy, simulation and hardware.

Errors between simulation and hardware exist only between runs of equal `configuration_hash`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct

from .case_labels import flat_keys, in_order, plain, policy_labels, short_keys
from .metric_table import BY_KEY, STAGES, Metric
from .metrics import measured, meets_objectives
from .runs import Run
from .statistics import (
    Estimate,
    batch_means,
    kendall_tau,
    paired_means,
    paired_over_repeats,
    paired_percentiles,
    percentile,
    share,
    t_interval,
)
from .summary import summary_of

if TYPE_CHECKING:
    import pandas as pd

BACKENDS: Final = ("simulation", "hardware")
COMPARED: Final = (
    "mean_ttft_s",
    "p50_ttft_s",
    "p90_ttft_s",
    "p99_ttft_s",
    "mean_tpot_s",
    "p50_tpot_s",
    "p90_tpot_s",
    "p99_tpot_s",
    "p99_itl_s",
    "mean_e2e_latency_s",
    "p50_e2e_latency_s",
    "p99_e2e_latency_s",
    "slo_attainment",
    "goodput",
    "throughput",
    "request_throughput",
    "prefix_hit_rate",
)
FEWEST_REPEATS: Final = 3  # for an interval to be taken seriously: of two, t is 12.7
_SPREAD: Final = ("mean", "p50", "p90", "p99")
ERRORS: Final = (
    *(f"{name}_{key}" for key in ("ttft_s", "tpot_s", "e2e_latency_s") for name in _SPREAD),
    "throughput",
    "request_throughput",
    "slo_attainment",
    "goodput",
    *(f"{name}_{key}" for key in STAGES for name in _SPREAD),
)
# what tells runs apart without being a condition under which policies are compared
_IDENTITY: Final = ("name", "seed", "backend", "repeats", "sweep", "report", "schema_version", "device")


def split_key(key: str) -> tuple[str | None, Metric]:
    """A summary's key as (mean or percentile, metric): `p99_ttft_s` is (`p99`, TTFT). Raises KeyError for others."""
    if key in BY_KEY:
        return None, BY_KEY[key]
    statistic, _, rest = key.partition("_")
    return statistic, BY_KEY[rest]


def label_of(key: str) -> str:
    """`p99 TTFT` for `p99_ttft_s`."""
    statistic, metric = split_key(key)
    return f"{statistic} {metric.label}" if statistic else metric.label


class Case:
    """One run with what tells it from others of its section: its policy, and its condition (all other differences)."""

    def __init__(self, run: Run, policy: str, condition: dict[str, Any]) -> None:
        self.run = run
        self.policy = policy
        self.condition_values = condition
        self.condition = ", ".join(f"{key}={plain(value)}" for key, value in condition.items())

    @cached_property
    def rows(self) -> pd.DataFrame:
        """`metrics.measured` of the run."""
        return measured(self.run)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summary_of(self.run)

    @property
    def met(self) -> Any:
        """Which requests meet all objectives, (n,) of bool."""
        return meets_objectives(self.rows, self.run.objectives)


class Section:
    """The runs of one experiment, told apart by policy, condition, backend and repeat."""

    def __init__(self, name: str, cases: Sequence[Case], full_names: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.cases = list(cases)
        self.full_names = dict(full_names or {})  # of policies whose names had to be shortened
        self.policies = list(dict.fromkeys(case.policy for case in self.cases))
        self.conditions = _conditions_in_order(self.cases)
        self.backends = [name for name in BACKENDS if any(case.run.backend == name for case in self.cases)]
        self.backends += sorted({case.run.backend for case in self.cases} - set(BACKENDS))

    def select(
        self, *, backend: str | None = None, condition: str | None = None, policy: str | None = None
    ) -> list[Case]:
        """The cases that match, repeats in order of seed."""
        found = [
            case
            for case in self.cases
            if (backend is None or case.run.backend == backend)
            and (condition is None or case.condition == condition)
            and (policy is None or case.policy == policy)
        ]
        return sorted(found, key=lambda case: (case.run.repeat, case.run.seed or 0, str(case.run.path)))

    @cached_property
    def swept(self) -> tuple[str, list[float]] | None:
        """The one numeric key that makes the conditions, and its values in order; None if there is none or more."""
        keys = {key for case in self.cases for key in case.condition_values}
        if len(keys) != 1:
            return None
        (key,) = keys
        values = {case.condition_values.get(key) for case in self.cases}
        if len(values) < 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return None
        return key, sorted(float(value) for value in values if value is not None)


# ---- sections -------------------------------------------------------------------------------------------------------


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """Runs grouped by experiment name, each labelled by what varies inside its group."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return [_section(name, group) for name, group in groups.items()]


def _section(name: str, runs: Sequence[Run]) -> Section:
    flats = [dict(flat_keys({key: value for key, value in run.config.items() if key not in _IDENTITY})) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    varying = [key for key in keys if len({json.dumps(flat.get(key)) for flat in flats}) > 1]
    policy_keys = {key for key in varying if key.startswith("policy.")}
    conditions = [key for key in varying if key not in policy_keys]
    short = short_keys(conditions)
    labels, full_names = policy_labels([run.config.get("policy") or {} for run in runs], policy_keys)
    cases = [
        Case(run, label, {short[key]: flat.get(key) for key in conditions})
        for run, flat, label in zip(runs, flats, labels)
    ]
    return Section(name, cases, full_names)


def _conditions_in_order(cases: Sequence[Case]) -> list[str]:
    """By the values of the first key that varies, then of the next: numbers by size, others as they first came."""
    keys = list(dict.fromkeys(key for case in cases for key in case.condition_values))
    places = {
        key: {
            json.dumps(value, sort_keys=True): place
            for place, value in enumerate(in_order(case.condition_values.get(key) for case in cases))
        }
        for key in keys
    }

    def place(case: Case) -> list[int]:
        return [places[key][json.dumps(case.condition_values.get(key), sort_keys=True)] for key in keys]

    return list(dict.fromkeys(case.condition for case in sorted(cases, key=place)))


# ---- policies -------------------------------------------------------------------------------------------------------


class Cell(Struct, frozen=True):
    """A metric of one policy. `difference` is this policy − the best one on the same requests; None for the best."""

    policy: str
    key: str
    estimate: Estimate
    is_best: bool = False
    difference: Estimate | None = None

    @property
    def distinguishable(self) -> bool | None:
        """Whether it differs from the best; None where it is the best or where the data cannot say."""
        if self.is_best or self.difference is None or not self.difference.has_interval:
            return None
        return self.difference.excludes_zero


def estimate(cases: Sequence[Case], key: str) -> Estimate:
    """The metric `key` over repeats (t interval), or of one run (batch means, order statistics, none for rates)."""
    values = [case.summary.get(key) for case in cases]
    known = [float(value) for value in values if value is not None]
    if not known:
        return Estimate(None)
    if len(cases) > 1:
        result = t_interval(known).from_zero()  # no metric is negative
        return Estimate(result.value, result.low, result.high, len(known), result.method, len(known) < FEWEST_REPEATS)
    case = cases[0]
    statistic, metric = split_key(key)
    if key == "slo_attainment":
        return share(case.met)
    if key == "goodput" and case.summary["duration_s"] > 0:
        hits = share(case.met)
        scale = len(case.rows) / case.summary["duration_s"]
        low, high = (None if bound is None else bound * scale for bound in (hits.low, hits.high))
        return Estimate(known[0], low, high, hits.n, hits.method)
    if metric.key not in case.rows.columns or statistic is None:
        return Estimate(known[0], n=1, method="one run")
    column = case.rows[metric.key].to_numpy(np.float64)
    return batch_means(column).from_zero() if statistic == "mean" else percentile(column, float(statistic[1:]))


def _same_requests(ours: Case, theirs: Case) -> pd.DataFrame | None:
    """Measures of the requests that both runs were given, `_a` and `_b`, in order of arrival; None unless they match.

    They match if the same ids ask for the same prompts and outputs bounds: common random numbers.
    """
    a = ours.rows.assign(met=ours.met.astype(np.float64))
    b = theirs.rows.assign(met=theirs.met.astype(np.float64))
    both = a.merge(b, on="request_id", suffixes=("_a", "_b"))
    if len(both) < 0.95 * max(len(a), len(b)) or not len(both):
        return None
    same = (both["num_prompt_tokens_a"] == both["num_prompt_tokens_b"]) & (both["max_tokens_a"] == both["max_tokens_b"])
    return both if bool(same.all()) else None


def difference(ours: Sequence[Case], theirs: Sequence[Case], key: str) -> Estimate | None:
    """Ours − theirs of one metric on common random numbers; None where nothing pairs up.

    With two or more repeats of equal seeds: paired by seed. Otherwise the first runs of each, paired by request: batch
    means for means and shares, a moving-block bootstrap for percentiles; rates of a single run cannot be compared.
    """
    mine = {(case.run.seed, case.run.repeat): case for case in ours}
    others = {(case.run.seed, case.run.repeat): case for case in theirs}
    shared = [seed for seed in mine if seed in others]
    if len(shared) > 1:
        pairs = [(mine[seed].summary.get(key), others[seed].summary.get(key)) for seed in shared]
        known = [(float(a), float(b)) for a, b in pairs if a is not None and b is not None]
        return paired_over_repeats([a for a, _ in known], [b for _, b in known]) if known else None
    if not shared:
        return None
    a, b = mine[shared[0]], others[shared[0]]
    both = _same_requests(a, b)
    if both is None:
        return None
    statistic, metric = split_key(key)
    if key in ("slo_attainment", "goodput"):
        result = paired_means(both["met_a"], both["met_b"])
        if key == "slo_attainment" or result.value is None:
            return result
        # a run's duration is one observation: the interval is that of the shares, at the mean duration
        seconds = (a.summary["duration_s"] + b.summary["duration_s"]) / 2
        scale = len(both) / seconds if seconds > 0 else 0.0
        low, high = (None if bound is None else bound * scale for bound in (result.low, result.high))
        return Estimate(result.value * scale, low, high, result.n, result.method, result.too_few)
    if statistic is None or f"{metric.key}_a" not in both.columns:
        return None
    left, right = both[f"{metric.key}_a"].to_numpy(np.float64), both[f"{metric.key}_b"].to_numpy(np.float64)
    return paired_means(left, right) if statistic == "mean" else paired_percentiles(left, right, float(statistic[1:]))


def compare_policies(cases: dict[str, list[Case]], keys: Sequence[str] = COMPARED) -> list[list[Cell]]:
    """One row per metric known of any policy, one cell per policy: the best is marked, others are set against it."""
    table: list[list[Cell]] = []
    for key in keys:
        estimates = {policy: estimate(group, key) for policy, group in cases.items()}
        known = {policy: e.value for policy, e in estimates.items() if e.value is not None}
        if not known:
            continue
        better = split_key(key)[1].better
        best = None
        if better != "neither" and len(known) > 1:
            best = (max if better == "higher" else min)(known, key=lambda policy: known[policy])
        table.append(
            [
                Cell(
                    policy,
                    key,
                    estimates[policy],
                    policy == best,
                    None
                    if best is None or policy == best or policy not in known
                    else difference(group, cases[best], key),
                )
                for policy, group in cases.items()
            ]
        )
    return table


# ---- simulation beside hardware -------------------------------------------------------------------------------------


class Pair(Struct, frozen=True):
    """A simulated run and the hardware run of equal configuration and seed."""

    simulation: Any  # Case
    hardware: Any  # Case

    @property
    def policy(self) -> str:
        return str(self.simulation.policy)

    @property
    def condition(self) -> str:
        return str(self.simulation.condition)


class MetricError(Struct, frozen=True):
    """Simulation against hardware, means over the repeats. `relative` is (simulation − hardware)/hardware.

    `relative` is None where the hardware's value is 0; its interval is over repeats, and absent for one pair.
    """

    key: str
    simulation: float
    hardware: float
    relative: Estimate

    @property
    def absolute(self) -> float:
        return self.simulation - self.hardware


def match_backends(cases: Sequence[Case]) -> list[Pair]:
    """Pairs of equal configuration_hash, seed and repeat, one of each backend; a run is in one pair at most."""

    def identity(case: Case) -> tuple[str | None, int | None, int]:
        return case.run.configuration_hash, case.run.seed, case.run.repeat

    waiting: dict[tuple[str | None, int | None, int], list[Case]] = {}
    for case in cases:
        if case.run.backend == "hardware" and case.run.configuration_hash:
            waiting.setdefault(identity(case), []).append(case)
    pairs: list[Pair] = []
    for case in cases:
        if case.run.backend == "simulation" and waiting.get(identity(case)):
            pairs.append(Pair(case, waiting[identity(case)].pop(0)))
    return pairs


def metric_errors(pairs: Sequence[Pair], keys: Sequence[str] = ERRORS) -> list[MetricError]:
    """Errors of the pairs of one policy and condition by metric; metrics unknown on either side are left out."""
    errors: list[MetricError] = []
    for key in keys:
        values = [(pair.simulation.summary.get(key), pair.hardware.summary.get(key)) for pair in pairs]
        known = [(float(s), float(h)) for s, h in values if s is not None and h is not None]
        if not known:
            continue
        relative = [s / h - 1.0 for s, h in known if h > 0]
        errors.append(
            MetricError(
                key,
                float(np.mean([s for s, _ in known])),
                float(np.mean([h for _, h in known])),
                t_interval(relative) if relative else Estimate(None),
            )
        )
    return errors


class Agreement(Struct, frozen=True):
    """Request by request: shares of requests served by the same executors, and median |error| of their latencies."""

    num_requests: int
    same_context: float
    same_generation: float
    same_route: float
    median_ttft_error: float | None
    median_e2e_error: float | None


def agreement(pair: Pair) -> Agreement | None:
    """Routes and latencies of the requests that both runs of the pair served; None if they share none."""
    both = pair.simulation.rows.merge(pair.hardware.rows, on="request_id", suffixes=("_s", "_h"))
    if not len(both):
        return None

    def same(column: str) -> Any:
        left, right = both[f"{column}_s"], both[f"{column}_h"]
        return ((left == right) | (left.isna() & right.isna())).to_numpy(np.bool_)

    def median_error(key: str) -> float | None:
        s, h = both[f"{key}_s"].to_numpy(np.float64), both[f"{key}_h"].to_numpy(np.float64)
        known = np.isfinite(s) & np.isfinite(h) & (h > 0)
        return float(np.median(np.abs(s[known] / h[known] - 1.0))) if known.any() else None

    context, generation = same("context_executor"), same("generation_executor")
    return Agreement(
        len(both),
        float(context.mean()),
        float(generation.mean()),
        float((context & generation).mean()),
        median_error("ttft_s"),
        median_error("e2e_latency_s"),
    )


def rank_agreement(pairs: Sequence[Pair], keys: Sequence[str] = ERRORS) -> dict[str, float]:
    """Kendall's τ-b between the policies' order in simulation and on hardware, per metric; needs two policies.

    Values are means over the repeats; metrics without an order (all ties) are left out.
    """
    by_policy: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_policy.setdefault(pair.policy, []).append(pair)
    found: dict[str, float] = {}
    errors = {policy: {e.key: e for e in metric_errors(group, keys)} for policy, group in by_policy.items()}
    for key in keys:
        known = [by_key[key] for by_key in errors.values() if key in by_key]
        if len(known) >= 2:
            tau = kendall_tau([error.simulation for error in known], [error.hardware for error in known])
            if tau is not None:
                found[key] = tau
    return found
