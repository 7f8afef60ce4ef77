"""The leaderboard as one self-contained HTML page."""

from __future__ import annotations

import base64
from typing import Any

from .board import Board, BoardScenario, Standing, overall, pareto, standings
from .board_figures import goodput, latencies, older_reports
from .board_text import behind_text, interval_text, pareto_text, shown, with_interval
from .comparison import label_of
from .drawing import Drawing
from .metric_table import BY_KEY
from .page import page_environment


def as_page(board: Board) -> str:
    """The whole page; nothing is loaded from elsewhere."""
    tables = {scenario.name: standings(board, scenario.name) for scenario in board.scenarios}
    page: str = (
        page_environment()
        .get_template("leaderboard.html.j2")
        .render(
            metric=label_of(board.metric),
            formula=BY_KEY[board.metric].formula if board.metric in BY_KEY else "",
            kind=board.kind.replace("_", " "),
            is_quick=board.is_quick,
            git_commit=board.git_commit,
            num_runs=len(board.runs),
            num_decisions=sum(len(each.rows) for each in board.regrets),
            names=[scenario.name for scenario in board.scenarios],
            summary=_summary(board, tables),
            best=[(name, _best(table)) for name, table in tables.items() if table],
            scenarios=[_scenario(board, scenario, tables[scenario.name]) for scenario in board.scenarios],
            policies=board.policies,
            failures=board.failures(),
        )
    )
    return page


def _best(table: list[Standing]) -> str:
    """Who is best, and who cannot be told from it."""
    first = [standing.policy for standing in table if standing.is_best]
    if len(first) > 1 and len(first) == sum(standing.first is not None for standing in table):
        return "all alike"
    tied = [standing.policy for standing in table if standing.is_tied]
    return ", ".join(first) + (f"; not distinguishable from it: {', '.join(tied)}" if tied else "")


def _summary(board: Board, tables: dict[str, list[Standing]]) -> list[dict[str, Any]]:
    """A row per policy: its place in each scenario, with a shade from 0 (first) to 1 (last)."""
    of = {name: {standing.policy: standing for standing in table} for name, table in tables.items()}
    ranks = {each.policy: each for each in overall(board)}
    by_label = {policy.label: policy for policy in board.policies}
    rows = []
    for label in [*ranks, *(label for label in by_label if label not in ranks)]:
        cells: list[dict[str, Any]] = []
        for name, table in of.items():
            standing = table.get(label)
            if standing is None:
                cells.append({"text": "", "title": "does not apply", "shade": None, "best": False})
                continue
            num_ranked = sum(each.first is not None for each in table.values())
            shade = None
            if standing.first is not None and standing.last is not None and num_ranked > 1:
                shade = ((standing.first + standing.last) / 2 - 1) / (num_ranked - 1)
            title = f"{name}: {with_interval(board.metric, standing.estimate)}"
            text = standing.place if standing.first is not None else shown(board.metric, standing.estimate.value)
            cells.append({"text": text, "title": title, "shade": shade, "best": standing.is_among_best})
        rows.append({"policy": by_label[label], "overall": ranks.get(label), "cells": cells})
    return rows


def _scenario(board: Board, scenario: BoardScenario, table: list[Standing]) -> dict[str, Any]:
    points = {point.policy: point for point in pareto(board, scenario.name)}
    regrets = {each.policy: each.summary for each in board.regrets if each.scenario == scenario.name}
    by_label = {policy.label: policy for policy in board.policies}
    rows: list[dict[str, Any]] = []
    for standing in table:
        point = points.get(standing.policy)
        regret = regrets.get(standing.policy)

        def mean(key: str, label: str = standing.policy) -> str:
            values = board.values(scenario.name, label, key).values()
            return shown(key, sum(values) / len(values)) if values else "–"

        rows.append(
            {
                "policy": by_label[standing.policy],
                "place": standing.place,
                "value": shown(board.metric, standing.estimate.value),
                "interval": interval_text(board.metric, standing.estimate),
                "behind": behind_text(board.metric, standing),
                "kind": "best" if standing.is_best else "",
                "ttft": mean("mean_ttft_s"),
                "p99_ttft": mean("p99_ttft_s"),
                "tpot": mean("mean_tpot_s"),
                "rejected": None if point is None else 1 - point.share_served,
                "pareto": pareto_text(point),
                "regret": regret,
            }
        )
    drawings = [latencies(board, scenario), goodput(board, scenario), older_reports(board, scenario)]
    return {
        "scenario": scenario,
        "objectives": ", ".join(
            f"{key.removesuffix('_ms').upper()} {value:g} ms" for key, value in scenario.objectives.items()
        ),
        "num_seeds": max((standing.estimate.n for standing in table), default=0),
        "rows": rows,
        "has_regret": any(row["regret"] for row in rows),
        "figures": [_shown(drawing) for drawing in drawings if drawing is not None],
        "regrets": [(row["policy"].label, row["regret"]) for row in rows if row["regret"]],
        "left_out": list(scenario.left_out.items()),
    }


def _shown(drawing: Drawing) -> dict[str, str]:
    data = base64.b64encode(drawing.svg).decode("ascii")
    return {"title": drawing.title, "alt": drawing.alt, "data": f"data:image/svg+xml;base64,{data}"}
