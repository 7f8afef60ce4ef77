"""The commands about finished runs, given their folders: their options. Each does its work in a module loaded when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_format import Format, Json, wants_json
from .errors import ConfigError

Replay = Annotated[
    bool,
    typer.Option("--replay/--no-replay", help="Simulate the hardware's own routes, to tell timing from decisions."),
]
Root = Annotated[
    Path | None, typer.Option(help="Where the experiment's relative paths start; default: its file's folder.")
]
RankedBy = Annotated[str, typer.Option(help="What policies are ranked by, e.g. p90_e2e_latency.")]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders, or folders of them.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Compare runs in one self-contained page, with its figures and tables beside it."""
    from .cli_report import report_runs

    report_runs(runs, output)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="SIM_RUN HW_RUN", help="Two runs, or two folders of a sweep.")],
    ranking: Annotated[
        bool, typer.Option("--ranking", help="Compare the order of policies; a second HW folder may follow.")
    ] = False,
    metric: RankedBy = "mean_ttft",
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json, comparison.md and plots.")] = None,
    replay: Replay = True,
    root: Root = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Say how far a simulation was off the hardware, by metric, stage and cause; two hardware runs give the floor."""
    from .cli_compare import compare_rankings, compare_runs

    as_json = wants_json(format, json)
    if len(runs) < 2 or len(runs) > (3 if ranking else 2):
        raise ConfigError(
            f"{len(runs)} folders: SIM_RUN HW_RUN are wanted, and with --ranking one more HW_RUN may follow"
        )
    if ranking:
        compare_rankings(runs[0], runs[1:], metric, as_json=as_json)
    else:
        compare_runs(runs[0], runs[1], as_json=as_json, output=output, replay=replay, root=root)


def fidelity(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the runs of all experiments.")],
    output: Annotated[Path, typer.Option(help="The page to write, .md; data and plots go beside it.")],
    commit: Annotated[str | None, typer.Option(help="Of profile and predictions; default: what the runs say.")] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.json", help="A page beside it, whose other experiments are taken over."),
    ] = None,
    intervals: Annotated[
        Path | None,
        typer.Option(metavar="PREDICTIONS.json", help="Of `disagg interval`: its intervals stand beside the figures."),
    ] = None,
    metric: RankedBy = "mean_ttft",
    replay: Replay = True,
    root: Root = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Write the table of all experiments that were simulated and run on hardware, once or twice."""
    from .cli_compare import write_fidelity

    as_json = wants_json(format, json)
    write_fidelity(
        folder,
        output,
        commit=commit,
        metric=metric,
        as_json=as_json,
        replay=replay,
        root=root,
        earlier=earlier,
        intervals=intervals,
    )


def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    format: Format = "text",
    json: Json = False,
) -> None:
    """Feed the event logs of a run to fresh cores and check that they give the same commands."""
    from .cli_report import replay_run

    replay_run(run_dir, as_json=wants_json(format, json))


def conform(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    format: Format = "text",
    json: Json = False,
) -> None:
    """Simulate a hardware run on its own times and check that it makes the same routes and batches."""
    from .cli_report import conform_run

    conform_run(run_dir, as_json=wants_json(format, json))


def regret(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    requests: Annotated[int, typer.Option(help="Requests whose decisions are looked at, drawn by the seed.")] = 20,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Say what the decisions of a simulated run cost: each again with every other executor, all others as they were."""
    from .cli_hindsight import regret_run

    regret_run(run_dir, requests, as_json=wants_json(format, json))
