"""Every way we know to write a wrong experiment file: exit code 2, place and key named, nothing written, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.experiments import cli

GOOD = """\
schema_version: 1
name: good
seed: 42
model: {id: llama-3.1-8b}
backend: simulation
cluster:
  profile: spec:h200
  context_servers:
    num_instances: 2
    tensor_parallel_size: 1
  generation_servers:
    num_instances: 2
  cache_transceiver: {backend: mpi}
policy:
  context_router: {name: least_tokens}
  generation_router: {name: power_of_two, d: 2}
workload:
  dataset: {type: synthetic, isl: {mean: 1024, stddev: 128}, osl: 128}
  max_tokens: 512
  phases:
    - {name: warmup, type: concurrency, concurrency: 4, requests: 5, exclude_from_results: true}
    - {name: profiling, type: poisson, rate: 8.0, requests: 10}
slo: {ttft_ms: 2000, tpot_ms: 100}
"""


def disagg(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["disagg", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    code = exit_.value.code
    return code if isinstance(code, int) else 0


# (what is replaced, by what, what the error must say); `{f}` is the file's path
POISON = {
    "an unknown role policy": (
        "  generation_router:",
        "  roles: schedule\n  generation_router:",
        ["{f}:16:3: policy.roles.name", "there is no role policy 'schedule', did you mean 'scheduled'"],
    ),
    "a role that there is not": (
        "  generation_router:",
        "  roles: {name: scheduled, changes: [{at_s: 1, executor: 1, role: prefill}]}\n  generation_router:",
        ["{f}:16:28: policy.roles.changes", "role must be one of context, generation, mixed, parked, got 'prefill'"],
    ),
    "a change of roles with a key misspelt": (
        "  generation_router:",
        "  roles: {name: scheduled, changes: [{at: 1, executor: 1, role: mixed}]}\n  generation_router:",
        ["{f}:16:28: policy.roles.changes", "'at', did you mean 'at_s'?"],
    ),
    "a change of an executor that there is not": (
        "  generation_router:",
        "  roles:\n    name: scheduled\n    changes:\n    - {at_s: 1, executor: 9, role: mixed}\n  generation_router:",
        ["{f}:19:17: policy.roles.changes.0.executor", "there is no executor 9; allowed: 1, 2, 3, 4"],
    ),
    "changes of roles that leave nobody to generate, listed in another order": (
        "  generation_router:",
        "  roles:\n    name: scheduled\n    changes:\n    - {at_s: 2, executor: 3, role: context}\n"
        "    - {at_s: 1, executor: 4, role: parked}\n  generation_router:",
        ["{f}:19:30: policy.roles.changes.0.role", "from 2 s on, no executor is left to generate"],
    ),
    "a role policy's parameter out of range": (
        "  generation_router:",
        "  roles: {name: mixed_pool, max_kv: 7}\n  generation_router:",
        ["{f}:16:29: policy.roles.max_kv", "at most 1, got 7"],
    ),
    "requests that could move nowhere": (
        "    num_instances: 2\n  cache_transceiver: {backend: mpi}\npolicy:\n",
        "    num_instances: 1\n  cache_transceiver: {backend: mpi}\npolicy:\n  migration: pair_by_load\n",
        ["{f}:15:3: policy.migration", "requests move between executors that generate; there is 1"],
    ),
    "roles without a router for what may come": (
        "  generation_router: {name: power_of_two, d: 2}",
        "  roles: scheduled",
        ["policy.generation_router", "policy.roles may give any role"],
    ),
    "a key misspelt": (
        "num_instances: 2\n    tensor",
        "num_instnces: 2\n    tensor",
        ["{f}:9:5:", "cluster.context_servers.num_instnces", "did you mean 'num_instances'"],
    ),
    "an unknown top key": ("seed: 42", "sead: 42", ["{f}:3:1: sead", "did you mean 'seed'"]),
    "a duplicate key": ("seed: 42", "seed: 42\nseed: 43", ["{f}:4:1: seed: duplicate key"]),
    "an anchor": ("seed: 42", "seed: &x 42", ["{f}:3:7:", "anchor &x"]),
    "an alias": ("seed: 42", "seed: *x", ["{f}:3:7:", "alias *x"]),
    "a python tag": ("seed: 42", "seed: !!python/object/apply:os.system [id]", ["{f}:3:7:", "tag"]),
    "a merge key": ("seed: 42", "<<: {seed: 42}", ["{f}:3:1:", "<<"]),
    "a wrong type": (
        "num_instances: 2\n    tensor",
        "num_instances: two\n    tensor",
        ["{f}:9:5:", "cluster.context_servers.num_instances: must be a whole number, not 'two'"],
    ),
    "a bool for a number": ("seed: 42", "seed: true", ["{f}:3:1: seed: must be a whole number"]),
    "a number for a word": ("name: good", "name: 12", ["{f}:2:1: name: must be a string"]),
    "a mapping for a number": ("seed: 42", "seed: {a: 1}", ["{f}:3:1: seed: must be a whole number, not a mapping"]),
    "a list for a mapping": ("model: {id: llama-3.1-8b}", "model: [llama]", ["{f}:4:1: model: must be a mapping"]),
    "a missing section": (
        "policy:\n  context_router: {name: least_tokens}\n  generation_router: {name: power_of_two, d: 2}\n",
        "",
        ["policy: required key is missing"],
    ),
    "a missing max_tokens": ("  max_tokens: 512\n", "", ["workload.max_tokens: required key is missing"]),
    "a wrong version": ("schema_version: 1", "schema_version: 2", ["{f}:1:1: schema_version: must be one of 1"]),
    "an unknown backend": (
        "backend: simulation",
        "backend: simulator",
        ["{f}:5:1: backend", "did you mean 'simulation'"],
    ),
    "a negative number": (
        "num_instances: 2\n    tensor",
        "num_instances: -1\n    tensor",
        ["{f}:9:5:", "must be at least 0"],
    ),
    "an infinite rate": ("rate: 8.0", "rate: .inf", ["{f}:22:40: workload.phases.profiling.rate"]),
    "a rate that is not a number": ("rate: 8.0", "rate: .nan", ["workload.phases.profiling.rate"]),
    "a zero rate": ("rate: 8.0", "rate: 0", ["workload.phases.profiling.rate: must be at least 1e-06"]),
    "a rate that is almost zero": (
        "rate: 8.0",
        "rate: 1e-300",
        ["{f}:22:40: workload.phases.profiling.rate: must be at least 1e-06"],
    ),
    "a load that takes years": ("rate: 8.0", "rate: 1e-6", ["workload.phases.profiling.rate: 10 requests at 1e-06"]),
    "tp that does not divide heads, with a KV size": (
        "tensor_parallel_size: 1",
        "tensor_parallel_size: 3\n    kv_cache: {max_tokens: 4096}",
        ["{f}:10:5: cluster.context_servers.tensor_parallel_size", "32 attention heads"],
    ),
    "rate and concurrency": (
        "rate: 8.0",
        "rate: 8.0, concurrency: 4",
        ["{f}:22:", "workload.phases.profiling.concurrency: rate and concurrency exclude each other"],
    ),
    "a phase without a type": ("type: poisson, ", "", ["{f}:22:", "workload.phases.profiling", "'type'"]),
    "an unknown phase type": ("type: poisson", "type: poison", ["workload.phases.profiling", "did you mean 'poisson'"]),
    "gamma without burstiness": (
        "type: poisson",
        "type: gamma",
        ["workload.phases.profiling.burstiness: required key is missing"],
    ),
    "two phases of one name": ("name: profiling", "name: warmup", ["two phases are named 'warmup'"]),
    "trace arrivals without a trace": (
        "type: poisson, rate: 8.0, requests: 10",
        "type: trace",
        ["workload.phases.profiling.type", "need a trace"],
    ),
    "everything excluded": ("requests: 10", "requests: 10, exclude_from_results: true", ["every phase is excluded"]),
    "an unknown policy": (
        "name: least_tokens",
        "name: least_token",
        ["{f}:15:20: policy.context_router.name", "least_tokens", "round_robin"],
    ),
    "an unknown policy parameter": (
        "d: 2}",
        "e: 2}",
        ["policy.generation_router.e", "has no parameter 'e'", "allowed: d"],
    ),
    "a missing policy file": ("name: least_tokens", "name: 'mine.py:Mine'", ["policy.context_router.name", "mine.py"]),
    "a policy of another kind": (
        "name: least_tokens",
        "name: accept_all",
        ["policy.context_router.name", "accept_all"],
    ),
    "no context router": (
        "  context_router: {name: least_tokens}\n",
        "",
        ["policy.context_router: required key is missing"],
    ),
    "two kinds of router": ("policy:", "policy:\n  router: random", ["router excludes context_router"]),
    "no transport": (
        "  cache_transceiver: {backend: mpi}\n",
        "",
        ["Disaggregated serving is not enabled, please check the configuration"],
    ),
    "a null transport": (
        "{backend: mpi}",
        "{backend: null}",
        ["{f}:13:", "Disaggregated serving is not enabled, please check the configuration"],
    ),
    "an unknown transport": (
        "{backend: mpi}",
        "{backend: tcp}",
        ["cluster.cache_transceiver.backend: must be one of mpi, cuda_ipc, host, auto"],
    ),
    "an unknown binding": (
        "{backend: mpi}",
        "{backend: mpi, generation_binding: at_context_end}",
        ["generation_binding: must be one of at_arrival, at_context_start, at_context_done"],
    ),
    "no executors": ("num_instances: 2", "num_instances: 0", ["there are no executors"]),
    "context without generation": (
        "  generation_servers:\n    num_instances: 2\n",
        "",
        ["context servers without generation servers"],
    ),
    "generation without context": (
        "  context_servers:\n    num_instances: 2\n    tensor_parallel_size: 1\n",
        "",
        ["generation servers without context servers"],
    ),
    "tp that does not divide heads": (
        "tensor_parallel_size: 1",
        "tensor_parallel_size: 3",
        ["{f}:10:5: cluster.context_servers.tensor_parallel_size", "32 attention heads", "allowed: 1, 2, 4"],
    ),
    "more stages than layers": (
        "tensor_parallel_size: 1",
        "pipeline_parallel_size: 33",
        ["cluster.context_servers.pipeline_parallel_size", "32 layers"],
    ),
    "layers that do not add up": (
        "tensor_parallel_size: 1",
        "pipeline_parallel_size: 2\n    layers_per_stage: [1, 2]",
        ["{f}:11:5:", "layers_per_stage", "32"],
    ),
    "an unknown model": ("id: llama-3.1-8b", "id: llama-3.1-9b", ["{f}:4:9: model.id", "did you mean 'llama-3.1-8b'"]),
    "an unknown profile": ("spec:h200", "spec:h20", ["{f}:7:3: cluster.profile", "did you mean 'spec:h200'"]),
    "missing weights": ("{id: llama-3.1-8b}", "{id: llama-3.1-8b, weights: nowhere}", ["model.weights", "nowhere"]),
    "two KV sizes": (
        "tensor_parallel_size: 1",
        "kv_cache: {max_tokens: 4096, free_gpu_memory_fraction: 0.5}",
        ["{f}:10:5:", "exclude each other"],
    ),
    "block reuse with blocks of two sizes": (
        "tensor_parallel_size: 1",
        "kv_cache: {enable_block_reuse: true, tokens_per_block: 16}",
        ["enable_block_reuse", "[16, 32]", "one tokens_per_block"],
    ),
    "beam search": (
        "slo:",
        "sampling: {beam_width: 2}\nslo:",
        ["{f}:23:12: sampling.beam_width: beam width 2 is not supported"],
    ),
    "faults": ("slo:", "faults: [{kill: 1}]\nslo:", ["{f}:23:1: faults", "allowed: []"]),
    "an unknown slo preset": (
        "{ttft_ms: 2000, tpot_ms: 100}",
        "{preset: llama3.1-9b}",
        ["{f}:23:7: slo.preset", "did you mean 'llama3.1-8b'"],
    ),
    "lengths upside down": (
        "isl: {mean: 1024, stddev: 128}",
        "isl: {min: 9, max: 3}",
        ["workload.dataset.isl.min", "greater than max 3"],
    ),
    "too few weights": (
        "isl: {mean: 1024, stddev: 128}",
        "isl: {values: [1, 2], weights: [1]}",
        ["workload.dataset.isl.weights"],
    ),
    "an empty length": ("osl: 128", "osl: 0", ["workload.dataset.osl", "at least 1"]),
    "a quantile over one": (
        "max_tokens: 512",
        "max_tokens: {quantile: 1.5}",
        ["workload.max_tokens.quantile: must be at most 1"],
    ),
    "a missing trace": (
        "{type: synthetic, isl: {mean: 1024, stddev: 128}, osl: 128}",
        "{type: azure, path: nowhere.csv}",
        ["workload.dataset.path", "nowhere.csv", "AzurePublicDataset"],
    ),
    "instances and servers": (
        "cluster:",
        "cluster:\n  instances: [{role: mixed}]",
        ["instances excludes context_servers"],
    ),
    "a sweep over an unknown key": (
        "slo:",
        "sweep: {cluster.context_servers.size: [1]}\nslo:",
        ["{f}:23:9:", "cluster.context_servers.size", "unknown key"],
    ),
    "a sweep over a wrong value": (
        "slo:",
        "sweep: {workload.phases.profiling.rate: [1, fast]}\nslo:",
        ["{f}:23:9:", "must be a number, not 'fast'"],
    ),
    "a sweep over an unknown phase": (
        "slo:",
        "sweep: {workload.phases.profilin.rate: [1]}\nslo:",
        ["did you mean 'profiling'"],
    ),
    "a sweep of nothing": ("slo:", "sweep: {seed: []}\nslo:", ["{f}:23:9: sweep.seed", "must not be empty"]),
    "a date": ("name: good", "name: [2024-01-01]", ["{f}:2:1: name: must be a string"]),
    "broken YAML": ("seed: 42", "seed: [42", ["{f}:"]),
    "a control character": ("seed: 42", "seed: \x01", ["not valid YAML"]),
    "tabs": ("  profile: spec:h200", "\tprofile: spec:h200", ["{f}:7:1:"]),
}


@pytest.mark.parametrize("case", POISON)
def test_a_poisoned_file_is_refused_by_place_and_key_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, told = POISON[case]
    if old not in GOOD:
        pytest.fail(f"the good file has no {old!r} to poison")
    monkeypatch.delenv("DISAGG_TRACES", raising=False)
    file = tmp_path / "experiment.yaml"
    file.write_text(GOOD.replace(old, new))
    output = tmp_path / "output"
    code = disagg(monkeypatch, "run", str(file), "--output", str(output))
    error = capsys.readouterr().err
    assert code == 2, error
    for text in told:
        assert text.replace("{f}", str(file)) in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == [file]


def test_the_file_that_is_poisoned_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(GOOD)
    assert disagg(monkeypatch, "validate", str(file)) == 0
    assert "valid; 1 run" in capsys.readouterr().out


def test_all_errors_are_listed_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(GOOD.replace("seed: 42", "seed: -1").replace("rate: 8.0", "rate: x").replace("ttft_ms", "ttft"))
    assert disagg(monkeypatch, "validate", str(file)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2] for line in lines] == ["3", "22", "23"]
    assert all(line.startswith(f"error: {file}:") for line in lines)


RAW = {
    "an empty file": (b"", "must be a mapping"),
    "a list": (b"- 1\n", "must be a mapping"),
    "a word": (b"hello\n", "must be a mapping"),
    "bad UTF-8": (b"schema_version: 1\nname: \xff\n", ":2:7: not UTF-8"),
    "an oversize file": (b"#" * ((1 << 20) + 1), "larger than"),
    "deep nesting": (b"a: " + b"[" * 200 + b"]" * 200, "levels deep"),
    "two documents": (b"a: 1\n---\nb: 1\n", ":2:1:"),
    "a key that is a list": (b"? [1]\n: 2\n", "must be a word"),
    "a null byte": (b"a: \x00\n", "not valid YAML"),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_experiment_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, told = RAW[case]
    file = tmp_path / "experiment.yaml"
    file.write_bytes(raw)
    assert disagg(monkeypatch, "validate", str(file)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert str(file) in error


OPTIONS = {
    "a --set without a value": (["--set", "seed"], "must have the form key.path=value"),
    "a --set of an unknown key": (["--set", "sede=1"], "--set sede=1: sede: unknown key 'sede'; did you mean 'seed'"),
    "a --set of an unknown phase": (["--set", "workload.phases.x.rate=1"], "has no element 'x'"),
    "a --set below a number": (["--set", "seed.x=1"], "has no keys"),
    "a --set of a wrong value": (["--set", "seed=x"], "--set seed=x: seed: must be a whole number"),
    "a --set with an alias": (["--set", "seed=*x"], "alias"),
    "an unknown backend": (["--backend", "gpu"], "--backend gpu: backend: must be one of simulation, hardware"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_named(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, told = OPTIONS[case]
    file = tmp_path / "experiment.yaml"
    file.write_text(GOOD)
    assert disagg(monkeypatch, "validate", str(file), *options) == 2
    assert told in capsys.readouterr().err


INSTANCES = """\
  instances:
    - {role: prefill, participant_ids: [1, 3], device_ids: [0, 1], tensor_parallel_size: 2}
    - {role: decode, participant_ids: [3], device_ids: [2]}
