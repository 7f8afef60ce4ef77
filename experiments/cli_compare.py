"""`disagg compare` and `disagg fidelity`: how far a simulation was off the hardware, and why."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from ..reports.attribution import Split, split_errors, stage_differences
from ..reports.error_figures import scatter
from ..reports.error_text import pair_text, ranking_text
from ..reports.fidelity import Group, Verdicts, groups_of, mismatch
from ..reports.fidelity_page import (
    Fidelity,
    Finding,
    as_data,
    as_markdown,
    commit_of,
    finding_of,
    read_data,
)
from ..reports.prediction_intervals import Interval, Prediction, read_predictions
from ..reports.ranking import Ranking, metric_key, rank_trees, rankings
from ..reports.run_errors import Matched, RunPair, match_trees
from ..reports.runs import ReportError, Run
from .errors import ConfigError, ExperimentError
from .run_directory import write_atomically

_UNSAFE: Final = str.maketrans({" ": "_", "/": "_", "=": "-", ",": "_"})


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with run directories is told like any other configuration problem."""
    try:
        yield
    except ReportError as error:
        raise ConfigError(str(error)) from error


# ---- disagg compare -------------------------------------------------------------------------------------------------


def compare_runs(
    simulated: Path, measured: Path, *, as_json: bool, output: Path | None, replay: bool, root: Path | None
) -> None:
    """Print the errors of each pair of runs; with `output` also write comparison.json, comparison.md and the plots.

    Raises ConfigError for folders that are no runs or runs of different configuration.
    """
    with _told():
        matched = match_trees(simulated, measured)
        told = [_compared(pair, replay, root) for pair in matched.pairs]
    data = {"pairs": [found for found, _ in told], "alone": [str(run.path) for run in matched.alone]}
    text = json.dumps(data, indent=2)
    if output is not None:
        _write_comparison(output, matched, text, [page for _, page in told])
    if as_json:
        print(text)
        return
    print("\n\n".join(page for _, page in told))
    for run in matched.alone:
        print(f"warning: {run.path} has no partner and was left out", file=sys.stderr)
    if output is not None:
        print(f"\nwrote {output}")


def _compared(pair: RunPair, replay: bool, root: Path | None) -> tuple[dict[str, Any], str]:
    stages = stage_differences(pair)
    split, why_not = _split(pair, replay, root)
    data = {
        "title": pair.title,
        "runs": [str(case.run.path) for case in (pair.simulated, pair.measured)],
        "backends": [case.run.backend for case in (pair.simulated, pair.measured)],
        "num_matched": len(pair.both),
        "share_routed_differently": pair.share_routed_differently,
        "kv_blocks": {str(executor): list(both) for executor, both in pair.kv_blocks.items()},
        "errors": msgspec.to_builtins(pair.errors()),
        "stages": msgspec.to_builtins(stages),
        "split": None if split is None else msgspec.to_builtins(split),
        "why_no_split": why_not or None,
    }
    return data, pair_text(pair, stages, split, why_not)


def _split(pair: RunPair, replay: bool, root: Path | None) -> tuple[Split | None, str]:
    """Timing and decisions apart, or why not: a comparison is worth having without it."""
    from .forced_routes import replay_routes

    simulated, measured = pair.simulated.run, pair.measured.run
    if simulated.backend != "simulation":
        return None, "both are hardware runs"
    if not replay:
        return None, "not asked for"
    with tempfile.TemporaryDirectory(prefix="disagg-compare-") as folder:
        try:
            routes = replay_routes(simulated, measured, Path(folder, "routes"), root=root)
            late = replay_routes(simulated, measured, Path(folder, "late"), with_dispatch=True, root=root)
        except (ExperimentError, ReportError, ModelError, PolicyError) as error:
            return None, str(error).replace("\n", "; ")
        if routes.manifest.get("profile_hash") != simulated.manifest.get("profile_hash"):
            return None, f"profile {simulated.manifest.get('profile')} has changed since the simulation"
        return split_errors(pair, routes, late), ""


