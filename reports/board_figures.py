"""Figures of the leaderboard: two latencies against each other, goodput over load, and what older reports cost.

With two dozen policies no palette tells all apart: a few are drawn in colour, by name, and the others in grey behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from .board import FRESH, NOT_SERVED, Board, BoardScenario, ageing, goodput_curve, own_policies, pareto, standings
from .board_text import seeds_text
from .drawing import GREY, Drawing, draw, plain_log_ticks, scale_of, styles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLOURED: Final = 7  # colours of the palette: more would look alike
_ALWAYS: Final = ("oracle", "round_robin")
_FAINT: Final = "#c8ccd0"


def coloured(board: Board, scenario: str, more: Sequence[str] = ()) -> list[str]:
    """The policies drawn in colour: a user's own, `more`, the best, round robin and the oracle; in order of rank."""
    ranked = [standing.policy for standing in standings(board, scenario)]
    first = [label for label in (*own_policies(board), *more, *_ALWAYS) if label in ranked]
    chosen = list(dict.fromkeys([*first, *ranked]))[:MOST_COLOURED]
    return [label for label in ranked if label in chosen]


def latencies(board: Board, scenario: BoardScenario) -> Drawing | None:
    """Mean TTFT against mean TPOT, a mark per policy."""
    points = pareto(board, scenario.name)
    if not points:
        return None
    efficient = {point.policy for point in points if point.is_efficient}
    ranked = [standing.policy for standing in standings(board, scenario.name) if standing.policy in efficient]
    chosen = coloured(board, scenario.name, ranked[: MOST_COLOURED - len(_ALWAYS)])
    styles = styles_of(chosen)
    x_factor, x_unit = scale_of([point.ttft_s for point in points], "s")
    y_factor, y_unit = scale_of([point.tpot_s for point in points], "s/token")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for point in points:
            style = styles.get(point.policy)
            part = point.share_served <= 1 - NOT_SERVED
            axes.scatter(
                point.ttft_s * x_factor,
                point.tpot_s * y_factor,
                s=44 if style else 20,
                marker=style.marker if style else "o",
                facecolor="none" if part else (style.colour if style else _FAINT),
                edgecolor=style.colour if style else GREY if part else _FAINT,
                zorder=3 if style else 2,
                label=point.policy + (f" ({100 * (1 - point.share_served):.0f} % rejected)" if part else "")
                if style
                else None,
            )
        values = [point.ttft_s for point in points]
        if min(values) > 0 and max(values) / min(values) > 8:
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis, max(values) / min(values))
        else:
            _at_least_wide(axes.set_xlim, [x_factor * value for value in values])
            axes.ticklabel_format(axis="x", useOffset=False)
        _at_least_wide(axes.set_ylim, [y_factor * point.tpot_s for point in points])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel(f"mean TTFT ({x_unit})")
        axes.set_ylabel(f"mean TPOT ({y_unit})")
        _legend(figure, axes)

    alt = "Mean TTFT and TPOT; not beaten in both: " + ", ".join(p.policy for p in points if p.is_efficient)
    return draw(
        f"{scenario.name}-latencies",
        "Mean TTFT against mean TPOT; hollow: it rejected, and shows those it served",
        alt,
        (5.4, 4.4),
        paint,
    )


