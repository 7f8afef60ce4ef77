"""The leaderboard as data, and what follows from it: standings with intervals, Pareto sets, what age of reports does.

A policy's place is a range: behind all that are better than it by more than chance, before all that it is better than.
Differences are paired by seed, Student's t, 95 %; they are not widened for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import msgspec
from msgspec import Struct

from .comparison import split_key
from .regret import RegretSummary, summarise_regret
from .statistics import Estimate, paired_over_repeats, t_interval

FORMAT_VERSION: Final = 1
OWN_LOAD: Final = 1.0
FRESH: Final = 0.0  # milliseconds between reports: they are sent at every change of a batch
NOT_SERVED: Final = 0.01  # share of requests from which on a policy counts as one that turns them away
NO_DIFFERENCE: Final = 0.01  # a share of a latency that is none
DEFAULT_METRIC: Final = "slo_attainment"


# ---- what was run ---------------------------------------------------------------------------------------------------


class BoardScenario(Struct, frozen=True):
    """`rate` in requests/s, None in a closed loop; `left_out` says why by policy.

    `no_regret` says why no decision was looked at again; empty where that was only not asked for.
    """

    name: str
    text: str
    executors: str
    profile: str
    rate: float | None
    objectives: dict[str, float]
    left_out: dict[str, str]
    no_regret: str = ""


class BoardPolicy(Struct, frozen=True):
    """`partner` says who decides at the stage that it does not; empty where it decides at all."""

    label: str
    source: str
    summary: str
    partner: str = ""
    is_oracle: bool = False
    is_own: bool = False


class BoardRun(Struct, frozen=True):
    """One simulation. `load` is a multiple of the scenario's own; `report_interval_ms` 0 where reports are fresh.

    `values` by key of a summary, seconds where it ends in `_s`; empty with an `error`.
    """

    scenario: str
    policy: str
    load: float
    report_interval_ms: float
    repeat: int
    seed: int
    values: dict[str, float | None] = {}
    error: str | None = None


class BoardRegret(Struct, frozen=True):
    """The rows of the sampled decisions of a policy, as in `regret.parquet`."""

    scenario: str
    policy: str
    rows: list[dict[str, Any]]
    error: str | None = None

    @property
    def summary(self) -> RegretSummary | None:
        return summarise_regret(self.rows) if self.rows else None


class Board(Struct, frozen=True, dict=True):
    """Everything that the page is made from; `metric` is what policies are ranked by."""

    metric: str
    is_quick: bool
    git_commit: str | None
    scenarios: tuple[BoardScenario, ...]
    policies: tuple[BoardPolicy, ...]
    runs: tuple[BoardRun, ...]
    regrets: tuple[BoardRegret, ...]
    kind: str = "routing"  # of the policies that are compared

    def values(
        self, scenario: str, policy: str, key: str, load: float = OWN_LOAD, report_interval_ms: float = FRESH
    ) -> dict[int, float]:
        """The metric `key` by seed; runs that failed or have none are missing."""
        found: dict[int, float] = {}
        for run in self.runs_at(scenario, load, report_interval_ms):
            value = run.values.get(key)
            if run.policy == policy and value is not None:
                found[run.seed] = float(value)
        return found

    @cached_property
    def _by_case(self) -> dict[tuple[str, float, float], list[BoardRun]]:
        found: dict[tuple[str, float, float], list[BoardRun]] = {}
        for run in self.runs:
            found.setdefault((run.scenario, run.load, run.report_interval_ms), []).append(run)
        return found

    def runs_at(self, scenario: str, load: float = OWN_LOAD, report_interval_ms: float = FRESH) -> list[BoardRun]:
        """In the order of policies, then of seeds."""
        return self._by_case.get((scenario, load, report_interval_ms), [])

    def ran_in(self, scenario: str) -> list[BoardPolicy]:
        """The policies with a run in `scenario` that did not fail."""
        labels = {run.policy for run in self.runs_at(scenario) if not run.error}
        return [policy for policy in self.policies if policy.label in labels]

    def loads(self, scenario: str) -> list[float]:
        return sorted({load for name, load, _ in self._by_case if name == scenario})

    def report_intervals(self, scenario: str) -> list[float]:
        return sorted({interval for name, _, interval in self._by_case if name == scenario})

    def notes(self) -> list[str]:
        """One line for each reason why policies or studies have no place in scenarios."""
        found: dict[str, list[str]] = {}
        for scenario in self.scenarios:
            by_reason: dict[str, list[str]] = {}
            for label, why in scenario.left_out.items():
                by_reason.setdefault(why, []).append(label)
            texts = [f"left out: {', '.join(who)} ({why})" for why, who in by_reason.items()]
            for text in [*texts, scenario.no_regret]:
                found.setdefault(text, []).append(scenario.name)
        return [f"{', '.join(names)}: {text}" for text, names in found.items() if text]

    def failures(self) -> list[str]:
        """One line for each policy that failed in a scenario."""
        lines = [f"{run.policy} in {run.scenario}: {run.error}" for run in self.runs if run.error]
        lines += [f"{each.policy} in {each.scenario}, regret: {each.error}" for each in self.regrets if each.error]
        return list(dict.fromkeys(lines))


def board_of(data: Any) -> Board:
    """From the values of leaderboard.json."""
    return msgspec.convert({key: data[key] for key in Board.__struct_fields__}, Board)


def higher_is_better(key: str) -> bool:
    return split_key(key)[1].better == "higher"


# ---- standings ------------------------------------------------------------------------------------------------------


class Standing(Struct, frozen=True):
    """A policy's place in a scenario. The oracle has no place: nobody can be told true lengths.

    `first` and `last` bound its place among those that are ranked. `behind` is how much worse than the best it is, in
    the metric's unit (paired by seed); None for the best and for the oracle. `is_tied` says that this may be chance. Those
    that are the same as the best under every seed are the best too.
    """

    policy: str
    estimate: Estimate
    first: int | None
    last: int | None
    behind: Estimate | None
    is_best: bool = False
    is_tied: bool = False

    @property
    def place(self) -> str:
        if self.first is None or self.last is None:
            return "–"
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"

    @property
    def is_among_best(self) -> bool:
        return self.is_best or self.is_tied


def standings(board: Board, scenario: str, key: str | None = None) -> list[Standing]:
    """Best first; equal means in the order of the policies. Policies without a value are left out."""
    key = key or board.metric
    sign = 1.0 if higher_is_better(key) else -1.0
    values = {policy.label: board.values(scenario, policy.label, key) for policy in board.ran_in(scenario)}
    values = {label: found for label, found in values.items() if found}
    estimates = {label: t_interval(list(found.values())) for label, found in values.items()}
    oracles = {policy.label for policy in board.policies if policy.is_oracle}
    order = sorted(values, key=lambda label: -sign * (estimates[label].value or 0.0))
    ranked = [label for label in order if label not in oracles]
    better: dict[str, int] = dict.fromkeys(ranked, 0)
    worse: dict[str, int] = dict.fromkeys(ranked, 0)
    for place, a in enumerate(ranked):
        for b in ranked[place + 1 :]:
            if _excess(values[a], values[b], sign).excludes_zero:
                better[b] += 1
                worse[a] += 1
    found = []
    for label in order:
        if label in oracles:
            found.append(Standing(label, estimates[label], None, None, None))
            continue
        is_best = values[label] == values[ranked[0]]
        behind = None if is_best else _excess(values[ranked[0]], values[label], sign)
        is_tied = behind is not None and behind.has_interval and not behind.excludes_zero
        found.append(
            Standing(label, estimates[label], 1 + better[label], len(ranked) - worse[label], behind, is_best, is_tied)
        )
    return found


def _excess(ours: dict[int, float], theirs: dict[int, float], sign: float) -> Estimate:
    """By how much ours is better, on the seeds that both have. Without any spread a difference is what it is."""
    shared = [seed for seed in ours if seed in theirs]
    a, b = [sign * ours[seed] for seed in shared], [sign * theirs[seed] for seed in shared]
    return paired_over_repeats(a, b)


class Overall(Struct, frozen=True):
    """A policy over all scenarios in which it has a place. `mean_place` is the mean of the middles of its ranges, as a
    share of the way from first (0) to last (1), so that scenarios of few policies count as much.
    """

    policy: str
    mean_place: float
    num_scenarios: int
    num_among_best: int
    worst_scenario: str


def overall(board: Board) -> list[Overall]:
    """Best mean place first."""
    places: dict[str, list[tuple[float, str]]] = {}
    among_best: dict[str, int] = {}
    for scenario in board.scenarios:
        table = [each for each in standings(board, scenario.name) if each.first is not None]
        for each in table:
            middle = ((each.first or 0) + (each.last or 0)) / 2
            share = (middle - 1) / (len(table) - 1) if len(table) > 1 else 0.0
            places.setdefault(each.policy, []).append((share, scenario.name))
            among_best[each.policy] = among_best.get(each.policy, 0) + each.is_among_best
    found = [
        Overall(label, sum(s for s, _ in each) / len(each), len(each), among_best[label], max(each)[1])
        for label, each in places.items()
    ]
    return sorted(found, key=lambda each: each.mean_place)


# ---- two latencies, older reports, other loads ----------------------------------------------------------------------


class Point(Struct, frozen=True):
    """Means over the seeds, in seconds; of the requests that were served, a share of those that came.

    `is_efficient`: no ranked policy is as good in both, to 1 %, and in one of them better by more than that and more than
    chance, unless it served fewer by over 1 % of all: who turns requests away has an easier load.
    """

    policy: str
    ttft_s: float
    tpot_s: float
    share_served: float
    is_efficient: bool = False


def pareto(board: Board, scenario: str) -> list[Point]:
    """Mean TTFT against mean TPOT of each policy. One that rejects has the latencies of those that it let in."""
    found: list[Point] = []
    by_seed: dict[str, list[dict[int, float]]] = {}
    for policy in board.ran_in(scenario):
        by_seed[policy.label] = [board.values(scenario, policy.label, key) for key in ("mean_ttft_s", "mean_tpot_s")]
        means = [_mean(values) for values in by_seed[policy.label]]
        served = _mean(board.values(scenario, policy.label, "num_completed"))
        asked = _mean(board.values(scenario, policy.label, "num_requests"))
        if means[0] is not None and means[1] is not None and served is not None and asked:
            found.append(Point(policy.label, means[0], means[1], served / asked))
    oracles = {policy.label for policy in board.policies if policy.is_oracle}
    able = [point for point in found if point.policy not in oracles]

    def beats(a: Point, b: Point) -> bool:
        if a.share_served < b.share_served - NOT_SERVED:
            return False
        ours, theirs = (a.ttft_s, a.tpot_s), (b.ttft_s, b.tpot_s)
        if any(x > (1 + NO_DIFFERENCE) * y for x, y in zip(ours, theirs, strict=True)):
            return False
        excess = [_excess(x, y, -1.0) for x, y in zip(by_seed[a.policy], by_seed[b.policy], strict=True)]
        return any(
            (1 + NO_DIFFERENCE) * x < y and e.low is not None and e.low > 0
            for x, y, e in zip(ours, theirs, excess, strict=True)
        )

    return [
        msgspec.structs.replace(point, is_efficient=point in able and not any(beats(other, point) for other in able))
        for point in found
    ]


def _mean(values: dict[int, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


class Ageing(Struct, frozen=True):
    """What older reports cost a policy: mean TTFT in seconds by report interval in ms, and each minus that with fresh ones.

    All on the same seeds, those that every interval has.
    """

    policy: str
    ttft_s: dict[float, Estimate]
    added_s: dict[float, Estimate]


def ageing(board: Board, scenario: str) -> list[Ageing]:
    """Of each policy that ran with older reports; paired by seed. Empty where none did."""
    intervals = board.report_intervals(scenario)
    found: list[Ageing] = []
    for policy in board.ran_in(scenario) if len(intervals) > 1 else ():
        by_seed = {
            interval: board.values(scenario, policy.label, "mean_ttft_s", report_interval_ms=interval)
            for interval in intervals
        }
        seeds = [seed for seed in by_seed[FRESH] if all(seed in values for values in by_seed.values())]
        if not seeds:
            continue
        values = {interval: [by_seed[interval][seed] for seed in seeds] for interval in intervals}
        found.append(
            Ageing(
                policy.label,
                {interval: t_interval(column) for interval, column in values.items()},
                {interval: paired_over_repeats(values[interval], values[FRESH]) for interval in intervals[1:]},
            )
        )
    return found


def goodput_curve(board: Board, scenario: BoardScenario, policy: str) -> list[tuple[float, Estimate]]:
    """(requests/s sent, requests/s of them that met all objectives) at each load, on the seeds that all loads have.

    That is attainment times the rate of arrivals: the drain of a short run, in which nobody arrives, does not count.
    """
    if scenario.rate is None:
        return []
    by_load = {load: board.values(scenario.name, policy, "slo_attainment", load) for load in board.loads(scenario.name)}
    seeds = set.intersection(*(set(values) for values in by_load.values()))
    found = []
    for load, values in by_load.items():
        rate = scenario.rate * load
        e = t_interval([rate * value for seed, value in values.items() if seed in seeds])
        if e.value is not None:
            found.append((rate, e))
    return found


def as_plain(board: Board) -> dict[str, Any]:
    """leaderboard.json: the board, and what follows from it."""
    plain: dict[str, Any] = {"format_version": FORMAT_VERSION, **msgspec.to_builtins(board)}
    plain["overall"] = msgspec.to_builtins(overall(board))
    plain["standings"] = {
        s.name: [
            msgspec.to_builtins(each) | {"place": each.place, "is_among_best": each.is_among_best}
            for each in standings(board, s.name)
        ]
        for s in board.scenarios
    }
    plain["pareto"] = {s.name: msgspec.to_builtins(pareto(board, s.name)) for s in board.scenarios}
    plain["failures"] = board.failures()
    return plain


def own_policies(board: Board) -> Sequence[str]:
    return [policy.label for policy in board.policies if policy.is_own]
