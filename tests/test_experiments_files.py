"""From experiment file to cluster: defaults, aliases, overrides, sweeps, and the executors that come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagg.core.devices import DEVICES
from disagg.core.model_shapes import PRESETS
from disagg.experiments.cluster import cluster_of, placements_of, world_size
from disagg.experiments.config import Experiment, json_schema
from disagg.experiments.config_loader import dump_yaml, parse_document
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import LoadedExperiment, _point_name, load_experiment
from disagg.experiments.manifest import configuration_hash
from disagg.experiments.run_point import run_points
from disagg.policies.vocabulary import PS_PER_S, Role

HERE = Path(__file__).resolve().parent.parent / "experiments"

BASE = """\
schema_version: 1
name: base
seed: 42
model: {id: llama-3.1-8b}
cluster:
  context_servers: {num_instances: 2}
  generation_servers: {num_instances: 1, tensor_parallel_size: 2}
  cache_transceiver: {backend: mpi}
policy: {context_router: least_tokens, generation_router: {name: power_of_two, d: 2}}
workload:
  dataset: {type: synthetic, isl: 100, osl: 10}
  max_tokens: 16
  phases:
    - {name: profiling, type: poisson, rate: 8, requests: 10}
"""


def load(tmp_path: Path, text: str = BASE, *overrides: str, **options: Any) -> LoadedExperiment:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    return load_experiment(file, overrides, **options)


@pytest.mark.parametrize("file", [*sorted(HERE.glob("templates/*.yaml")), *sorted(HERE.glob("*.yaml"))])
def test_every_shipped_experiment_is_valid(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    (tmp_path / "AzureLLMInferenceTrace_conv.csv").write_text(header)
    monkeypatch.setenv("DISAGG_TRACES", str(tmp_path))
    loaded = load_experiment(file)
    assert loaded.points
    assert loaded.warnings == ()


def test_an_expanded_file_loads_to_the_same_experiment(tmp_path: Path) -> None:
    first = load(tmp_path, BASE + "slo: {preset: llama3.1-8b, scale: 2}\n").experiment
    again = load(tmp_path, dump_yaml(first.expanded())).experiment
    assert again.expanded() == first.expanded()
    assert cluster_of(again) == cluster_of(first)
    assert configuration_hash(again) == configuration_hash(first)


def test_a_preset_of_objectives_is_scaled(tmp_path: Path) -> None:
    slo = load(tmp_path, BASE + "slo: {preset: llama3.1-8b, scale: 2}\n").experiment.slo
    assert slo is not None
    assert (slo.ttft_ms, slo.tpot_ms, slo.attainment, slo.preset) == (4000.0, 200.0, 0.99, None)


def test_prefill_and_decode_are_other_words_for_context_and_generation(tmp_path: Path) -> None:
    other = (
        BASE.replace("context_servers", "prefill_servers")
        .replace("generation_servers", "decode_servers")
        .replace("context_router", "prefill_router")
        .replace("generation_router", "decode_router")
    )
    assert load(tmp_path, other).experiment == load(tmp_path).experiment
    swept = other + "sweep: {cluster.prefill_servers.num_instances: [1, 2]}\n"
    assert [len(cluster_of(p.experiment).executors) for p in load(tmp_path, swept).points] == [2, 3]


def test_both_words_for_one_key_are_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="duplicate key 'context_servers'"):
        load(tmp_path, BASE.replace("  generation_servers", "  prefill_servers: {}\n  generation_servers"))


def test_a_list_element_is_set_by_its_name_and_a_bare_policy_by_its_keys(tmp_path: Path) -> None:
    overrides = ["workload.phases.profiling.rate=2.5", "policy.context_router.name=random", "seed=7"]
    config = load(tmp_path, BASE, *overrides).experiment
    assert config.workload.phases[0].rate == 2.5  # type: ignore[union-attr]
    assert config.policy.context_router is not None
    assert config.policy.context_router.name == "random"
    assert config.seed == 7


def test_yaml_scalars_follow_version_1_2() -> None:
    data = parse_document("{a: 1e6, b: yes, c: 010, d: 1:30, e: .5, f: null, g: -3, h: true}", "f").data
    assert data == {"a": 1e6, "b": "yes", "c": 10, "d": "1:30", "e": 0.5, "f": None, "g": -3, "h": True}


@pytest.mark.parametrize(
    "value", ["1e6", "yes", "null", "1:30", "12", "a: b", "", "0x10", "é\n", 1e6, 1e-9, None, True, [{}]]
)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    assert parse_document(dump_yaml({"a": value}), "f").data == {"a": value}


def test_executors_get_ids_ranks_and_devices_in_order(tmp_path: Path) -> None:
    config = load(tmp_path).experiment
    placements = placements_of(config)
    assert [p.id for p in placements] == [1, 2, 3]
    assert [p.role for p in placements] == [Role.CONTEXT, Role.CONTEXT, Role.GENERATION]
    assert [p.participant_ids for p in placements] == [(1,), (2,), (3, 4)]
    assert [p.device_ids for p in placements] == [(0,), (1,), (2, 3)]
    assert world_size(config) == 5


def test_blocks_are_what_the_weights_leave_of_the_memory(tmp_path: Path) -> None:
    shape, device = PRESETS["llama-3.1-8b"], DEVICES["h200"]
    one, _, two = cluster_of(load(tmp_path).experiment).executors
    block_bytes = shape.kv_bytes_per_token * 32
    assert one.num_blocks == int((device.memory_bytes - shape.weight_bytes) * 0.9) // block_bytes
    # two ranks: half the KV and (but for the norms) half the weights on each
    assert two.num_blocks == pytest.approx((2 * device.memory_bytes - shape.weight_bytes) * 0.9 / block_bytes, rel=1e-3)


def test_max_tokens_fixes_the_number_of_blocks(tmp_path: Path) -> None:
    text = BASE.replace("{num_instances: 2}", "{num_instances: 2, kv_cache: {max_tokens: 1000, tokens_per_block: 16}}")
    assert cluster_of(load(tmp_path, text).experiment).executors[0].num_blocks == 62


def test_the_default_transfer_time_out_grows_with_the_bytes(tmp_path: Path) -> None:
    executor = cluster_of(load(tmp_path).experiment).executors[0]
    device = DEVICES["h200"]
    rate = device.link_bandwidth * device.link_efficiency
    assert executor.transfer_timeout_base == 30 * PS_PER_S
    assert executor.transfer_timeout_per_token == pytest.approx(4 * 131072 / rate * 1e12, rel=1e-6)
    given = load(tmp_path, BASE, "cluster.cache_transceiver.kv_transfer_timeout_ms=250").experiment
    assert cluster_of(given).executors[0].transfer_timeout_base == PS_PER_S // 4
    assert cluster_of(given).executors[0].transfer_timeout_per_token == 0


def test_parameters_reach_the_policies(tmp_path: Path) -> None:
    cluster = cluster_of(load(tmp_path).experiment)
    assert cluster.generation_router is not None
    assert (cluster.generation_router.name, cluster.generation_router.params) == ("power_of_two", {"d": 2})
    assert cluster.policy_root == str(tmp_path.resolve())


def test_a_policy_in_a_file_is_found_beside_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from disagg.policies.routing import RoundRobin\n\n\nclass Mine(RoundRobin):\n    '''Mine.'''\n"
    )
    loaded = load(tmp_path, BASE.replace("least_tokens", "'mine.py:Mine'"))
    router = cluster_of(loaded.experiment).context_router
    assert router is not None
    assert router.name == "mine.py:Mine"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise OSError('no weights')", "could not be imported: OSError: no weights"),
        ("class Other: pass", "has no class 'Mine'"),
        ("class Mine: pass", "must derive from RoutingPolicy"),
        (
            "from disagg.policies.routing import RoundRobin\nclass Mine(RoundRobin):\n"
            "    def __init__(self, *, rng, share=2):\n        raise ValueError('share must be under 1')",
            "ValueError: share must be under 1",
        ),
        (
            "from disagg.policies.routing import RoundRobin\nclass Mine(RoundRobin):\n"
            "    def __init__(self, *, rng, share):\n        super().__init__(rng=rng)",
            "needs the parameters share",
        ),
    ],
)
def test_a_policy_file_that_cannot_serve_is_a_matter_of_configuration(tmp_path: Path, source: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=r"experiment\.yaml:9:\d+: policy\.context_router") as error:
        load(tmp_path, BASE.replace("least_tokens", "'mine.py:Mine'"))
    assert told in str(error.value)


SWEEP = "sweep: {workload.phases.profiling.rate: [2, 4.5], policy.context_router.name: [round_robin, least_tokens]}\n"


def test_a_sweep_is_a_cartesian_product_with_readable_names(tmp_path: Path) -> None:
    points = load(tmp_path, BASE + SWEEP).points
    assert [p.name for p in points] == [
        "rate=2,context_router=round_robin",
        "rate=2,context_router=least_tokens",
        "rate=4.5,context_router=round_robin",
        "rate=4.5,context_router=least_tokens",
    ]
    assert points[2].experiment.workload.phases[0].rate == 4.5  # type: ignore[union-attr]


def test_names_of_swept_keys_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    keys = "cluster.context_servers.num_instances: [1], cluster.generation_servers.num_instances: [1]"
    points = load(tmp_path, BASE + f"sweep: {{{keys}}}\n").points
    assert points[0].name == "context_servers.num_instances=1,generation_servers.num_instances=1"


def test_a_swept_data_set_is_named_by_its_file(tmp_path: Path) -> None:
    value = {"type": "azure", "path": "folder/conv.csv"}
    assert _point_name({"dataset": value, "router": "lor"}, set()) == "dataset=conv,router=lor"
    assert _point_name({"dataset": value | {"limit": 5}}, set()) == "dataset=conv+limit-5"


def test_repeats_share_their_seeds_over_the_points(tmp_path: Path) -> None:
    runs = run_points(load(tmp_path, BASE + SWEEP + "repeats: 2\n"), Path("out"))
    assert [run.seed for run in runs] == [42, 43] * 4
    assert runs[1].directory == Path("out/rate=2,context_router=round_robin/1")
    assert runs[1].experiment.expanded()["sweep"] == {}


def test_a_single_run_goes_straight_into_the_output(tmp_path: Path) -> None:
    (run,) = run_points(load(tmp_path), Path("out"))
    assert run.directory == Path("out")


def test_the_configuration_hash_ignores_the_backend_and_names_and_nothing_that_matters(tmp_path: Path) -> None:
    base = configuration_hash(load(tmp_path).experiment)
    assert configuration_hash(load(tmp_path, backend="hardware").experiment) == base
    assert configuration_hash(load(tmp_path, BASE, "name=other").experiment) == base
    assert configuration_hash(load(tmp_path, seed=3).experiment) == base
    assert configuration_hash(load(tmp_path, BASE, "policy.context_router=random").experiment) != base
    assert configuration_hash(load(tmp_path, BASE, "workload.phases.profiling.rate=2").experiment) != base


def test_the_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(Experiment.model_fields)
    assert schema["additionalProperties"] is False
