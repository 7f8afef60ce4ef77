"""The `disagg` command. This module knows all its commands, in the order of `--help`, and the options of most of them; each
does its work in a module loaded when called.

Exit codes: 0 ok, 1 run failed, 2 configuration, 3 resources, 124 time-out, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_bench import bench_app
from .cli_calibrate import calibrate, profile_app
from .cli_finished_runs import compare, conform, fidelity, regret, replay, report
from .cli_format import Format, Json, wants_json
from .errors import EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_RESOURCES, EXIT_TIMEOUT, ConfigError, ExperimentError
from .noise import DRAWS, ERROR, JITTER, Noise


class _Interrupted(BaseException):
    """A KeyboardInterrupt, which typer and click would end in words and codes of their own, by version."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    name="disagg",
    cls=_Commands,
    help="Routing and scheduling policies for disaggregated LLM serving, in simulation and on hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench_app)
app.add_typer(profile_app)
app.command()(calibrate)

File = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. workload.phases.profiling.rate=4."),
]
Workers = Annotated[str, typer.Option(metavar="N|auto", help="Processes that simulate; auto: one a core.")]
Executor = Annotated[str, typer.Option(help="Whose: processes, mpi (under mpiexec), or dask.")]


@app.command()
def run(
    file: File,
    backend: Annotated[str | None, typer.Option(help="simulation or hardware; default: what the file says.")] = None,
    sets: Sets = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first repeat.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip runs that are finished.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give up a run after this long, with exit code 124.")
    ] = None,
    workers: Workers = "auto",
    executor: Executor = "processes",
    cold: Annotated[
        bool, typer.Option("--cold", help="On hardware: a new cluster for every run, not one while it stays the same.")
    ] = False,
) -> None:
    """Run an experiment: every point of its sweep, every repeat; simulations in parallel."""
    from .cli_run import parse_workers, run_file

    code = run_file(
        file,
        overrides=sets or [],
        backend=backend,
        output=output,
        seed=seed,
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume,
        timeout_s=timeout,
        workers=parse_workers(workers),
        executor=executor,
        cold=cold,
    )
    raise typer.Exit(code)


@app.command()
def plan(
    file: File,
    sets: Sets = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the plan; default: runs/NAME-plan.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first repeat.")] = None,
    workers: Workers = "auto",
    executor: Executor = "processes",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take up what is finished.")] = False,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Find the cluster and the routers with the highest goodput per GPU under the objectives, by simulation."""
    from .cli_plan import plan_file
    from .cli_run import parse_workers

    code = plan_file(
        file,
        overrides=sets or [],
        output=output,
        seed=seed,
        workers=parse_workers(workers),
        executor=executor,
        resume=resume,
        overwrite=overwrite,
        as_json=wants_json(format, json),
    )
    raise typer.Exit(code)


@app.command()
def interval(
    file: File,
    draws: Annotated[int, typer.Option(help="Simulations with noise, of each point and repeat.")] = DRAWS,
    jitter: Annotated[
        float, typer.Option(metavar="SHARE", help="Of step times, drawn for every epoch: hardware beside itself.")
    ] = JITTER,
    error: Annotated[
        float, typer.Option(metavar="SHARE", help="Of step times, drawn once a run: the cost model's own.")
    ] = ERROR,
    sets: Sets = None,
    output: Annotated[Path | None, typer.Option(help="Write the predictions to this file, .json.")] = None,
    workers: Workers = "auto",
    format: Format = "text",
    json: Json = False,
) -> None:
    """Predict by simulation, every figure with the interval in which it scatters as steps do; writes no runs."""
    from .cli_interval import interval_file
    from .cli_run import parse_workers

    interval_file(
        file,
        Noise(draws, jitter, error),
        overrides=sets or [],
        workers=parse_workers(workers),
        as_json=wants_json(format, json),
        output=output,
    )


@app.command()
def validate(file: File, backend: Annotated[str | None, typer.Option()] = None, sets: Sets = None) -> None:
    """Check an experiment file and list every problem by line and key."""
    from .cli_files import validate_file

    validate_file(file, sets or [], backend)


@app.command()
def expand(
    file: File,
    backend: Annotated[str | None, typer.Option()] = None,
    sets: Sets = None,
    format: Annotated[str, typer.Option("--format", help="yaml or json.")] = "yaml",
    json: Json = False,
) -> None:
    """Print an experiment file with every default written out."""
    from .cli_files import expand_file

    if format not in ("yaml", "json"):
        raise ConfigError(f"--format {format}: must be yaml or json")
    expand_file(file, sets or [], backend, as_json=json or format == "json")


@app.command()
def schema(format: Format = "json", json: Json = False) -> None:
    """Print the JSON Schema of the experiment file."""
    from .cli_files import print_schema

    wants_json(format, json)
    print_schema()


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="policies, profiles or models.", show_default=False)],
    format: Format = "text",
    json: Json = False,
) -> None:
    """List what an experiment file can name."""
    from .cli_files import list_names

    list_names(what, as_json=wants_json(format, json))


