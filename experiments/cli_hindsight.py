"""`disagg oracle` and `disagg regret`: what was possible, beside what policies did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ..policies.interfaces import PolicyError
from ..policies.registry import load
from ..reports.regret import REGRET_TABLE, summarise_regret
from ..reports.runs import ReportError, Run, find_runs
from .cli_run import check_workers
from .config_loader import Document
from .errors import ConfigError, ExperimentError
from .experiment_file import load_experiment
from .forced_routes import experiment_of
from .oracle_gap import Gap, check_size, gap_of, gap_task, gap_text, instance_of
from .progress_bar import progress_bar
from .regret import regrets_of
from .run_directory import check_folder, write_atomically_into
from .simulated_rows import SimulatedRows
from .sweep_workers import completed, num_cores, open_pool

COMPARED: Final = ("oracle", "least_tokens", "round_robin")
_MOST_INSTANCES: Final = 1000


# ---- disagg oracle --------------------------------------------------------------------------------------------------


def oracle_file(
    file: Path,
    *,
    overrides: Sequence[str],
    num_requests: int,
    num_instances: int,
    policies: Sequence[str],
    workers: int | None,
    as_json: bool,
) -> None:
    """Print the gap of the oracle, and of `policies`, to the best of all routings. Raises ExperimentError."""
    check_workers(workers, "processes")
    if not 1 <= num_instances <= _MOST_INSTANCES:
        raise ConfigError(f"--instances {num_instances}: must be 1 to {_MOST_INSTANCES}")

    def plain(document: Document) -> None:
        for key in ("sweep", "repeats"):
            document.data.pop(key, None)

    config = load_experiment(file, overrides, backend="simulation", edit=plain).experiment
    names = list(dict.fromkeys(("oracle", *(policies or COMPARED))))
    try:
        for name in names:
            load(name, "routing", str(config.root))
    except PolicyError as error:
        raise ConfigError(f"--policy: {error}") from error
    num_routings = check_size(config, num_requests)
    instances = [instance_of(config, num_requests, number) for number in range(num_instances)]
    gaps: dict[int, Gap] = {}
    with open_pool("processes", min(workers or num_cores(), num_instances)) as pool:
        if pool is None:
            return
        with progress_bar(f"{num_instances} instances of {num_routings} routings") as progress:
            progress.update(0, num_instances)
            for number, answer in completed(pool, gap_task, [gap_text(each, names) for each in instances]):
                if isinstance(answer, ExperimentError):
                    raise answer
                if isinstance(answer, Exception):
                    raise ExperimentError(str(answer) or type(answer).__name__) from answer
                gaps[number] = gap_of(answer)
                progress.update(len(gaps), num_instances)
    found = [gaps[number] for number in range(num_instances)]
    print(json.dumps(_gap_data(found, names), indent=2) if as_json else _gap_text(found, names, num_requests))


def _gap_data(gaps: Sequence[Gap], names: Sequence[str]) -> dict[str, Any]:
    return {
        "is_bound": all(gap.gap("oracle") == 0 for gap in gaps),
        "instances": [asdict(gap) | {"gaps": {name: gap.gap(name) for name in names}} for gap in gaps],
    }


def _gap_text(gaps: Sequence[Gap], names: Sequence[str], num_requests: int) -> str:
    widths = [max(len(name), 9) for name in names]
    lines = [
        f"{len(gaps)} instances of {num_requests} requests, {gaps[0].num_routings} routings each.",
        "Mean latency of the best routing, and by how much each policy's is over it:",
        "",
        "      seed   best (s)  " + "  ".join(name.rjust(width) for name, width in zip(names, widths)),
    ]
    for gap in gaps:
        shares = [gap.gap(name) for name in names]
        cells = ["failed" if share is None else f"{100 * share:.2f} %" for share in shares]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        lines.append(f"{gap.seed:>10}  {gap.best_s:9.4f}  {row}")
    known = [share for gap in gaps if (share := gap.gap("oracle")) is not None]
    num_best = sum(share == 0 for share in known)
    if num_best == len(gaps):
        verdict = "The oracle's is the best one on all of them: a bound there, and only there."
    else:
        worst = f", {100 * sum(known) / len(known):.2f} % over it on average, {100 * max(known):.2f} % at worst"
        verdict = f"The oracle is no bound: it has the best one on {num_best} of {len(gaps)}{worst if known else ''}."
    return "\n".join([*lines, "", verdict])


# ---- disagg regret --------------------------------------------------------------------------------------------------


def _runs_below(folder: Path) -> str:
    """Of a sweep's folder: which runs could have been meant."""
    try:
        runs = [run.path for run in find_runs([folder])]
    except ReportError:
        return ""
    shown = ", ".join(map(str, runs[:3])) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
    return f" itself; allowed: one of {shown}"


def regret_run(run_dir: Path, num_requests: int, *, as_json: bool) -> None:
    """Write `regret.parquet` into a simulated run's folder, where `disagg report` finds it. Raises ConfigError."""
    if num_requests < 1:
        raise ConfigError(f"--requests {num_requests}: must be at least 1")
    try:
        check_folder(run_dir)
        run = Run(run_dir)
        if not run.manifest:
            raise ConfigError(f"{run_dir}: holds no finished run{_runs_below(run_dir)}")
        if run.backend != "simulation":
            raise ConfigError(f"{run_dir}: ran on {run.backend}; regret needs a simulated run, to be simulated again")
        config = experiment_of(run).model_copy(update={"seed": run.seed or 0})
        requests = run.requests
        requests = requests.assign(excluded=requests["phase"].isin(run.warmup_phases) | requests["excluded"])
        rows = SimulatedRows(requests, run.decisions)
        with progress_bar(f"decisions on {num_requests} requests") as progress:
            found = [asdict(regret) for regret in regrets_of(config, num_requests, rows, progress.update)]
    except ReportError as error:
        place = "" if str(run_dir) in str(error) else f"{run_dir}: "
        raise ConfigError(f"{place}{error}") from error
    if not found:
        raise ConfigError(f"{run_dir}: no decision had an alternative: there is one executor of each role")
    import pandas as pd

    write_atomically_into(run_dir / REGRET_TABLE, lambda path: pd.DataFrame(found).to_parquet(path, index=False))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    summary = summarise_regret(found)
    print(
        f"{summary.num_decisions} decisions on {num_requests} requests: {100 * summary.share_best:.0f} % were the best"
        f" possible; on average one cost all requests together {summary.mean_text} of latency."
    )
    for each in summary.worst:
        print(
            f"  {each['at_s']:9.3f} s  request {each['request_id']} ({each['num_prompt_tokens']} tokens), {each['stage']}:"
            f" {each['chosen']} cost {each['regret_s']:.3f} s more than {each['best']}"
        )
    print(f"wrote {run_dir / REGRET_TABLE}")
