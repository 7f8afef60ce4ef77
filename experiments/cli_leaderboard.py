"""`disagg leaderboard`: every policy in every scenario, as a page, as JSON and as Markdown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from ..reports.board import FORMAT_VERSION, Board, as_plain
from ..reports.comparison import split_key
from ..reports.ranking import metric_key
from ..reports.runs import ReportError
from .answer_book import AnswerBook
from .cli_run import check_workers
from .config_loader import read_document
from .errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError
from .leaderboard import FULL, MEASURES, QUICK, Size, compute
from .leaderboard_entries import entries_of, scenarios_of, shipped, text_of
from .run_directory import write_atomically
from .sweep_workers import Pool, num_cores, open_pool

BOARD: Final = "leaderboard.json"
PAGE: Final = "leaderboard.html"
TABLE: Final = "leaderboard.md"
ANSWERS: Final = "answers"
_BEGUN: Final = {"format_version": None}  # what leaderboard.json holds until the board is whole
_OWN_NAMES: Final = re.compile(  # with what a killed process left half written
    rf"(?P<partial>\.)?({re.escape(BOARD)}|{re.escape(PAGE)}|{re.escape(TABLE)}|[0-9a-f]{{32}}\.json)(?(partial)\.partial-\d+)"
)


def list_scenarios() -> None:
    """Print the shipped scenarios, those too whose trace is not there."""
    for path in shipped().values():
        print(f"{read_document(path).data['name']}: {text_of(path)}")


def leaderboard(
    *,
    scenarios: Sequence[str] = (),
    policies: Sequence[str] = (),
    output: Path | None = None,
    metric: str = "slo_attainment",
    size: Size | None = None,
    quick: bool = False,
    workers: int | None = None,
    executor: str = "processes",
    overwrite: bool = False,
    resume: bool = False,
    as_json: bool = False,
    kind: str = "routing",
) -> int:
    """Compute the board and write it. Returns the exit code: 1 if a policy failed somewhere, which the page tells.

    Raises ExperimentError for what the user can put right.
    """
    check_workers(workers, executor)
    with open_pool(executor, workers or num_cores()) as pool:  # first: an MPI world's other ranks wait for it
        if pool is None:
            return EXIT_OK
        key = _ranked_by(metric)
        target = output if output is not None else Path("runs") / "leaderboard"
        _check(target, overwrite=overwrite, resume=resume)
        try:
            board = _computed(
                scenarios, policies, size or (QUICK if quick else FULL), key, quick, pool, target, overwrite, kind
            )
        except (ModelError, PolicyError) as error:
            raise ConfigError(str(error)) from error
    _write(board, target)
    if as_json:
        print(json.dumps(as_plain(board), indent=2))
    else:
        from ..reports.board_text import as_text

        print(as_text(board))
        print(f"\nwrote {target / PAGE}, {BOARD}, {TABLE}")
    for line in board.notes():
        print(f"note: {line}", file=sys.stderr)
    failures = board.failures()
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _computed(
    scenarios: Sequence[str],
    policies: Sequence[str],
    size: Size,
    key: str,
    quick: bool,
    pool: Pool,
    target: Path,
    overwrite: bool,
    kind: str,
) -> Board:
    entries = entries_of(policies, kind)
    found, left_out = scenarios_of(scenarios)
    for line in left_out:
        print(f"warning: left out: {line}", file=sys.stderr)

    def begin() -> AnswerBook:
        """Only once everything is known to be good is anything made or removed."""
        if overwrite and target.exists():
            _remove_board(target)
        (target / ANSWERS).mkdir(parents=True, exist_ok=True)
        if not (target / BOARD).is_file():
            write_atomically(target / BOARD, json.dumps(_BEGUN) + "\n")
        return AnswerBook(pool, target / ANSWERS)

    return compute(found, entries, size, begin, key, quick)


def _write(board: Board, target: Path) -> None:
    from ..reports.board_page import as_page
    from ..reports.board_text import as_markdown

    page, text = as_page(board), as_markdown(board)  # all of it before any of it
    write_atomically(target / PAGE, page)
    write_atomically(target / TABLE, text)
    write_atomically(target / BOARD, json.dumps(as_plain(board), indent=1) + "\n")


def _ranked_by(metric: str) -> str:
    """Raises ConfigError."""
    try:
        key = metric_key(metric)
    except ReportError as error:
        raise ConfigError(str(error)) from error
    if key not in MEASURES or split_key(key)[1].better == "neither":
        allowed = ", ".join(name.removesuffix("_s") for name in MEASURES if not name.startswith("num_"))
        raise ConfigError(f"--metric {metric}: is not one that policies are ranked by; allowed: {allowed}")
    return key


def _check(target: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises ConfigError for a folder that is not empty, without a word on what to do with it."""
    if resume and overwrite:
        raise ConfigError("--overwrite and --resume exclude each other")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ConfigError(f"--output {target}: is not a folder")
    if not (resume or overwrite):
        raise ConfigError(f"--output {target}: is not empty; allowed: --resume, --overwrite, or another folder")
    if not (target / BOARD).is_file():
        raise ConfigError(f"--output {target}: holds files and no leaderboard of disagg; it is left alone")
    try:
        data = json.loads((target / BOARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    is_whole = isinstance(data, dict) and data.get("format_version") == FORMAT_VERSION and "standings" in data
    if data != _BEGUN and not is_whole:
        raise ConfigError(
            f"{target / BOARD}: is no leaderboard of format {FORMAT_VERSION}, the one known here; it is left alone"
        )


def _remove_board(target: Path) -> None:
    """Only what a leaderboard leaves behind; whatever else lies there stays. The file that says what it is goes last."""
    answers = target / ANSWERS
    paths = [path for folder in (answers, target) if folder.is_dir() for path in folder.iterdir()]
    paths = [path for path in paths if path.is_file() and _OWN_NAMES.fullmatch(path.name)]
    for path in sorted(paths, key=lambda path: path.name == BOARD):
        path.unlink()
