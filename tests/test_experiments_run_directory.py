"""Run directories: whole or absent, the same columns always, and nothing of the user's overwritten by chance."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from disagg.core.tables import DecisionRow, RequestRow, StepRow, TransferRow
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_directory import RunDirectory, prepare_output
from disagg.experiments.run_point import RunOutcome, RunPoint, run_points
from disagg.experiments.tables_writer import TABLES, column_name, seconds_of

TEXT = """\
schema_version: 1
name: run
seed: 42
model: {id: tiny-llama}
cluster:
  profile: spec:cpu-2core
  context_servers: {}
  generation_servers: {}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: 100, osl: 10}
  max_tokens: 16
  phases: [{name: profiling, type: poisson, rate: 8, requests: 10}]
"""
FILES = {"config.yaml", "manifest.json", "summary.json", "trace.json", *(f"{name}.parquet" for name in TABLES)}


def points(tmp_path: Path, more: str = "") -> list[RunPoint]:
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT + more)
    return run_points(load_experiment(file), tmp_path / "out")


def request_row(request_id: int = 0, at: int = 0) -> RequestRow:
    return RequestRow(
        request_id, "", "", None, 100, 16, 10, "length", None, 1, 1, 2, at, at, at, at + 10**9, at, at, at + 10**10
    )


def write(point: RunPoint, overwrite: bool = False) -> None:
    with RunDirectory(point, overwrite=overwrite) as writer:
        for number in range(3):
            at = number * 10**12
            writer.write(request_row(number, at), phase="profiling", excluded=number == 0)
            writer.write(StepRow(1, number, number, 2, 1, 100, 1, 64, 0, at, at + 10**9, 1, 2, 3, 4, 5))
            writer.write(TransferRow(number, 1, 2, 100, 7, at, at + 10**8, True, None, number))
        writer.write(DecisionRow(0, "context", "route", 1, None, None, 0, (1, 2), None))
        writer.add_events("orchestrator.msgpack", b"\x00log")
        writer.finish(RunOutcome(num_requests=3))


def test_a_run_leaves_every_file(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    write(point)
    assert {path.name for path in point.directory.iterdir()} == FILES | {"events.orchestrator.msgpack"}
    assert (point.directory / "events.orchestrator.msgpack").read_bytes() == b"\x00log"
    assert "error" not in json.loads((point.directory / "summary.json").read_text())
    assert yaml.safe_load((point.directory / "config.yaml").read_text())["seed"] == 42


def test_instants_become_seconds_and_planned_facts_fill_the_request_rows(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    write(point)
    rows = pq.read_table(point.directory / "requests.parquet").to_pylist()
    assert rows[1]["first_token_s"] == 1.001
    assert [row["phase"] for row in rows] == ["profiling"] * 3
    assert [row["excluded"] for row in rows] == [True, False, False]
    (decision,) = pq.read_table(point.directory / "decisions.parquet").to_pylist()
    assert decision["view_versions"] == [1, 2]
    assert decision["max_age_s"] is None


@given(st.lists(st.integers(-(2**62), 2**63 - 1) | st.integers(2**53 - 9, 2**53 + 9), min_size=1))
def test_instants_are_rounded_once_however_long_the_run(picoseconds: list[int]) -> None:
    assert seconds_of(np.array(picoseconds)).tolist() == [value / 10**12 for value in picoseconds]


def test_an_empty_table_has_its_columns(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    write(point)
    table = pq.read_table(point.directory / "stays.parquet")
    assert table.num_rows == 0
    assert table.column_names == [column_name(name) for name in TABLES["stays"].__struct_fields__]
    assert pq.ParquetFile(point.directory / "requests.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_rows_leave_memory_in_row_groups(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    with RunDirectory(point) as writer:
        for number in range(70_000):
            writer.write(request_row(number), phase="profiling")
        writer.finish(RunOutcome(num_requests=70_000))
    with pq.ParquetFile(point.directory / "requests.parquet") as file:
        assert file.metadata.num_row_groups == 3
        assert file.read(["request_id"])["request_id"].to_pylist() == list(range(70_000))
    assert json.loads((point.directory / "manifest.json").read_text())["num_rows"]["requests"] == 70_000


def test_the_manifest_says_what_was_run(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    write(point)
    manifest = json.loads((point.directory / "manifest.json").read_text())
    assert manifest["backend"] == "simulation"
    assert manifest["seed"] == 42
    assert manifest["oracle"] is False
    assert manifest["num_devices"] == 2
    assert [executor["role"] for executor in manifest["executors"]] == ["context", "generation"]
    assert all(executor["num_blocks"] > 0 for executor in manifest["executors"])
    assert manifest["num_rows"]["requests"] == 3
    assert {"python", "msgspec", "numpy"} <= set(manifest["versions"])


def test_the_timeline_is_json_with_a_track_per_executor_and_arrows_for_transfers(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    write(point)
    events = json.loads((point.directory / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}
    assert [event["ph"] for event in events].count("s") == [event["ph"] for event in events].count("f") == 3
    assert sum(event["ph"] == "X" and event["tid"] == 0 for event in events) == 3


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (point,) = points(tmp_path)

    def fails() -> None:
        with RunDirectory(point) as writer:
            writer.write(request_row())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert {path.name for path in tmp_path.iterdir()} == {"experiment.yaml"}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import {module} as run
from disagg.experiments import run_directory
(point,) = run.points(Path({folder!r}))
{patch}
run.write(point)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "RunDirectory.write = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)",
        "run_directory.manifest_of = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "run_directory._summarise = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "run_directory._flush = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "RunDirectory._move_into_place = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_a_run_killed_at_any_moment_leaves_no_half_directory_and_the_next_one_cleans_up(
    moment: str, tmp_path: Path
) -> None:
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        module=Path(__file__).stem,
        folder=str(tmp_path),
        patch=moment.replace("RunDirectory.", "run_directory.RunDirectory."),
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (point,) = points(tmp_path)
    assert not point.directory.exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "experiment.yaml"]
    assert all(name.startswith(".out.partial-") for name in left)
    assert left
    write(point)
    assert {path.name for path in tmp_path.iterdir()} == {"experiment.yaml", "out"}


def test_a_partial_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    write(point)
    assert other.is_dir()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    runs = points(tmp_path)
    write(runs[0])
    with pytest.raises(ConfigError, match="is not empty; allowed: --resume, --overwrite"):
        prepare_output(runs, tmp_path / "out")


def test_a_folder_without_runs_is_never_overwritten(tmp_path: Path) -> None:
    runs = points(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for flag in ("overwrite", "resume"):
        with pytest.raises(ConfigError, match="holds files and no run of disagg"):
            prepare_output(runs, tmp_path / "out", **{flag: True})
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    runs = points(tmp_path)
    (tmp_path / "out").mkdir()
    assert prepare_output(runs, tmp_path / "out") == runs
    write(runs[0])
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_overwriting_replaces_the_run_when_the_new_one_is_whole(tmp_path: Path) -> None:
    runs = points(tmp_path)
    write(runs[0])
    (tmp_path / "out" / "old").write_text("")
    assert prepare_output(runs, tmp_path / "out", overwrite=True) == runs
    assert (tmp_path / "out" / "old").exists()
    write(runs[0], overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"experiment.yaml", "out"}


def test_resuming_skips_what_is_finished(tmp_path: Path) -> None:
    runs = points(tmp_path, "sweep: {policy.router.name: [round_robin, random]}\nrepeats: 2\n")
    assert prepare_output(runs, tmp_path / "out") == runs
    write(runs[0])
    write(runs[2])
    assert prepare_output(runs, tmp_path / "out", resume=True) == [runs[1], runs[3]]
    listing = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["directory"] for run in listing["runs"]] == [
        "router=round_robin/0",
        "router=round_robin/1",
        "router=random/0",
        "router=random/1",
    ]


def test_resuming_another_configuration_is_refused(tmp_path: Path) -> None:
    sweep = "sweep: {policy.router.name: [round_robin, random]}\n"
    runs = points(tmp_path, sweep)
    prepare_output(runs, tmp_path / "out")
    write(runs[0])
    with pytest.raises(ConfigError, match="another configuration hash"):
        prepare_output(points(tmp_path, sweep + "slo: {ttft_ms: 5}\n"), tmp_path / "out", resume=True)
