"""docs/benchmarks/fidelity.md and .json: the table of every experiment, what lies behind it, and its scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from .attribution import Split, StageDifference
from .error_text import fidelity_table, percent, ranking_text, split_sentence, split_table, stage_table, table
from .fidelity import GOALS, FidelityRow, Group, file_name, summary_excerpt
from .ranking import Ranking

SCHEMA_VERSION: Final = 1
MOST_PLOT_BYTES: Final = 60_000


class Finding(Struct, frozen=True):
    """One experiment: its rows, its errors by stage and by cause, and the name of its plot beside the page."""

    group: Any  # Group
    rows: tuple[FidelityRow, ...]
    stages: tuple[StageDifference, ...] = ()
    split: Split | None = None
    why_no_split: str = ""
    plot: str | None = None


class Fidelity(Struct, frozen=True):
    """All that the page tells. `folder` is where the runs lie, `commit` that of profile and predictions."""

    folder: Path
    findings: tuple[Finding, ...]
    rankings: tuple[Ranking, ...]
    commit: str
    title: str = "Fidelity: simulation against hardware"

    @property
    def rows(self) -> list[FidelityRow]:
        return [row for finding in self.findings for row in finding.rows]


def commit_of(groups: Sequence[Group]) -> str:
    """The commit at which the simulated runs were made, as their manifests say; several are all named."""
    runs = [group.simulated for group in groups if group.simulated is not None]
    commits = sorted({str(run.manifest.get("git_commit") or "unknown") for run in runs})
    return ", ".join(commits) or "unknown"


# ---- data -----------------------------------------------------------------------------------------------------------


def as_data(fidelity: Fidelity) -> dict[str, Any]:
    """The page as JSON-ready values; `rows` holds every metric of every experiment, times in seconds."""
    experiments = []
    for finding in fidelity.findings:
        group: Group = finding.group
        runs = [run for run in (group.simulated, *group.measured) if run is not None]
        experiments.append(
            {
                "experiment": group.title,
                "missing": group.missing,
                "predicted_before_measured": group.was_predicted,
                "runs": [summary_excerpt(run, fidelity.folder) for run in runs],
                "stages": msgspec.to_builtins(finding.stages),
                "split": None if finding.split is None else msgspec.to_builtins(finding.split),
                "plot": finding.plot,
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "commit": fidelity.commit,
        "goals": msgspec.to_builtins(GOALS),
        "rows": msgspec.to_builtins(fidelity.rows),
        "rankings": [
            msgspec.to_builtins(ranking) | {"num_apart": ranking.num_apart, "is_enough": ranking.is_enough}
            for ranking in fidelity.rankings
        ],
        "experiments": experiments,
    }


# ---- the page -------------------------------------------------------------------------------------------------------


def as_markdown(fidelity: Fidelity) -> str:
    """The whole page. Plots are named relative to it."""
    rows = fidelity.rows
    judged = [row for row in rows if row.met is not None]
    met = sum(bool(row.met) for row in judged)
    compared = [finding for finding in fidelity.findings if finding.rows]
    parts = [
        f"# {fidelity.title}",
        "",
        "Written by `disagg fidelity`; the same as data, with every run's summary, in the JSON file beside this page.",
        "",
        f"Profile and predictions: commit `{fidelity.commit}`. {len(compared)} experiments, every one that was run."
        f" {met} of {len(judged)} judged figures are within their limit; {len(rows) - len(judged)} more are shown and not"
        " judged, with the reason.",
        "",
        "`error` is (simulated − measured)/measured, of SLO attainment the difference in points. `floor` is the difference"
        " between hardware runs of the same experiment, `limit` the larger of goal and floor. With several hardware runs"
        " `measured` is their mean.",
        "",
        "## Overview",
        "",
        _overview(fidelity.findings),
    ]
    late = [f.group.title for f in compared if f.group.was_predicted is False]
    if late:
        parts += ["", f"Simulated only after the hardware had run: {', '.join(late)}."]
    if "-dirty" in fidelity.commit:
        parts += ["", "The source tree was changed since that commit when the predictions were made."]
    for finding in fidelity.findings:
        parts += ["", *_experiment(finding, fidelity.folder)]
    if fidelity.rankings:
        parts += ["", "## Ranking of policies"]
        for ranking in fidelity.rankings:
            parts += ["", ranking_text(ranking)]
    return "\n".join(parts) + "\n"


def _overview(findings: Sequence[Finding]) -> str:
    """A line per experiment, an error per metric; bold where it misses its limit, in parentheses where not judged."""
    names = [goal.metric for goal in GOALS]
    lines = []
    for finding in findings:
        by_metric = {row.metric: row for row in finding.rows}
        cells = [_short(by_metric.get(name)) for name in names]
        lines.append((finding.group.title, *(cells if finding.rows else ["–"] * len(names))))
    return table(("experiment", *names), lines)


def _short(row: FidelityRow | None) -> str:
    if row is None or row.error is None:
        return "–"
    text = percent(row.error, in_points=row.metric == "slo_attainment")
    return f"({text})" if row.met is None else text if row.met else f"**{text}**"


def _experiment(finding: Finding, folder: Path) -> list[str]:
    group: Group = finding.group
    parts = [f"## {group.title}", ""]
    if group.missing:
        return [*parts, f"Not compared: {group.missing}."]
    parts += [fidelity_table(finding.rows), ""]
    if finding.plot:
        parts += [f"![TTFT, TPOT and e2e latency of each request, simulation against hardware]({finding.plot})", ""]
    if finding.stages:
        parts += ["Mean difference by stage, first hardware run:", "", stage_table(finding.stages), ""]
    if finding.split is not None:
        parts += [f"Timing against decisions. {split_sentence(finding.split)}", "", split_table(finding.split), ""]
    elif finding.why_no_split:
        parts += [f"Timing and decisions were not told apart: {finding.why_no_split}.", ""]
    parts += ["Runs:", "", _runs(group, folder), "", "    " + "\n    ".join(_commands(group))]
    return parts


def _runs(group: Group, folder: Path) -> str:
    lines = []
    for run in (group.simulated, *group.measured):
        if run is None:
            continue
        found = summary_excerpt(run, folder)
        counts = f"{found['num_completed']} of {found['num_requests']}"
        commit = str(found["git_commit"] or "")
        commit = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
        lines.append(
            (str(found["directory"]), str(found["device"]), counts, f"{found['duration_s']:.1f} s", commit,
             str(found["started_at"] or "")[:19])
        )  # fmt: skip
    return table(("run directory", "device", "completed", "duration", "commit", "started (UTC)"), lines, 2)


def _commands(group: Group) -> list[str]:
    """What makes these runs again; a point of a sweep comes with its whole sweep."""
    simulated, measured = group.simulated, group.measured[0]
    if simulated is None:
        return []
    file, profile = file_name(measured), simulated.manifest.get("profile")
    name = measured.name
    commands = [
        f"disagg run {file} --set cluster.profile={profile} --output RUNS/{name}/simulated",
        f"disagg run {file} --backend hardware --output RUNS/{name}/hardware-1",
    ]
    return [*commands, f"disagg compare RUNS/{name}/simulated RUNS/{name}/hardware-1"]
