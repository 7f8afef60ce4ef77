"""`disagg bench transfer`, `engine`, `overlap` and `idle`: their options, their table and their file.

The measuring is the runtime's and has its own tests; here it is replaced by one that returns two rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from disagg.runtime.launcher import LaunchError
from disagg.runtime.transport import TransportError


@dataclass(frozen=True)
class Row:
    name: str
    measured: float
    ceiling: float | None
    ratio: float | None
    goal: float | None
    met: bool | None
    unit: str
    note: str = ""


ROWS = [
    Row("copy, 134 MB", 350.0, 374.0, 0.936, 0.93, True, "GB/s"),
    Row("slow one [x]", 10.0, 374.0, 0.027, 0.8, False, "GB/s", "a note"),
]
FUNCTIONS = {"transfer": ("bench_transfer", "run_transfer_bench"), "engine": ("bench_engine", "run_engine_bench")}


IDLE = Path(__file__).resolve().parent.parent / "benchmarks" / "h200" / "idle.yaml"
CPU = "--set device=cpu --set cluster.cache_transceiver.backend=mpi --set cluster.profile=spec:cpu-2core"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function where the benchmarks of the runtime are."""

    def replace(function: Callable[..., Any]) -> None:
        for module, name in FUNCTIONS.values():
            stand_in = ModuleType(f"disagg.runtime.{module}")
            setattr(stand_in, name, function)
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)

    return replace


@pytest.mark.parametrize("which", ["transfer", "engine"])
def test_rows_are_printed_as_one_table_and_written_with_command_and_date(
    which: str,
    disagg: Callable[..., int],
    measuring: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}
    measuring(lambda **options: asked.update(options) or ROWS)
    out = tmp_path / "rows.json"
    assert disagg("bench", which, "--quick", "--device", "cpu", "--out", out) == 0
    printed = capsys.readouterr().out
    for words in ("floor", "measured", "ratio", "goal", "met", "copy, 134 MB", "slow one [x]", "NO", "a note"):
        assert words in printed
    assert (asked["quick"], asked["device"]) == (True, "cpu")
    rows = json.loads(out.read_text())
    wanted = {"name", "measured", "ceiling", "ratio", "goal", "met", "command", "date"}
    assert all(wanted <= row.keys() for row in rows)
    assert rows[0]["command"].startswith(f"disagg bench {which} --quick")
    assert [row["met"] for row in rows] == [True, False]


def test_json_is_all_that_is_printed(
    disagg: Callable[..., int], measuring: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    measuring(lambda **options: asked.update(options) or ROWS)
    backends = ["--backend", "mpi", "--backend", "host", "--backend", "mpi"]
    assert disagg("bench", "transfer", "--device", "cpu", "--json", *backends) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [row.name for row in ROWS]
    assert asked["backends"] == ["mpi", "host"]
    assert disagg("bench", "engine", "--device", "cpu", "--json", "--tp", "2", "--model", "tiny-llama") == 0
    assert (asked["tp"], asked["model"]) == (2, "tiny-llama")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("transfer --backend tcp", "--backend tcp: must be one of"),
        ("transfer --backend cuda_ipc --device cpu", "--backend cuda_ipc needs --device cuda"),
        ("transfer --device tpu", "--device tpu: must be one of cuda, cpu"),
        ("transfer --out /nonexistent/folder/rows.json", "--out /nonexistent/folder/rows.json: there is no folder"),
        ("engine --model gpt-9", "--model gpt-9: unknown"),
        ("engine --tp 0", "--tp 0: must divide the 32 attention heads"),
        ("engine --tp 3", "--tp 3: must divide the 32 attention heads"),
        ("engine --device tpu", "--device tpu"),
        ("engine --device cpu --output runs", "--output is where --in-run leaves its runs"),
        ("overlap --model gpt-9", "--model gpt-9: unknown"),
        ("overlap --programs 0", "--programs 0: allowed: 1 to"),
        (f"idle {IDLE} --window 0", "--window 0: allowed: more than 0"),
        (f"idle {IDLE} --after -1", "--after -1: allowed: 0 to"),
        (f"idle {IDLE} --out /nonexistent/folder/rows.json", "--out /nonexistent/folder/rows.json: there is no folder"),
    ],
)
def test_wrong_options_are_refused_by_name(
    disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    assert disagg("bench", *arguments.split()) == 2
    printed = capsys.readouterr().err
    assert told in printed
    assert "Traceback" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("which", ["transfer", "engine"])
def test_a_gpu_that_is_not_here_is_a_missing_resource(
    which: str, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("bench", which, "--device", "cuda") == 3
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_engine_without_a_device_to_run_on_is_not_told_to_take_a_gpu(
    disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("bench", "engine") == 3
    printed = capsys.readouterr().err
    assert "torch finds none here" in printed
    assert "allowed: cuda" not in printed


@pytest.mark.parametrize(("error", "code"), [(TransportError("needs ucx"), 2), (LaunchError("no mpiexec"), 3)])
def test_what_the_runtime_refuses_is_told_without_a_traceback(
    error: Exception,
    code: int,
    disagg: Callable[..., int],
    measuring: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**options: Any) -> Any:
        raise error

    measuring(refuse)
    assert disagg("bench", "transfer", "--device", "cpu") == code
    assert f"error: {error}" in capsys.readouterr().err


def test_what_has_no_meaning_without_a_gpu_is_refused_before_anything_runs(
    disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ("engine --in-run --device cpu", "overlap --device cpu", f"idle {IDLE} {CPU}"):
        assert disagg("bench", *arguments.split()) == 3
        assert "error: " in capsys.readouterr().err


def test_transformers_generate_stands_behind_the_engines_rows_or_a_word_why_not(
    disagg: Callable[..., int],
    measuring: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from disagg.runtime import bench_reference

    measuring(lambda **options: ROWS)

    def reference(model: str, device: str) -> list[Any]:
        assert (model, device) == ("tiny-llama", "cpu")
        return [Row("transformers generate", 61.0, None, None, None, None, "ms")]

    monkeypatch.setattr(bench_reference, "run_reference_bench", reference)
    call = ("bench", "engine", "--device", "cpu", "--model", "tiny-llama", "--reference", "--json")
    assert disagg(*call) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)][2:] == ["transformers generate"]

    def missing(model: str, device: str) -> list[Any]:
        raise bench_reference.ReferenceMissing("transformers cannot be imported")

    monkeypatch.setattr(bench_reference, "run_reference_bench", missing)
    assert disagg(*call) == 0
    captured = capsys.readouterr()
    assert "no reference: transformers cannot be imported" in captured.err
    assert len(json.loads(captured.out)) == 2


def test_the_reference_generates_exactly_the_tokens_it_is_asked_for() -> None:
    pytest.importorskip("transformers")
    from disagg.runtime.bench_reference import run_reference_bench

    rows = run_reference_bench("tiny-llama", "cpu", batch=2, prompt_tokens=24, new_tokens=4, repeats=3)
    names = ["prefill", "decode step", "output rate"]
    assert [any(name in row.name for name in names) for row in rows] == [True] * 3
    prefill, step, rate = (row.measured for row in rows)
    assert prefill > 0
    assert rate == pytest.approx(2 * 4 / ((prefill + 3 * step) / 1e3))
