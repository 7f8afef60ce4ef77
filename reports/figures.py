"""Figures of a report, each a PNG and an SVG: drawn from numbers alone, in colours that the colour-blind tell apart.

A policy has one colour, line style and hatch in all figures of a report, so that print without colour stays legible.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from msgspec import Struct

from .comparison import Case, MetricError, Pair, Section, estimate, label_of, split_key
from .executors import timelines
from .metrics import BY_KEY, STAGES, window_s
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as MatplotlibFigure

# Okabe and Ito's palette without its yellow, which white paper swallows
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES: Final = ("", "///", "---", "xxx", "\\\\\\", "++", "|||")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
STAGE_COLOURS: Final = ("#999999", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
GREY: Final = "#555555"
NOT_FREE: Final = "#c4c4c4"
HELD: Final = "#333333"  # no policy's colour
MAX_EXECUTORS: Final = 8
MAX_POINTS: Final = 4000
TIME_BINS: Final = 150
MAX_ERROR_PERCENT: Final = 200.0
_CURVE_POINTS: Final = 400
_CHARACTERS_AN_INCH: Final = 15  # of a legend
_LEGEND_ROW_INCHES: Final = 0.2
_TICK_CHARACTERS: Final = 24


class Style(Struct, frozen=True):
    colour: str
    line: Any
    hatch: str
    marker: str


class Drawing(Struct, frozen=True):
    """A finished figure: `name` is its file's stem, `alt` says in words what it shows."""

    name: str
    title: str
    alt: str
    png: bytes
    svg: bytes


