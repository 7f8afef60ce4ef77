"""The table at the end of a sweep: one line a point, read back from the summaries of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
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
    columns = [c for c in _COLUMNS if any(c[1] in run for runs in by_point.values() for run in runs)]
    lines = [("", "runs", "requests", "failed", *(title for title, *_ in columns))]
    for name, runs in by_point.items():
        counts = [sum(int(run.get(key, 0)) for run in runs) for key in ("num_requests", "num_failed")]
        lines.append((name, str(len(runs)), *map(str, counts), *(_mean(runs, *column[1:]) for column in columns)))
    return lines


def _mean(runs: Sequence[Mapping[str, Any]], key: str, factor: float, digits: int) -> str:
    values = [run[key] for run in runs if isinstance(run.get(key), (int, float))]
    return f"{factor * fmean(values):,.{digits}f}" if values else ""


def print_sweep(points: Sequence[RunPoint], num_run: int, wall_s: float) -> None:
    """The table, and how long the runs took that were made now; of many points the first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, *lines = sweep_lines(points)
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 200)  # lines that wrap lose nothing, columns that shrink do
    table = Table(box=box.SIMPLE)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for line in lines[:MOST_LINES]:
        table.add_row(*line)
    console.print(table)
    if len(lines) > MOST_LINES:
        print(f"and {len(lines) - MOST_LINES} more points; disagg report shows all")
    print(f"{num_run} of {len(points)} runs in {wall_s:.1f} s of wall time")
