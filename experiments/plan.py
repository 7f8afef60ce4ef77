"""The search for a cluster: which candidates are simulated how closely, in rounds that do not depend on who computes them.

1. Rate matching leaves out the disaggregated shapes whose matched rate per GPU is under half of the best one's. Mixed ones
   stay: that figure asks TPOT of each of their steps, and the objective asks it of a request's mean.
2. Every other shape, with the first choice of routers: one seed, a coarse grid, a short horizon.
3. The shapes near the best one, with the other routers, likewise.
4. The finalists: all seeds, the fine grid, the whole horizon. Only these are ranked against each other.

`exhaustive` makes finalists of all, and so does a space of a few. The rounds end before the next one begins, so that the
result is the same whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .answer_book import AnswerBook
from .config import Experiment, Plan
from .errors import ConfigError
from .plan_arithmetic import Arithmetic, Lengths, arithmetic, lengths_of
from .plan_rates import base_rate, grid_place
from .plan_search import Found, RateSearch, failed_answer, found_of, search_task
from .plan_space import Candidate, Unfit, candidate_of, routers_of, shapes_of
from .run_simulation import costs_of
from .streams import repeat_seed
from .sweep_workers import Pool

FEW: Final = 8  # candidates that all become finalists
LEAST_SHARE: Final = 0.5  # of the best matched rate per GPU
NEAR: Final = 0.25  # below the best shape's goodput per GPU
MOST_SHAPES: Final = 12
FINAL: Final = 0.12
MOST_FINALISTS: Final = 8
_COARSE: Final = 0.05  # tolerance of a screening
_SCREENING_HORIZON: Final = 0.4  # of the whole
_LATENCIES: Final = 5.0  # the longest latency allowed, in the default horizon
_START_AT: Final = 0.7  # of the matched rate: queues take the rest


@dataclass
class Entry:
    """A candidate on its way: what arithmetic says, what its screening found, and what each seed found in the final."""

    candidate: Candidate
    arithmetic: Arithmetic
    screened: Found | None = None
    finals: list[Found] = field(default_factory=list)
    left_out: str = ""

    @property
    def num_gpus(self) -> int:
        return self.candidate.shape.num_gpus

    @property
    def role(self) -> str:
        return self.candidate.shape.role

    @property
    def screened_per_gpu(self) -> float:
        return 0.0 if self.screened is None else self.screened.rate / self.num_gpus

    @property
    def error(self) -> str | None:
        found = self.finals or ([self.screened] if self.screened is not None else [])
        return next((each.error for each in found if each.error), None)


@dataclass(frozen=True)
class Search:
    """A finished search. `entries` in the order of the space; `seeds` are those of the finalists' columns."""

    base: Experiment
    plan: Plan
    lengths: Lengths
    horizon_s: float
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    unfit: tuple[Unfit, ...]

    @property
    def num_probes(self) -> int:
        return sum(found.num_probes for found in self._all())

    @property
    def num_requests(self) -> int:
        return sum(found.num_requests for found in self._all())

    @property
    def num_known(self) -> int:
        return sum(found.num_known for found in self._all())

    def _all(self) -> list[Found]:
        return [f for e in self.entries for f in (*e.finals, *([e.screened] if e.screened is not None else []))]


def horizon_of(plan: Plan, base: Experiment, lengths: Lengths) -> float:
    """Seconds of arrivals at each rate. Raises ConfigError without an objective."""
    slo = base.slo
    if slo is None or (slo.ttft_ms is None and slo.tpot_ms is None and slo.e2e_ms is None):
        raise ConfigError("plan: needs objectives; allowed: slo with ttft_ms, tpot_ms, e2e_ms or a preset")
    if plan.horizon_s is not None:
        return plan.horizon_s
    longest = (slo.ttft_ms or 0.0) + (slo.tpot_ms or 0.0) * lengths.output
    if slo.e2e_ms is not None:
        longest = min(longest or slo.e2e_ms, slo.e2e_ms)
    return _LATENCIES * longest / 1e3


