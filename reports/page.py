"""One self-contained HTML page from run directories, with its figures and tables as files beside it.

Everything is computed before anything is written: a run that cannot be read leaves no half report.
"""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .beside_figures import error_bars, request_scatter
from .comparison import (
    ERRORS,
    Case,
    Section,
    agreement,
    compare_policies,
    label_of,
    match_backends,
    metric_errors,
    rank_agreement,
    sections_of,
    split_key,
)
from .drawing import Drawing, Style, styles_of
from .figures import executor_timelines, latency_cdf, service_levels, stage_breakdown
from .metric_table import METRICS
from .page_words import error_headlines, facts, headlines, warnings
from .regret import RegretSummary, regret_of
from .role_changes import RoleChanges, role_changes_of
from .runs import ReportError, find_runs
from .statistics import min_observations
from .tables import (
    ERROR_HEADER,
    POLICY_HEADER,
    error_records,
    error_rows,
    executor_table,
    number,
    policy_records,
    policy_rows,
    run_table,
    to_csv,
)

MAX_CONDITIONS_DRAWN: Final = 4
MAX_TIMELINES: Final = 12
_DRAWN_ERRORS: Final = tuple(key for key in ERRORS if split_key(key)[0] in (None, "mean", "p99"))


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of all runs at or below `run_dirs` to `output`, files to `<output stem>_files/` beside it.

    Runs are grouped by experiment name, one section each. Raises ReportError, naming the path, if there are no runs,
    one cannot be read, or the output cannot be written.
    """
    output = Path(output)
    runs = find_runs(run_dirs)
    sections = sections_of(runs)
    styles = styles_of([policy for section in sections for policy in section.policies])
    drawings: list[Drawing] = []
    records = _Records()
    views = [
        _section_view(section, f"{i + 1}-{_slug(section.name)}", styles, drawings, records)
        for i, section in enumerate(sections)
    ]
    folder = output.with_name(f"{output.stem}_files")
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=" · ".join(section.name for section in sections),
            sections=views,
            metrics=METRICS,
            num_runs=len(runs),
            files=folder.name,
            min_p99=min_observations(99.0),
            csv_names=sorted(records.files()),
        )
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            _write(folder / f"{drawing.name}.png", drawing.png)
            _write(folder / f"{drawing.name}.svg", drawing.svg)
        for name, text in records.files().items():
            _write(folder / name, text.encode())
        _write(output, page.encode())
    except OSError as error:
        raise ReportError(f"{error.filename or output}: cannot be written: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def page_environment() -> Any:
    """Templates of this package, escaped by default."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    return environment


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:60] or "all"


class _Records:
    """Rows of the CSV files, gathered section by section."""

    def __init__(self) -> None:
        self.policies: list[list[Any]] = []
        self.errors: list[list[Any]] = []
        self.cases: list[tuple[str, Case]] = []

    def files(self) -> dict[str, str]:
        """Text by file name."""
        found = {
            "runs.csv": to_csv(*run_table(self.cases)),
            "executors.csv": to_csv(*executor_table(self.cases)),
            "policies.csv": to_csv(POLICY_HEADER, self.policies),
        }
        if self.errors:
            found["simulation_errors.csv"] = to_csv(ERROR_HEADER, self.errors)
        return found


# ---- one experiment -------------------------------------------------------------------------------------------------


def _section_view(
    section: Section, stem: str, styles: dict[str, Style], drawings: list[Drawing], records: _Records
) -> dict[str, Any]:
    records.cases += [(section.name, case) for case in section.cases]

    def shown(drawing: Drawing | None) -> dict[str, str] | None:
        if drawing is None:
            return None
        drawings.append(drawing)
        data = base64.b64encode(drawing.svg).decode("ascii")
        return {"title": drawing.title, "alt": drawing.alt, "data": f"data:image/svg+xml;base64,{data}"}

    return {
        "name": section.name,
        "anchor": stem,
        "facts": facts(section),
        "warnings": warnings(section),
        "backends": [_backend_view(section, backend, stem, styles, shown, records) for backend in section.backends],
        "beside": _beside_view(section, stem, styles, shown, records) if len(section.backends) > 1 else None,
    }


def _backend_view(
    section: Section, backend: str, stem: str, styles: dict[str, Style], shown: Any, records: _Records
) -> dict[str, Any]:
    conditions = [c for c in section.conditions if section.select(backend=backend, condition=c)]
    drawn = set(_spread(conditions, MAX_CONDITIONS_DRAWN))
    blocks = []
    for i, condition in enumerate(conditions):
        groups = _by_policy(section.select(backend=backend, condition=condition), section.policies)
        table = compare_policies(groups)
        records.policies += policy_records(section.name, backend, condition, table)
        name = f"{stem}-{backend}" + (f"-{i + 1}" if len(conditions) > 1 else "")
        where = f"{backend}, {condition}" if condition else backend
        figures = []
        if condition in drawn:
            figures = [
                shown(latency_cdf(f"{name}-latency", groups, styles, f"TTFT and TPOT ({where})")),
                None
                if section.swept
                else shown(
                    service_levels(
                        f"{name}-slo",
                        section,
                        backend,
                        styles,
                        f"Goodput and SLO attainment ({where}); 95 % intervals, attainment wanted dotted",
                        condition,
                    )
                ),
                shown(stage_breakdown(f"{name}-stages", groups, f"Stage breakdown ({where})")),
            ]
        blocks.append(
            {
                "condition": condition,
                "policies": [_policy_head(policy, groups[policy]) for policy in groups],
                "rows": policy_rows(table),
                "headlines": headlines(table),
                "regrets": _regrets(groups),
                "roles": _role_changes(groups),
                "figures": [figure for figure in figures if figure],
            }
        )
    sweep_figure = None
    if section.swept:
        title = (
            f"Goodput and SLO attainment over {section.swept[0]} ({backend}); 95 % intervals, attainment wanted dotted"
        )
        sweep_figure = shown(service_levels(f"{stem}-{backend}-slo", section, backend, styles, title))
    return {
        "name": backend,
        "blocks": blocks,
        "sweep_figure": sweep_figure,
        "timelines": _timelines(section, backend, conditions, stem, styles, shown),
    }


