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

from .case_labels import in_order
from .comparison import (
    ERRORS,
    Case,
    Cell,
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
from .figures import (
    Drawing,
    Style,
    error_bars,
    executor_timelines,
    latency_cdf,
    request_scatter,
    scale_of,
    service_levels,
    stage_breakdown,
    styles_of,
)
from .metrics import METRICS
from .regret import RegretSummary, regret_of
from .role_changes import RoleChanges, role_changes_of
from .runs import ReportError, Run, find_runs
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
    signed_percent,
    to_csv,
)

MAX_CONDITIONS_DRAWN: Final = 4
MAX_TIMELINES: Final = 12
_HEADLINES: Final = ("mean_ttft_s", "p99_ttft_s", "mean_tpot_s", "slo_attainment")
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
        "facts": _facts(section),
        "warnings": _warnings(section),
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
                "headlines": _headlines(table),
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
                "headlines": _error_headlines(errors),
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


# ---- words ----------------------------------------------------------------------------------------------------------


def _headlines(table: Sequence[Sequence[Cell]]) -> list[str]:
    """For a few metrics: which policy is best, and from which others the data cannot tell it."""
    sentences = []
    for cells in table:
        best = next((cell for cell in cells if cell.is_best), None)
        if best is None or best.key not in _HEADLINES or best.estimate.value is None:
            continue
        _, metric = split_key(best.key)
        factor, unit = scale_of([best.estimate.value], metric.unit)
        word = "Highest" if metric.better == "higher" else "Lowest"
        unit = "" if unit == "share" else f" {unit}"
        sentence = f"{word} {label_of(best.key)}: {best.policy}, {number(best.estimate.value * factor)}{unit}"
        same = [cell.policy for cell in cells if cell.distinguishable is False]
        worse = [cell.policy for cell in cells if cell.distinguishable]
        unknown = [
            c.policy for c in cells if not c.is_best and c.distinguishable is None and c.estimate.value is not None
        ]
        if same:
            sentence += f"; not distinguishable from it: {', '.join(same)}"
        if worse:
            sentence += f"; worse: {', '.join(worse)}"
        if unknown:
            sentence += f"; the data cannot tell for {', '.join(unknown)}"
        sentences.append(sentence + ".")
    return sentences


def _error_headlines(errors: dict[str, Any]) -> list[str]:
    sentences = []
    for key in ("mean_ttft_s", "mean_tpot_s", "throughput"):
        values = [
            e.relative.value
            for found in errors.values()
            for e in found
            if e.key == key and e.relative.value is not None
        ]
        if values:
            low, high = signed_percent(min(values)), signed_percent(max(values))
            sentences.append(f"{label_of(key)}: {low if low == high else f'{low} to {high}'} of the hardware's.")
    return sentences


_NUMBER: Final = re.compile(r"\d[\d.,]*\d|\d")


def _warnings(section: Section) -> list[dict[str, Any]]:
    """Each kind of warning once, its numbers as ranges over the runs that it is about."""
    found: dict[str, list[tuple[list[str], str]]] = {}
    for case in section.cases:
        name = ", ".join(part for part in (case.policy, case.run.backend, case.condition) if part)
        for text in case.summary["warnings"]:
            found.setdefault(_NUMBER.sub("#", text), []).append((_NUMBER.findall(text), name))
    views = []
    for kind, cases in found.items():
        numbers = [_range(column) for column in zip(*(values for values, _ in cases))]
        words = kind.split("#")
        names = list(dict.fromkeys(name for _, name in cases))
        everyone = len(cases) == len(section.cases) > 1
        views.append(
            {
                "text": "".join(part for pair in zip(words, [*numbers, ""]) for part in pair),
                "who": "all runs"
                if everyone
                else f"{len(cases)} of {len(section.cases)} runs: " + "; ".join(names[:6]),
                "more": 0 if everyone else max(0, len(names) - 6),
            }
        )
    return views


def _range(texts: Sequence[str]) -> str:
    if len(set(texts)) == 1:
        return texts[0]
    ordered = sorted(texts, key=lambda text: float(text.replace(",", "")))
    return f"{ordered[0]} to {ordered[-1]}"


