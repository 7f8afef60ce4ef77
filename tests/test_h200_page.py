"""The page of what H200s gave: each row of its tables is one of the JSON beside it, and says «met» where its ratio does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "h200.md"
ROWS: list[dict[str, Any]] = json.loads(PAGE.with_suffix(".json").read_text())
MET = {"yes": True, "**no**": False, "": None}


def judged_rows() -> list[dict[str, str]]:
    """The rows of the tables that have a column «met», by the words of their heads."""
    found: list[dict[str, str]] = []
    head: list[str] = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif "met" in head and not set(line) <= set("|- "):
            found.append(dict(zip(head, cells, strict=True)))
    return found


def is_shown_as(text: str, value: float | None) -> bool:
    """Whether `text` begins with `value`, rounded to as many digits as it has."""
    number = re.match(r"-?[\d,]+(\.(\d+))?", text)
    if number is None or value is None:
        return number is None and value is None
    return abs(float(number[0].replace(",", "")) - value) <= 0.501 * 10.0 ** -len(number[2] or "")


def stands_for(told: dict[str, str], row: dict[str, Any]) -> bool:
    """Where a table has no column of ratios, what it says was measured may be one."""
    shown = [(told["goal"], row["goal"])]
    shown += [(told[name], row["ceiling"]) for name in ("floor", "ceiling") if told.get(name)]
    shown += [(told["ratio"], row["ratio"])] if told.get("ratio") else []
    measured = [row["measured"]] if "ratio" in told else [row["measured"], row["ratio"]]
    is_it = any(is_shown_as(told["measured"], value) for value in measured)
    return is_it and MET[told["met"]] == row["met"] and all(is_shown_as(text, value) for text, value in shown)


def test_each_row_of_the_tables_is_one_of_the_json() -> None:
    rows = judged_rows()
    assert len(rows) > 40
    for told in rows:
        each = told["measured"].split(", ")  # gaps of three kinds stand in one row
        for measured in each if len(each) > 1 else [told["measured"]]:
            assert any(stands_for({**told, "measured": measured}, row) for row in ROWS), told


def test_a_goal_is_met_where_the_ratio_is_on_its_good_side() -> None:
    judged = [row for row in ROWS if row["goal"] is not None]
    assert len(judged) > 30
    for row in judged:
        most = not (row["unit"] == "GB/s" or row["name"].startswith(("prefill", "KV pool", "time of receiving")))
        if most or "beside tp 1" in row["name"]:
            assert row["met"] == (row["ratio"] <= row["goal"]), row["name"]
        else:
            assert row["met"] == (row["ratio"] >= row["goal"]), row["name"]


def test_a_ratio_is_that_of_its_two_numbers() -> None:
    for row in ROWS:
        if row["ceiling"] and row["ratio"]:
            both = (row["measured"] / row["ceiling"], row["ceiling"] / row["measured"])
            assert min(abs(row["ratio"] / each - 1) for each in both) < 2e-3, row["name"]
