"""Errors, their causes and rankings as text: tables that read well in a terminal and are Markdown at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .attribution import Split, StageDifference
from .comparison import label_of, split_key
from .fidelity import GOALS, FidelityRow
from .metric_table import BY_KEY
from .prediction_intervals import METRICS, Prediction
from .ranking import LEAST_PAIRS, LEAST_POLICIES, Ranking
from .run_errors import ErrorRow, RunPair
from .tables import number

_MS: Final = 1e3
_TEXT: Final = ("note", "verdict")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """A Markdown table with padded columns; the first `num_text` and those of words are aligned left, the others right."""
    is_text = [i < num_text or name in _TEXT for i, name in enumerate(header)]
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if left else cell.rjust(w) for cell, w, left in zip(cells, widths, is_text)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if left else "-" * (w - 1) + ":" for w, left in zip(widths, is_text)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def percent(value: float | None, *, in_points: bool = False, signed: bool = True) -> str:
    """`+1.23 %`, or `+1.23 pt` of a difference of shares; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"
    return f"{text} {'pt' if in_points else '%'}".replace("-", "−")


def _scaled(key: str, value: float | None) -> str:
    """Times in milliseconds, shares in percent, rates as they are."""
    unit = split_key(key)[1].unit
    factor = _MS if unit == "s" else 100.0 if unit == "share" else 1.0
    return number(None if value is None else value * factor, 4)


def _unit(key: str) -> str:
    unit = split_key(key)[1].unit
    return {"s": "ms", "share": "%"}.get(unit, unit)


# ---- one pair of runs -----------------------------------------------------------------------------------------------


def error_table(rows: Sequence[ErrorRow], first: str = "simulated", second: str = "measured") -> str:
    """Each metric of a pair of runs, with the 95 % interval of the measured side."""
    header = ("metric", "unit", first, second, "95 % interval", "n", "error", "note")
    lines = [
        (
            label_of(row.key),
            _unit(row.key),
            _scaled(row.key, row.simulated),
            _scaled(row.key, row.measured),
            _interval(row),
            str(row.n) if row.n > 1 else "",
            percent(row.error, in_points=row.in_points),
            "; ".join(row.notes),
        )
        for row in rows
    ]
    return table(header, lines, 2)


def _interval(row: ErrorRow) -> str:
    if row.low is None and row.high is None:
        return ""
    low, high = ("?" if bound is None else _scaled(row.key, bound) for bound in (row.low, row.high))
    return f"[{low}, {high}]"


def prediction_table(prediction: Prediction) -> str:
    """Each metric of a prediction with the median of the draws and the bounds of their interval."""
    lines = []
    for key in METRICS:
        found = prediction.intervals.get(key)
        drawn = (None, None, None) if found is None else (found.median, found.low, found.high)
        values = (prediction.values.get(key), *drawn)
        if key == "num_completed":  # a count, which has no place among metrics
            cells = ["completed", "requests", *(number(v) for v in values)]
        else:
            cells = [label_of(key), _unit(key), *(_scaled(key, v) for v in values)]
        lines.append(cells)
    return table(("metric", "unit", "predicted", "median", "5 %", "95 %"), lines, 2)


def stage_table(differences: Sequence[StageDifference]) -> str:
    """Mean signed difference of each stage; the last line is their sum."""
    total = differences[-1].difference if differences else 0.0
    measured = differences[-1].measured if differences else 0.0
    lines = [
        (
            "**" + BY_KEY[d.stage].label + "**" if d is differences[-1] else BY_KEY[d.stage].label,
            number(d.simulated * _MS, 4),
            number(d.measured * _MS, 4),
            _signed(d.difference * _MS),
            percent(d.difference / measured) if measured else "–",
            percent(d.difference / total, signed=False) if total else "–",
        )
        for d in differences
    ]
    return table(("stage (mean, ms)", "simulated", "measured", "difference", "of e2e", "of the error"), lines)


def split_table(split: Split) -> str:
    """Error = diverged decisions + the client's delays + timing, each relative to the measured value."""
    lines = []
    for row in split.rows:
        share = split_key(row.key)[1].unit == "share"
        scale = 1.0 if share else row.measured
        parts = (row.total, row.diverged, row.client, row.timing)
        cells = [percent(None if p is None or not scale else p / scale, in_points=share) for p in parts]
        lines.append((label_of(row.key), *cells))
    return table(("metric", "error", "= diverged decisions", "+ client", "+ timing"), lines)


def split_sentence(split: Split) -> str:
    """How many requests went elsewhere, and whether the replay kept to the recorded routes."""
    differently, forced = split.share_routed_differently, split.share_forced
    text = (
        "" if differently is None else f"{percent(differently, signed=False)} of the requests were routed differently."
    )
    if forced is not None and forced < 1.0:
        text += (
            f" The replay served only {percent(forced, signed=False)} of them as recorded: read its parts with care."
        )
    return text.strip()


