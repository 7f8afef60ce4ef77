"""The leaderboard as plain text and as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from .board import FRESH, NOT_SERVED, Board, Point, Standing, ageing, overall, pareto, standings
from .comparison import label_of, split_key
from .drawing import scale_of
from .statistics import Estimate

_MOST_COLUMNS: Final = 100  # of a terminal


def shown(key: str, value: float | None, signed: bool = False) -> str:
    """A value of the metric `key` with its unit; shares in percent."""
    if value is None:
        return "–"
    metric = split_key(key)[1]
    sign = "+" if signed else ""
    if metric.key == "slo_attainment":
        return f"{100 * value:{sign}.1f} %"
    factor, unit = scale_of([value], metric.unit)
    return f"{factor * value:{sign}.3g} {unit}"


def interval_text(key: str, e: Estimate) -> str:
    """The 95 % interval in brackets, empty without one. A share's does not leave 0 to 1."""
    if e.low is None or e.high is None:
        return ""
    low, high = max(e.low, 0.0), min(e.high, 1.0) if key == "slo_attainment" else e.high
    return f"[{shown(key, low)}, {shown(key, high)}]"


def with_interval(key: str, e: Estimate) -> str:
    """The value and its 95 % interval."""
    return f"{shown(key, e.value)} {interval_text(key, e)}".rstrip()


def behind_text(key: str, standing: Standing) -> str:
    """How far behind the best, or that this cannot be said."""
    if standing.is_best:
        return "best"
    if standing.behind is None:
        return "oracle"
    if standing.is_tied:
        return "not distinguishable"
    if not standing.behind.has_interval:
        return "one seed"
    if split_key(key)[1].key == "slo_attainment":  # of what all send, not of what the best attains
        return f"{100 * (standing.behind.value or 0.0):.1f} points behind"
    return f"{shown(key, standing.behind.value)} behind"


def pareto_text(point: Point | None) -> str:
    """Whether nobody beats it in both latencies; of one that rejects these are of those that it let in."""
    if point is None or not point.is_efficient:
        return ""
    return "yes" if point.share_served > 1 - NOT_SERVED else f"of the {100 * point.share_served:.0f} % served"


def seeds_text(numbers: Iterable[int]) -> str:
    """On how many seeds each curve of a figure is, in words."""
    few, many = min(found := set(numbers)), max(found)
    if few == many:
        return f"the same {many} seeds at each point" if many > 1 else "one seed"
    return f"of each policy the same {few} to {many} seeds at each point"


def as_text(board: Board) -> str:
    """Place and mean in every scenario, as aligned columns, below each other where they are wider than a terminal."""
    labels = [policy.label for policy in board.policies]
    width = max(map(len, labels))
    places = {scenario.name: {s.policy: s for s in standings(board, scenario.name)} for scenario in board.scenarios}
    lines = [
        f"Place by {label_of(board.metric)}, and its mean. A range where the order may be chance;",
        "* not distinguishable from the best mean, though others may be better by more than chance.",
    ]
    order = [each.policy for each in overall(board)]
    order += [label for label in labels if label not in order]
    columns: list[list[str]] = []  # of each scenario: its name, then a cell for each policy
    for name, table in places.items():
        rows = [table.get(label) for label in order]
        means = [shown(board.metric, row.estimate.value) if row else "" for row in rows]
        size = max(map(len, means), default=0)
        spots = [row.place + ("*" if row.is_among_best else " ") if row else "" for row in rows]
        cells = [f"{spot}  {mean.rjust(size)}" if spot else "" for spot, mean in zip(spots, means, strict=True)]
        longest = max(len(name), *map(len, cells))
        columns.append([cell.rjust(longest) for cell in [name, *cells]])
    head = [text.ljust(width) for text in ("", *order)]
    while columns:
        number = 1  # of columns that fit beside each other
        while number < len(columns) and width + sum(2 + len(c[0]) for c in columns[: number + 1]) <= _MOST_COLUMNS:
            number += 1
        lines += ["", *("  ".join(row).rstrip() for row in zip(head, *columns[:number], strict=True))]
        columns = columns[number:]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
        "",
    ]


def places_table(board: Board) -> list[str]:
    """Every policy's place in every scenario, by mean place (0 first, 1 last); the oracle's value instead."""
    tables = {s.name: {each.policy: each for each in standings(board, s.name)} for s in board.scenarios}
    ranks = {each.policy: each for each in overall(board)}
    rows = []
    for label in [*ranks, *(policy.label for policy in board.policies if policy.label not in ranks)]:
        rank = ranks.get(label)
        cells = [label, "–" if rank is None else f"{rank.mean_place:.2f} (of {rank.num_scenarios})"]
        for table in tables.values():
            standing = table.get(label)
            if standing is None:
                cells.append("")
            elif standing.first is None:
                cells.append(shown(board.metric, standing.estimate.value))
            else:
                cells.append(f"**{standing.place}**" if standing.is_among_best else standing.place)
        rows.append(cells)
    return _table(["policy", "mean place", *(name.replace("_", " ") for name in tables)], rows)


def as_markdown(board: Board) -> str:
    """Every table of the page."""
    title = "Leaderboard" if board.kind == "routing" else f"Leaderboard of {board.kind.replace('_', ' ')} policies"
    lines = [f"# {title}", "", f"Ranked by {label_of(board.metric)}. Made by `disagg leaderboard`.", ""]
    lines += ["A place is a range where the order may be chance; bold: the best, or not distinguishable from it.", ""]
    lines += places_table(board)
    for scenario in board.scenarios:
        lines += [f"## {scenario.name}", "", scenario.text, ""]
        points = {point.policy: point for point in pareto(board, scenario.name)}
        regrets = {r.policy: r.summary for r in board.regrets if r.scenario == scenario.name}
        rows = []
        for each in standings(board, scenario.name):
            point, regret = points.get(each.policy), regrets.get(each.policy)
            rows.append(
                [
                    each.place,
                    each.policy,
                    with_interval(board.metric, each.estimate),
                    behind_text(board.metric, each),
                    "–" if point is None else shown("mean_ttft_s", point.ttft_s),
                    "–" if point is None else shown("mean_tpot_s", point.tpot_s),
                    pareto_text(point),
                    "–" if regret is None else f"{regret.mean.value or 0.0:.3f} s",
                ]
            )
        lines += _table(
            ["place", "policy", label_of(board.metric), "", "mean TTFT", "mean TPOT", "Pareto", "regret a decision"],
            rows,
        )
        aged = ageing(board, scenario.name)
        if aged:
            intervals = sorted({interval for each in aged for interval in each.ttft_s})
            seeds = seeds_text(each.ttft_s[FRESH].n for each in aged)
            lines += [f"Mean TTFT by report interval (0: at every change of a batch), {seeds}:", ""]
            lines += _table(
                ["policy", *(f"{interval:g} ms" for interval in intervals)],
                [[each.policy, *(shown("mean_ttft_s", each.ttft_s[i].value) for i in intervals)] for each in aged],
            )
        if scenario.no_regret:
            lines += [f"{scenario.no_regret.capitalize()}.", ""]
        if scenario.left_out:
            lines += ["Left out: " + "; ".join(f"{name} ({why})" for name, why in scenario.left_out.items()) + ".", ""]
    failures = board.failures()
    if failures:
        lines += ["## Failed", "", *(f"- {line}" for line in failures), ""]
    return "\n".join(lines)