def run_search(
    data: dict[str, Any], base: Experiment, pool: Pool, folder: Path, begin: Callable[[], None] = lambda: None
) -> Search:
    """Search the space of `base.plan` (its defaults if None). `data` are the file's plain values, `folder` keeps results.

    `begin` is called before the first simulation. Raises ConfigError where nothing can be searched, without that call.
    """
    plan = base.plan if base.plan is not None else Plan.model_validate({})
    native = base_rate(base)
    lengths = lengths_of(base)
    horizon = horizon_of(plan, base, lengths)
    seeds = tuple(repeat_seed(base.seed, repeat) for repeat in range(plan.seeds))
    book = AnswerBook(pool, folder)
    entries: list[Entry] = []
    unfit: list[Unfit] = []

    def add(shape: Any, routers: dict[str, Any]) -> Entry | None:
        candidate = candidate_of(data, base.root, shape, routers)
        if isinstance(candidate, Unfit):
            unfit.append(candidate)
            return None
        entry = Entry(candidate, arithmetic(candidate.experiment, costs_of(candidate.experiment), lengths))
        entries.append(entry)
        return entry

    shapes = shapes_of(plan, base)
    routers = {role: routers_of(plan, base, role) for role in ("disaggregated", "mixed")}
    num_candidates = sum(len(routers[shape.role]) for shape in shapes)
    all_are_finalists = plan.exhaustive or num_candidates <= FEW
    for shape in shapes:
        for choice in routers[shape.role] if all_are_finalists else routers[shape.role][:1]:
            add(shape, choice)
    if not entries:
        reasons = sorted({each.why for each in unfit})
        raise ConfigError("plan: no cluster of the space can be built:", *(f"plan: {why}" for why in reasons[:5]))
    begin()
    if all_are_finalists:
        finalists = entries[:]
    else:
        _leave_out_hopeless(entries)

        def screen(chosen: Sequence[Entry], title: str) -> None:
            tolerance = max(plan.tolerance, _COARSE)
            searches = [
                RateSearch(
                    e.candidate.experiment, native, tolerance, _start(e, tolerance), _SCREENING_HORIZON * horizon
                )
                for e in chosen
            ]
            for entry, found in zip(chosen, _answers(book, searches, title), strict=True):
                entry.screened = found

        screen([e for e in entries if not e.left_out], "shapes")
        near = _best(entries, NEAR, MOST_SHAPES)
        others = [
            added
            for entry in near
            for choice in routers[entry.role][1:]
            if (added := add(entry.candidate.shape, choice)) is not None
        ]
        if others:
            screen(others, "routers")
        finalists = _best(entries, FINAL, MOST_FINALISTS)
    for entry in entries:
        if entry not in finalists and not entry.left_out:
            entry.left_out = "screened out"
    searches = [
        RateSearch(_with_seed(e.candidate.experiment, seed), native, plan.tolerance, _start(e, plan.tolerance), horizon)
        for e in finalists
        for seed in seeds
    ]
    found = _answers(book, searches, "finalists")
    for number, entry in enumerate(finalists):
        entry.finals = found[number * len(seeds) : (number + 1) * len(seeds)]
    return Search(base, plan, lengths, horizon, seeds, tuple(entries), tuple(unfit))


def _with_seed(config: Experiment, seed: int) -> Experiment:
    return config.model_copy(update={"seed": seed})


def _start(entry: Entry, tolerance: float) -> int:
    rate = entry.screened.rate if entry.screened is not None else 0.0
    rate = rate or _START_AT * entry.arithmetic.matched_rate or float(entry.num_gpus)
    return grid_place(rate, tolerance)


def _leave_out_hopeless(entries: Sequence[Entry]) -> None:
    apart = [entry for entry in entries if entry.role == "disaggregated"]
    best = max((entry.arithmetic.matched_rate_per_gpu for entry in apart), default=0.0)
    for entry in apart:
        if entry.arithmetic.matched_rate_per_gpu < LEAST_SHARE * best:
            entry.left_out = "rate matching"


def _best(entries: Sequence[Entry], within: float, most: int) -> list[Entry]:
    """Those within a share of the best, at most so many, and in any case the best of each role; in the order of the space."""
    ranked = sorted(
        (entry for entry in entries if entry.screened is not None and entry.screened_per_gpu > 0),
        key=lambda entry: -entry.screened_per_gpu,
    )
    chosen = [e for e in ranked if e.screened_per_gpu >= (1 - within) * ranked[0].screened_per_gpu][:most]
    for role in ("disaggregated", "mixed"):
        first = next((entry for entry in ranked if entry.role == role), None)
        if first is not None and first not in chosen:
            chosen.append(first)
    chosen += [entry for entry in entries if entry.screened is not None and entry.screened.error]  # to be told of
    return [entry for entry in entries if any(entry is each for each in chosen)]


def _answers(book: AnswerBook, searches: Sequence[RateSearch], title: str) -> list[Found]:
    texts = [search.text() for search in searches]
    return [found_of(answer) for answer in book.look_up(search_task, texts, title, failed_answer, "searches")]
