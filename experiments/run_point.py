"""One run of an experiment, before and after: what the runners of both worlds are given, and what they give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .config import Experiment
from .experiment_file import LoadedExperiment
from .streams import repeat_seed


@dataclass(frozen=True)
class RunPoint:
    """One run: a sweep point and a repeat. `experiment` has the run's own seed and no sweep; `directory` is to be made.

    `name` is empty where nothing is swept.
    """

    name: str
    repeat: int
    values: dict[str, Any]
    directory: Path
    experiment: Experiment
    experiment_file: Path
    timeout_s: float | None = None  # of wall time

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def title(self) -> str:
        """For progress bars and messages."""
        return f"{self.name or self.experiment.name} repeat {self.repeat}"


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. `exit_code` 0 unless the run as a whole failed; a failed request alone does not fail a run.

    `num_cut` counts outputs that were longer than max_tokens. `device` and `manifest` go into manifest.json.
    """

    num_requests: int
    num_failed: int = 0
    num_cut: int = 0
    exit_code: int = 0
    message: str | None = None
    device: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def none_served(first_error: str | None) -> str:
    """The message of a run of which no request was served: with why not, since nothing of it is kept to look it up in."""
    return f"no request could be served{f'; the first: {first_error}' if first_error else ''}"


class Progress(Protocol):
    """How far a run is; may be called often."""

    def update(self, completed: int, total: int | None) -> None: ...


class NoProgress:
    """Says nothing."""

    def update(self, completed: int, total: int | None) -> None:
        pass


def run_points(loaded: LoadedExperiment, output: Path, timeout_s: float | None = None) -> list[RunPoint]:
    """All runs of an experiment, in the order in which they run: repeats of one point follow each other.

    A single run, without sweep and repeats, goes straight into `output`; otherwise each into `output/<point>/<repeat>`,
    the point being `all` where nothing is swept. Repeat r has the seed `seed + r` at every point.
    """
    repeats = loaded.experiment.repeats
    single = not loaded.experiment.sweep and repeats == 1
    found: list[RunPoint] = []
    for point in loaded.points:
        for repeat in range(repeats):
            experiment = point.experiment.model_copy(
                update={"seed": repeat_seed(point.experiment.seed, repeat), "sweep": {}, "repeats": 1}
            )
            directory = output if single else output / (point.name or "all") / str(repeat)
            found.append(RunPoint(point.name, repeat, point.values, directory, experiment, loaded.file, timeout_s))
    return found
