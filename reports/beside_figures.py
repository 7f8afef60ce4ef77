"""Figures of a simulation beside hardware: errors by metric, and requests one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from .comparison import MetricError, Pair, label_of, split_key
from .drawing import GREY, Drawing, Style, draw, legend, scale_of, whiskers

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

MAX_POINTS: Final = 4000
MAX_ERROR_PERCENT: Final = 200.0


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
                xerr=np.where(beyond, math.nan, 100.0 * whiskers([e for _, e in rows])),
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
        legend(figure, axes)

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
        legend(figure, panels[0])

    return draw(name, title, "TTFT and e2e latency of each request, simulation against hardware", (9.0, 4.4), paint)
