"""A run again in the simulator with another run's decisions: every route is the one that was recorded, times are the model's.

What is left between such a replay and the recorded run is timing alone; what lies between it and the free simulation
comes from decisions that diverged. The routes go in through the interface of every policy: the orchestrator, the
executors and their schedulers are the ones that always run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from ..policies.interfaces import AdmissionPolicy, RoutingPolicy
from ..policies.registry import register
from ..policies.views import ExecutorPool, FleetView
from ..policies.vocabulary import PS_PER_S, Admission, Admit, Hold, Reject, Request, Role, Route, RouteMixed, Routing
from ..reports.runs import ReportError, Run
from .config import Experiment, validate_mapping
from .config_keys import PolicyChoice
from .config_loader import read_document
from .errors import ConfigError, ExperimentError
from .run_directory import RunDirectory
from .run_point import NoProgress, RunPoint
from .run_simulation import run_simulation

if TYPE_CHECKING:
    import pandas as pd

ROUTES: Final = "recorded_routes"
ADMISSION: Final = "recorded_admission"
_SOURCE: Final = "decisions.parquet of a run"

# one recorded answer as plain values: picoseconds from the first question to this answer, what it was, and its executors
Choice = tuple[int, str, int | None, int | None]
Choices = Mapping[str, list[Choice]]  # by the user's request id, as text: parameters of a policy are JSON


# ---- policies that are given the answers ----------------------------------------------------------------------------


class _Answers:
    """The recorded answers of one stage, each given once, in order; a hold lasts as long as it was recorded to."""

    def __init__(self, choices: Choices) -> None:
        self._left: dict[int, list[Choice]] = {
            int(request): [(wait, answer, executor, generation) for wait, answer, executor, generation in found[::-1]]
            for request, found in choices.items()
        }
        self._asked: dict[int, int] = {}

    def next(self, request: int, now: int) -> Hold | Choice | None:
        """What was recorded for `request`; None once nothing is left."""
        left = self._left.get(request)
        if not left:
            return None
        until = self._asked.setdefault(request, now) + left[-1][0]
        if now < until:
            return Hold(until)
        del self._asked[request]
        return left.pop()


@register(ROUTES, kind="routing", source=_SOURCE)
class RecordedRoutes(RoutingPolicy):
    """The executors that another run chose for each request; a request that it never routed goes to any healthy one.

    `context` and `generation` hold the answers of each stage, by request id.
    """

    def __init__(self, *, rng: Random, context: Choices, generation: Choices) -> None:
        super().__init__(rng=rng)
        self._context = _Answers(context)
        self._generation = _Answers(generation)

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.context if fleet.context.num_healthy else fleet.mixed
        found = self._context.next(request.id, fleet.now)
        if isinstance(found, Hold):
            return found
        if found is None:
            other = _any_of(pool, request)
            return RouteMixed(other) if pool.role is Role.MIXED else Route(context=other)
        _, answer, executor, generation = found
        if answer == "reject" or executor is None:
            return Reject("rejected in the recorded run")
        return RouteMixed(executor) if answer == "mixed" else Route(executor, generation)

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        found = self._generation.next(request.id, fleet.now)
        if isinstance(found, Hold):
            return found
        if found is None:
            return Route(generation=_any_of(fleet.generation if fleet.generation.num_healthy else fleet.mixed, request))
        _, answer, executor, _ = found
        if answer == "reject" or executor is None:
            return Reject("rejected in the recorded run")
        return Route(generation=executor)


def _any_of(pool: ExecutorPool, request: Request) -> int:
    rows = pool.healthy_rows
    return int(rows[request.id % len(rows)].executor_id)


@register(ADMISSION, kind="admission", source=_SOURCE)
class RecordedAdmission(AdmissionPolicy):
    """Lets each request in as late after its intended send as `delays` (picoseconds by request id) says.

    Then it holds or rejects it as was recorded in `answers`.
    """

    def __init__(self, *, rng: Random, answers: Choices, delays: Mapping[str, int]) -> None:
        super().__init__(rng=rng)
        self._answers = _Answers(answers)
        self._delays = {int(request): delay for request, delay in delays.items()}

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        sent = request.arrival + self._delays.get(request.id, 0)
        if fleet.now < sent:
            return Hold(sent)
        found = self._answers.next(request.id, fleet.now)
        if isinstance(found, Hold):
            return found
        return Reject("rejected in the recorded run") if found is not None and found[1] == "reject" else Admit()


# ---- what was recorded ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """The answers of a run by stage and request id, and how late its client sent each request (picoseconds)."""

    context: dict[str, list[Choice]]
    generation: dict[str, list[Choice]]
    admission: dict[str, list[Choice]]
    delays: dict[str, int]

    def applied(self, config: Experiment, with_dispatch: bool) -> Experiment:
        """`config` with policies that give these answers, and with these delays of the client if `with_dispatch`."""
        routes = {"context": self.context, "generation": self.generation}
        admission = {"answers": self.admission, "delays": self.delays if with_dispatch else {}}
        policy = config.policy.model_copy(
            update={
                "router": PolicyChoice.model_validate({"name": ROUTES, **routes}),
                "context_router": None,
                "generation_router": None,
                "mixed_router": None,
                "admission": PolicyChoice.model_validate({"name": ADMISSION, **admission}),
                "roles": None,
                "migration": None,
            }
        )
        return config.model_copy(update={"policy": policy})


def recorded_choices(run: Run) -> Recorded:
    """What `run` decided. Raises ReportError for a run without decisions, or one in which executors changed roles."""
    if not len(run.decisions):
        raise ReportError(f"{run.path / 'decisions.parquet'}: holds no decisions")
    return choices_of(run.decisions, run.requests)


def choices_of(decisions: pd.DataFrame, requests: pd.DataFrame) -> Recorded:
    """The same from the two tables of a run."""
    if (decisions["stage"] == "role").any():
        raise ReportError("executors changed roles in that run (policy.roles): its routes cannot be taken elsewhere")
    if (decisions["stage"] == "migration").any():
        raise ReportError("requests moved in that run (policy.migration): its routes cannot be taken elsewhere")
    stages: dict[str, dict[str, list[Choice]]] = {"context": {}, "generation": {}, "admission": {}}
    asked: dict[tuple[str, str], int] = {}
    columns = ("request_id", "stage", "answer", "executor", "generation_executor", "at_s")
    values = (decisions.sort_values("at_s", kind="stable")[name].tolist() for name in columns)
    for request_id, stage, answer, executor, generation, at_s in zip(*values):
        request, at = str(int(request_id)), round(at_s * PS_PER_S)
        if stage == "context" and ("admission", request) in asked:  # held at the gate, and let in just now
            stages["admission"].setdefault(request, []).append(
                (at - asked.pop(("admission", request)), "admit", None, None)
            )
        first = asked.setdefault((stage, request), at)
        if answer != "hold":
            choice = (at - first, str(answer), _executor(executor), _executor(generation))
            stages[stage].setdefault(request, []).append(choice)
            del asked[stage, request]
    late = (requests["dispatch_s"] - requests["arrival_s"]).clip(lower=0.0)
    delays = {str(int(i)): round(s * PS_PER_S) for i, s in zip(requests["request_id"], late)}
    return Recorded(stages["context"], stages["generation"], stages["admission"], delays)


def _executor(value: Any) -> int | None:
    return None if value is None or value != value else int(value)  # a missing one is None or NaN


# ---- the run again --------------------------------------------------------------------------------------------------


def experiment_of(run: Run, root: Path | None = None) -> Experiment:
    """The experiment that `run` ran. Relative paths in it start at `root`, by default the folder of its file.

    Raises ConfigError for a configuration that this version does not read.
    """
    document = read_document(run.path / "config.yaml")
    try:
        experiment = validate_mapping(document.data, {})
    except ValueError as error:
        raise ConfigError(f"{run.path / 'config.yaml'}: was written by another version: {error}") from error
    if root is None:
        folder = Path(str(run.manifest.get("experiment_file") or "")).parent
        root = folder if folder.is_dir() else run.path
    experiment._root = root.resolve()
    return experiment


def replay_routes(
    simulated: Run, recorded: Run, target: Path, *, with_dispatch: bool = False, root: Path | None = None
) -> Run:
    """Simulate the experiment of `simulated` once more, on the routes of `recorded`; the run directory is `target`.

    With `with_dispatch` the client is as late as in `recorded` too. Raises ExperimentError if it cannot be simulated.
    """
    choices = recorded_choices(recorded)
    config = choices.applied(experiment_of(simulated, root), with_dispatch)
    file = Path(str(simulated.manifest.get("experiment_file") or "config.yaml"))
    point = RunPoint(str(simulated.manifest.get("point") or ""), simulated.repeat, {}, target, config, file)
    with RunDirectory(point) as writer:
        outcome = run_simulation(config, point, writer, NoProgress())
        if outcome.exit_code:
            raise ExperimentError(f"the replay of {recorded.path} failed: {outcome.message}")
        writer.finish(outcome)
    if with_dispatch:
        _dispatched_late(target / "requests.parquet", choices.delays)
    return Run(target)


def _dispatched_late(path: Path, delays: Mapping[str, int]) -> None:
    """The wait at the gate stands for the client's delay: have the rows say so."""
    import pandas as pd

    rows = pd.read_parquet(path)
    late = rows["request_id"].map(lambda i: delays.get(str(int(i)), 0) / PS_PER_S)
    rows["dispatch_s"] = rows["arrival_s"] + late
    rows.to_parquet(path, compression="zstd", index=False)
