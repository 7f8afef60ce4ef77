"""What the leaderboard computes: every policy in every scenario, under the same seeds, and what becomes of that in one table.

Four studies: the scenario's own load with every seed, by which policies are ranked; other loads; older reports; the regret
of sampled decisions in a shorter run. A run is a task of its own whose answer depends on nothing else, so the table is
the same whatever the number of workers, and a run that was answered is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from msgspec.structs import replace

from ..reports.board import Board, BoardPolicy, BoardRegret, BoardRun, BoardScenario
from .answer_book import AnswerBook
from .cluster import placements_of
from .config import Experiment
from .config_workload import ConcurrencyPhase, Phase, TraceDataset
from .errors import ExperimentError
from .leaderboard_entries import Entry, Scenario
from .manifest import git_commit
from .plan_rates import at_rate, base_rate
from .regret import regret_task
from .run_simulation import costs_of
from .simulated_rows import objectives_of, simulate_summary
from .streams import repeat_seed
from .sweep_task import experiment_from, plain_of
from .workload import phase_counts

MEASURES: Final = (
    "slo_attainment",
    "mean_ttft_s",
    "p50_ttft_s",
    "p90_ttft_s",
    "p99_ttft_s",
    "mean_tpot_s",
    "p90_tpot_s",
    "p99_tpot_s",
    "mean_e2e_latency_s",
    "p99_e2e_latency_s",
    "num_requests",
    "num_completed",
)
_VERSION: Final = 1  # of what a task means: answers to another one are not taken up


@dataclass(frozen=True)
class Size:
    """How much is computed. `seeds` None: as many as the scenario's `repeats`; `requests` cuts each phase that counts.

    Of `load_seeds` and `stale_seeds` no more are taken than of `seeds`.
    """

    seeds: int | None = None
    requests: int | None = None
    loads: tuple[float, ...] = (0.6, 0.8, 1.2)  # times the scenario's own
    load_seeds: int = 5
    report_intervals_ms: tuple[float, ...] = (10.0, 100.0, 1000.0)
    stale_seeds: int = 5
    stale_scenarios: tuple[str, ...] = ("heavy_tails", "bursts", "shared_prefixes")
    regret_scenarios: tuple[str, ...] = ("heavy_tails", "bursts", "shared_prefixes", "conditional")
    regret_requests: int = 3  # whose decisions are looked at again
    regret_run: int = 120  # requests of the run in which they are, behind a third as many of warm-up


FULL: Final = Size()
QUICK: Final = Size(
    seeds=5,
    requests=60,
    loads=(0.8, 1.2),
    load_seeds=5,
    report_intervals_ms=(1000.0,),
    stale_seeds=5,
    stale_scenarios=("heavy_tails",),
    regret_scenarios=("heavy_tails", "conditional"),
    regret_requests=2,
    regret_run=80,
)


@dataclass(frozen=True)
class _Run:
    """One simulation: where its result goes, and what to simulate."""

    place: BoardRun
    experiment: Experiment
    digest: str


def compute(
    scenarios: Sequence[Scenario],
    entries: Sequence[Entry],
    size: Size,
    begin: Callable[[], AnswerBook],
    metric: str,
    quick: bool,
) -> Board:
    """The whole table. `begin` is called before the first simulation; ConfigError comes before that call."""
    board = [_described(scenario) for scenario in scenarios]
    runs: list[_Run] = []
    regrets: list[tuple[str, str, str]] = []
    for number, scenario in enumerate(scenarios):
        left_out: dict[str, str] = {}
        no_regret = _no_regret(scenario.experiment)
        for entry in entries:
            why = entry.why_not(scenario.experiment)
            if why:
                left_out[entry.label] = why
                continue
            config = scenario.with_entry(entry)
            runs += _runs(scenario, entry, config, size, _is_chosen(scenario, scenarios, size.stale_scenarios))
            no_regret = no_regret or _no_regret(config)
            if _no_regret(config):
                continue
            if _is_chosen(scenario, scenarios, size.regret_scenarios):
                short = cut_short(config, size.regret_run, -(-size.regret_run // 3))
                text = task_text(short, entry.digest, num_requests=size.regret_requests)
                regrets.append((scenario.name, entry.label, text))
        board[number] = replace(board[number], left_out=left_out, no_regret=no_regret)
    texts = [task_text(run.experiment, run.digest) for run in runs]
    book = begin()
    answers = book.look_up(run_task, texts, "simulations", _failed, "runs")
    told = book.look_up(regret_task, [text for *_, text in regrets], "regret", _failed, "runs")
    samples = [_filled(run.place, json.loads(answer)) for run, answer in zip(runs, answers, strict=True)]
    found: list[BoardRegret] = []
    for (scenario_name, label, _), answer in zip(regrets, told, strict=True):
        data = json.loads(answer)
        found.append(BoardRegret(scenario_name, label, data.get("regrets") or [], data.get("error")))
    policies = [
        BoardPolicy(e.label, e.source, e.summary, e.partner, e.is_oracle, e.is_own)
        for e in entries
        if any(run.place.policy == e.label for run in runs)
    ]
    kind = next((entry.kind for entry in entries), "routing")
    return Board(metric, quick, git_commit(), tuple(board), tuple(policies), tuple(samples), tuple(found), kind)


def _no_regret(config: Experiment) -> str:
    """Why one decision of its runs cannot be changed with all others as they were, or nothing."""
    if config.policy.roles is not None:
        return "no regret: executors change roles"
    return "no regret: requests move while they run" if config.policy.migration is not None else ""


def _is_chosen(scenario: Scenario, scenarios: Sequence[Scenario], names: Sequence[str]) -> bool:
    """Whether a costly study is made here: in the scenarios named for it, or in the first one if none of them runs."""
    chosen = [each.name for each in scenarios if each.name in names] or [scenarios[0].name]
    return scenario.name in chosen


def _runs(scenario: Scenario, entry: Entry, config: Experiment, size: Size, is_stale: bool) -> Iterator[_Run]:
    config = cut_short(config, size.requests)
    seeds = size.seeds or config.repeats

    def run(changed: Experiment, load: float, interval_ms: float, repeat: int) -> _Run:
        changed = _repeat(changed, repeat)
        place = BoardRun(scenario.name, entry.label, load, interval_ms, repeat, changed.seed)
        return _Run(place, changed, entry.digest)

    for repeat in range(seeds):
        yield run(config, 1.0, 0.0, repeat)
    if not any(isinstance(phase, ConcurrencyPhase) for phase in config.workload.phases):
        base = base_rate(config)
        for load in size.loads:
            changed = at_rate(config, base * load, base)
            for repeat in range(min(size.load_seeds, seeds)):
                yield run(changed, load, 0.0, repeat)
    if is_stale:
        for interval_ms in size.report_intervals_ms:
            cluster = config.cluster.model_copy(
                update={"report_interval_ms": interval_ms, "report_on_batch_change": False}
            )
            for repeat in range(min(size.stale_seeds, seeds)):
                yield run(config.model_copy(update={"cluster": cluster}), 1.0, interval_ms, repeat)


def _repeat(config: Experiment, repeat: int) -> Experiment:
    """Another seed; of a trace, whose requests no seed changes, the next part too."""
    update: dict[str, Any] = {"seed": repeat_seed(config.seed, repeat), "repeats": 1}
    dataset = config.workload.dataset
    if isinstance(dataset, TraceDataset):
        skip = dataset.skip + repeat * sum(phase_counts(config))
        update["workload"] = config.workload.model_copy(update={"dataset": dataset.model_copy(update={"skip": skip})})
    return config.model_copy(update=update)


def cut_short(config: Experiment, requests: int | None, warm_up: int | None = None) -> Experiment:
    """The experiment with so many requests at most in each phase, and `warm_up` in one that does not count.

    None: as many as it has. A warm-up that is cut short leaves caches cold, and batches that are still filling.
    """
    phases: list[Phase] = []
    for phase in config.workload.phases:
        most = warm_up if phase.exclude_from_results else requests
        least = [number for number in (phase.requests, most) if number is not None]
        phases.append(phase.model_copy(update={"requests": min(least)}) if least else phase)
    return config.model_copy(update={"workload": config.workload.model_copy(update={"phases": phases})})


def _described(scenario: Scenario) -> BoardScenario:
    config = scenario.experiment
    kinds: dict[str, int] = {}
    for executor in placements_of(config):
        kind = f"{executor.role.value} tp{executor.tensor_parallel_size}"
        kind += f" on {executor.keys.profile}" if executor.keys.profile else ""
        kinds[kind] = kinds.get(kind, 0) + 1
    is_open = not any(isinstance(phase, ConcurrencyPhase) for phase in config.workload.phases)
    return BoardScenario(
        scenario.name,
        scenario.text,
        ", ".join(f"{number} {kind}" for kind, number in kinds.items()),
        config.cluster.profile,
        base_rate(config) if is_open else None,
        objectives_of(config),
        {},
    )


def _filled(place: BoardRun, answer: dict[str, Any]) -> BoardRun:
    return replace(place, values=answer.get("values") or {}, error=answer.get("error"))


# ---- as a worker's task ---------------------------------------------------------------------------------------------


def task_text(config: Experiment, digest: str, **more: Any) -> str:
    """All that a run's answer depends on: measured costs and users' files change in place."""
    costs = sha256(repr(sorted(costs_of(config).items())).encode()).hexdigest()
    return json.dumps({"version": _VERSION, **plain_of(config), "costs": costs, "file": digest, **more}, sort_keys=True)


def run_task(text: str) -> str:
    """A worker's deed: one simulation; its measures under `values`, or what went wrong under `error`, as JSON."""
    try:
        summary = simulate_summary(experiment_from(json.loads(text)))
    except ExperimentError as error:
        return _failed("; ".join(error.problems))
    return json.dumps({"values": {key: summary[key] for key in MEASURES}})


def _failed(error: str) -> str:
    return json.dumps({"error": " ".join(error.split())})
