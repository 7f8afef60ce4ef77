"""Profile files: whole or refused, and used for what they were measured for only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg.core.cost import StepFeatures
from disagg.core.measured_cost import MeasuredCost
from disagg.core.measured_range import Measured
from disagg.core.overheads import LaunchGaps, LinkCost
from disagg.experiments.calibration_samples import (
    ClientSample,
    MessageSample,
    Samples,
    StepSample,
    TransferSample,
    pair_kind,
    read_samples,
    write_samples,
)
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.measured_profile import ChunkFit, CurveFit, DecodeFit, Profile
from disagg.experiments.profile_cost import measured_cost
from disagg.experiments.profile_diff import diff_profiles
from disagg.experiments.profile_file import load_profile, profile_path, save_profile, shipped_profiles
from disagg.experiments.profile_merge import merge_profiles, merged
from disagg.experiments.profile_refit import refit_profile
from disagg.experiments.profile_show import print_profile
from tests.profile_examples import EXPERIMENT, a_profile, entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_profile(a_profile(), tmp_path / "measured.json")
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT, encoding="utf-8")
    return tmp_path


def test_a_profile_comes_back_from_its_file_as_it_was(folder: Path) -> None:
    assert load_profile(folder / "measured.json") == a_profile()


def test_an_experiment_takes_its_step_times_from_the_profile_it_names(folder: Path) -> None:
    from disagg.experiments.run_simulation import costs_of, gaps_of, link_costs, message_latency

    config = load_experiment(folder / "experiment.yaml").experiment
    costs = costs_of(config)
    profile = a_profile()
    assert costs[2] == measured_cost(profile, profile.engines[1], 8)
    ns = 1e6 + 4 * 1e6 / 8 + 1000 * 4e5 / 4000 + 4 * 5e3
    assert costs[2].step_time(StepFeatures(4, 1000)) / (1000 << 20) == pytest.approx(ns, rel=1e-6)
    assert gaps_of(config)[1].decode_after_idle == 10**9
    assert message_latency(config).between_executors == 3 * 10**9
    assert link_costs(config, {})  # made without a look at executors
    throttled = load_experiment(
        folder / "experiment.yaml", ["cluster.cache_transceiver.throttle_gb_per_s=0.5"]
    ).experiment
    from disagg.experiments.cluster import cluster_of

    executors = {executor.id: executor for executor in cluster_of(throttled).executors}
    assert link_costs(throttled, executors)(1, 2) == LinkCost(0.5e9, 2 * 10**9)


def test_steps_that_one_kind_of_executor_never_ran_cost_what_its_siblings_say() -> None:
    profile = a_profile()
    context, generation = (measured_cost(profile, e, 8) for e in profile.engines)
    chunk = StepFeatures(0, 0, ((0, 100, True),))
    assert generation.step_time(chunk) == context.step_time(chunk)
    alone = a_profile(engines=(entry("generation"),))
    assert measured_cost(alone, alone.engines[0], 8).step_time(chunk) > 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.id=llama-3.1-8b"], "was measured for tiny-llama in float32, not llama-3.1-8b in float32"),
        (["model.dtype=bfloat16"], "was measured for tiny-llama in float32, not tiny-llama in bfloat16"),
        (["device=cuda"], "was measured for device: cpu (a processor), not cuda"),
        (
            ["cluster.context_servers.tensor_parallel_size=2"],
            "was measured for context tp 1 pp 1, generation tp 1 pp 1 executors, not for context tp 2 pp 1",
        ),
        (
            ["cluster.generation_servers.kv_cache.tokens_per_block=32"],
            "was measured for KV blocks of 16 tokens, not 32",
        ),
        (
            ["cluster.cache_transceiver.backend=host"],
            "was measured for KV over mpi from tp 1 pp 1 to tp 1 pp 1, not host",
        ),
        (["cluster.profile=./missing.json"], "cannot be read"),
        (["cluster.profile=cpu-3core-tiny"], "unknown profile 'cpu-3core-tiny'"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_what_it_was_measured_for(
    folder: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        load_experiment(folder / "experiment.yaml", overrides)
    assert "cluster.profile" in str(error.value)  # named by file, line and key


def test_roles_that_were_not_measured_are_refused(folder: Path) -> None:
    text = EXPERIMENT.replace("context_servers", "mixed_servers", 1)
    text = re.sub(r"  generation_servers.*\n  cache_tr.*\n", "", text)
    (folder / "mixed.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="not for mixed tp 1 pp 1"):
        load_experiment(folder / "mixed.yaml")


def _broken(change: Any) -> bytes:
    plain = msgspec.to_builtins(a_profile())
    change(plain)
    return json.dumps(plain).encode()


def _decode_parts(**keys: float) -> Any:
    return lambda plain: plain["engines"][1]["decode"].update(keys)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Input data was truncated"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe", "invalid"),
        (b"[" * 100_000, "recursion|malformed|Expected"),
        (_broken(lambda p: p.update(format_version=3)), "of format 3; allowed: 1, 2"),
        (
            _broken(lambda p: p["measured_for"].update(device_type="cuda")),
            "of format 1, .*; allowed: 2, by calibrating again",
        ),
        (_broken(lambda p: p.update(surprise=1)), "unknown field `surprise`"),
        (_broken(lambda p: p["messages"].update(into_executor=-1)), r"messages.into_executor is -1; allowed"),
        (_broken(lambda p: p["engines"][1]["decode"].update(sequence_ns=float("nan"))), "malformed|nan|NaN"),
        (_broken(lambda p: p["engines"][1]["decode"]["rows"].update(ns=[5.0, 1.0])), "negative"),
        (_broken(lambda p: p["engines"][1]["decode"]["rows"].update(knots=[0, 8, 9])), "argument 2 is shorter|strict"),
        (_broken(lambda p: p["engines"][1]["decode"]["rows"].update(knots=[1, 8])), "ascend from 0"),
        (_broken(lambda p: p["engines"][0].update(layers_per_stage=[1] * 2000)), "2000 items; allowed: at most 1024"),
        (_broken(lambda p: p["device"].update(memory_bytes="much")), "Expected `int`"),
        (_broken(_decode_parts(shared_part=1.5)), ": shared_part is 1.5; allowed: 0 to 1"),
        (_broken(_decode_parts(full_shared_part=1.5)), ": full_shared_part is 1.5; allowed: 0 to 1"),
        (
            _broken(_decode_parts(shared_part=0.3, full_batch=4, full_shared_part=0.4)),
            ": full_shared_part is 0.4; allowed: at most shared_part, which is 0.3",
        ),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as error:
        load_profile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_full_batch_may_save_as_much_of_kv_that_is_read_again_as_others_and_without_one_it_is_no_matter() -> None:
    decode = a_profile().engines[1].decode
    assert decode is not None
    for parts in ({"full_batch": 4, "shared_part": 0.4}, {"full_batch": 0, "shared_part": 0.0}):
        fit = msgspec.structs.replace(decode, full_shared_part=0.4, **parts)
        profile = a_profile(engines=(entry("generation", decode=fit),))
        assert measured_cost(profile, profile.engines[0], 8).full_shared == round(0.4 * (1 << 20))


def test_what_is_shown_says_from_which_batch_on_a_kv_token_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    decode = a_profile().engines[1].decode
    assert decode is not None
    fit = msgspec.structs.replace(decode, shared_part=0.4, full_batch=5, full_kv_ns=4.164, full_shared_part=0.25)
    print_profile(a_profile(engines=(entry("generation", decode=fit),)))
    shown = capsys.readouterr().out
    assert "  from 5 sequences on a KV token of a decode step takes 4.16 ns more\n" in shown
    assert "costs 40% less by fewer than 5 decodes alone, 25% less by more" in shown
    print_profile(a_profile())
    assert "sequences on" not in capsys.readouterr().out


def test_a_profile_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(ConfigError, match="allowed: at most 4194304"):
        load_profile(path)


def test_profiles_of_one_device_and_model_become_one() -> None:
    one, other = a_profile(), a_profile(name="mixed", engines=(entry("mixed"),), links=())
    both = merged([one, other], "both")
    assert [e.role for e in both.engines] == ["context", "generation", "mixed"]
    assert both.name == "both"
    assert both.links == one.links
    elsewhere = msgspec.structs.replace(other.measured_for, device_name="another processor")
    with pytest.raises(ConfigError, match="on another processor"):
        merged([one, a_profile(measured_for=elsewhere)], "both")


def test_samples_of_merged_profiles_go_on_in_numbers_so_that_each_entry_finds_its_own(tmp_path: Path) -> None:
    def samples(session: int, executor: int) -> Samples:
        step = StepSample(session, executor, 1, 1, "first", "idle", 10**9, 1, 5, 0, 0, 0, 0, 0, 1, 0, False)
        said = MessageSample(session, 0, executor, pair_kind(0, executor), "Enqueue", 10**6)
        moved = TransferSample(session, executor, executor + 1, 64, 4, 1, 10**8, None)
        return Samples([step], [said], [moved], [ClientSample(session, True, 7)])

    one = a_profile(engines=(entry("context", executors=(1,)), entry("generation", executors=(2,))), num_sessions=20)
    other = a_profile(engines=(entry("mixed", executors=(1, 2)),), links=())
    paths = [tmp_path / "one.json", tmp_path / "other.json", tmp_path / "bare.json"]
    bare = a_profile(engines=(entry("mixed", tensor_parallel_size=2, executors=(1,)),), links=())
    for path, profile in zip(paths, (one, other, bare), strict=True):
        save_profile(profile, path)
    write_samples(samples(3, 1), tmp_path / "one.samples")
    write_samples(samples(0, 1), tmp_path / "other.samples")
    both = merge_profiles(paths, tmp_path / "both.json")
    assert [e.executors for e in both.engines] == [(1,), (2,), (3, 4), (5,)]
    found = read_samples(tmp_path / "both.samples")
    assert found is not None
    assert [(s.session, s.executor) for s in found.steps] == [(3, 1), (20, 3)]
    assert [(s.session, s.sender, s.receiver) for s in found.messages] == [(3, 0, 1), (20, 0, 3)]
    assert [(s.session, s.source, s.reader) for s in found.transfers] == [(3, 1, 2), (20, 3, 4)]
    assert [s.session for s in found.clients] == [3, 20]
    assert both.messages == refit_profile(tmp_path / "both.json", tmp_path / "later" / "again.json").messages


def test_pooled_profiles_are_fitted_to_the_samples_of_all_that_measured_a_kind(tmp_path: Path) -> None:
    def measured(name: str, role: str, ms: float) -> Path:
        """A profile whose decode steps took `ms` each, whatever is in them."""
        path = tmp_path / f"{name}.json"
        save_profile(a_profile(name=name, engines=(entry(role, executors=(1,)),), links=()), path)
        steps = [
            StepSample(
                0, 1, 1, 2, "following", "same", round(ms * 10**9), batch, batch * 100, 0, 0, 0, 0, 0, 0, 0, False
            )
            for batch in (1, 2, 4, 8)
            for _ in range(4)
        ]
        write_samples(Samples(steps), path.with_suffix(".samples"))
        return path

    def decode_ms(profile: Profile) -> list[float]:
        return [e.decode.rows.ns[-1] / 1e6 for e in profile.engines if e.decode is not None]

    paths = [
        measured("fast", "generation", 10.0),
        measured("slow", "generation", 10.4),
        measured("other", "mixed", 20.0),
    ]
    both = merge_profiles(paths, tmp_path / "both.json", pool=True)
    assert [e.executors for e in both.engines] == [(1, 2), (3,)]
    assert decode_ms(both) == pytest.approx([10.2, 20.0], rel=1e-3)
    assert load_profile(tmp_path / "both.json") == both
    assert refit_profile(tmp_path / "both.json", tmp_path / "again.json").engines == both.engines
    limited = a_profile(engines=(entry("generation", executors=(1,), max_batch_size=3),), links=())
    with pytest.raises(ConfigError, match=r"have max_batch_size 3, those of an earlier profile .* equal limits"):
        merged([load_profile(paths[0]), limited], "both", pool=True)
    save_profile(a_profile(engines=(entry("generation", executors=(1,)),), links=()), tmp_path / "bare.json")
    with pytest.raises(ConfigError, match="holds no samples of steps, so there is nothing to pool"):
        merge_profiles([paths[0], tmp_path / "bare.json"], tmp_path / "no.json", pool=True)


def test_the_difference_of_two_profiles_is_that_of_their_predictions() -> None:
    slower = entry("generation", decode=DecodeFit(CurveFit((0, 8), (1.1e6, 2.2e6), 1e5), CurveFit((0,), (0.0,), 0.0)))
    first = a_profile(
        engines=(entry("generation", decode=DecodeFit(CurveFit((0, 8), (1e6, 2e6), 1e5), CurveFit((0,), (0.0,), 0.0))),)
    )
    told = diff_profiles(first, a_profile(engines=(slower,)))
    family = told["families"]["generation tp 1 pp 1: decode steps"]
    assert family["mean"] == pytest.approx(0.1, rel=1e-6)
    assert family["max_abs"] == pytest.approx(0.1, rel=1e-6)
    assert told["mean_step_time"] == pytest.approx(0.1, rel=1e-6)
    assert diff_profiles(first, first)["mean_step_time"] == 0
    with pytest.raises(ConfigError, match="no kind of executor in common"):
        diff_profiles(a_profile(links=()), a_profile(engines=(entry("mixed"),), links=()))


def test_where_a_fit_has_what_every_step_with_chunks_begins_with_makes_no_difference() -> None:
    def split(rows_ms: float, gap_ms: float) -> Profile:
        gap = round(gap_ms * 10**9)
        rows = CurveFit((0, 512), (rows_ms * 1e6, rows_ms * 1e6 + 7e6), 1.5e4)
        chunks = ChunkFit(rows, 10.0, 1.0, 1e5, 0.0, CurveFit(), 0.0)
        gaps = LaunchGaps(chunk_after_idle=gap + 10**9, chunk_after_decode=gap, chunk_after_chunk=gap)
        no_decodes = Measured(0, 0, 512, 4, 10**6, 512)
        return a_profile(engines=(entry("context", chunks=chunks, gaps=gaps, measured=no_decodes),), links=())

    assert diff_profiles(split(5.0, 0.0), split(2.0, 3.0))["mean_step_time"] == pytest.approx(0, abs=1e-9)
    assert diff_profiles(split(5.0, 0.0), split(5.0, 1.0))["mean_step_time"] > 0.05


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_loads(name: str) -> None:
    from disagg.experiments.profile_file import SHIPPED

    assert load_profile(SHIPPED / f"{name}.json").engines


@pytest.mark.parametrize("name", [name for name in shipped_profiles() if name.startswith("h200")])
def test_a_prompt_beside_decodes_makes_no_step_shorter_in_a_profile_that_is_shipped(name: str) -> None:
    from disagg.experiments.profile_file import SHIPPED

    profile = load_profile(SHIPPED / f"{name}.json")
    mixed = [engine for engine in profile.engines if engine.role == "mixed"]
    assert mixed
    for engine in mixed:
        cost = measured_cost(profile, engine, engine.max_batch_size)
        for batch in range(1, engine.measured.mixed_decodes):
            for context in (128, 1024):
                alone = cost.step_time(StepFeatures(batch, batch * context))
                assert cost.step_time(StepFeatures(batch, batch * context, ((0, 16, True),))) > alone, (
                    engine.title,
                    batch,
                )


def test_another_gpu_than_the_profile_was_measured_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from disagg.experiments import device_names

    for_ = msgspec.structs.replace(a_profile().measured_for, device_type="cuda", device_name="NVIDIA H200")
    profile = a_profile(measured_for=for_)
    monkeypatch.setattr(device_names, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    with pytest.raises(ConfigError, match="was measured on NVIDIA H200, and here is NVIDIA H100 80GB HBM3"):
        device_names.check_device_name(profile)
    monkeypatch.setattr(device_names, "device_name", lambda _: "NVIDIA H200")
    device_names.check_device_name(profile)
    device_names.check_device_name(a_profile())


@pytest.mark.parametrize(("binding", "graphs"), [("at_context_start", False), ("at_context_done", True)])
def test_prompts_whose_layers_are_sent_early_are_simulated_kernel_by_kernel(binding: str, graphs: bool) -> None:
    from disagg.experiments.run_simulation import costs_of

    file = Path(__file__).parent.parent / "benchmarks" / "h200" / "layerwise.yaml"
    sets = ["cluster.profile=h200-llama-3.1-8b", f"cluster.cache_transceiver.generation_binding={binding}"]
    loaded = load_experiment(file, sets)
    context, generation = (costs_of(loaded.points[0].experiment)[i] for i in (1, 2))
    assert isinstance(context, MeasuredCost)
    assert loaded.points[0].experiment.cluster.cache_transceiver.layerwise  # type: ignore[union-attr]
    assert context.chunk_graphs is graphs
    prompt = StepFeatures(0, 0, ((0, 100, True),))
    assert (context.step_time(prompt) >= context.launch_floor) is not graphs
    assert isinstance(generation, MeasuredCost)
    assert not generation.chunk_graphs  # it records none, whatever its siblings do


@pytest.mark.parametrize("name", ["h200-llama-3.1-8b", "h200-qwen2.5-7b"])
def test_a_shipped_profile_is_what_its_shipped_samples_give(name: str, tmp_path: Path) -> None:
    """But for launch floors, which no sample shows, and executors without samples, which stay as they are."""
    path = profile_path(name, tmp_path)
    again = refit_profile(path, tmp_path / "again.json")
    assert msgspec.structs.replace(again, name=name) == load_profile(path)
    assert diff_profiles(load_profile(tmp_path / "again.json"), load_profile(path))["mean_step_time"] == 0.0


def test_a_profile_without_samples_cannot_be_fitted_anew(tmp_path: Path) -> None:
    save_profile(a_profile(), tmp_path / "bare.json")
    with pytest.raises(ConfigError, match=r"bare\.samples: holds no samples of steps"):
        refit_profile(tmp_path / "bare.json", tmp_path / "again.json")


def test_samples_that_lack_a_column_or_are_no_table_are_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    save_profile(a_profile(), tmp_path / "damaged.json")
    write_samples(Samples(), tmp_path / "damaged.samples")
    steps = tmp_path / "damaged.samples" / "steps.parquet"
    pq.write_table(pq.read_table(steps).drop_columns(["num_left", "sends_early"]), steps)
    with pytest.raises(ConfigError, match=r"damaged\.samples/steps\.parquet: has no column num_left$"):
        refit_profile(tmp_path / "damaged.json", tmp_path / "again.json")
    steps.write_bytes(b"steps")
    with pytest.raises(ConfigError, match=r"damaged\.samples/steps\.parquet: cannot be read: "):
        refit_profile(tmp_path / "damaged.json", tmp_path / "again.json")