"""


def with_instances(text: str) -> str:
    start, end = GOOD.index("  context_servers:"), GOOD.index("  cache_transceiver")
    return GOOD[:start] + text + GOOD[end:]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", "", "two executors share rank 3"),
        ("[3]", "[0]", "rank 0 is the orchestrator's"),
        ("[3]", "[5]", "no executor has rank 2"),
        ("[3]", "[2, 4]", "2 ranks for tensor_parallel_size 1"),
        ("[2]", "[2, 4]", "2 devices for 1 ranks"),
        ("participant_ids: [3], ", "", "must be given for every instance or for none"),
        ("role: decode", "role: decoder", "cluster.instances.1.role: must be one of context, generation, mixed"),
    ],
)
def test_participants_must_be_disjoint_complete_and_without_gaps(
    old: str, new: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(with_instances(INSTANCES.replace(old, new) if old else INSTANCES))
    assert disagg(monkeypatch, "validate", str(file)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert f"{file}:" in error


def test_two_executors_on_one_device_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(with_instances(INSTANCES.replace("[1, 3]", "[1, 2]").replace("device_ids: [2]", "device_ids: [1]")))
    assert disagg(monkeypatch, "validate", str(file)) == 0
    assert "executors 1 and 2 share device 1" in capsys.readouterr().err


def test_weights_that_fit_no_device_are_a_matter_of_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(GOOD.replace("spec:h200", "spec:a100").replace("llama-3.1-8b", "llama-3.1-70b"))
    assert disagg(monkeypatch, "validate", str(file)) == 3
    assert "raise tensor_parallel_size" in capsys.readouterr().err


def test_a_model_folder_that_cannot_be_served_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"is_encoder_decoder": true}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    file = tmp_path / "experiment.yaml"
    for name, told in (("t5", "encoder-decoder"), ("broken", "not valid JSON")):
        file.write_text(GOOD.replace("llama-3.1-8b", name))
        assert disagg(monkeypatch, "validate", str(file)) == 2
        error = capsys.readouterr().err
        assert told in error
        assert f"{file}:4:9: model.id" in error


def test_a_malformed_trace_line_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,x\n")
    file = tmp_path / "experiment.yaml"
    text = GOOD.replace("{type: synthetic, isl: {mean: 1024, stddev: 128}, osl: 128}", "{type: azure, path: t.csv}")
    file.write_text(text)
    output = tmp_path / "output"
    assert disagg(monkeypatch, "run", str(file), "--output", str(output)) == 2
    assert f"{tmp_path / 't.csv'}:2: GeneratedTokens must be a whole number, not 'x'" in capsys.readouterr().err
    assert not output.exists()
