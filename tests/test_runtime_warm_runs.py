"""Runs on real executors that share a warm cluster: told apart, complete, and as their own logs say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from disagg.experiments.cli import app
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_point import run_points

pytest.importorskip("torch")
from disagg.experiments.run_warm import by_cluster, warm_groups

EXPERIMENT = """\
schema_version: 1
name: warm
seed: 1
model: {id: tiny-llama, dtype: float32}
device: cpu
cluster:
  profile: spec:cpu-2core
  context_servers: {num_instances: 1, kv_cache: {tokens_per_block: 16, max_tokens: 4096}}
  generation_servers: {num_instances: 1, kv_cache: {tokens_per_block: 16, max_tokens: 4096}}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {mean: 24, stddev: 8}, osl: {min: 1, max: 6}}
  max_tokens: 8
  phases:
    - {name: profiling, type: poisson, rate: 40, requests: 12}
sweep: {policy.router: [least_tokens, ONE]}
"""
FAILS = '''
from disagg.policies import SelectingPolicy


class Fails(SelectingPolicy):
    """Says nothing that could be done."""

    def select(self, request, executors):
        raise ZeroDivisionError("of this policy")
'''


def write(folder: Path, one: str, **changes: str) -> Path:
    text = EXPERIMENT.replace("ONE", one)
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "experiment.yaml").write_text(text)
    (folder / "fails.py").write_text(FAILS)
    return folder / "experiment.yaml"


def disagg(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.mpi
def test_points_of_a_sweep_share_a_cluster_and_one_that_fails_costs_itself(tmp_path: Path) -> None:
    file = write(tmp_path, '"fails.py:Fails", random')
    code, text = disagg("run", file, "--backend", "hardware", "--output", tmp_path / "out")
    assert code == 1, text
    assert "ZeroDivisionError" in text
    assert "of this policy" in text
    folders = sorted(path.parent for path in (tmp_path / "out").glob("*/0/manifest.json"))
    assert [folder.parent.name for folder in folders] == ["router=least_tokens", "router=random"], text
    processes = set()
    for folder in folders:
        requests = pd.read_parquet(folder / "requests.parquet")
        assert len(requests) == 12
        assert set(requests["finish_reason"]) == {"stop"}
        manifest = json.loads((folder / "manifest.json").read_text())
        processes.add(tuple(rank["pid"] for rank in manifest["ranks"]))
        for command in ("replay", "conform"):
            code, text = disagg(command, folder)
            assert code == 0, text
    assert len(processes) == 2  # the one after the failure has a cluster of its own
    code, text = disagg("run", file, "--backend", "hardware", "--output", tmp_path / "out", "--resume")
    assert "2 of 3 runs are finished already" in text


def test_runs_share_a_cluster_while_its_executors_stay_the_same(tmp_path: Path) -> None:
    """Policies and loads may change; a KV pool, a transport, or a limit of time may not."""

    def sizes(sweep: str, timeout_s: float | None = None) -> list[int]:
        file = write(tmp_path, "random", **{"{policy.router: [least_tokens, random]}": sweep})
        loaded = load_experiment(file, (), backend="hardware")
        return [len(group) for group in warm_groups(run_points(loaded, tmp_path / "out", timeout_s))]

    assert sizes("{policy.router: [least_tokens, random], workload.phases.profiling.rate: [20, 40]}") == [4]
    assert sizes("{seed: [1, 2]}") == [2]
    assert sizes("{cluster.context_servers.kv_cache.max_tokens: [4096, 2048]}") == [1, 1]
    assert sizes("{cluster.cache_transceiver.throttle_gb_per_s: [null, 5]}") == [1, 1]
    assert sizes("{policy.router: [least_tokens, random]}", timeout_s=60.0) == [1, 1]


def test_runs_on_equal_clusters_can_be_put_next_to_each_other(tmp_path: Path) -> None:
    sweep = "{policy.router: [least_tokens, random], cluster.context_servers.kv_cache.max_tokens: [4096, 2048]}"
    file = write(tmp_path, "random", **{"{policy.router: [least_tokens, random]}": sweep})
    points = run_points(load_experiment(file, (), backend="hardware"), tmp_path / "out")
    assert [len(group) for group in warm_groups(points)] == [1, 1, 1, 1]
    ordered = by_cluster(points)
    assert [len(group) for group in warm_groups(ordered)] == [2, 2]
    assert sorted(point.name for point in ordered) == sorted(point.name for point in points)