def _facts(section: Section) -> list[tuple[str, str]]:
    """What was run, as (term, description)."""
    run = section.cases[0].run
    config = run.config
    model, workload = _dict(config.get("model")), _dict(config.get("workload"))
    seeds = sorted({case.run.seed for case in section.cases if case.run.seed is not None})
    facts = [
        ("Runs", f"{len(section.cases)}: {len(section.policies)} policies, {' and '.join(section.backends)}"),
        (
            "Model",
            ", ".join(filter(None, (str(model.get("id", "")), _inline({k: model[k] for k in model if k != "id"})))),
        ),
        ("Cluster", _cluster(run)),
        ("Policies", _policies(section)),
        *((f"“{label}”", text) for label, text in section.full_names.items()),
        ("Dataset", _inline(_dict(workload.get("dataset"))) + f"; max_tokens {_inline(workload.get('max_tokens'))}"),
        ("Load", "; ".join(_phase(_dict(phase)) for phase in workload.get("phases") or [])),
        ("Objectives", _objectives(run)),
        ("Varied", _varied(section)),
        ("Seeds", ", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else "")),
    ]
    for key, term in (
        ("git_commit", "Commit"),
        ("device", "Device"),
        ("driver", "Driver"),
        ("profile_hash", "Profile"),
    ):
        values = sorted({_inline(case.run.manifest[key]) for case in section.cases if case.run.manifest.get(key)})
        facts.append((term, " · ".join(values)))
    versions = {_inline(case.run.manifest["versions"]) for case in section.cases if case.run.manifest.get("versions")}
    facts.append(("Versions", " · ".join(sorted(versions))))
    return [(term, text) for term, text in facts if text]


def _policies(section: Section) -> str:
    """Each decision with every policy that took it in some run, `none` where only some runs had one."""
    found: dict[str, dict[str, None]] = {}
    for case in section.cases:
        for key, value in _dict(case.run.config.get("policy")).items():
            found.setdefault(key, {})[_inline(value).removeprefix("name ") or "none"] = None
    return "; ".join(f"{key} {' | '.join(texts)}" for key, texts in found.items() if set(texts) != {"none"})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _inline(value: Any) -> str:
    """A value of the configuration on one line, missing parts left out."""
    if isinstance(value, dict):
        if set(value) == {"name"}:
            return str(value["name"])
        parts = ((key, _inline(item)) for key, item in value.items())
        return ", ".join(f"{key} ({text})" if "," in text else f"{key} {text}" for key, text in parts if text)
    if isinstance(value, list):
        return ", ".join(map(_inline, value[:8])) + (" …" if len(value) > 8 else "")
    if value is None or value == "":
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cluster(run: Run) -> str:
    cluster = _dict(run.config.get("cluster"))
    parts = []
    for role in ("context", "generation", "mixed"):
        group = _dict(cluster.get(f"{role}_servers"))
        if group.get("num_instances"):
            tp, pp = group.get("tensor_parallel_size", 1), group.get("pipeline_parallel_size", 1)
            parts.append(f"{group['num_instances']} {role}" + (f" (tp {tp}, pp {pp})" if (tp, pp) != (1, 1) else ""))
    instances = cluster.get("instances") or []
    for role in dict.fromkeys(str(_dict(instance).get("role")) for instance in instances):
        parts.append(f"{sum(_dict(i).get('role') == role for i in instances)} {role}")
    devices = f", {run.num_devices} devices" if run.num_devices else ""
    return f"{' + '.join(parts)} executors{devices}, {cluster.get('profile', '')}" if parts else ""


def _phase(phase: dict[str, Any]) -> str:
    left_out = " (not in results)" if phase.get("exclude_from_results") else ""
    hidden = ("name", "type", "exclude_from_results", "traffic_class", "priority")
    numbers = _inline({key: value for key, value in phase.items() if key not in hidden})
    return f"{phase.get('name', '')}: {phase.get('type', '')} {numbers}{left_out}"


def _objectives(run: Run) -> str:
    words = [
        f"{name} ≤ {number(1000 * run.objectives[key])} ms"
        for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_latency_s", "E2E"))
        if key in run.objectives
    ]
    if words and "attainment" in run.objectives:
        words.append(f"for {run.objectives['attainment']:.0%} of requests")
    return ", ".join(words)


def _varied(section: Section) -> str:
    values: dict[str, list[Any]] = {}
    for case in section.cases:
        for key, value in case.condition_values.items():
            values.setdefault(key, []).append(value)
    return "; ".join(f"{key}: {', '.join(map(_inline, in_order(found)))}" for key, found in values.items())