def _regrets(groups: dict[str, list[Case]]) -> list[tuple[str, RegretSummary]]:
    """Of each policy the first run whose decisions were looked at again."""
    found = {policy: [regret for case in cases if (regret := regret_of(case.run))] for policy, cases in groups.items()}
    return [(policy, summaries[0]) for policy, summaries in found.items() if summaries]


def _role_changes(groups: dict[str, list[Case]]) -> list[tuple[str, RoleChanges]]:
    """Of each policy its first run, where roles changed in it."""
    found = {policy: role_changes_of(cases[0].run) for policy, cases in groups.items() if cases}
    return [(policy, changes) for policy, changes in found.items() if changes is not None]


def _timelines(
    section: Section, backend: str, conditions: list[str], stem: str, styles: dict[str, Style], shown: Any
) -> list[dict[str, str]]:
    """The first repeat of each policy under the last condition (the highest rate of a sweep)."""
    if not conditions:
        return []
    last = conditions[-1]
    if section.swept:
        key = section.swept[0]
        last = max(conditions, key=lambda c: section.select(backend=backend, condition=c)[0].condition_values[key])
    found = []
    for policy in section.policies[:MAX_TIMELINES]:
        cases = section.select(backend=backend, condition=last, policy=policy)
        if cases:
            where = f"{policy}, {backend}" + (f", {last}" if last else "")
            name = f"{stem}-{backend}-timeline-{_slug(policy)}"
            found.append(shown(executor_timelines(name, cases[0], styles[policy], f"Executors over time ({where})")))
    return [figure for figure in found if figure]


def _beside_view(
    section: Section, stem: str, styles: dict[str, Style], shown: Any, records: _Records
) -> dict[str, Any]:
    pairs = match_backends(section.cases)
    blocks = []
    for i, condition in enumerate(dict.fromkeys(pair.condition for pair in pairs)):
        mine = [pair for pair in pairs if pair.condition == condition]
        by_policy = {policy: [p for p in mine if p.policy == policy] for policy in section.policies}
        errors = {policy: metric_errors(group) for policy, group in by_policy.items() if group}
        records.errors += error_records(section.name, condition, errors)
        routes = [(policy, agreement(group[0])) for policy, group in by_policy.items() if group]
        name = f"{stem}-beside" + (f"-{i + 1}" if i else "")
        blocks.append(
            {
                "condition": condition,
                "policies": list(errors),
                "rows": error_rows(errors),
                "routes": [(policy, found) for policy, found in routes if found],
                "ranks": [(label_of(key), f"{tau:+.2f}") for key, tau in _chosen_ranks(rank_agreement(mine))],
                "headlines": error_headlines(errors),
                "figures": [
                    figure
                    for figure in (
                        shown(error_bars(f"{name}-errors", errors, styles, _DRAWN_ERRORS, "Error of the simulation")),
                        shown(request_scatter(f"{name}-requests", mine, styles, "Request by request")),
                    )
                    if figure
                ],
            }
        )
    paired = {id(case) for pair in pairs for case in (pair.simulation, pair.hardware)}
    return {"blocks": blocks, "num_pairs": len(pairs), "num_unpaired": len(section.cases) - len(paired)}


def _chosen_ranks(ranks: dict[str, float]) -> list[tuple[str, float]]:
    return [(key, tau) for key, tau in ranks.items() if split_key(key)[0] in (None, "mean", "p99")][:10]


def _spread(values: Sequence[str], count: int) -> list[str]:
    """At most `count` of the values, ends included, evenly spaced."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _by_policy(cases: Sequence[Case], order: Sequence[str]) -> dict[str, list[Case]]:
    groups = {policy: [case for case in cases if case.policy == policy] for policy in order}
    return {policy: group for policy, group in groups.items() if group}


def _policy_head(policy: str, cases: Sequence[Case]) -> dict[str, Any]:
    n = sum(case.summary["num_requests"] for case in cases)
    failed = sum(case.summary["num_failed"] for case in cases)
    return {
        "name": policy,
        "oracle": any(case.run.is_oracle for case in cases),
        "count": f"n = {n:,}" + (f" in {len(cases)} repeats" if len(cases) > 1 else ""),
        "failed": f"{failed:,} failed" if failed else "",
    }
