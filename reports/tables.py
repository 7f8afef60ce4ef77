"""The tables of a report: cells as a page shows them, and rows as CSV files hold them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from .comparison import Case, Cell, MetricError, label_of, split_key
from .drawing import scale_of
from .statistics import Estimate


class ShownCell(Struct, frozen=True):
    """Text of a cell: the value, its interval, and marks as (class, words): best, same, differs, few, none."""

    value: str
    interval: str = ""
    marks: tuple[tuple[str, str], ...] = ()


class ShownRow(Struct, frozen=True):
    label: str
    unit: str
    cells: tuple[ShownCell, ...]
    note: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 12)}f}"


def signed_percent(value: float) -> str:
    """A share as a percentage with its sign, two digits where it is small."""
    if abs(value) < 5e-6:
        return "0 %"
    text = f"{100 * value:+.2g} %" if abs(value) < 0.1 else f"{100 * value:+.0f} %"
    return text.replace("-", "−")


def interval_text(estimate: Estimate, factor: float) -> str:
    if estimate.low is None and estimate.high is None:
        return ""
    low = "?" if estimate.low is None else number(estimate.low * factor)
    high = "?" if estimate.high is None else number(estimate.high * factor)
    return f"[{low}, {high}]"


def policy_rows(table: Sequence[Sequence[Cell]]) -> list[ShownRow]:
    """`comparison.compare_policies` as shown: a row per metric in one unit, a cell per policy."""
    rows: list[ShownRow] = []
    for cells in table:
        _, metric = split_key(cells[0].key)
        factor, unit = scale_of([cell.estimate.value for cell in cells], metric.unit)
        best = next((cell.estimate.value for cell in cells if cell.is_best), None)
        # a row of single observations has no best: nothing says that it would be so again
        single = not any(cell.estimate.has_interval or cell.difference for cell in cells)
        alone = single or not any(cell.is_best for cell in cells)
        shown = tuple(
            ShownCell(
                number(None if cell.estimate.value is None else cell.estimate.value * factor),
                interval_text(cell.estimate, factor),
                () if cell.estimate.value is None else _marks(cell, best, alone),
            )
            for cell in cells
        )
        once = all(cell.estimate.method in ("one run", "") for cell in cells)
        rows.append(ShownRow(label_of(cells[0].key), unit, shown, "one run: no interval" if once else ""))
    return rows


def _marks(cell: Cell, best: float | None, alone: bool) -> tuple[tuple[str, str], ...]:
    marks: list[tuple[str, str]] = []
    if cell.estimate.too_few:
        marks.append(("few", "n too small"))
    if alone:
        return tuple(marks)
    if cell.is_best:
        return (("best", "best"), *marks)
    apart = cell.distinguishable
    if apart is None:
        if not marks:
            marks.append(("none", "other requests: not paired" if cell.difference is None else "n too small to tell"))
    elif apart and cell.difference is not None and cell.difference.value is not None:
        relative = cell.difference.value / best if best else None
        marks.append(("differs", signed_percent(relative) if relative is not None else "differs"))
    else:
        marks.append(("same", "not distinguishable"))
    return tuple(marks)


def error_rows(errors: dict[str, list[MetricError]]) -> list[ShownRow]:
    """Errors by metric, a cell per policy: simulation / hardware, the relative error and its interval over repeats."""
    keys = list(dict.fromkeys(error.key for found in errors.values() for error in found))
    rows: list[ShownRow] = []
    for key in keys:
        by_policy = {policy: next((e for e in found if e.key == key), None) for policy, found in errors.items()}
        known = [e for e in by_policy.values() if e is not None]
        _, metric = split_key(key)
        factor, unit = scale_of([value for e in known for value in (e.simulation, e.hardware)], metric.unit)
        if all(e.simulation == 0 and e.hardware == 0 for e in known):
            continue
        rows.append(ShownRow(label_of(key), unit, tuple(_error_cell(e, factor, unit) for e in by_policy.values())))
    return rows


def _error_cell(error: MetricError | None, factor: float, unit: str) -> ShownCell:
    if error is None:
        return ShownCell("–")
    both = f"{number(error.simulation * factor)} / {number(error.hardware * factor)}"
    if unit == "share":
        return ShownCell(f"{signed_percent(error.absolute).removesuffix(' %')} points", both)
    if error.relative.value is None:
        return ShownCell(f"{number(error.absolute * factor)} absolute", both)
    interval = ""
    if error.relative.low is not None and error.relative.high is not None:
        interval = f" [{signed_percent(error.relative.low)}, {signed_percent(error.relative.high)}]"
    return ShownCell(signed_percent(error.relative.value), both + interval)


# ---- CSV ------------------------------------------------------------------------------------------------------------


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """RFC 4180 with a header; None is an empty field. Text that a spreadsheet would run as a formula is quoted by '."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_field(value) for value in row])
    return text.getvalue()


