"""`disagg calibrate` and `disagg profile …`: their options. Each does its work in a module loaded when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_format import Format, Json, wants_json
from .errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError

profile_app = typer.Typer(
    name="profile",
    help="Measured profiles: what calibration found, and how well it is fitted.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Named = Annotated[
    str, typer.Argument(metavar="PROFILE", help="A shipped profile's name, or a file.", show_default=False)
]


def calibrate(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(metavar="PROFILE.json", help="File to write; default: profiles/NAME.json.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few points: to see that it works.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the sessions that have ended.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the profile and its samples.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give up after this long, with exit code 124.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the file.")
    ] = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Measure the cluster of an experiment file, and write the profile that simulations of it take their times from."""
    raise typer.Exit(
        run_calibration(
            file,
            output,
            quick=quick,
            resume=resume,
            overwrite=overwrite,
            timeout_s=timeout,
            overrides=sets or [],
            as_json=wants_json(format, json),
        )
    )


@profile_app.command()
def show(
    profile: Named,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots of measured against fitted.")] = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Print what a profile was measured for, its costs, and the residuals of each family of samples."""
    from .profile_show import show_profile

    show_profile(profile, plots, as_json=wants_json(format, json))


@profile_app.command()
def diff(
    first: Named,
    second: Named,
    limit: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Exit 1 if mean step times differ by more, e.g. 0.02.")
    ] = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Compare what two profiles predict for the same steps: mean and largest relative difference."""
    from .profile_diff import check_limit, print_diff

    check_limit(limit)
    worst = print_diff(first, second, as_json=wants_json(format, json))
    if limit is not None and worst > limit:
        raise typer.Exit(EXIT_RUN_FAILED)


def _check_free(output: Path, overwrite: bool) -> None:
    _check_output(output)
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output}: exists; allowed: --overwrite, or another file")


@profile_app.command()
def merge(
    profiles: Annotated[
        list[str],
        typer.Argument(metavar="PROFILE...", help="Shipped profiles' names, or files; of one device and model."),
    ],
    output: Annotated[Path, typer.Option(metavar="PROFILE.json", help="File to write.")],
    pool: Annotated[
        bool,
        typer.Option("--pool", help="Fit what several of them measured to the samples of all; else the first counts."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Put the executors, links and samples of several profiles of one device and one model into one."""
    from .profile_file import profile_path
    from .profile_merge import merge_profiles

    _check_free(output, overwrite)
    merge_profiles([profile_path(name, Path(".")) for name in profiles], output, pool=pool)
    print(f"wrote {output}")


@profile_app.command()
def refit(
    profile: Annotated[
        str,
        typer.Argument(metavar="PROFILE", help="A shipped profile's name, or a file with its samples beside it."),
    ],
    output: Annotated[Path, typer.Option(metavar="PROFILE.json", help="File to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Fit a profile anew from its samples: after a change of the cost model or of the fit."""
    from .profile_file import profile_path
    from .profile_refit import refit_profile

    _check_free(output, overwrite)
    refit_profile(profile_path(profile, Path(".")), output)
    print(f"wrote {output}")


def run_calibration(
    file: Path,
    output: Path | None = None,
    *,
    quick: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    timeout_s: float | None = None,
    overrides: list[str] | None = None,
    as_json: bool = False,
) -> int:
    """Calibrate and say what came of it; the exit code."""
    from datetime import UTC, datetime

    from .experiment_file import load_experiment
    from .profile_show import print_profile, profile_json

    if timeout_s is not None and not timeout_s > 0:
        raise ConfigError(f"--timeout {timeout_s:g}: must be more than 0 seconds")
    if output is not None:
        _check_output(output)
    loaded = load_experiment(file, overrides or [], backend="hardware")
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        from .calibrate import calibrate as measure
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "mpi4py", "safetensors"):
            raise
        raise ConfigError(f"calibrate needs {error.name}: pip install 'disagg[runtime]'") from None
    target = output if output is not None else Path("profiles") / f"{loaded.experiment.name}.json"

    def told(done: int, total: int, name: str) -> None:
        print(f"[{done}/{total}] {name}", file=sys.stderr, flush=True)

    profile = measure(
        loaded.experiment,
        target,
        now=datetime.now(UTC),
        quick=quick,
        resume=resume,
        overwrite=overwrite,
        timeout_s=timeout_s,
        told=told,
    )
    if as_json:
        print(profile_json(profile))
    else:
        print_profile(profile)
        print(f"wrote {target}; cluster.profile: {target} uses it")
    return EXIT_OK


def _check_output(output: Path) -> None:
    """Raises ConfigError unless it is a .json file: `cluster.profile` knows files by it, and names beside it end otherwise."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: allowed: a file name that ends in .json")
