"""Requests of one run against those of another: TTFT, TPOT and e2e latency, with the diagonal and a band of ±10 %."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from .comparison import label_of, split_key
from .drawing import GREY, PALETTE, Drawing, draw, plain_log_ticks, scale_of
from .run_errors import LATENCIES, RunPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAND: Final = 0.10
SMALL_DPI: Final = 72
_SMALL_COLORS: Final = 64  # dots over dots have thousands of shades, which do not compress
_MOST_POINTS: Final = 3000


def scatter(name: str, pair: RunPair, *, small: bool = False) -> Drawing | None:
    """Three panels, hardware across and simulation up; `small` for a page with many. None if no request completed."""
    both = pair.both
    if not len(both):
        return None
    shown = both if len(both) <= _MOST_POINTS else both.sample(_MOST_POINTS, random_state=0)
    hardware_only = pair.simulated.run.backend == "hardware"

    def paint(figure: Figure) -> None:
        for axes, key in zip(figure.subplots(1, 3), LATENCIES):
            x, y = (shown[f"{key}{side}"].to_numpy(np.float64) for side in (".hw", ".sim"))
            known = np.isfinite(x) & np.isfinite(y)
            label = split_key(key)[1].label
            axes.set_title(label)
            if not known.any():
                axes.text(0.5, 0.5, "undefined", ha="center", transform=axes.transAxes)
                continue
            factor, unit = scale_of([float(max(x[known].max(), y[known].max()))], "s")
            x, y = x[known] * factor, y[known] * factor
            low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
            if low > 0 and high / low > 20:
                axes.set_xscale("log")
                axes.set_yscale("log")
                for axis in (axes.xaxis, axes.yaxis):
                    plain_log_ticks(axis, high / low)
                low, high = low / 1.15, high * 1.15
            else:
                margin = 0.05 * (high - low) or 0.05 * high or 1.0
                low, high = max(0.0, low - margin), high + margin
            line = np.geomspace(low, high, 64) if axes.get_xscale() == "log" else np.array([low, high])
            axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#dddddd", lw=0, label="±10 %")
            axes.plot(line, line, color=GREY, lw=1.0, ls="--", label="equal")
            axes.scatter(x, y, s=9, alpha=0.45, color=PALETTE[0], linewidths=0, rasterized=True)
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            axes.set_aspect("equal")
            axes.set_xlabel(f"second hardware run ({unit})" if hardware_only else f"hardware ({unit})")
            axes.set_ylabel(f"first hardware run ({unit})" if hardware_only else f"simulation ({unit})")
            axes.legend(loc="upper left", fontsize=8)

    title = f"{pair.title}: {len(both)} requests"
    alt = f"{title}; {', '.join(label_of(key) for key in LATENCIES)} of each, one run against the other"
    if not small:
        return draw(name, title, alt, (9.6, 3.6), paint)
    return draw(name, title, alt, (9.6, 3.6), paint, dpi=SMALL_DPI, colors=_SMALL_COLORS)