def styles_of(policies: Sequence[str]) -> dict[str, Style]:
    """One style per policy, by order of name: the same policies get the same styles in every report."""
    return {
        policy: Style(
            PALETTE[i % len(PALETTE)],
            LINES[(i + i // len(PALETTE)) % len(LINES)],
            HATCHES[i % len(HATCHES)],
            MARKERS[i % len(MARKERS)],
        )
        for i, policy in enumerate(sorted(set(policies)))
    }


_RC: Final[Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "disagg",
    "hatch.linewidth": 0.6,
}


def draw(
    name: str,
    title: str,
    alt: str,
    size: tuple[float, float],
    paint: Callable[[MatplotlibFigure], None],
    layout: Literal["constrained"] | None = "constrained",
    dpi: int = 150,
) -> Drawing:
    """`paint` on an empty figure of `size` inches, as PNG and SVG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        paint(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=dpi)
        FigureCanvasSVG(figure)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(name, title, alt, png.getvalue(), svg.getvalue())


def _legend(figure: MatplotlibFigure, axes: Axes, columns: int = 4) -> None:
    """Below the panels, as many columns as its words leave room for; its further rows make the figure higher."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        room = int(_CHARACTERS_AN_INCH * figure.get_figwidth()) // (max(map(len, labels)) + 4)
        columns = max(1, min(columns, room, len(handles)))
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_INCHES * ((len(handles) - 1) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _tick_labels(policies: Sequence[str]) -> list[str]:
    return [fill(policy, _TICK_CHARACTERS) for policy in policies]


def scale_of(values: Sequence[float | None], unit: str) -> tuple[float, str]:
    """Factor and unit in which times read well: milliseconds under a second, otherwise the unit itself."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if unit in ("s", "s/token") and 0 < largest < 1.0:
        return (1e3, f"m{unit}") if largest >= 1e-3 else (1e6, f"µ{unit}")
    return 1.0, unit


# ---- distributions --------------------------------------------------------------------------------------------------


def latency_cdf(name: str, groups: dict[str, list[Case]], styles: dict[str, Style], title: str) -> Drawing:
    """Cumulated share of requests by TTFT and by TPOT, a curve per policy (repeats pooled); objectives are dotted."""

    def paint(figure: MatplotlibFigure) -> None:
        panels = figure.subplots(1, 2)
        for axes, key in zip(panels, ("ttft_s", "tpot_s")):
            metric = BY_KEY[key]
            columns = {
                policy: np.concatenate([case.rows[key].to_numpy(np.float64) for case in cases])
                for policy, cases in groups.items()
            }
            columns = {policy: values[np.isfinite(values)] for policy, values in columns.items()}
            high = [float(np.percentile(values, 99)) for values in columns.values() if len(values)]
            factor, unit = scale_of(high, metric.unit)
            low = min((float(values.min()) for values in columns.values() if len(values)), default=0.0)
            for policy, values in columns.items():
                if not len(values):
                    continue
                shares = np.linspace(0.0, 1.0, min(_CURVE_POINTS, len(values) + 1))
                quantiles = np.quantile(values, shares, method="inverted_cdf") * factor
                style = styles[policy]
                axes.plot(
                    quantiles,
                    shares,
                    label=policy,
                    color=style.colour,
                    linestyle=style.line,
                    lw=1.8,
                    drawstyle="steps-post",
                )
            # spans of more than a factor of 20 would hide their short end on a linear axis
            if low > 0 and high and max(high) / low > 20:
                axes.set_xscale("log")
                plain_log_ticks(axes.xaxis, max(high) / low)
            objectives = {case.run.objectives.get(key) for cases in groups.values() for case in cases}
            for objective in sorted(value for value in objectives if value is not None):
                if high and objective <= 3 * max(high):
                    axes.axvline(objective * factor, color=GREY, lw=1.0, ls=":")
                    axes.text(
                        objective * factor,
                        0.03,
                        " objective",
                        color=GREY,
                        fontsize=8,
                        rotation=90,
                        ha="right",
                        va="bottom",
                    )
            axes.set_xlabel(f"{metric.label} ({unit})")
            axes.set_ylim(0.0, 1.02)
        panels[0].set_ylabel("share of requests")
        _legend(figure, panels[0])

    alt = "Cumulative distributions of TTFT and TPOT, one curve per policy: " + ", ".join(groups)
    return draw(name, title, alt, (9.0, 3.9), paint)


def plain_log_ticks(axis: Axis, span: float) -> None:
    """Ticks of a logarithmic axis as plain numbers; `span` is its largest value over its smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# ---- service levels -------------------------------------------------------------------------------------------------


def service_levels(
    name: str, section: Section, backend: str, styles: dict[str, Style], title: str, condition: str | None = None
) -> Drawing | None:
    """Goodput and SLO attainment with 95 % intervals: curves over a numeric sweep, else bars for one `condition`."""
    cases = section.select(backend=backend, condition=condition)
    keys = ("goodput", "slo_attainment") if any(case.summary["slo_attainment"] is not None for case in cases) else ()
    if not keys:
        return None
    policies = [policy for policy in section.policies if any(case.policy == policy for case in cases)]
    swept = section.swept if condition is None else None

    def curves(figure: MatplotlibFigure) -> None:
        panels = figure.subplots(1, 2)
        key_name = swept[0] if swept else ""
        for axes, key in zip(panels, keys):
            for i, policy in enumerate(policies):
                points: list[tuple[float, Estimate]] = []
                for case in section.select(backend=backend, policy=policy):
                    value = float(case.condition_values[key_name])
                    if value not in [x for x, _ in points]:
                        group = section.select(backend=backend, policy=policy, condition=case.condition)
                        points.append((value, estimate(group, key)))
                points = sorted((x, e) for x, e in points if e.value is not None)
                x = [value for value, _ in points]
                y = [e.value or 0.0 for _, e in points]
                style = styles[policy]
                # points of several policies at one rate would hide each other's intervals
                spread = (max(x) - min(x)) * 0.006 * (i - (len(policies) - 1) / 2) if x else 0.0
                axes.errorbar(
                    [value + spread for value in x],
                    y,
                    yerr=_whiskers([e for _, e in points]),
                    label=policy,
                    color=style.colour,
                    linestyle=style.line,
                    marker=style.marker,
                    ms=5,
                    lw=1.6,
                    capsize=3,
                )
            axes.set_xlabel(_swept_label(key_name))
            _level_axis(axes, key, cases)
        _legend(figure, panels[0])

    def bars(figure: MatplotlibFigure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key in zip(panels, keys):
            found = [estimate([case for case in cases if case.policy == policy], key) for policy in policies]
            for y, (policy, e) in enumerate(zip(policies, found)):
                style = styles[policy]
                axes.barh(y, e.value or 0.0, 0.62, color=style.colour, hatch=style.hatch, edgecolor="white", lw=0)
            axes.errorbar(
                [e.value or 0.0 for e in found],
                range(len(found)),
                xerr=_whiskers(found),
                fmt="none",
                ecolor="black",
                capsize=3,
                lw=1.2,
            )
            axes.set_yticks(range(len(policies)), _tick_labels(policies))
            axes.grid(axis="y", visible=False)
            _level_axis(axes, key, cases, horizontal=True)
        panels[0].invert_yaxis()

    size = (9.0, 3.9) if swept else (9.0, 1.4 + 0.42 * len(policies))
    alt = f"Goodput and SLO attainment with 95 % intervals for {', '.join(policies)}"
    return draw(name, title, alt, size, curves if swept else bars)


def _swept_label(key: str) -> str:
    return {"rate": "request rate (requests/s)"}.get(key.rpartition(".")[2], key)


def _level_axis(axes: Axes, key: str, cases: Sequence[Case], horizontal: bool = False) -> None:
    metric = BY_KEY[key]
    text = f"{metric.label} ({metric.unit})"
    (axes.set_xlabel if horizontal else axes.set_ylabel)(text)
    if key == "slo_attainment":
        (axes.set_xlim if horizontal else axes.set_ylim)(0.0, 1.03)
        for wanted in {case.run.objectives.get("attainment", 1.0) for case in cases}:
            (axes.axvline if horizontal else axes.axhline)(wanted, color=GREY, lw=1.0, ls=":")
    else:
        (axes.set_xlim if horizontal else axes.set_ylim)(0.0, None)


def _whiskers(estimates: Sequence[Estimate]) -> Any:
    """Lengths of error bars below and above, (2, n); NaN, which draws nothing, where a bound is missing."""
    below = [math.nan if e.low is None or e.value is None else max(0.0, e.value - e.low) for e in estimates]
    above = [math.nan if e.high is None or e.value is None else max(0.0, e.high - e.value) for e in estimates]
    return np.array([below, above])


# ---- stages ---------------------------------------------------------------------------------------------------------


def stage_breakdown(name: str, groups: dict[str, list[Case]], title: str) -> Drawing:
    """Mean time of each stage, stacked to the mean e2e latency, a bar per policy."""
    stages = ("dispatch_delay_s", *STAGES)
    means = {policy: [_mean(cases, stage) for stage in stages] for policy, cases in groups.items()}
    totals = {policy: sum(values) for policy, values in means.items()}
    factor, unit = scale_of(list(totals.values()), "s")

    def paint(figure: MatplotlibFigure) -> None:
        axes = figure.subplots()
        left = np.zeros(len(means))
        for i, stage in enumerate(stages):
            widths = np.array([values[i] for values in means.values()]) * factor
            axes.barh(
                range(len(means)),
                widths,
                0.62,
                left=left,
                label=BY_KEY[stage].label,
                color=STAGE_COLOURS[i],
                hatch=HATCHES[i],
                edgecolor="white",
                lw=0.8,
            )
            left += widths
        for y, total in enumerate(totals.values()):
            axes.text(total * factor, y, f" {total * factor:.3g} {unit}", va="center", fontsize=9)
        axes.set_xlim(0.0, max([*left, 1e-12]) * 1.12)
        axes.set_yticks(range(len(means)), _tick_labels(list(means)))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"mean time of a completed request ({unit})")
        _legend(figure, axes, 6)

    alt = "Mean time by stage: " + "; ".join(
        f"{policy} {total * factor:.3g} {unit} in all" for policy, total in totals.items()
    )
    return draw(name, title, alt, (9.0, 1.7 + 0.45 * len(means)), paint)


def _mean(cases: Sequence[Case], stage: str) -> float:
    """Mean over repeats of the mean over completed requests; 0 where none completed."""
    columns = [case.rows.loc[case.rows["completed"], stage].to_numpy(np.float64) for case in cases]
    means = [float(values.mean()) for values in columns if len(values)]
    return float(np.mean(means)) if means else 0.0


# ---- executors over time --------------------------------------------------------------------------------------------


def executor_timelines(name: str, case: Case, style: Style, title: str) -> Drawing | None:
    """Busy share, decode batch, prefill rate and held blocks over time, a row per executor (the first eight)."""
    executors = list(case.run.roles)[:MAX_EXECUTORS]
    if not executors or not len(case.rows):
        return None
    start, end = window_s(case.rows)
    lines = timelines(case.run, executors, start, end, TIME_BINS)
    columns = (
        ("busy", "busy share", 1.0),
        ("decodes", "decoding requests", 1.0),
        ("prefill_tokens_per_s", "prefill (1000 tokens/s)", 1e-3),
        ("occupied_share", "KV blocks (share of all)", 1.0),
    )

    def paint(figure: MatplotlibFigure) -> None:
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.105, right=0.99, top=1 - 0.3 / height, bottom=0.85 / height, wspace=0.22, hspace=0.25
        )
        panels = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True, sharey="col")
        for (field, label, factor), column in zip(columns, panels.T):
            top = 1.0 if field == "busy" else max(float(getattr(line, field).max()) for line in lines) * factor * 1.05
            column[0].set_ylim(0.0, top or 1.0)
            column[0].set_xlim(start, max(end, start + 1e-9))
            column[0].set_title(label, fontsize=10)
            column[-1].set_xlabel("time (s)", fontsize=9)
            for axes, line in zip(column, lines):
                axes.locator_params(axis="y", nbins=3)
                axes.tick_params(labelsize=8)
                blocks = field == "occupied_share"
                _fill(axes, line.edges_s, getattr(line, field) * factor, NOT_FREE if blocks else style.colour)
                if blocks:
                    _fill(axes, line.edges_s, line.held_share, HELD)
        for axes, line in zip(panels[:, 0], lines):
            axes.annotate(
                f"{line.executor}: {line.role}",
                (0.0, 0.5),
                xycoords="axes fraction",
                xytext=(-34, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="center",
                fontsize=9,
            )
        from matplotlib.patches import Patch

        patches = [Patch(color=NOT_FREE, label="not free"), Patch(color=HELD, label="held for a transfer")]
        figure.legend(handles=patches, loc="lower right", ncols=2, title=None)

    left_out = len(case.run.roles) - len(executors)
    alt = f"Busy share, decodes, prefill and held blocks over time of executors {', '.join(map(str, executors))}"
    if left_out:
        title += f" (first {MAX_EXECUTORS} of {len(case.run.roles)} executors)"
    # many small panels: the constrained layout of the other figures would take seconds
    return draw(name, title, alt, (10.5, 1.15 + 1.15 * len(lines)), paint, layout=None)


def _fill(axes: Axes, edges: Any, values: Any, colour: str) -> None:
    if np.any(values > 0):
        axes.stairs(values, edges, color=colour, fill=True)


# ---- simulation beside hardware -------------------------------------------------------------------------------------


def error_bars(
    name: str, errors: dict[str, list[MetricError]], styles: dict[str, Style], keys: Sequence[str], title: str
) -> Drawing | None:
    """Relative error of each metric, simulation against hardware, a mark per policy, with intervals over repeats."""
    shown = [
        key for key in keys if any(e.key == key and e.relative.value is not None for es in errors.values() for e in es)
    ]
    if not shown:
        return None

    def paint(figure: MatplotlibFigure) -> None:
        axes = figure.subplots()
        height = 0.7 / len(errors)
        for i, (policy, found) in enumerate(errors.items()):
            by_key = {error.key: error.relative for error in found}
            rows = [(y, by_key[key]) for y, key in enumerate(shown) if key in by_key and by_key[key].value is not None]
            style = styles[policy]
            places = [y + (i - (len(errors) - 1) / 2) * height for y, _ in rows]
            percents = np.array([100.0 * (e.value or 0.0) for _, e in rows])
            beyond = np.abs(percents) > MAX_ERROR_PERCENT
            axes.barh(
                places,
                np.clip(percents, -MAX_ERROR_PERCENT, MAX_ERROR_PERCENT),
                height * 0.9,
                xerr=np.where(beyond, math.nan, 100.0 * _whiskers([e for _, e in rows])),
                label=policy,
                color=style.colour,
                hatch=style.hatch,
                edgecolor="white",
                lw=0,
                ecolor="black",
                capsize=2,
            )
            # one metric that is off by orders of magnitude must not flatten all others
            for place, percent in zip(np.array(places)[beyond], percents[beyond]):
                axes.text(MAX_ERROR_PERCENT, place, f" {percent:+,.0f} %", fontsize=8, va="center")
        axes.axvline(0.0, color="black", lw=0.8)
        axes.set_yticks(range(len(shown)), [label_of(key) for key in shown])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("simulation − hardware, % of hardware")
        _legend(figure, axes)

    alt = f"Relative error of simulation against hardware by metric for {', '.join(errors)}"
    rows = len(shown) * max(1.0, 0.5 * len(errors))
    return draw(name, title, alt, (9.0, 1.5 + 0.28 * rows), paint)


def request_scatter(name: str, pairs: Sequence[Pair], styles: dict[str, Style], title: str) -> Drawing | None:
    """TTFT and e2e latency of each request, hardware against simulation; the diagonal is agreement."""
    tables = [
        (pair, pair.simulation.rows.merge(pair.hardware.rows, on="request_id", suffixes=("_s", "_h"))) for pair in pairs
    ]
    if not any(len(table) for _, table in tables):
        return None

    def paint(figure: MatplotlibFigure) -> None:
        panels = figure.subplots(1, 2)
        for axes, key in zip(panels, ("ttft_s", "e2e_latency_s")):
            values = np.concatenate([t[[f"{key}_h", f"{key}_s"]].to_numpy(np.float64).ravel() for _, t in tables])
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            factor, unit = scale_of([float(values.max())], "s")
            labelled: set[str] = set()
            for pair, table in tables:
                sample = table if len(table) <= MAX_POINTS else table.sample(MAX_POINTS, random_state=0)
                style = styles[pair.policy]
                axes.scatter(
                    sample[f"{key}_h"] * factor,
                    sample[f"{key}_s"] * factor,
                    s=14,
                    alpha=0.6,
                    color=style.colour,
                    marker=style.marker,
                    linewidths=0,
                    rasterized=len(sample) > 500,
                    label=None if pair.policy in labelled else pair.policy,
                )
                labelled.add(pair.policy)
            low, high = float(values.min()) * factor, float(values.max()) * factor
            axes.axline((low, low), slope=1.0, color=GREY, lw=1.0, ls="--") if high > low else None
            if low > 0 and high / low > 20:
                axes.set_xscale("log")
                axes.set_yscale("log")
            label = split_key(key)[1].label
            axes.set_xlabel(f"{label} on hardware ({unit})")
            axes.set_ylabel(f"{label} in simulation ({unit})")
        _legend(figure, panels[0])

    return draw(name, title, "TTFT and e2e latency of each request, simulation against hardware", (9.0, 4.4), paint)
