"""Pictures of a profile: what was measured against what the profile says of it, of each kind of executor and each link."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from ..core.launch_gaps import gap_of
from ..core.measured_cost import UNITS_PER_NS, MeasuredCost
from ..core.overheads import LaunchGaps
from .calibration_load import Load, LoadEffect
from .calibration_points import SHORTEST
from .calibration_samples import FIRST, FOLLOWING, NOTHING, Samples, StepSample, TransferSample, as_arrays
from .measured_profile import EngineEntry, LinkEntry, Profile, link_title
from .profile_cost import measured_cost
from .profile_refit import link_ends

_PS_PER_MS: Final = 1e9
_BAND: Final = 0.1
_EDGE: Final = 0.6
_MOST_DOTS: Final = 4000
_SUMS: Final = (
    "num_decodes",
    "num_kv_tokens",
    "num_chunks",
    "num_chunk_tokens",
    "num_pairs",
    "num_cached_tokens",
    "longest_cached",
    "num_sampled",
    "num_shared_kv",
)


def write_plots(profile: Profile, samples: Samples, folder: Path) -> list[Path]:
    """One PNG for each kind of executor, and one of transfers."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for entry in profile.engines:
        steps = fitted_steps(entry, samples)
        path = folder / f"{entry.title.replace(' ', '-')}.png"
        if steps:
            _plot_engine(measured_cost(profile, entry, entry.max_batch_size), entry, steps, path)
            written.append(path)
    by_link = [(link, *transfers_of(profile, link, samples)) for link in profile.links]
    by_link = [each for each in by_link if each[1]]
    if by_link:
        path = folder / "transfers.png"
        _plot_transfers(profile, by_link, path)
        written.append(path)
    return written


def fitted_steps(entry: EngineEntry, samples: Samples) -> list[StepSample]:
    """Those that the fit was given; without graphs none that told of their layers."""
    graphs = entry.chunks is not None and entry.chunks.graphs
    own = (s for s in samples.steps if s.executor in entry.executors and s.before != NOTHING)
    return [s for s in own if graphs or not s.sends_early]


def fitted_ns(cost: MeasuredCost, entry: EngineEntry, columns: dict[str, Any]) -> Any:
    """What the profile says of each sample, launch gap and load included, in nanoseconds."""
    found = []
    slower = _slower(entry.gaps, columns)
    launched = dataclasses.replace(cost, chunk_graphs=False)
    for i in range(len(columns["duration_ps"])):
        row = {name: column[i] for name, column in columns.items()}
        if row["longest_cached"] < 0:  # an older sample: nearly all have one chunk behind cached KV
            row["longest_cached"] = row["num_cached_tokens"]
        num_decodes, num_kv, *chunks = (int(row[name]) for name in _SUMS)
        own = launched if row["sends_early"] else cost
        units = own.time_of_sums(num_decodes, num_kv, *chunks)
        gap = 0
        if row["kind"] == FIRST:
            joined, left, decodes = (int(row[name]) for name in ("num_joined", "num_left", "num_decodes"))
            by_kernels = bool(chunks[0]) and own.runs_by_kernels(num_decodes, chunks[0], chunks[1])
            gap = gap_of(entry.gaps, row["before"], bool(row["num_chunks"]), joined, left, decodes, by_kernels)
        elif row["kind"] != FOLLOWING:
            gap = entry.gaps.continued
        found.append(units / UNITS_PER_NS * slower[i] + gap / 1000)
    return np.array(found)


def _slower(gaps: LaunchGaps, columns: dict[str, Any]) -> Any:
    """What the own time of each step is multiplied by: a load lengthens those with chunks that it was built up by."""
    slower = np.ones(len(columns["duration_ps"]))
    chunked = columns["num_chunks"] > 0
    if gaps.millionths_under_load and chunked.any():
        effect = LoadEffect(gaps.millionths_under_load / 1e6, max(gaps.load_after, 1) / 1000, gaps.load_drain)
        slower[chunked] = Load({name: column[chunked] for name, column in columns.items()}).slower(effect)
    return slower