def goodput(board: Board, scenario: BoardScenario) -> Drawing | None:
    """Requests/s that met their objectives over requests/s sent; None in a closed loop."""
    curves = {policy.label: goodput_curve(board, scenario, policy.label) for policy in board.ran_in(scenario.name)}
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    chosen = [label for label in coloured(board, scenario.name) if label in curves]
    styles = styles_of(chosen)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        top = max(rate for curve in curves.values() for rate, _ in curve)
        axes.plot([0, top], [0, top], color=GREY, lw=0.8, ls=":")
        for label, curve in curves.items():
            rates, values = [rate for rate, _ in curve], [e.value or 0.0 for _, e in curve]
            style = styles.get(label)
            if style is None:
                axes.plot(rates, values, color=_FAINT, lw=0.9, zorder=1)
                continue
            low = [e.low if e.low is not None else e.value or 0.0 for _, e in curve]
            high = [e.high if e.high is not None else e.value or 0.0 for _, e in curve]
            axes.fill_between(
                rates,
                [max(0.0, v) for v in low],
                [min(v, r) for v, r in zip(high, rates)],
                color=style.colour,
                alpha=0.10,
                lw=0,
            )
            axes.plot(
                rates,
                values,
                color=style.colour,
                ls=style.line,
                marker=style.marker,
                ms=4,
                lw=1.5,
                label=label,
                zorder=3,
            )
        lowest = min(rate for curve in curves.values() for rate, _ in curve)
        axes.set_xlim(0.95 * lowest, 1.02 * top)
        axes.set_ylim(0.0, None)
        axes.set_xlabel("requests/s sent")
        axes.set_ylabel("requests/s that met the objectives")
        _legend(figure, axes)

    return draw(
        f"{scenario.name}-goodput",
        "Goodput over load; dotted: every request meets them; "
        + seeds_text(e.n for curve in curves.values() for _, e in curve),
        f"Goodput over load of {', '.join(curves)}",
        (5.4, 4.4),
        paint,
    )


def older_reports(board: Board, scenario: BoardScenario) -> Drawing | None:
    """Mean TTFT over the interval between reports; None where none were made older."""
    aged = [each for each in ageing(board, scenario.name) if len(each.ttft_s) > 1]
    if not aged:
        return None
    hit = sorted(aged, key=lambda each: -max(e.value or 0.0 for e in each.added_s.values()))[:3]
    chosen = coloured(
        board, scenario.name, ["least_requests", "least_tokens", "power_of_two", *(each.policy for each in hit)]
    )
    styles = styles_of(chosen)
    intervals = sorted({interval for each in aged for interval in each.ttft_s})
    factor, unit = scale_of([e.value for each in aged for e in each.ttft_s.values()], "s")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = {interval: place for place, interval in enumerate(intervals)}
        for each in aged:
            x = [places[interval] for interval in each.ttft_s]
            y = [factor * (e.value or 0.0) for e in each.ttft_s.values()]
            style = styles.get(each.policy)
            if style is None:
                axes.plot(x, y, color=_FAINT, lw=0.9, zorder=1)
            else:
                axes.plot(
                    x,
                    y,
                    color=style.colour,
                    ls=style.line,
                    marker=style.marker,
                    ms=4,
                    lw=1.5,
                    label=each.policy,
                    zorder=3,
                )
        axes.set_xticks(range(len(intervals)), ["at each\nchange" if i == FRESH else f"{i:g} ms" for i in intervals])
        axes.set_xlabel("executors report")
        axes.set_ylabel(f"mean TTFT ({unit})")
        values = [factor * (e.value or 0.0) for each in aged for e in each.ttft_s.values()]
        if min(values) > 0 and max(values) / min(values) > 8:
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis, max(values) / min(values))
        else:
            axes.set_ylim(0.0, 1.06 * max(values) or None)
        axes.margins(x=0.08)
        _legend(figure, axes)

    return draw(
        f"{scenario.name}-reports",
        "Mean TTFT with older reports; " + seeds_text(each.ttft_s[FRESH].n for each in aged),
        f"Mean TTFT over the report interval of {', '.join(e.policy for e in aged)}",
        (5.4, 4.4),
        paint,
    )


def _at_least_wide(set_limits: Callable[[float, float], object], values: Sequence[float]) -> None:
    """Limits around `values`, and no narrower than 2 % of them: a thousandth is no difference to be looked at."""
    low, high = min(values), max(values)
    half = max(0.55 * (high - low), 0.01 * (low + high) / 2)
    if half > 0:
        set_limits((low + high) / 2 - half, (low + high) / 2 + half)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
