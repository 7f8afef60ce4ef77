"""One run of a sweep, from its description to its folder, in whatever process it is computed; and that description as text."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .config import Experiment, validate_mapping
from .errors import EXIT_CONFIGURATION, EXIT_OK, EXIT_RUN_FAILED, ExperimentError
from .run_directory import RunDirectory
from .run_point import NoProgress, Progress, RunOutcome, RunPoint

Runner = Callable[[Any, RunPoint, RunDirectory, Progress], RunOutcome]


@dataclass(frozen=True)
class RunResult:
    """What is told of a run that was tried. `no_summary` says why there is none; `details` is a traceback."""

    exit_code: int
    num_requests: int = 0
    num_failed: int = 0
    message: str | None = None
    no_summary: str | None = None
    details: str | None = None


def run_one(runner: Runner, point: RunPoint, progress: Progress, *, overwrite: bool = False) -> RunResult:
    """Run `point` into its folder, which appears if it succeeds. What the runner raises goes through."""
    no_summary = None
    with RunDirectory(point, overwrite=overwrite) as writer:
        outcome = runner(point.experiment, point, writer, progress)
        if outcome.exit_code == EXIT_OK:
            summary = writer.finish(outcome)
            no_summary = summary["error"] if "error" in summary and len(summary) == 1 else None
    return RunResult(outcome.exit_code, outcome.num_requests, outcome.num_failed, outcome.message, no_summary)


def try_one(runner: Runner, point: RunPoint, progress: Progress, *, overwrite: bool = False) -> RunResult:
    """`run_one` for a run that must not stop the others: what it raises becomes its result."""
    try:
        return run_one(runner, point, progress, overwrite=overwrite)
    except (ModelError, PolicyError) as error:
        return RunResult(EXIT_CONFIGURATION, message=str(error))
    except ExperimentError as error:
        return RunResult(error.exit_code, message="; ".join(error.problems))
    except Exception as error:
        text = " ".join(str(error).split())
        message = f"{type(error).__name__}{': ' if text else ''}{text}"
        return RunResult(EXIT_RUN_FAILED, message=message, details=traceback.format_exc())


# ---- as text --------------------------------------------------------------------------------------------------------


def plain_of(experiment: Experiment) -> dict[str, Any]:
    """All of an experiment as plain values, for a worker that reads no experiment file."""
    return {"experiment": experiment.expanded(), "root": str(experiment.root)}


def experiment_from(plain: Mapping[str, Any]) -> Experiment:
    """The experiment that `plain_of` wrote down."""
    experiment = validate_mapping(plain["experiment"], {})
    experiment._root = Path(plain["root"])
    return experiment


def task_of(point: RunPoint, *, overwrite: bool = False) -> str:
    """The whole run as JSON: a worker reads no experiment file, which may change meanwhile or be elsewhere."""
    return json.dumps(
        {
            **plain_of(point.experiment),
            "name": point.name,
            "repeat": point.repeat,
            "values": point.values,
            "directory": str(point.directory.absolute()),
            "experiment_file": str(point.experiment_file),
            "timeout_s": point.timeout_s,
            "overwrite": overwrite,
        }
    )


def point_of(task: str) -> tuple[RunPoint, bool]:
    """The run that `task_of` wrote down, and whether it may overwrite."""
    data = json.loads(task)
    experiment = experiment_from(data)
    point = RunPoint(
        name=data["name"],
        repeat=data["repeat"],
        values=data["values"],
        directory=Path(data["directory"]),
        experiment=experiment,
        experiment_file=Path(data["experiment_file"]),
        timeout_s=data["timeout_s"],
    )
    return point, data["overwrite"]


def simulate_task(task: str) -> str:
    """Compute one run in the simulator; a worker's only deed. Returns a RunResult as JSON."""
    from .run_simulation import run_simulation

    point, overwrite = point_of(task)
    return json.dumps(asdict(try_one(run_simulation, point, NoProgress(), overwrite=overwrite)))


def result_of(text: str) -> RunResult:
    return RunResult(**json.loads(text))
