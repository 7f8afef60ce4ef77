"""The table at the end of a sweep: one line a point, read back from the summaries of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import fill
from typing import Any, Final

from .run_point import RunPoint

MOST_LINES: Final = 40
_COLUMNS: Final = (  # title, key of summary.json, factor, digits
    ("mean TTFT ms", "mean_ttft_s", 1e3, 1),
    ("p99 TTFT ms", "p99_ttft_s", 1e3, 1),
    ("mean TPOT ms", "mean_tpot_s", 1e3, 2),
    ("p99 TPOT ms", "p99_tpot_s", 1e3, 2),
    ("mean e2e s", "mean_e2e_latency_s", 1.0, 2),
    ("tok/s", "throughput", 1.0, 0),
    ("within SLO %", "slo_attainment", 1e2, 1),
)
_LEAST_FIRST: Final = ("mean e2e s", "p99 TPOT ms", "requests", "runs", "tok/s", "mean TPOT ms", "failed")


def sweep_lines(points: Sequence[RunPoint]) -> list[tuple[str, ...]]:
    """Header and one line a point, in the points' order: means over its finished repeats. Empty columns are left out."""
    by_point: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        kept = by_point.setdefault(point.name or "all", [])
        try:
            found = json.loads((point.directory / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it failed, and was told
        if isinstance(found, dict):
            kept.append(found)
    columns = [c for c in _COLUMNS if any(_is_number(run.get(c[1])) for runs in by_point.values() for run in runs)]
    lines = [("", "runs", "requests", "failed", *(title for title, *_ in columns))]
    for name, runs in by_point.items():
        counts = [sum(int(run.get(key, 0)) for run in runs) for key in ("num_requests", "num_failed")]
        lines.append((name, str(len(runs)), *map(str, counts), *(_mean(runs, *column[1:]) for column in columns)))
    return lines


def _mean(runs: Sequence[Mapping[str, Any]], key: str, factor: float, digits: int) -> str:
    values = [run[key] for run in runs if _is_number(run.get(key))]
    return f"{factor * fmean(values):,.{digits}f}" if values else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fitting(lines: Sequence[tuple[str, ...]], width: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """The lines, less as many of the columns that matter least as `width` characters ask for, and what was left out.

    Titles stand on two lines, and a name may fold to half the width.
    """
    kept = list(range(len(lines[0])))
    left_out: list[str] = []
    for title in _LEAST_FIRST:
        if _natural_width(lines, kept, width) <= width:
            break
        if title in lines[0]:
            kept.remove(lines[0].index(title))
            left_out.append(title)
    return [tuple(line[number] for number in kept) for line in lines], left_out


def _natural_width(lines: Sequence[tuple[str, ...]], kept: Sequence[int], width: int) -> int:
    cells = [[*two_lines(lines[0][number]).split("\n"), *(line[number] for line in lines[1:])] for number in kept]
    widest = [max(map(len, column)) for column in cells]
    return 2 + min(widest[0], width // 2) + sum(widest[1:]) + 2 * len(kept)


def two_lines(title: str) -> str:
    return title.replace(" ", "\n", 1)


def print_sweep(points: Sequence[RunPoint], num_run: int, wall_s: float, width: int | None = None) -> None:
    """The table, and how long the runs took that were made now; of many points the first.

    `width` in characters is that of the terminal; what is written to a file is as wide as it needs to be.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if width is None and console.is_terminal:
        width = console.width
    lines, left_out = sweep_lines(points), list[str]()
    has_repeats = any(int(line[1]) > 1 for line in lines[1:])
    if width is not None:
        lines, left_out = fitting(lines, width)
    header, *rows = lines
    console.width = width or 10_000  # lines that wrap lose nothing, columns that shrink do
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for number, title in enumerate(header):
        most = None if number or width is None else width // 2
        table.add_column(
            two_lines(title),
            justify="right" if number else "left",
            no_wrap=bool(number),
            overflow="fold",
            max_width=most,
        )
    for line in rows[:MOST_LINES]:
        table.add_row(*line)
    console.print(table)
    notes = []
    if len(rows) > MOST_LINES:
        notes.append(f"and {len(rows) - MOST_LINES} more points; disagg report shows all")
    if left_out:
        notes.append(f"no room for {', '.join(left_out)}; disagg report shows all")
    if has_repeats:
        notes.append("each value is the mean over a point's runs: a p99 that of the runs' p99s")
    notes.append(f"{num_run} of {len(points)} runs in {wall_s:.1f} s of wall time")
    print("\n".join(fill(note, width or 10_000) for note in notes))