@app.command()
def init(
    template: Annotated[str, typer.Option(help="Which template; `--template list` lists them.")] = "disaggregated",
    output: Annotated[Path, typer.Option(help="File to write; - for the terminal.")] = Path("experiment.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Write a commented experiment file to start from."""
    from .cli_files import init_file

    init_file(template, output, overwrite=overwrite)


for command in (report, compare, fidelity, replay, conform):
    app.command()(command)


@app.command()
def leaderboard(
    scenarios: Annotated[
        list[str] | None, typer.Option("--scenario", metavar="NAME|FILE", help="Only these; experiment files too.")
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME|file.py:Class",
            help="Only these of the catalogue. Your own file comes on top: of all of it, unless you name some too.",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="What is compared, e.g. admission or queue_order, beside each scenario's own router.")
    ] = "routing",
    output: Annotated[Path | None, typer.Option(help="Folder of the page; default: runs/leaderboard.")] = None,
    metric: Annotated[str, typer.Option(help="What policies are ranked by, e.g. mean_ttft.")] = "slo_attainment",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Five seeds of 60 requests, the warm-up whole: shows large differences only."),
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the scenarios and end.")] = False,
    workers: Workers = "auto",
    executor: Executor = "processes",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the leaderboard in the output folder.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take up what is finished.")] = False,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Compare every policy of a kind, and your own, in a fixed set of scenarios: ranks with intervals, and where each loses."""
    from .cli_leaderboard import leaderboard as make
    from .cli_leaderboard import list_scenarios
    from .cli_run import parse_workers

    if listing:
        list_scenarios()
        return
    code = make(
        scenarios=scenarios or [],
        policies=policies or [],
        output=output,
        metric=metric,
        quick=quick,
        workers=parse_workers(workers),
        executor=executor,
        overwrite=overwrite,
        resume=resume,
        as_json=wants_json(format, json),
        kind=kind,
    )
    raise typer.Exit(code)


@app.command()
def oracle(
    file: File,
    requests: Annotated[int, typer.Option(help="Requests of an instance, at most 8.")] = 4,
    instances: Annotated[int, typer.Option(help="Instances, each with a seed of its own.")] = 5,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", metavar="NAME", help="Policies to set beside it.")
    ] = None,
    sets: Sets = None,
    workers: Workers = "auto",
    format: Format = "text",
    json: Json = False,
) -> None:
    """Say how far the oracle is from the best of all routings of a few requests: only where it is the best is it a bound."""
    from .cli_hindsight import oracle_file
    from .cli_run import parse_workers

    oracle_file(
        file,
        overrides=sets or [],
        num_requests=requests,
        num_instances=instances,
        policies=policies or [],
        workers=parse_workers(workers),
        as_json=wants_json(format, json),
    )


app.command()(regret)


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Look only, measure nothing.")] = False,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Say what MPI, UCX, torch and the devices here can do, what cannot work and why, and how fast each path is."""
    from .cli_doctor import examine

    raise typer.Exit(examine(quick=quick, as_json=wants_json(format, json)))


def main() -> None:
    """Entry point of the `disagg` command."""
    try:
        app()
    except ExperimentError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except TimeoutError as error:
        print(f"error: timed out: {error}", file=sys.stderr)
        raise SystemExit(EXIT_TIMEOUT) from None
    except (KeyboardInterrupt, _Interrupted):
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE)
        raise SystemExit(EXIT_RESOURCES if full else EXIT_CONFIGURATION) from None
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        raise SystemExit(EXIT_RESOURCES) from None


if __name__ == "__main__":
    main()
