"""Two kinds of device in one cluster: each executor has its own's speed, memory and links, and policies that predict know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from disagg.core.cost import StepFeatures, roofline
from disagg.core.devices import DEVICES
from disagg.core.overheads import LinkCost
from disagg.experiments.cluster import cluster_of, shape_of
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_simulation import costs_of, link_costs
from disagg.policies.vocabulary import PS_PER_S

EXPERIMENT = """\
schema_version: 1
name: kinds
seed: 1
model: {id: llama-3.1-8b}
cluster:
  profile: spec:h200
  instances:
    - {role: context}
    - {role: context, profile: spec:a100}
    - {role: generation}
    - {role: generation, profile: spec:a100, tensor_parallel_size: 2}
  cache_transceiver: {backend: cuda_ipc}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: 2000, osl: 20}
  max_tokens: 32
  phases:
    - {name: profiling, type: poisson, rate: 12, requests: 80}
slo: {ttft_ms: 2000, tpot_ms: 50}
"""
H200, A100 = DEVICES["h200"], DEVICES["a100"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kinds.yaml"
    path.write_text(EXPERIMENT)
    return path


def config_of(file: Path, *changes: str) -> Any:
    return load_experiment(file, changes).points[0].experiment


def test_steps_and_memory_are_those_of_each_executor_s_own_device(file: Path) -> None:
    config = config_of(file)
    shape, costs = shape_of(config), costs_of(config)
    chunk, decode = StepFeatures(0, 0, ((0, 2000, True),)), StepFeatures(16, 32_000)
    for executor, device, tp in ((1, H200, 1), (2, A100, 1), (3, H200, 1), (4, A100, 2)):
        alone = roofline(shape, device, tp, 1)
        assert [costs[executor].step_time(step) for step in (chunk, decode)] == [
            alone.step_time(step) for step in (chunk, decode)
        ]
    blocks = [executor.num_blocks for executor in cluster_of(config).executors]
    # nine tenths of what 16.1 GB of weights leave of 141 and of 80 GB, in blocks of 32 tokens of 131,072 bytes
    assert [round(n * 32 * 131_072 / 1e9) for n in blocks[:2]] == [112, 58]
    assert blocks[0] == blocks[2]


def test_a_link_between_two_kinds_is_the_slower_one_s_and_each_rank_has_one(file: Path) -> None:
    config = config_of(file)
    cost = link_costs(config, {e.id: e for e in cluster_of(config).executors})
    latency = round(20e-6 * PS_PER_S)
    assert cost(1, 3) == LinkCost(450e9 * 0.87, latency)
    assert cost(1, 4) == cost(2, 3) == LinkCost(300e9 * 0.87, latency)  # one rank at one end
    assert cost(4, 4) == LinkCost(2 * 300e9 * 0.87, latency)


def test_a_measured_kind_stands_beside_a_specified_one(file: Path) -> None:
    changes = ("cluster.instances.0.profile=h200-llama-3.1-8b", "cluster.instances.3.tensor_parallel_size=1")
    config = config_of(file, *changes)
    costs = costs_of(config)
    chunk = StepFeatures(0, 0, ((0, 2000, True),))
    assert costs[2].step_time(chunk) == roofline(shape_of(config), A100, 1, 1).step_time(chunk)
    assert costs[1].step_time(chunk) != roofline(shape_of(config), H200, 1, 1).step_time(chunk)
    cost = link_costs(config, {e.id: e for e in cluster_of(config).executors})
    assert cost(1, 4).bytes_per_s <= 300e9 * 0.87
    assert cost(1, 4).fixed >= cost(2, 4).fixed


def test_a_prompt_takes_as_long_as_its_device_and_prediction_sends_it_where_it_is_sooner_done(
    file: Path, disagg: Callable[..., int], tmp_path: Path
) -> None:
    shares = {}
    for router in ("round_robin", "{name: mooncake, rejects: false}"):
        folder = tmp_path / router.strip("{}").split(":")[0]
        assert disagg("run", str(file), "--set", f"policy.router={router}", "--output", str(folder)) == 0
        requests = pd.read_parquet(folder / "requests.parquet")
        shares[folder.name] = (requests["context_executor"] == 1).mean()
        alone = (requests["first_token_s"] - requests["context_start_s"]).groupby(requests["context_executor"]).min()
        assert alone[2] > 2.5 * alone[1]  # 989 to 312 TFLOP/s, and overheads that are the same
        manifest = json.loads((folder / "manifest.json").read_text())
        assert [e["profile"] for e in manifest["executors"]] == ["spec:h200", "spec:a100"] * 2
    assert shares["round_robin"] == 0.5
    assert shares["name"] > 0.7


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ("spec:a10", "cluster.instances.1.profile: unknown profile 'spec:a10'; did you mean 'spec:a100'?"),
        (
            "spec:cpu-2core",
            "cluster.instances.1.profile: profile spec:cpu-2core is of another device type than the cluster",
        ),
        ("h200-qwen2.5-7b", "cluster.instances.1.profile: .* was measured for qwen2.5-7b"),
        ("missing.json", "cluster.instances.1.profile: there is no profile "),
        ("cpu-2core-tiny", "cluster.instances.1.profile: .* was measured for device: cpu"),
    ],
)
def test_a_profile_that_executors_cannot_have_is_told_where_it_stands(file: Path, profile: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(file, f"cluster.instances.1.profile={profile}")
