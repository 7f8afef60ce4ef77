"""The main job: one policy, one experiment file, both worlds, one report. The policy and the file are the README's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from disagg.runtime.launcher import find_mpiexec

pytestmark = pytest.mark.mpi

README = Path(__file__).resolve().parent.parent / "README.md"
DISAGG = Path(sys.executable).with_name("disagg")
SMALL = ("--set", "workload.phases.profiling.requests=12", "--set", "workload.phases.profiling.rate=10")


def run(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def block(language: str, containing: str) -> str:
    """The one code block of the README in this language that contains this text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)
    (found,) = [text for text in blocks if containing in text]
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository with the README's policy and experiment, run in both worlds."""
    path = tmp_path_factory.mktemp("user")
    policy = block("python", "my_policy.py")
    (path / "my_policy.py").write_text(policy)
    (path / "my_experiment.yaml").write_text(block("yaml", "my_policy.py:LeastWork"))
    run(DISAGG, "run", "my_experiment.yaml", "--output", "simulated", *SMALL, cwd=path)
    run(DISAGG, "run", "my_experiment.yaml", "--output", "real", "--backend", "hardware", *SMALL, cwd=path)
    return path


@pytest.fixture
def disagg_there(
    folder: Path, disagg: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process and that folder: its exit code, what it printed, and what it said of errors."""
    monkeypatch.chdir(folder)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        return disagg(*arguments), *capsys.readouterr()

    return call


def test_the_readme_s_policy_has_about_ten_lines_of_code() -> None:
    lines = [line for line in block("python", "my_policy.py").splitlines() if line.strip() and line[0] != "#"]
    assert len(lines) <= 10


@pytest.mark.parametrize("world", ["simulated", "real"])
def test_every_request_is_served_and_routed_by_the_user_s_policy(folder: Path, world: str) -> None:
    requests = pd.read_parquet(folder / world / "requests.parquet")
    assert len(requests) == 12
    assert set(requests["finish_reason"]) == {"stop"}
    assert set(requests["num_output_tokens"]) == {12}
    manifest = json.loads((folder / world / "manifest.json").read_text())
    assert manifest["backend"] == {"simulated": "simulation", "real": "hardware"}[world]
    # least work with ties in turn: an unloaded cluster uses both context executors
    assert set(requests["context_executor"]) == {1, 2}
    summary = json.loads((folder / world / "summary.json").read_text())
    assert summary["num_completed"] == 12
    assert "error" not in summary


def test_both_runs_have_the_same_configuration_and_the_same_columns(folder: Path) -> None:
    manifests = [json.loads((folder / world / "manifest.json").read_text()) for world in ("simulated", "real")]
    assert manifests[0]["configuration_hash"] == manifests[1]["configuration_hash"]
    for table in ("requests", "steps", "stays", "transfers", "decisions"):
        tables = [pd.read_parquet(folder / world / f"{table}.parquet") for world in ("simulated", "real")]
        assert list(tables[0].columns) == list(tables[1].columns)
        assert list(tables[0].dtypes) == list(tables[1].dtypes)


@pytest.mark.parametrize("world", ["simulated", "real"])
def test_the_event_logs_replay_to_identical_commands(
    disagg_there: Callable[..., tuple[int, str, str]], world: str
) -> None:
    code, out, _ = disagg_there("replay", world, "--json")
    assert code == 0
    told = json.loads(out)
    assert len(told) == 4
    assert all(log["equal"] for log in told.values())


def test_the_simulator_on_the_hardware_s_times_makes_the_hardware_s_decisions(
    disagg_there: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = disagg_there("conform", "real", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["equal"]
    assert told["instants"] > 100


def test_conforming_to_a_simulated_run_is_refused(disagg_there: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = disagg_there("conform", "simulated")
    assert code == 2
    assert "only hardware runs" in said


def test_one_report_lays_both_worlds_side_by_side(
    folder: Path, disagg_there: Callable[..., tuple[int, str, str]]
) -> None:
    assert disagg_there("report", "simulated", "real", "--output", "report.html")[0] == 0
    page = (folder / "report.html").read_text()
    assert "Simulation beside hardware" in page
    errors = pd.read_csv(folder / "report_files" / "simulation_errors.csv")
    assert {"mean_ttft_s", "p99_tpot_s", "throughput"} <= set(errors["metric"])
    assert (errors["simulation"] - errors["hardware"]).to_numpy() == pytest.approx(
        errors["error"].to_numpy(), abs=1e-12
    )


def test_the_error_of_the_simulation_is_told_by_stage_and_by_cause(
    folder: Path, disagg_there: Callable[..., tuple[int, str, str]]
) -> None:
    """Timing and decisions are told apart by replaying the hardware's own routes, all of them."""
    code, out, _ = disagg_there("compare", "simulated", "real", "--json", "--output", "compared")
    assert code == 0
    told = json.loads(out)
    (pair,) = told["pairs"]
    assert pair["num_matched"] == 12
    *stages, e2e = pair["stages"]
    assert sum(stage["difference"] for stage in stages) == pytest.approx(e2e["difference"], abs=1e-9)
    assert pair["split"]["share_forced"] == 1.0
    rows = {row["key"]: row for row in pair["split"]["rows"]}
    assert {"mean_ttft_s", "mean_tpot_s", "p50_e2e_latency_s", "throughput"} <= set(rows)
    for row in rows.values():
        assert row["diverged"] + row["client"] + row["timing"] == pytest.approx(row["simulated"] - row["measured"])
    assert (folder / "compared" / "scatter.png").stat().st_size > 10_000


def test_the_fidelity_table_holds_every_experiment_of_a_folder(
    folder: Path, disagg_there: Callable[..., tuple[int, str, str]]
) -> None:
    runs = folder / "fidelity_runs"
    for world in ("simulated", "real"):
        shutil.copytree(folder / world, runs / world)
    assert disagg_there("fidelity", runs, "--output", "fidelity.md")[0] == 0
    data = json.loads((folder / "fidelity.json").read_text())
    assert len(data["rows"]) == 10
    (experiment,) = data["experiments"]
    assert experiment["split"]["share_forced"] == 1.0
    assert experiment["predicted_before_measured"] is True


def joined(folder: Path, num_ranks: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    world = [find_mpiexec(), "-n", num_ranks, "--map-by", ":oversubscribe", "--mca", "pml", "ob1"]
    command = [DISAGG, "run", "my_experiment.yaml", "--backend", "hardware", *SMALL, *arguments]
    return run("env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "OMP_NUM_THREADS=1",
               *map(str, world), *map(str, command), cwd=folder, code=code)  # fmt: skip


def test_a_run_joins_the_mpi_world_it_is_started_in(folder: Path) -> None:
    joined(folder, 4, "--output", "joined")
    assert json.loads((folder / "joined" / "summary.json").read_text())["num_completed"] == 12


def test_a_world_too_small_is_refused_with_numbers_and_writes_nothing(folder: Path) -> None:
    done = joined(folder, 2, "--output", "small", code=3)
    assert "needs 4 ranks" in done.stderr
    assert "only 2" in done.stderr
    assert not (folder / "small").exists()
