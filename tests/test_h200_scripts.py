"""The scripts around runs on hardware: predictions, series and archives, on small files and this machine's processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import pytest

from disagg.reports.prediction_intervals import METRICS, read_predictions
from tests.test_prediction_intervals import TEXT

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "h200"
SIMULATED = TEXT.replace("name: drawn", "name: NAME")
MEASURED = """\
schema_version: 1
name: NAME
seed: 3
model: {id: tiny-llama, dtype: float32, weights: random, seed: 0}
backend: hardware
device: cpu
cluster:
  profile: spec:cpu-2core
  mixed_servers:
    scheduler: {max_batch_size: 4, max_num_tokens: 256}
    kv_cache: {tokens_per_block: 16, max_tokens: 4096}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {type: uniform, min: 20, max: 60}, osl: 3}
  max_tokens: 4
  phases:
    - {name: profiling, type: poisson, rate: 50, requests: 4}
"""


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def written(folder: Path, name: str, text: str = SIMULATED, more: str = "") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text.replace("NAME", name) + more)
    return file


# ---- predict.py -----------------------------------------------------------------------------------------------------


def test_predictions_with_and_without_intervals_agree_in_their_values(tmp_path: Path) -> None:
    files = [written(tmp_path, "one"), written(tmp_path, "two", more="sweep: {seed: [1, 2]}\n")]
    told = {}
    for name, options in (("quick", ["--no-intervals"]), ("whole", [])):
        output = tmp_path / f"{name}.json"
        done = script("predict.py", "--runs", tmp_path / name, "--output", output, *options, *files)
        assert done.returncode == 0, done.stderr
        told[name] = json.loads(output.read_text())
        assert (tmp_path / name / "one" / "simulated" / "summary.json").exists()
    assert list(told["quick"]["predictions"]) == ["one", "two seed=1", "two seed=2"]
    assert all(set(values) == set(METRICS) for values in told["quick"]["predictions"].values())
    intervals = read_predictions(tmp_path / "whole.json")
    for title, values in told["quick"]["predictions"].items():
        assert intervals[title].values == values
        assert intervals[title].intervals["mean_ttft_s"].low < intervals[title].intervals["mean_ttft_s"].high
    assert {key: told["whole"][key] for key in ("draws", "jitter", "error")} == {
        "draws": 40,
        "jitter": 0.011,
        "error": 0.01,
    }


@pytest.mark.parametrize(
    ("files", "output", "told"),
    [
        (["one.yaml", "none.yaml"], "p.json", "none.yaml: cannot be read: No such file"),
        (["one.yaml", "wrong.yaml"], "p.json", "did you mean 'least_tokens'"),
        (["one.yaml"], "nowhere/p.json", "its folder does not exist"),
        (["one.yaml"], ".", "is a folder"),
    ],
    ids=["missing file", "wrong file", "missing folder", "a folder"],
)
def test_what_cannot_be_predicted_is_told_in_one_line_before_anything_is_simulated(
    tmp_path: Path, files: list[str], output: str, told: str
) -> None:
    written(tmp_path, "one")
    written(tmp_path, "wrong", SIMULATED.replace("least_tokens", "least_tokenz"))
    paths = [tmp_path / file for file in files]
    done = script("predict.py", "--runs", tmp_path / "runs", "--output", tmp_path / output, *paths)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---- series.py ------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_a_series_runs_every_file_once_for_each_label_on_one_cluster_and_skips_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mpi4py")
    files = [written(tmp_path, name, MEASURED) for name in ("one", "two")]
    runs = tmp_path / "runs"
    wanted = {runs / name / label for name in ("one", "two") for label in ("first", "second")}
    arguments = ("--runs", runs, "--label", "first", "--label", "second")
    done = script("series.py", *arguments, *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a cluster for") == 1
    assert "a cluster for 4 runs" in done.stdout
    found = {manifest.parent for manifest in runs.rglob("manifest.json")}
    assert found == wanted
    assert all(json.loads((run / "summary.json").read_text())["num_completed"] == 4 for run in found)
    again = script("series.py", *arguments, *files)
    assert (again.returncode, "a cluster for" in again.stdout) == (0, False)


def test_a_series_without_time_left_starts_no_cluster_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    files = [written(tmp_path, name, MEASURED) for name in ("one", "two")]
    done = script("series.py", "--runs", tmp_path / "runs", "--until", "-1", *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out for want of time: one repeat 0, two repeat 0" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_series_with_a_file_that_is_not_there_tells_it_in_one_line(tmp_path: Path) -> None:
    done = script("series.py", "--runs", tmp_path / "runs", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none.yaml'}: ")
    assert done.stderr.count("\n") == 1


# ---- archive.py -----------------------------------------------------------------------------------------------------

MOST_MB = 1.5


def put(path: Path, num_bytes: int, *, shrinks: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes) if shrinks else Random(path.name).randbytes(num_bytes))


def archived(output: Path) -> set[str]:
    """Names in all archives, none of which is above the bound or holds what another one holds."""
    names: list[str] = []
    for path in output.glob("*.tgz"):
        assert path.stat().st_size <= MOST_MB * 1e6
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == len(set(names))
    return set(names)


def test_archives_keep_their_bounds_and_lose_no_table(tmp_path: Path) -> None:
    runs = tmp_path / "heldout"
    for i in range(6):
        put(runs / f"run{i}" / "requests.csv", 400_000)
        put(runs / f"run{i}" / "manifest.json", 100)
        put(runs / f"run{i}" / "events.0.log", 400_000)
    put(runs / "run0" / "steps.csv", 5_000_000, shrinks=True)  # larger than an archive, until it has shrunk
    put(runs / "run3" / "events.1.log", 1_600_000)  # larger than an archive
    done = script("archive.py", runs, tmp_path / "out", "--most-mb", MOST_MB, "--most-archives", 7)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "out").iterdir())) <= 7
    everything = {str(path.relative_to(tmp_path)) for path in runs.rglob("*") if path.is_file()}
    missing = everything - archived(tmp_path / "out")
    assert missing
    assert all("events." in name for name in missing)
    assert "heldout/run3/events.1.log" in missing
    assert f"event logs left out: {len(missing)} of 7\n" in done.stdout


def test_logs_that_find_no_archive_are_counted_all(tmp_path: Path) -> None:
    put(tmp_path / "runs" / "requests.csv", 1000)
    for i in range(3):
        put(tmp_path / "runs" / f"events.{i}.log", 1000)
    done = script("archive.py", tmp_path / "runs", tmp_path / "out", "--most-mb", MOST_MB, "--most-archives", 1)
    assert done.returncode == 0
    assert "event logs left out: 3 of 3\n" in done.stdout
    assert archived(tmp_path / "out") == {"runs/requests.csv"}


def test_a_table_for_which_there_is_no_room_is_an_error_that_names_it(tmp_path: Path) -> None:
    put(tmp_path / "runs" / "requests.csv", 1000)
    put(tmp_path / "runs" / "steps.csv", 1_600_000)
    done = script("archive.py", tmp_path / "runs", tmp_path / "out", "--most-mb", MOST_MB)
    assert done.returncode == 1
    assert done.stderr == "error: no room for the tables runs/steps.csv\n"
    assert archived(tmp_path / "out") == {"runs/requests.csv"}
    nowhere = script("archive.py", tmp_path / "nowhere", tmp_path / "out")
    assert (nowhere.returncode, nowhere.stderr) == (2, f"error: {tmp_path / 'nowhere'}: no such folder\n")
