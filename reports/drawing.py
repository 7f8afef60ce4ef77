"""How figures of a report look, and how one is drawn: as a PNG and an SVG, in colours that the colour-blind tell apart.

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
GREY: Final = "#555555"
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
    colors: int | None = None,
) -> Drawing:
    """`paint` on an empty figure of `size` inches, as PNG and SVG; with `colors`, the PNG has so many at most."""
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
        if colors is not None:
            png = _with_palette(png, colors)
        FigureCanvasSVG(figure)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(name, title, alt, png.getvalue(), svg.getvalue())


def _with_palette(png: io.BytesIO, colors: int) -> io.BytesIO:
    from PIL import Image

    small = io.BytesIO()
    Image.open(png).convert("RGB").quantize(colors).save(small, format="png", optimize=True)
    return small


def legend(figure: MatplotlibFigure, axes: Axes, columns: int = 4) -> None:
    """Below the panels, as many columns as its words leave room for; its further rows make the figure higher."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        room = int(_CHARACTERS_AN_INCH * figure.get_figwidth()) // (max(map(len, labels)) + 4)
        columns = max(1, min(columns, room, len(handles)))
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_INCHES * ((len(handles) - 1) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def tick_labels(policies: Sequence[str]) -> list[str]:
    return [fill(policy, _TICK_CHARACTERS) for policy in policies]


def scale_of(values: Sequence[float | None], unit: str) -> tuple[float, str]:
    """Factor and unit in which times read well: milliseconds under a second, otherwise the unit itself."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if unit in ("s", "s/token") and 0 < largest < 1.0:
        return (1e3, f"m{unit}") if largest >= 1e-3 else (1e6, f"µ{unit}")
    return 1.0, unit


def plain_log_ticks(axis: Axis, span: float) -> None:
    """Ticks of a logarithmic axis as plain numbers; `span` is its largest value over its smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whiskers(estimates: Sequence[Estimate]) -> Any:
    """Lengths of error bars below and above, (2, n); NaN, which draws nothing, where a bound is missing."""
    below = [math.nan if e.low is None or e.value is None else max(0.0, e.value - e.low) for e in estimates]
    above = [math.nan if e.high is None or e.value is None else max(0.0, e.high - e.value) for e in estimates]
    return np.array([below, above])
