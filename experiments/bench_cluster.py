"""`disagg bench cluster`: an experiment on the user's cluster, reported as disaggServerBenchmark reports it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .bench_options import BenchOptions
from .cli_run import Runner, in_world, run_all, runner_of
from .cluster import world_size
from .errors import ConfigError, ResourceError
from .experiment_file import LoadedExperiment, load_experiment
from .run_directory import MANIFEST, prepare_output
from .run_point import RunPoint, run_points

if TYPE_CHECKING:
    from ..reports.bench_table import BenchLine
    from ..runtime.hosts import Placing

MOST_WARM_UPS: Final = 10_000
_WIDTH: Final = 160


@dataclass(frozen=True)
class BenchRun:
    """How and where to run it. `warm_up`: requests over every context × generation pair before the measured ones."""

    backend: str | None = "hardware"
    hosts: str | None = None
    hostfile: Path | None = None
    launch_agent: str | None = None
    warm_up: int = 1
    seed: int | None = None
    output: Path | None = None
    overwrite: bool = False
    timeout_s: float | None = None
    output_csv: Path | None = None
    iteration_stats: bool = False
    kv_transfer_time: bool = True
    as_json: bool = False


def bench_cluster(file: Path, options: BenchOptions, how: BenchRun, overrides: Sequence[str] = ()) -> int:
    """Run the benchmark, print its table, and return the exit code. Raises ExperimentError for what can be put right."""
    options.check()
    _check(how)
    loaded = load_experiment(file, overrides, backend=how.backend, seed=how.seed, edit=options.apply)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    target = how.output if how.output is not None else Path("runs") / f"bench-{loaded.experiment.name}"
    points = run_points(loaded, target, how.timeout_s)

    def run() -> int:
        with redirect_stdout(sys.stderr) if how.as_json else nullcontext():
            try:
                runner = _runner(loaded, points, how)
                todo = prepare_output(points, target, overwrite=how.overwrite, can_resume=False)
                code = run_all(runner, points, todo, overwrite=how.overwrite)
            except (ModelError, PolicyError) as error:
                raise ConfigError(str(error)) from error
            done = [point for point in points if (point.directory / MANIFEST).is_file()]
            if done:
                _report(target)
        _tell(done, how)
        return code

    return run() if loaded.experiment.backend != "hardware" else in_world(run, points)


def _check(how: BenchRun) -> None:
    if how.hosts is not None and how.hostfile is not None:
        raise ConfigError("--host and --hostfile exclude each other; allowed: one of them")
    if not 0 <= how.warm_up <= MOST_WARM_UPS:
        raise ConfigError(f"--warm-up {how.warm_up}: allowed: 0 to {MOST_WARM_UPS}")
    if how.timeout_s is not None and not how.timeout_s > 0:
        raise ConfigError(f"--timeout {how.timeout_s:g}: must be more than 0 seconds")
    if how.output_csv is not None and not how.output_csv.resolve().parent.is_dir():
        raise ConfigError(f"--output-csv {how.output_csv}: there is no folder {how.output_csv.parent}")
    elsewhere = [
        flag
        for flag, value in (
            ("--host", how.hosts),
            ("--hostfile", how.hostfile),
            ("--launch-agent", how.launch_agent),
        )
        if value is not None
    ]
    if how.backend == "simulation" and elsewhere:
        raise ConfigError(f"{elsewhere[0]} concerns processes, and --backend simulation starts none")
    if elsewhere == ["--launch-agent"]:
        raise ConfigError("--launch-agent needs --host or --hostfile: this machine alone needs none")


def _runner(loaded: LoadedExperiment, points: Sequence[RunPoint], how: BenchRun) -> Runner:
    runner = runner_of(loaded.experiment.backend)
    if loaded.experiment.backend != "hardware":
        return runner
    from .run_hardware import HardwareOptions, run_hardware

    placing = _placing(how, max(world_size(point.experiment) for point in points))

    def placed(text: str) -> None:
        print(text, flush=True)

    return partial(run_hardware, options=HardwareOptions(placing, how.warm_up, placed))


def _placing(how: BenchRun, num_ranks: int) -> Placing | None:
    """The hosts to run on; None for this one alone, which is looked at first, or in a world that somebody else started."""
    from ..runtime.hosts import HostError, Placing, check_hosts, local_first, parse_hosts, read_hostfile, slurm_hosts
    from ..runtime.launcher import LaunchError, inside_mpi

    try:
        if how.hosts is not None:
            hosts = parse_hosts(how.hosts)
        elif how.hostfile is not None:
            hosts = read_hostfile(how.hostfile)
        else:
            hosts = () if inside_mpi() is not None else slurm_hosts() or ()
        if not hosts:
            return None
        if inside_mpi() is not None:
            raise HostError("--host and --hostfile concern a world that is yet to be started, and this is one already")
        placing = Placing(local_first(hosts), how.launch_agent)
        check_hosts(placing)
        placing.rank_hosts(num_ranks)
        return None if placing.is_here else placing
    except HostError as error:
        raise ConfigError(str(error)) from error
    except LaunchError as error:
        raise ResourceError(str(error)) from error


# ---- afterwards -----------------------------------------------------------------------------------------------------


def _report(target: Path) -> None:
    from ..reports.page import write_report
    from ..reports.runs import ReportError

    try:
        write_report([target], target / "report.html")
    except ReportError as error:
        print(f"warning: no report: {error}", file=sys.stderr)


def _tell(points: Sequence[RunPoint], how: BenchRun) -> None:
    """Write and print the table of each run."""
    from ..reports.bench_table import bench_table, iteration_table, original_row, write_bench_table
    from ..reports.runs import Run

    told: list[dict[str, Any]] = []
    for point in points:
        run = Run(point.directory)
        lines = bench_table(run, transfers=how.kv_transfer_time)
        csv = how.output_csv if how.output_csv is None or len(points) == 1 else _numbered(how.output_csv, len(told))
        write_bench_table(lines, point.directory, csv)
        iterations = iteration_table(run) if how.iteration_stats else []
        told.append(
            {
                "directory": str(point.directory),
                "values": point.values,
                "repeat": point.repeat,
                "seed": point.seed,
                "backend": run.backend,
                "ranks": run.manifest.get("ranks", []),
                "clock_offsets": run.manifest.get("clock_offsets", []),
                "metrics": [line.columns() for line in lines],
                "original": original_row(lines),
                **({"iteration_stats": iterations} if how.iteration_stats else {}),
            }
        )
        if not how.as_json:
            _print_table(f"{point.title} -> {point.directory}", lines, iterations)
            for text in _clocks(told[-1]):
                print(text)
    if how.as_json:
        print(json.dumps({"runs": told}, indent=2))


def _clocks(told: dict[str, Any]) -> Iterator[str]:
    """How well the clocks of other hosts are known; nothing for a run on one host."""
    hosts = {rank["rank"]: rank["host"] for rank in told["ranks"]}
    for offset in told["clock_offsets"]:
        if offset["same_clock"]:
            continue
        known = [
            f"±{offset[when]['uncertainty_ns'] / 1e6:.3g} ms at the {when}"
            for when in ("start", "end")
            if offset[when] is not None
        ]
        drift = "" if offset["drift_ppm"] is None else f", drift {offset['drift_ppm']:.3g} ppm"
        how = "removed" if offset["applied"] else "not removed: it was not measured at the end"
        yield f"clock of rank {offset['rank']} on {hosts.get(offset['rank'])}: {', '.join(known)}{drift} ({how})"


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _print_table(title: str, lines: Sequence[BenchLine], iterations: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.width = max(console.width, _WIDTH)  # lines that wrap lose nothing, columns that shrink do
    table = _table(escape(title), ["metric", "unit", "n", "avg", "p50", "p90", "p99", "min", "max"])
    for line in lines:
        found = line.columns()
        first = found["value"] if not line.metric.is_distribution else found["avg"]
        rest = [found[name] for name in ("p50", "p90", "p99", "min", "max")]
        n = str(line.n) if line.metric.is_distribution else ""
        table.add_row(line.metric.name, line.metric.unit, n, _number(first), *map(_number, rest))
    console.print(table)
    if iterations:
        names = [name for name in iterations[0] if name != "role"]
        steps = _table("iteration statistics of each executor", ["role", *names])
        for entry in iterations:
            steps.add_row(entry["role"], *(_number(entry.get(name)) for name in names))
        console.print(steps)


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
