"""`disagg run`: every run of an experiment, one after another, each into its own folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .cluster import cluster_of, placements_of, world_size
from .errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUN_FAILED,
    ConfigError,
    ExperimentError,
    ResourceError,
    did_you_mean,
)
from .experiment_file import LoadedExperiment, load_experiment
from .progress_bar import progress_bar
from .run_directory import prepare_output
from .run_point import RunPoint, run_points
from .sweep import Tally, run_in_parallel, workers_for
from .sweep_table import print_sweep
from .sweep_task import Runner as Runner
from .sweep_task import run_one, try_one
from .sweep_workers import EXECUTORS, Pool, open_pool
from .workload import Workload

MOST_WORKERS: Final = 1024
_SILENT_S: Final = 5.0


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
    workers: int | None = None,
    executor: str = "processes",
    cold: bool = False,
) -> int:
    """Run an experiment file and return the exit code. Raises ExperimentError for what its user can put right.

    `timeout_s` is for each run by itself. `workers` (default: one a core) and `executor` are for simulations; runs on
    hardware follow each other, on one warm cluster while it stays the same; `cold`: on a new one each.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ConfigError(f"--timeout {timeout_s:g}: must be more than 0 seconds")
    check_workers(workers, executor)

    def load_and_run(world: Pool | None) -> int:
        loaded = load_experiment(file, overrides, backend=backend, seed=seed)
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        target = output if output is not None else Path("runs") / loaded.experiment.name
        points = run_points(loaded, target, timeout_s)
        on_hardware = loaded.experiment.backend == "hardware"
        if on_hardware and (executor != "processes" or (workers or 1) > 1):
            raise ConfigError(
                "--workers and --executor are for simulations: runs on hardware follow each other; allowed: --workers 1"
            )
        if cold and not on_hardware:
            print("warning: --cold has no effect in a simulation: no cluster is kept warm", file=sys.stderr)
        if dry_run:
            _describe(loaded, points)
            return EXIT_OK
        if world is None and not on_hardware:
            _refuse_many_ranks()

        def run_todo(runner: Runner, todo: Sequence[RunPoint]) -> int:
            if world is not None:
                return run_in_parallel(world, points, todo, overwrite=overwrite)
            if on_hardware and len(todo) > 1 and not cold:
                return run_all_warm(runner, points, todo, overwrite=overwrite)
            num_workers = 1 if on_hardware else workers_for(todo, workers)
            if num_workers == 1 and executor == "processes":
                return run_all(runner, points, todo, overwrite=overwrite)
            with open_pool(executor, num_workers) as pool:
                return EXIT_OK if pool is None else run_in_parallel(pool, points, todo, overwrite=overwrite)

        def run() -> int:
            try:
                runner = runner_of(loaded.experiment.backend)
                todo = prepare_output(points, target, overwrite=overwrite, resume=resume)
                if len(todo) < len(points):
                    print(f"{len(points) - len(todo)} of {len(points)} runs are finished already")
                began = time.monotonic()
                code = run_todo(runner, todo)
                if len(points) > 1 and code in (EXIT_OK, EXIT_RUN_FAILED):
                    print_sweep(points, len(todo), time.monotonic() - began)
                return code
            except (ModelError, PolicyError) as error:
                raise ConfigError(str(error)) from error

        return in_world(run, points) if on_hardware else run()

    if executor != "mpi":
        return load_and_run(None)
    with open_pool(executor, 0) as pool:  # before anything can fail: the other ranks wait for it
        return EXIT_OK if pool is None else load_and_run(pool)


def _refuse_many_ranks() -> None:
    """Raises ConfigError where every rank of a world would compute the same runs, into the same folder."""
    from ..runtime.launcher import inside_mpi

    found = inside_mpi()
    if found is not None and found.size > 1:
        raise ConfigError(
            f"a simulation in an {found.kind} world of {found.size} ranks; allowed: --executor mpi, or one rank"
        )


def check_workers(workers: int | None, executor: str) -> None:
    """Raises ConfigError."""
    if executor not in EXECUTORS:
        raise ConfigError(
            f"--executor {executor}: must be one of {', '.join(EXECUTORS)}{did_you_mean(executor, EXECUTORS)}"
        )
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"--workers {workers}: must be 1 to {MOST_WORKERS}, or auto")


def parse_workers(text: str) -> int | None:
    """Of `--workers`: None for auto. Raises ConfigError."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"--workers {text}: must be a whole number or auto")
    return int(text)


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

    An interrupt stops them all. What a single run raises goes through.
    """
    tally = Tally(len(points), len(todo))
    run = run_one if len(points) == 1 else try_one
    for point in todo:
        label = tally.label(point)
        with progress_bar(label) as progress:
            result = run(runner, point, progress, overwrite=overwrite)
        if result.exit_code == EXIT_INTERRUPTED:
            print(f"interrupted: {label}; nothing of it was kept", file=sys.stderr)
            return EXIT_INTERRUPTED
        tally.tell(point, result)
    return tally.exit_code()


def run_all_warm(
    runner: Runner, points: Sequence[RunPoint], todo: Sequence[RunPoint], *, overwrite: bool = False
) -> int:
    """`run_all` on hardware, where runs that follow each other on equal clusters share a warm one."""
    from .run_warm import run_warm, warm_groups

    tally = Tally(len(points), len(todo))
    for group in warm_groups(todo):
        label = tally.label(group[0]) + (f" and {len(group) - 1} more on its cluster" if len(group) > 1 else "")
        with progress_bar(label) as progress:
            if len(group) > 1:
                progress.update(0, len(group))
                is_over = not run_warm(group, tally.tell, progress, overwrite=overwrite)
            else:
                result = try_one(runner, group[0], progress, overwrite=overwrite)
                is_over = result.exit_code == EXIT_INTERRUPTED
                if not is_over:
                    tally.tell(group[0], result)
        if is_over:
            print(f"interrupted: {label}; what had not ended was not kept", file=sys.stderr)
            return EXIT_INTERRUPTED
    return tally.exit_code()


def runner_of(backend: str) -> Runner:
    if backend == "hardware":
        for name in ("torch", "mpi4py", "safetensors"):  # looked for, not loaded: most of a run needs none of them here
            if not _is_installed(name):
                raise ConfigError(f"--backend hardware needs {name}: pip install 'disagg[runtime]'")
        from .run_hardware import run_hardware

        return run_hardware
    from .run_simulation import run_simulation

    return run_simulation


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _describe(loaded: LoadedExperiment, points: Sequence[RunPoint]) -> None:
    """What would run: the executors of each distinct cluster, the load, the folders."""
    shown: set[str] = set()
    for point in loaded.points:
        cluster = cluster_of(point.experiment)
        lines = [
            f"  executor {e.id}: {e.role.value}, tp {e.tensor_parallel_size} pp {e.pipeline_parallel_size},"
            f" {e.num_blocks} blocks of {e.tokens_per_block} tokens" + (f", {p.keys.profile}" if p.keys.profile else "")
            for e, p in zip(cluster.executors, placements_of(point.experiment), strict=True)
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