def pair_text(pair: RunPair, differences: Sequence[StageDifference], split: Split | None, why_not: str = "") -> str:
    """Everything about one pair, as Markdown without figures."""
    first, second = ("simulated", "measured") if pair.simulated.run.backend == "simulation" else ("first", "second")
    parts = [f"## {pair.title}", f"{len(pair.both)} requests completed in both runs.", ""]
    parts.append(error_table(pair.errors(), first, second))
    if pair.kv_blocks:
        parts += ["", kv_sentence(pair)]
    if differences:
        parts += ["", "Where the e2e difference comes from:", "", stage_table(differences)]
    if split is not None:
        parts += ["", f"Timing against decisions: {split_sentence(split)}", "", split_table(split)]
    elif why_not:
        parts += ["", f"Timing and decisions were not told apart: {why_not}."]
    return "\n".join(parts)


def kv_sentence(pair: RunPair) -> str:
    """Which executors had another amount of KV memory; it matters where memory is what requests wait for."""
    told = ", ".join(f"executor {e}: {ours:,} and {theirs:,}" for e, (ours, theirs) in pair.kv_blocks.items())
    return f"KV blocks differ ({told})."


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))


# ---- rankings -------------------------------------------------------------------------------------------------------


def _best_text(ranking: Ranking) -> str:
    if ranking.chosen == ranking.best:
        return "the same policy is best"
    if ranking.best_agrees:
        return f"{ranking.chosen}, best in simulation, and {ranking.best}, best on hardware, are a tie there"
    return "simulation would have chosen another policy"


def ranking_text(ranking: Ranking) -> str:
    """Kendall's τ, the values of each policy, and every pair."""
    tau = "undefined: hardware tells no pair apart" if ranking.tau is None else f"{ranking.tau:.3g}"
    few = "" if ranking.is_enough else f" (too few for a claim: {LEAST_POLICIES} policies and {LEAST_PAIRS} pairs)"
    best = _best_text(ranking)
    condition = f", {ranking.condition}" if ranking.condition else ""
    head = (
        f"{ranking.experiment}{condition}: {label_of(ranking.key)} of {len(ranking.measured)} policies."
        f" τ = {tau}, over {ranking.num_apart} of {len(ranking.pairs)} pairs that hardware tells apart{few}; {best}."
    )
    ordered = sorted(ranking.measured, key=lambda policy: ranking.measured[policy])
    values = [
        (p, _scaled(ranking.key, ranking.simulated[p]), _scaled(ranking.key, ranking.measured[p])) for p in ordered
    ]
    pairs = [
        (
            f"{pair.a} : {pair.b}",
            pair.verdict + (f" ({pair.why})" if pair.why else ""),
            f"{_scaled(ranking.key, pair.simulated_a)} : {_scaled(ranking.key, pair.simulated_b)}",
            f"{_scaled(ranking.key, pair.measured_a)} : {_scaled(ranking.key, pair.measured_b)}",
            percent(pair.difference, signed=False),
        )
        for pair in ranking.pairs
    ]
    unit = _unit(ranking.key)
    return "\n".join(
        [
            head,
            "",
            table(("policy", f"simulated ({unit})", f"measured ({unit})"), values),
            "",
            table(("pair", "verdict", f"simulated ({unit})", f"measured ({unit})", "apart on hardware"), pairs, 2),
        ]
    )


# ---- the fidelity table ---------------------------------------------------------------------------------------------

_GOAL_KEYS: Final = {goal.metric: goal.key for goal in GOALS}


def fidelity_table(rows: Sequence[FidelityRow]) -> str:
    """The rows of one experiment, with the intervals of its prediction where any are known."""
    has_intervals = any(row.interval is not None for row in rows)
    lines = []
    for row in rows:
        key = _GOAL_KEYS[row.metric]
        points = row.metric == "slo_attainment"
        met = "yes" if row.within_goal else "by floor"
        verdict = "–" if row.met is None else met if row.met else "**no**"
        lines.append(
            (
                row.metric,
                _unit(key),
                _scaled(key, row.simulated),
                *((_bounds(key, row.interval),) if has_intervals else ()),
                _scaled(key, row.measured),
                percent(row.error, in_points=points),
                percent(row.floor, in_points=points, signed=False),
                percent(row.goal, in_points=points, signed=False),
                percent(row.limit, in_points=points, signed=False),
                verdict,
                row.note,
            )
        )
    drawn = ("5–95 %",) if has_intervals else ()
    header = ("metric", "unit", "simulated", *drawn, "measured", "error", "floor", "goal", "limit", "met", "note")
    return table(header, lines, 2)


def _bounds(key: str, interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{_scaled(key, interval[0])} to {_scaled(key, interval[1])}"
