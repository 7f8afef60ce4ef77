"""Does simulation order policies as hardware does? Every pair of them, and Kendall's τ over those that hardware tells apart.

A pair is a tie, and left out, where the hardware's values differ by less than 10 % of the smaller one, or where their
difference is no larger than its own spread over the repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from .case_labels import plain
from .comparison import split_key
from .metric_table import BY_KEY
from .run_errors import check_comparable
from .runs import ReportError, Run, find_runs
from .summary import summary_of

TIE: Final = 0.10
LEAST_POLICIES: Final = 5
LEAST_PAIRS: Final = 10


class RankPair(Struct, frozen=True):
    """Two policies. `difference` is |a − b| over the smaller of the hardware's values; `spread` that of a − b over
    repeats on hardware, None for a single one. `verdict`: agree, disagree, or tie (`why` says of which kind).
    """

    a: str
    b: str
    measured_a: float
    measured_b: float
    simulated_a: float
    simulated_b: float
    difference: float
    spread: float | None
    verdict: str
    why: str = ""


class Ranking(Struct, frozen=True):
    """The pairs of one condition (what is swept beside policies). `tau` is None where hardware tells no pair apart."""

    experiment: str
    condition: str
    key: str
    simulated: dict[str, float]
    measured: dict[str, float]
    pairs: tuple[RankPair, ...]
    tau: float | None

    @property
    def num_apart(self) -> int:
        return sum(pair.verdict != "tie" for pair in self.pairs)

    @property
    def is_enough(self) -> bool:
        """Whether there are as many policies and pairs told apart as a claim about ranking needs."""
        return len(self.measured) >= LEAST_POLICIES and self.num_apart >= LEAST_PAIRS

    @property
    def chosen(self) -> str:
        """The policy that is best in simulation."""
        return _best(self.simulated, self.key)

    @property
    def best(self) -> str:
        """The policy that is best on hardware."""
        return _best(self.measured, self.key)

    @property
    def best_agrees(self) -> bool:
        """Whether the policy that simulation would choose is the hardware's best, or one that it ties with."""
        both = {self.chosen, self.best}
        return len(both) == 1 or any({pair.a, pair.b} == both and pair.verdict == "tie" for pair in self.pairs)


def _best(values: dict[str, float], key: str) -> str:
    choose = max if split_key(key)[1].better == "higher" else min
    return choose(values, key=lambda policy: values[policy])


# ---- pairs ----------------------------------------------------------------------------------------------------------


def rank_pairs(
    simulated: Mapping[str, Sequence[float]], measured: Mapping[str, Sequence[float]], tie: float = TIE
) -> tuple[RankPair, ...]:
    """Every pair of policies. Values are those of each repeat; on hardware repeat r of one policy pairs with r of another.

    Raises ValueError unless both sides hold the same policies.
    """
    if set(simulated) != set(measured):
        raise ValueError(f"policies {sorted(simulated)} cannot be ranked against {sorted(measured)}")
    return tuple(_pair(a, b, simulated, measured, tie) for a, b in combinations(measured, 2))


def _pair(
    a: str, b: str, simulated: Mapping[str, Sequence[float]], measured: Mapping[str, Sequence[float]], tie: float
) -> RankPair:
    mean = {policy: _mean(measured[policy]) for policy in (a, b)}
    guess = {policy: _mean(simulated[policy]) for policy in (a, b)}
    apart = mean[a] - mean[b]
    smaller = min(abs(mean[a]), abs(mean[b]))
    relative = abs(apart) / smaller if smaller else (0.0 if apart == 0 else float("inf"))
    differences = [x - y for x, y in zip(measured[a], measured[b])]
    spread = max(differences) - min(differences) if len(differences) > 1 else None
    verdict, why = "disagree", ""
    if relative < tie:
        verdict, why = "tie", f"{100 * relative:.1f} % apart"
    elif spread is not None and abs(apart) <= spread:
        verdict, why = "tie", "within the spread of repeats"
    elif (guess[a] - guess[b]) * apart > 0:
        verdict = "agree"
    elif guess[a] == guess[b]:
        why = "equal in simulation"
    return RankPair(a, b, mean[a], mean[b], guess[a], guess[b], relative, spread, verdict, why)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tau_of(pairs: Sequence[RankPair]) -> float | None:
    """(agreeing − disagreeing) / pairs told apart; one that is equal in simulation counts as neither. None without any."""
    apart = [pair for pair in pairs if pair.verdict != "tie"]
    if not apart:
        return None
    score = sum(1 if pair.verdict == "agree" else 0 if pair.why else -1 for pair in apart)
    return score / len(apart)


