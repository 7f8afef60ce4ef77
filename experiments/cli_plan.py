"""`disagg plan`: the cluster with the highest goodput per GPU under an experiment's objectives."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from .cli_run import check_workers
from .config_loader import Document
from .errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError
from .experiment_file import load_experiment
from .plan import Search, run_search
from .plan_ranking import Rank, plain_search, rank
from .plan_winner import write_winner
from .run_directory import write_atomically
from .sweep_workers import Pool, num_cores, open_pool

PLAN: Final = "plan.json"
SEARCHES: Final = "searches"


def plan_file(
    file: Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    seed: int | None = None,
    workers: int | None = None,
    executor: str = "processes",
    resume: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """Search, print the ranking, write plan.json and winner.yaml. Returns the exit code: 1 if a candidate failed, or none
    meets the objectives at any rate. Raises ExperimentError for what the user can put right.
    """
    check_workers(workers, executor)
    with open_pool(executor, workers or num_cores()) as pool:  # first: an MPI world's other ranks wait for it
        if pool is None:
            return EXIT_OK
        return _plan(file, overrides, output, seed, pool, resume=resume, overwrite=overwrite, as_json=as_json)


def _plan(
    file: Path,
    overrides: Sequence[str],
    output: Path | None,
    seed: int | None,
    pool: Pool,
    *,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    data: dict[str, Any] = {}

    def keep(document: Document) -> None:
        for key in ("sweep", "repeats"):
            document.data.pop(key, None)
        data.update(deepcopy(document.data))

    loaded = load_experiment(file, overrides, backend="simulation", seed=seed, edit=keep)
    base = loaded.experiment
    target = output if output is not None else Path("runs") / f"{base.name}-plan"
    _check(target, resume=resume, overwrite=overwrite)
    search = run_search(
        data, base, pool, target / SEARCHES, begin=lambda: _prepare(target, base.name, overwrite=overwrite)
    )
    ranks = rank(search)
    found = plain_search(search, ranks)
    winner = next((each for each in ranks if each.least_rate > 0), None)
    if winner is not None:
        path, objections = write_winner(search, winner, target)
        found["winner"] = {"candidate": winner.entry.candidate.label, "rate": winner.least_rate, "file": str(path)}
        for line in objections:
            print(f"warning: not on hardware as it is: {line}", file=sys.stderr)
    write_atomically(target / PLAN, json.dumps(found, indent=2) + "\n")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from .plan_report import print_plan

        print_plan(search, ranks, found.get("winner"))
    return _end(search, winner)


def _end(search: Search, winner: Rank | None) -> int:
    failed = [entry for entry in search.entries if entry.error]
    for entry in failed:
        print(f"error: {entry.candidate.label}: {entry.error}", file=sys.stderr)
    if winner is None:
        print("error: no candidate meets the objectives with every seed at any rate", file=sys.stderr)
    return EXIT_RUN_FAILED if failed or winner is None else EXIT_OK


def _check(target: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError for a folder that is not empty, without a word on what to do with it."""
    if resume and overwrite:
        raise ConfigError("--overwrite and --resume exclude each other")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not target.is_dir():
            raise ConfigError(f"--output {target}: is not a folder")
        if not (resume or overwrite):
            raise ConfigError(f"--output {target}: is not empty; allowed: --resume, --overwrite, or another folder")
        if not (target / PLAN).is_file():
            raise ConfigError(f"--output {target}: holds files and no plan of disagg; it is left alone")


def _prepare(target: Path, name: str, *, overwrite: bool) -> None:
    """Make the folder, and with `overwrite` remove what is there: only once the file is known to be searchable."""
    if overwrite and target.exists():
        shutil.rmtree(target)
    (target / SEARCHES).mkdir(parents=True, exist_ok=True)
    if not (target / PLAN).is_file():
        write_atomically(target / PLAN, json.dumps({"experiment": name, "ranking": None}) + "\n")
