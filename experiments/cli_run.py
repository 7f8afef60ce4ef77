"""`disagg run`: every run of an experiment, one after another, each into its own folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .cluster import cluster_of, world_size
from .errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, ExperimentError, ResourceError
from .experiment_file import LoadedExperiment, load_experiment
from .run_directory import RunDirectory, prepare_output
from .run_point import NoProgress, Progress, RunOutcome, RunPoint, run_points
from .workload import Workload

_SILENT_S: Final = 5.0

Runner = Callable[[Any, RunPoint, RunDirectory, Progress], RunOutcome]


def run_file(
    file: Path,
    *,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    output: Path | None = None,
    seed: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    timeout_s: float | None = None,
) -> int:
    """Run an experiment file and return the exit code. Raises ExperimentError for what its user can put right.

    `timeout_s` is for each run by itself.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ConfigError(f"--timeout {timeout_s:g}: must be more than 0 seconds")
    loaded = load_experiment(file, overrides, backend=backend, seed=seed)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    target = output if output is not None else Path("runs") / loaded.experiment.name
    points = run_points(loaded, target, timeout_s)
    if dry_run:
        _describe(loaded, points)
        return EXIT_OK

    def run() -> int:
        try:
            runner = runner_of(loaded.experiment.backend)
            todo = prepare_output(points, target, overwrite=overwrite, resume=resume)
            return run_all(runner, points, todo, overwrite=overwrite)
        except (ModelError, PolicyError) as error:
            raise ConfigError(str(error)) from error

    return run() if loaded.experiment.backend != "hardware" else in_world(run, points)


def in_world(run: Callable[[], int], points: Sequence[RunPoint]) -> int:
    """`run`, as rank 0 does; in an MPI world that somebody else started the other ranks serve their executors."""
    from ..runtime.launcher import LaunchError, check_world_size, inside_mpi

    world = inside_mpi()
    if world is None:
        return run()
    from ..runtime.mpi_main import run_rank

    def part() -> int:
        """This rank's part; what is wrong with the experiment is known to all, and told by rank 0."""
        try:
            if len(points) > 1:
                raise ConfigError(
                    f"an existing {world.kind} world can serve one run, and this experiment has {len(points)};"
                    " allowed: no sweep and repeats: 1, or a start outside it"
                )
            if points[0].timeout_s is not None:
                raise ConfigError(f"--timeout cannot end an existing {world.kind} world; give the limit to its starter")
            try:
                check_world_size(world_size(points[0].experiment), world.size, f"{world.kind} world")
            except LaunchError as error:
                raise ResourceError(str(error)) from error
            if world.rank == 0:
                return run()
            from .run_hardware import serve_hardware

            serve_hardware(points[0].experiment)
            return EXIT_OK
        except ExperimentError as error:
            if world.rank == 0:
                for problem in error.problems:
                    print(f"error: {problem}", file=sys.stderr)
            else:
                time.sleep(_SILENT_S)  # the first rank to leave ends the others: let that be the one that speaks
            return error.exit_code

    return run_rank(part)


def run_all(runner: Runner, points: Sequence[RunPoint], todo: Sequence[RunPoint], *, overwrite: bool = False) -> int:
    """Run `todo` in order; a run that fails is told, leaves nothing and does not stop the others. Returns the exit code.

    An interrupt stops them all.
    """
    code = EXIT_OK
    if len(todo) < len(points):
        print(f"{len(points) - len(todo)} of {len(points)} runs are finished already")
    for number, point in enumerate(todo, start=1):
        label = f"[{number}/{len(todo)}] {point.title}"
        with RunDirectory(point, overwrite=overwrite) as writer, progress_bar(label) as progress:
            outcome = runner(point.experiment, point, writer, progress)
            if outcome.exit_code == EXIT_OK:
                summary = writer.finish(outcome)
        if outcome.exit_code == EXIT_INTERRUPTED:
            print(f"interrupted: {label}; nothing of it was kept", file=sys.stderr)
            return EXIT_INTERRUPTED
        if outcome.exit_code != EXIT_OK:
            print(f"error: {label}: {outcome.message or 'the run failed'}; nothing was kept", file=sys.stderr)
            code = code or outcome.exit_code
            continue
        failed = f", {outcome.num_failed} failed" if outcome.num_failed else ""
        print(f"{label}: {outcome.num_requests} requests{failed} -> {point.directory}")
        if outcome.num_failed:
            print(f"warning: {label}: {outcome.num_failed} of {outcome.num_requests} requests failed", file=sys.stderr)
        if outcome.message:
            print(f"{label}: {outcome.message}")
        if "error" in summary and len(summary) == 1:
            print(f"warning: {label}: no summary: {summary['error']}", file=sys.stderr)
    return code


def runner_of(backend: str) -> Runner:
    if backend == "hardware":
        try:
            from .run_hardware import run_hardware
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "mpi4py", "safetensors"):
                raise
            raise ConfigError(f"--backend hardware needs {error.name}: pip install 'disagg[runtime]'") from None
        return run_hardware
    from .run_simulation import run_simulation

    return run_simulation


def _describe(loaded: LoadedExperiment, points: Sequence[RunPoint]) -> None:
    """What would run: the executors of each distinct cluster, the load, the folders."""
    shown: set[str] = set()
    for point in loaded.points:
        cluster = cluster_of(point.experiment)
        lines = [
            f"  executor {e.id}: {e.role.value}, tp {e.tensor_parallel_size} pp {e.pipeline_parallel_size},"
            f" {e.num_blocks} blocks of {e.tokens_per_block} tokens"
            for e in cluster.executors
        ]
        text = "\n".join(lines)
        if text not in shown:
            shown.add(text)
            print(f"cluster ({point.experiment.backend}, {point.experiment.cluster.profile}):\n{text}")
    workload = Workload(loaded.points[0].experiment)
    print(f"workload: {workload.num_requests} requests, max_tokens {workload.max_tokens}")
    print(f"{len(points)} {'run' if len(points) == 1 else 'runs'}:")
    for run_point in points:
        print(f"  {run_point.directory} (seed {run_point.seed})")


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar = bar
        self._task = task

    def update(self, completed: int, total: int | None) -> None:
        self._bar.update(self._task, completed=completed, total=total)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        yield _Bar(bar, bar.add_task(escape(label), total=None))