# ---- from trees of runs ---------------------------------------------------------------------------------------------


def metric_key(name: str) -> str:
    """A summary's key for `mean_ttft`, `mean_ttft_s`, `slo_attainment`… Raises ReportError for others."""
    for key in (name, f"{name}_s"):
        try:
            statistic, metric = split_key(key)
        except KeyError:
            continue
        if (statistic is None) != metric.per_request:
            return key
    known = ", ".join(metric.key.removesuffix("_s") for metric in BY_KEY.values())
    raise ReportError(f"--metric {name}: is no metric of a run; allowed: mean_, p50_, p90_, p99_ and one of {known}")


def rankings(simulated: Sequence[Run], measured: Sequence[Sequence[Run]], key: str) -> list[Ranking]:
    """One ranking per condition. `measured` holds the runs of each tree of hardware runs; repeats may be in each.

    Raises ReportError for runs that do not belong together and where no condition has two policies.
    """
    ours = _by_condition([simulated], key)
    theirs = _by_condition(measured, key)
    found: list[Ranking] = []
    for condition, by_policy in theirs.items():
        shared = [policy for policy in by_policy if policy in ours.get(condition, {})]
        for policy in shared:
            for run in by_policy[policy].runs:
                check_comparable(_partner(ours[condition][policy].runs, run), run)
        if len(shared) < 2:
            continue
        counts = {policy: len(by_policy[policy].values) for policy in shared}
        if len(set(counts.values())) > 1:
            raise ReportError(f"{condition or 'the sweep'}: policies have different numbers of hardware runs: {counts}")
        guesses = {policy: ours[condition][policy].values for policy in shared}
        values = {policy: by_policy[policy].values for policy in shared}
        pairs = rank_pairs(guesses, values)
        found.append(
            Ranking(
                by_policy[shared[0]].runs[0].name,
                condition,
                key,
                {policy: _mean(each) for policy, each in guesses.items()},
                {policy: _mean(each) for policy, each in values.items()},
                pairs,
                tau_of(pairs),
            )
        )
    if not found:
        raise ReportError("no two policies were run in both worlds: a ranking needs a sweep over a policy's name")
    return found


def _partner(runs: Sequence[Run], other: Run) -> Run:
    """The run of the same seed, else the first, which the check of configurations will then refuse."""
    return next((run for run in runs if run.seed == other.seed), runs[0])


class _Repeats:
    """The runs of one policy under one condition, in the order of the trees and their repeats."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.values: list[float] = []


def _by_condition(trees: Sequence[Sequence[Run]], key: str) -> dict[str, dict[str, _Repeats]]:
    found: dict[str, dict[str, _Repeats]] = {}
    for runs in trees:
        for run in sorted(runs, key=lambda run: run.repeat):
            swept: dict[str, Any] = run.manifest.get("values") or {}
            condition = ", ".join(f"{name}={_plain(v)}" for name, v in swept.items() if not name.startswith("policy."))
            names = [_plain(v) for name, v in swept.items() if name.startswith("policy.")]
            policy = names[0] if names and set(names) == {names[0]} else ", ".join(names)
            value = summary_of(run).get(key)
            if not policy or value is None:
                continue
            repeats = found.setdefault(condition, {}).setdefault(policy, _Repeats())
            repeats.runs.append(run)
            repeats.values.append(float(value))
    return found


def _plain(value: Any) -> str:
    """A policy by its name, without the file it is from."""
    if isinstance(value, dict):
        others = ", ".join(f"{key}={_plain(item)}" for key, item in value.items() if key != "name")
        return _plain(value.get("name", "")) + (f" ({others})" if others else "")
    text = value if isinstance(value, str) else plain(value)
    return text.rpartition(":")[2] if ".py:" in text else text


def rank_trees(simulated: Path, measured: Sequence[Path], key: str) -> list[Ranking]:
    """`rankings` of folders. Raises ReportError."""
    return rankings(find_runs([simulated]), [find_runs([path]) for path in measured], key)