def _plot_engine(cost: MeasuredCost, entry: EngineEntry, steps: Sequence[StepSample], path: Path) -> None:
    columns = as_arrays(steps)
    measured = columns["duration_ps"] / _PS_PER_MS
    fitted = fitted_ns(cost, entry, columns) / 1e6
    chunks = columns["num_chunks"] > 0
    following = columns["kind"] == FOLLOWING
    panels = [
        ("decode steps inside a plan", ~chunks & following, "num_decodes", "sequences in the batch"),
        ("first decode steps of plans", ~chunks & ~following, "num_decodes", "sequences in the batch"),
        ("steps with chunks", chunks, "num_chunk_tokens", "prompt tokens in the step"),
    ]
    panels = [panel for panel in panels if panel[1].any()]
    figure, axes = _figure(len(panels), entry.title)
    for column, (title, chosen, feature, words) in zip(axes.T, panels, strict=True):
        dots = np.flatnonzero(chosen)
        dots = dots[:: max(1, len(dots) // _MOST_DOTS)]
        _scatter(column[0], fitted[dots], measured[dots], title)
        column[1].axhspan(-_BAND, _BAND, color="0.93")
        column[1].axhline(0, color="0.4", linewidth=0.8)
        column[1].plot(
            columns[feature][dots],
            np.clip(measured[dots] / fitted[dots] - 1, -_EDGE, _EDGE),
            ".",
            markersize=3,
            alpha=0.4,
        )
        column[1].set_xscale("symlog", linthresh=1)
        column[1].set_ylim(-_EDGE * 1.02, _EDGE * 1.02)  # what lies beyond is drawn there
        column[1].set_xlabel(words)
        column[1].set_ylabel("measured over fitted, less one")
    _save(figure, path)


def transfers_of(profile: Profile, link: LinkEntry, samples: Samples) -> tuple[list[TransferSample], bool]:
    """Those that `link` is fitted to, and whether nothing else is among them: of several links of equal layouts, in a profile
    of a time in which links did not say between which executors they are, all transfers between such executors.
    """
    ends = link_ends(profile, link)
    is_told = all(ends)
    sources, readers = ends if is_told else link_ends(replace(profile, links=(link,)), link)
    return [t for t in samples.transfers if t.source in sources and t.reader in readers], is_told


def _plot_transfers(
    profile: Profile, by_link: Sequence[tuple[LinkEntry, Sequence[TransferSample], bool]], path: Path
) -> None:
    figure, axes = _figure(len(by_link), "Transfers")
    for (link, transfers, is_told), (above, below) in zip(by_link, axes.T, strict=True):
        columns = as_arrays(transfers)
        alone = columns["num_in_flight"] == 1
        tokens, measured = columns["num_tokens"], columns["duration_ps"] / _PS_PER_MS
        fitted = link.cost.fixed / _PS_PER_MS + tokens * profile.kv_bytes_per_token / link.cost.bytes_per_s * 1e3
        where = link_title(link).replace(", ", ",\n", 1)
        if not is_told:
            where += "\n(and of others between such executors)"
        kind, shown = ("alone", alone) if alone.any() else ("with others", ~alone)
        _scatter(above, fitted[shown], measured[shown], f"{where}\n{kind} on the link")
        for chosen, label in ((alone, "alone"), (~alone, "with others")):
            below.plot(tokens[chosen], measured[chosen], ".", markersize=4, alpha=0.5, label=label)
        order = np.argsort(tokens)
        below.plot(tokens[order], fitted[order], color="0.3", linewidth=1, label="fit")
        below.set_xlabel("tokens")
        below.set_ylabel("ms")
        below.legend()
    _save(figure, path)


def _figure(columns: int, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, columns, figsize=(4.6 * columns, 8), squeeze=False, layout="constrained")
    figure.suptitle(title)
    return figure, axes


def limits_of(fitted: Any, measured: Any) -> tuple[float, float]:
    """Of both axes, in the unit of both. Samples far from the median are no measure: a host that is held up sees two steps
    end at once, the second after nothing.
    """
    median = np.median(measured)
    near = (measured * SHORTEST >= median) & (measured <= SHORTEST * median) & (measured > 0) & (fitted > 0)
    seen = np.concatenate((fitted[near], measured[near])) if near.any() else np.ones(1)
    return float(seen.min()) * 0.9, float(seen.max()) * 1.1


def _scatter(axes: Any, fitted: Any, measured: Any, title: str) -> None:
    low, high = limits_of(fitted, measured)
    line = np.array([low, high])
    axes.fill_between(line, line * (1 - _BAND), line * (1 + _BAND), color="0.93", label="±10 %")
    axes.plot(line, line, color="0.4", linewidth=0.8)
    # what lies beyond is drawn at the edge
    axes.plot(np.clip(fitted, low, high), np.clip(measured, low, high), ".", markersize=3, alpha=0.4, clip_on=False)
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, few enough to be read
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,), numticks=8))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.set_xlabel("fitted, ms")
    axes.set_ylabel("measured, ms")
    axes.legend(loc="upper left")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=80)
    pyplot.close(figure)
