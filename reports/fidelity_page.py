"""docs/benchmarks/fidelity.md and .json: the table of every experiment, what lies behind it, and its scatter plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from .attribution import Split, StageDifference, stage_differences
from .error_text import fidelity_table, percent, ranking_text, split_sentence, split_table, stage_table, table
from .fidelity import GOALS, FidelityRow, Group, Verdicts, fidelity_rows, summary_excerpt
from .prediction_intervals import NOMINAL, Interval
from .ranking import Ranking
from .runs import ReportError

SCHEMA_VERSION: Final = 1


class Finding(Struct, frozen=True):
    """One experiment: its runs, rows, errors by stage and by cause, and the name of its plot beside the page.

    `commit`: of profile and predictions. `runs`: what `summary_excerpt` gives of each, the simulated one first.
    `predicted_before_measured` None: not known.
    """

    experiment: str
    commit: str
    missing: str | None
    predicted_before_measured: bool | None
    runs: tuple[dict[str, Any], ...]
    rows: tuple[FidelityRow, ...] = ()
    stages: tuple[StageDifference, ...] = ()
    split: Split | None = None
    why_no_split: str = ""
    plot: str | None = None

    @property
    def name(self) -> str:
        """The experiment's, without the point of a sweep."""
        return self.experiment.split(" ", 1)[0]


class Fidelity(Struct, frozen=True):
    """All that the page tells."""

    findings: tuple[Finding, ...]
    rankings: tuple[Ranking, ...]
    title: str = "Fidelity: simulation against hardware"

    @property
    def rows(self) -> list[FidelityRow]:
        return [row for finding in self.findings for row in finding.rows]

    def beside(self, earlier: Fidelity) -> Fidelity:
        """These experiments, and those of `earlier` that are not among them, as they stood there."""
        own = {finding.name for finding in self.findings}
        findings = (*self.findings, *(finding for finding in earlier.findings if finding.name not in own))
        rankings = (*self.rankings, *(ranking for ranking in earlier.rankings if ranking.experiment not in own))
        return Fidelity(
            tuple(sorted(findings, key=lambda finding: finding.experiment)),
            tuple(sorted(rankings, key=lambda ranking: (ranking.experiment, ranking.condition))),
            self.title,
        )


def finding_of(
    group: Group,
    folder: Path,
    commit: str,
    *,
    split: Split | None = None,
    why_no_split: str = "",
    plot: str | None = None,
    intervals: Mapping[str, Interval] | None = None,
) -> Finding:
    """What is told of one experiment, whose runs lie below `folder`; `intervals` are those of its prediction."""
    runs = [run for run in (group.simulated, *group.measured) if run is not None]
    return Finding(
        group.title,
        commit,
        group.missing,
        group.was_predicted,
        tuple(summary_excerpt(run, folder) for run in runs),
        tuple(fidelity_rows(group, intervals=intervals)),
        tuple(stage_differences(group.pairs[0])) if group.pairs else (),
        split,
        why_no_split,
        plot,
    )


def commit_of(group: Group) -> str:
    """The commit at which the simulated run was made, as its manifest says."""
    return str((group.simulated and group.simulated.manifest.get("git_commit")) or "unknown")


# ---- data -----------------------------------------------------------------------------------------------------------


def as_data(fidelity: Fidelity) -> dict[str, Any]:
    """The page as JSON-ready values; `rows` holds every metric of every experiment, times in seconds."""
    verdicts = Verdicts.of(fidelity.rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "commit": ", ".join(_by_commit(fidelity.findings)),
        "goals": msgspec.to_builtins(GOALS),
        "verdicts": msgspec.to_builtins(verdicts) | {"num_by_floor_alone": verdicts.num_by_floor_alone},
        "rows": msgspec.to_builtins(fidelity.rows),
        "rankings": [
            msgspec.to_builtins(ranking) | {"num_apart": ranking.num_apart, "is_enough": ranking.is_enough}
            for ranking in fidelity.rankings
        ],
        "experiments": [
            {name: value for name, value in msgspec.to_builtins(finding).items() if name != "rows"}
            for finding in fidelity.findings
        ],
    }


class _Version(Struct):
    schema_version: int


class _Row(Struct):
    experiment: str


class _Data(Struct):
    """What is read of a page's data again."""

    commit: str
    rows: list[dict[str, Any]]
    experiments: list[dict[str, Any]]
    rankings: tuple[Ranking, ...]


