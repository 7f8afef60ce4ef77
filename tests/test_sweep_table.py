"""The table after a sweep fits the terminal that it is printed on, and says what its values are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.experiments.experiment_file import _point_name
from disagg.experiments.sweep_table import print_sweep, sweep_lines

SUMMARY = {
    "num_requests": 2000,
    "num_failed": 0,
    "mean_ttft_s": 1.234567,
    "p99_ttft_s": 12.3456,
    "mean_tpot_s": 0.01234,
    "p99_tpot_s": 0.1234,
    "mean_e2e_latency_s": 12.34,
    "throughput": 12345.6,
    "slo_attainment": None,
}


def points(folder: Path, repeats: int) -> list[Any]:
    found = []
    for name in ("router=least_tokens,rate=5", "router=" + "+".join(["executor-2"] * 12) + ",rate=10"):
        for repeat in range(repeats):
            directory = folder / name / str(repeat)
            directory.mkdir(parents=True)
            (directory / "summary.json").write_text(json.dumps(SUMMARY))
            found.append(SimpleNamespace(name=name, directory=directory))
    return found


@pytest.mark.parametrize("width", [80, 60])
def test_no_line_is_wider_than_the_terminal_and_what_was_left_out_is_said(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_sweep(points(tmp_path, 2), 4, 1.0, width)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "1,234.6" in text
    assert "12,345.6" in text
    assert "no room for mean e2e s" in text
    assert "a p99 that of the runs' p99s" in " ".join(text.split())
    assert "…" not in text


def test_a_file_gets_every_column_that_has_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = points(tmp_path, 1)
    assert "within SLO %" not in sweep_lines(found)[0]
    print_sweep(found, 2, 1.0)
    text = capsys.readouterr().out
    assert "12,346" in text
    assert found[-1].name in text
    assert "no room" not in text
    assert "p99s" not in text


def test_a_point_without_a_value_is_named_as_the_file_says_it() -> None:
    assert _point_name({"roles": None, "layerwise": True}, set()) == "roles=null,layerwise=true"
