"""Figures of runs, drawn from numbers alone: distributions, service levels, stages, executors over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .comparison import Case, Section, estimate
from .drawing import (
    GREY,
    HATCHES,
    Drawing,
    Style,
    draw,
    legend,
    plain_log_ticks,
    scale_of,
    tick_labels,
    whiskers,
)
from .executors import timelines
from .metric_table import BY_KEY, STAGES
from .metrics import window_s
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

STAGE_COLOURS: Final = ("#999999", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
NOT_FREE: Final = "#c4c4c4"
HELD: Final = "#333333"  # no policy's colour
MAX_EXECUTORS: Final = 8
TIME_BINS: Final = 150
_CURVE_POINTS: Final = 400


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
        legend(figure, panels[0])

    alt = "Cumulative distributions of TTFT and TPOT, one curve per policy: " + ", ".join(groups)
    return draw(name, title, alt, (9.0, 3.9), paint)


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
                    yerr=whiskers([e for _, e in points]),
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
        legend(figure, panels[0])

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
                xerr=whiskers(found),
                fmt="none",
                ecolor="black",
                capsize=3,
                lw=1.2,
            )
            axes.set_yticks(range(len(policies)), tick_labels(policies))
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
        axes.set_yticks(range(len(means)), tick_labels(list(means)))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"mean time of a completed request ({unit})")
        legend(figure, axes, 6)

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