def _field(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value


POLICY_HEADER = (
    "experiment", "backend", "condition", "policy", "metric", "unit", "value", "low_95", "high_95", "n", "method",
    "n_too_small", "best", "difference_from_best", "difference_low_95", "difference_high_95", "difference_method",
    "distinguishable_from_best",
)  # fmt: skip


def policy_records(experiment: str, backend: str, condition: str, table: Sequence[Sequence[Cell]]) -> list[list[Any]]:
    """`compare_policies` as rows under POLICY_HEADER, values in the metric's own unit."""
    return [
        [
            experiment,
            backend,
            condition,
            cell.policy,
            cell.key,
            split_key(cell.key)[1].unit,
            cell.estimate.value,
            cell.estimate.low,
            cell.estimate.high,
            cell.estimate.n,
            cell.estimate.method,
            cell.estimate.too_few,
            cell.is_best,
            *((d.value, d.low, d.high, d.method) if (d := cell.difference) is not None else (None,) * 4),
            cell.distinguishable,
        ]
        for row in table
        for cell in row
    ]


ERROR_HEADER = (
    "experiment", "condition", "policy", "metric", "unit", "simulation", "hardware", "error", "relative_error",
    "relative_low_95", "relative_high_95", "n_pairs",
)  # fmt: skip


def error_records(experiment: str, condition: str, errors: dict[str, list[MetricError]]) -> list[list[Any]]:
    """Rows under ERROR_HEADER, values in the metric's own unit."""
    return [
        [
            experiment,
            condition,
            policy,
            e.key,
            split_key(e.key)[1].unit,
            e.simulation,
            e.hardware,
            e.absolute,
            e.relative.value,
            e.relative.low,
            e.relative.high,
            e.relative.n,
        ]
        for policy, found in errors.items()
        for e in found
    ]


def run_table(cases: Sequence[tuple[str, Case]]) -> tuple[list[str], list[list[Any]]]:
    """One row per run with every plain number of its summary; pairs are (experiment, case)."""
    plain = [
        {key: value for key, value in case.summary.items() if value is None or isinstance(value, int | float | str)}
        for _, case in cases
    ]
    keys = list(dict.fromkeys(key for summary in plain for key in summary))
    header = ["experiment", "backend", "condition", "policy", "repeat", "seed", "path", *keys]
    rows = [
        [
            experiment,
            case.run.backend,
            case.condition,
            case.policy,
            case.run.repeat,
            case.run.seed,
            str(case.run.path),
            *(summary.get(key) for key in keys),
        ]
        for (experiment, case), summary in zip(cases, plain)
    ]
    return header, rows


def executor_table(cases: Sequence[tuple[str, Case]]) -> tuple[list[str], list[list[Any]]]:
    """One row per executor of each run."""
    entries = [(experiment, case, entry) for experiment, case in cases for entry in case.summary["executors"]]
    keys = list(dict.fromkeys(key for _, _, entry in entries for key in entry))
    header = ["experiment", "backend", "condition", "policy", "repeat", *keys]
    rows = [
        [experiment, case.run.backend, case.condition, case.policy, case.run.repeat, *(entry.get(key) for key in keys)]
        for experiment, case, entry in entries
    ]
    return header, rows
