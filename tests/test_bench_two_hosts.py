"""`disagg bench cluster` over two hosts, the second one being this machine under another name and with another clock.

A launch agent stands in for ssh: real daemons of PRRTE, real ranks, MPI over TCP between them (`launch_agent.sh`).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

HERE = Path(__file__).parent
DISAGG = Path(sys.executable).parent / "disagg"
SHIFT_S = 20_000_000  # 231 days: more than 64 bits hold in picoseconds
OTHER = "disagg-other-host"
EXPERIMENT = """
schema_version: 1
name: two-hosts
seed: 1
model: {id: tiny-llama, dtype: float32}
backend: hardware
device: cpu
cluster:
  profile: spec:cpu-2core
  context_servers: {num_instances: 1, kv_cache: {max_tokens: 8192}}
  generation_servers: {num_instances: 1, kv_cache: {max_tokens: 8192}}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {mean: 64, stddev: 16}, osl: 12}
  max_tokens: 16
  phases:
    - {name: profiling, type: poisson, rate: 10, requests: 200}
"""


def has_namespaces() -> bool:
    for root in ([], ["--map-root-user"]):
        command = ["unshare", *root, "--time", "--uts", "--fork", "true"]
        try:
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return True
        except OSError:
            return False
    return False


def bench(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    (folder / "e.yaml").write_text(EXPERIMENT)
    command = [str(DISAGG), "bench", "cluster", str(folder / "e.yaml"), "--output", str(folder / "out"), *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AGENT_SHIFT_S": str(SHIFT_S), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_hosts(agent: str | None = None) -> list[str]:
    names = f"{socket.gethostname()}:1,{OTHER}:1"
    return ["--host", names, "--launch-agent", agent or str(HERE / "launch_agent.sh")]


def placed(lines: Iterator[str]) -> dict[int, tuple[str, int]]:
    """Host and process of each rank, from what is printed at the start."""
    ranks: dict[int, tuple[str, int]] = {}
    for line in lines:
        words = line.split()
        if len(words) == 6 and words[0].isdigit() and words[2].isdigit():
            ranks[int(words[0])] = (words[1], int(words[2]))
        if len(ranks) == 3:
            return ranks
    raise AssertionError(f"the placement was not printed: {ranks}")


def no_longer(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run over both hosts: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("two-hosts")
    process = bench(folder, *two_hosts(), "--max-samples", "30", "--warm-up", "2", "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert OTHER in err or not has_namespaces()  # the placement goes beside the JSON
    (told,) = json.loads(out)["runs"]
    return folder / "out", told


@pytest.mark.mpi
def test_every_request_is_served_and_the_ranks_are_on_the_hosts_that_were_named(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = run
    values = {metric["metric"]: metric for metric in told["metrics"]}
    assert values["samples"]["value"] == 30
    assert values["kv_transfer_latency"]["n"] == 30
    manifest = json.loads((folder / "manifest.json").read_text())
    hosts = [(rank["rank"], rank["role"], rank["executor"], rank["device"]) for rank in manifest["ranks"]]
    assert hosts == [(0, "orchestrator", None, None), (1, "context", 1, "cpu"), (2, "generation", 2, "cpu")]
    if has_namespaces():
        assert [rank["host"] for rank in manifest["ranks"]] == [socket.gethostname()] * 2 + [OTHER]
        assert manifest["num_hosts"] == 2
    table = pd.read_parquet(folder / "bench.parquet").set_index("metric")
    assert table.loc["samples", "value"] == 30
    assert (folder / "report.html").is_file()


@pytest.mark.mpi
@pytest.mark.skipif(not has_namespaces(), reason="no time namespaces: the second host would have the first one's clock")
def test_the_other_host_s_clock_is_found_within_the_uncertainty_that_is_stored(
    run: tuple[Path, dict[str, Any]],
) -> None:
    near, far = run[1]["clock_offsets"]
    assert (near["same_clock"], near["applied"]) == (True, False)
    assert (near["start"]["offset_ns"], near["start"]["uncertainty_ns"]) == (0, 0)
    assert (far["same_clock"], far["applied"]) == (False, True)
    for reading in (far["start"], far["end"]):
        assert abs(reading["offset_ns"] - SHIFT_S * 10**9) <= reading["uncertainty_ns"]
        assert 0 < reading["uncertainty_ns"] < 50_000_000


@pytest.mark.mpi
def test_stamps_of_both_hosts_are_in_one_order_but_for_the_uncertainty(run: tuple[Path, dict[str, Any]]) -> None:
    folder, told = run
    readings = [o[when] for o in told["clock_offsets"] for when in ("start", "end")]
    slack = 2 * max(reading["uncertainty_ns"] for reading in readings) / 1e9
    requests = pd.read_parquet(folder / "requests.parquet")
    names = ["arrival_s", "context_start_s", "first_token_s", "transfer_start_s", "kv_usable_s", "end_s"]
    for before, after in itertools.pairwise(names):
        assert (requests[after] >= requests[before] - slack).all(), (before, after)
    stays, steps = (pd.read_parquet(folder / f"{name}.parquet") for name in ("stays", "steps"))
    for frame, name in ((stays, "enqueued_s"), (steps, "start_s")):
        assert frame[name].between(-slack, requests["end_s"].max() + 10).all()


@pytest.mark.mpi
@pytest.mark.parametrize("command", ["replay", "conform"])
def test_a_run_over_two_hosts_replays_and_conforms(run: tuple[Path, dict[str, Any]], command: str) -> None:
    done = subprocess.run([str(DISAGG), command, str(run[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout


@pytest.mark.mpi
def test_a_rank_that_dies_on_the_other_host_fails_its_requests_alone(tmp_path: Path) -> None:
    process = bench(tmp_path, *two_hosts(), "--max-samples", "30")
    assert process.stdout is not None
    ranks = placed(process.stdout)
    time.sleep(0.7)
    os.kill(ranks[2][1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    values = dict(line.split("│")[1:5:3] for line in out.splitlines() if line.count("│") > 5)
    found = {name.strip(): value.strip() for name, value in values.items()}
    errors = int(found["context_error_samples"]) + int(found["generation_error_samples"])
    assert errors > 0
    assert int(found["samples"]) + errors == 30
    assert f"{errors} of 30 requests were rejected or failed" in err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["clock_offsets"][1]["end"] == (None if has_namespaces() else manifest["clock_offsets"][1]["start"])
    assert no_longer([pid for _, pid in ranks.values()])


@pytest.mark.mpi
def test_the_end_of_rank_0_ends_the_run_on_both_hosts_and_leaves_nothing(tmp_path: Path) -> None:
    process = bench(tmp_path, *two_hosts())
    assert process.stdout is not None
    ranks = placed(process.stdout)
    os.kill(ranks[0][1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the run left no result" in err
    assert OTHER in err
    assert not (tmp_path / "out").exists()
    assert no_longer([pid for _, pid in ranks.values()])


@pytest.mark.mpi
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopping_the_command_leaves_no_process_on_either_host(tmp_path: Path, number: int, code: int) -> None:
    process = bench(tmp_path, *two_hosts())
    assert process.stdout is not None
    ranks = placed(process.stdout)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert no_longer([pid for _, pid in ranks.values()])
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".") and path.name != "e.yaml"]


@pytest.mark.mpi
def test_a_host_that_cannot_be_reached_ends_the_run_with_its_name(tmp_path: Path) -> None:
    process = bench(tmp_path, *two_hosts("false"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert OTHER in err
    assert "Traceback" not in err


@pytest.mark.mpi
def test_without_this_machine_among_the_hosts_rank_0_runs_on_the_first(tmp_path: Path) -> None:
    agent = str(HERE / "launch_agent.sh")
    hosts = ["--host", f"{OTHER}:1,{OTHER}-2:1", "--launch-agent", agent]
    process = bench(tmp_path, *hosts, "--max-samples", "5", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (told,) = json.loads(out)["runs"]
    assert told["metrics"][0]["value"] == 5
    if has_namespaces():
        assert [rank["host"] for rank in told["ranks"]] == [OTHER, OTHER, f"{OTHER}-2"]


@pytest.mark.mpi
def test_a_slurm_allocation_of_two_nodes_is_used_as_it_is(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").symlink_to(HERE / "fake_srun.sh")
    (programs / "scontrol").write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    (programs / "scontrol").chmod(0o755)
    nodes = f"{socket.gethostname()},{OTHER}"
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOBID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NODELIST": nodes,
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
        "FAKE_SRUN_LOG": str(tmp_path / "srun.log"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    process = bench(tmp_path, "--max-samples", "5", "--json", env=slurm)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["runs"][0]["metrics"][0]["value"] == 5
    assert (tmp_path / "srun.log").read_text().split() == [OTHER]