def _write_comparison(output: Path, matched: Matched, text: str, pages: Sequence[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "comparison.json", text + "\n")
    whole: list[str] = []
    for pair, page in zip(matched.pairs, pages, strict=True):
        name = "scatter" if len(matched.pairs) == 1 else f"scatter-{pair.title.translate(_UNSAFE)}"
        drawing = scatter(name, pair)
        whole.append(page)
        if drawing is not None:
            (output / f"{name}.png").write_bytes(drawing.png)
            (output / f"{name}.svg").write_bytes(drawing.svg)
            whole.append(f"![{drawing.alt}]({name}.png)")
    write_atomically(output / "comparison.md", "# Comparison\n\n" + "\n\n".join(whole) + "\n")


def compare_rankings(simulated: Path, measured: Sequence[Path], metric: str, *, as_json: bool) -> None:
    """Print how far simulation orders policies as hardware does. Raises ConfigError."""
    with _told():
        found = rank_trees(simulated, measured, metric_key(metric))
    if as_json:
        print(json.dumps([_ranking_data(ranking) for ranking in found], indent=2))
    else:
        print("\n\n".join(ranking_text(ranking) for ranking in found))


def _ranking_data(ranking: Ranking) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(ranking)
    return values | {
        "num_apart": ranking.num_apart,
        "is_enough": ranking.is_enough,
        "best_agrees": ranking.best_agrees,
    }


# ---- disagg fidelity ------------------------------------------------------------------------------------------------


def write_fidelity(
    folder: Path,
    output: Path,
    *,
    commit: str | None,
    metric: str,
    as_json: bool,
    replay: bool,
    root: Path | None,
    earlier: Path | None = None,
    intervals: Path | None = None,
) -> None:
    """Write the table of every experiment below `folder` to `output` (.md), with the .json and the plots beside it.

    `earlier`: the .json of such a page beside `output`, whose other experiments are taken over as they stand there.
    `intervals`: a file of predictions, whose intervals stand beside those experiments of the folder that it predicts.
    Raises ConfigError for runs that do not belong together, or a file that is no such page.
    """
    if output.suffix != ".md":
        raise ConfigError(f"--output {output}: must end in .md; the data go beside it, in .json")
    with _told():
        predictions = read_predictions(intervals) if intervals is not None else {}
        groups = groups_of(folder)
        plots = output.with_suffix("")
        before = read_data(earlier) if earlier is not None else Fidelity((), ())
        if earlier is not None and earlier.parent.resolve() != output.parent.resolve():
            raise ConfigError(f"--earlier {earlier}: must lie beside {output}, or its plots would not be found")
        found = Fidelity(
            tuple(_finding(group, folder, commit, plots, replay, root, predictions) for group in groups),
            tuple(_rankings(groups, metric_key(metric))),
        ).beside(before)
    data = json.dumps(as_data(found), indent=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output.with_suffix(".json"), data + "\n")
    write_atomically(output, as_markdown(found))
    if as_json:
        print(data)
        return
    for row in found.rows:
        if row.met is False:
            print(f"missed: {row.experiment}: {row.metric} {row.error or 0.0:+.2%}, limit {row.limit:.2%}")
    print(Verdicts.of(found.rows).text)
    print(f"wrote {output} and {output.with_suffix('.json')}")


def _intervals_of(group: Group, predictions: Mapping[str, Prediction]) -> Mapping[str, Interval]:
    """Of the group's prediction; none, and a warning, if it is another than the simulated run."""
    if not predictions:
        return {}
    prediction = predictions.get(group.title)
    differs = "none in the file" if prediction is None else mismatch(group, prediction)
    if differs:
        print(f"warning: {group.title}: no intervals: {differs}", file=sys.stderr)
    return prediction.intervals if prediction is not None and not differs else {}


def _finding(
    group: Group,
    folder: Path,
    commit: str | None,
    plots: Path,
    replay: bool,
    root: Path | None,
    predictions: Mapping[str, Prediction],
) -> Finding:
    commit = commit or commit_of(group)
    if not group.pairs:
        return finding_of(group, folder, commit)
    pair = group.pairs[0]
    split, why_not = _split(pair, replay, root)
    plot = None
    drawing = scatter(group.title, pair, small=True)
    if drawing is not None:
        plots.mkdir(parents=True, exist_ok=True)
        file = plots / f"{group.title.translate(_UNSAFE)}.png"
        file.write_bytes(drawing.png)
        plot = f"{plots.name}/{file.name}"
    intervals = _intervals_of(group, predictions)
    told = why_not if replay else ""
    return finding_of(group, folder, commit, split=split, why_no_split=told, plot=plot, intervals=intervals)


def _rankings(groups: Sequence[Group], key: str) -> Iterator[Ranking]:
    """Of every experiment that sweeps policies; its first hardware runs make one tree, its second the next."""
    names = dict.fromkeys(group.simulated.name for group in groups if group.simulated is not None and group.measured)
    for name in names:
        own = [group for group in groups if group.simulated is not None and group.simulated.name == name]
        swept = [group for group in own if group.measured and _sweeps_policies(group.measured[0])]
        if len(swept) < 2:
            continue
        trees = [
            [group.measured[number] for group in swept] for number in range(min(len(group.measured) for group in swept))
        ]
        yield from rankings([group.simulated for group in swept if group.simulated is not None], trees, key)


def _sweeps_policies(run: Run) -> bool:
    return any(str(key).startswith("policy.") for key in run.manifest.get("values") or {})