def read_data(path: Path) -> Fidelity:
    """What `as_data` gave, from its file. Raises ReportError, with the key that is to blame, for any other file."""
    try:
        raw = path.read_bytes()
        version = msgspec.json.decode(raw, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ReportError(f"{path}: schema_version {version}; allowed: {SCHEMA_VERSION}")
        data = msgspec.json.decode(raw, type=_Data)
        rows: dict[str, list[Any]] = {}
        for row in data.rows:
            rows.setdefault(msgspec.convert(row, _Row).experiment, []).append(row)
        findings = [  # the first pages had one commit for all
            msgspec.convert({"commit": data.commit, **each, "rows": rows.get(str(each.get("experiment")), [])}, Finding)
            for each in data.experiments
        ]
        return Fidelity(tuple(findings), data.rankings)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(
            f"{path}: not the data of a page of `disagg fidelity`: {error}; allowed: the .json beside one"
        ) from error


def _by_commit(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """The experiments, by name, of each commit; the commit of most first."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        names = found.setdefault(finding.commit, [])
        if finding.name not in names:
            names.append(finding.name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


# ---- the page -------------------------------------------------------------------------------------------------------


def as_markdown(fidelity: Fidelity) -> str:
    """The whole page. Plots are named relative to it."""
    rows = fidelity.rows
    verdicts = Verdicts.of(rows)
    compared = [finding for finding in fidelity.findings if finding.rows]
    by_commit = _by_commit(fidelity.findings)
    commits = "; ".join(
        f"commit `{commit}`" + (f" ({', '.join(names)})" if len(by_commit) > 1 else "")
        for commit, names in by_commit.items()
    )
    parts = [
        f"# {fidelity.title}",
        "",
        "Written by `disagg fidelity`; the same as data, with every run's summary, in the JSON file beside this page.",
        "",
        f"Profile and predictions: {commits}. {len(compared)} experiments, every one that was run."
        f" {verdicts.text}; {len(rows) - verdicts.num_judged} more are shown and not judged, with the reason.",
        "",
        "`error` is (simulated − measured)/measured, of SLO attainment the difference in points. `floor` is the difference"
        " between hardware runs of the same experiment, `limit` the larger of goal and floor. With several hardware runs"
        " `measured` is their mean.",
        *_intervals(rows),
        "",
        "## Overview",
        "",
        _overview(fidelity.findings),
    ]
    late = [finding.experiment for finding in compared if finding.predicted_before_measured is False]
    if late:
        parts += ["", f"Simulated only after the hardware had run: {', '.join(late)}."]
    if any("-dirty" in commit for commit in by_commit):
        parts += ["", "The source tree was changed since that commit when the predictions were made."]
    for finding in fidelity.findings:
        parts += ["", *_experiment(finding)]
    if fidelity.rankings:
        parts += ["", "## Ranking of policies"]
        for ranking in fidelity.rankings:
            parts += ["", ranking_text(ranking)]
    return "\n".join(parts) + "\n"


def _intervals(rows: Sequence[FidelityRow]) -> list[str]:
    """How often hardware lay where the noisy simulations said, as a paragraph; none where no interval is known."""
    known = [row for row in rows if row.interval is not None]
    if not known:
        return []
    inside = sum(bool(row.inside) for row in known)
    return [
        "",
        f"`5–95 %` is the interval of simulations with noise of step times. Of {len(known)} figures with one {inside} lie"
        f" inside, which is {100 * inside / len(known):.0f} % for a nominal {100 * NOMINAL:.0f} %; it changes no limit and no"
        " verdict.",
    ]


def _overview(findings: Sequence[Finding]) -> str:
    """A line per experiment, an error per metric; bold where it misses its limit, in parentheses where not judged."""
    names = [goal.metric for goal in GOALS]
    lines = []
    for finding in findings:
        by_metric = {row.metric: row for row in finding.rows}
        cells = [_short(by_metric.get(name)) for name in names]
        lines.append((finding.experiment, *(cells if finding.rows else ["–"] * len(names))))
    return table(("experiment", *names), lines)


def _short(row: FidelityRow | None) -> str:
    if row is None or row.error is None:
        return "–"
    text = percent(row.error, in_points=row.metric == "slo_attainment")
    return f"({text})" if row.met is None else text if row.met else f"**{text}**"


def _experiment(finding: Finding) -> list[str]:
    parts = [f"## {finding.experiment}", ""]
    if finding.missing:
        return [*parts, f"Not compared: {finding.missing}."]
    parts += [fidelity_table(finding.rows), ""]
    if finding.plot:
        parts += [f"![TTFT, TPOT and e2e latency of each request, simulation against hardware]({finding.plot})", ""]
    if finding.stages:
        parts += ["Mean difference by stage, first hardware run:", "", stage_table(finding.stages), ""]
    if finding.split is not None:
        parts += [f"Timing against decisions. {split_sentence(finding.split)}", "", split_table(finding.split), ""]
    elif finding.why_no_split:
        parts += [f"Timing and decisions were not told apart: {finding.why_no_split}.", ""]
    parts += ["Runs:", "", _runs(finding), "", "    " + "\n    ".join(_commands(finding))]
    return parts


def _runs(finding: Finding) -> str:
    lines = []
    for found in finding.runs:
        counts = f"{found['num_completed']} of {found['num_requests']}"
        commit = str(found["git_commit"] or "")
        commit = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
        lines.append(
            (str(found["directory"]), str(found["device"]), counts, f"{found['duration_s']:.1f} s", commit,
             str(found["started_at"] or "")[:19])
        )  # fmt: skip
    return table(("run directory", "device", "completed", "duration", "commit", "started (UTC)"), lines, 2)


def _commands(finding: Finding) -> list[str]:
    """What makes these runs again; a point of a sweep comes with its whole sweep."""
    simulated, measured = finding.runs[:2]
    file, profile, name = measured["experiment_file"], simulated["profile"], finding.name
    return [
        f"disagg run {file} --set cluster.profile={profile} --output RUNS/{name}/simulated",
        f"disagg run {file} --backend hardware --output RUNS/{name}/hardware-1",
        f"disagg compare RUNS/{name}/simulated RUNS/{name}/hardware-1",
    ]
