"""The engine's rows inside a run, and its idle time: what is read out of run directories, on a real cluster of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disagg.experiments import bench_idle
from disagg.experiments.bench_idle import decode_step_times, decoding_stretches, idle_rows, overhead_rows
from disagg.experiments.bench_in_run import (
    DECODE_FILE,
    PREFILL_FILE,
    decode_name,
    decode_steps,
    prefill_name,
    prefill_steps,
    with_in_run_rows,
)
from disagg.experiments.cli_run import run_file
from disagg.experiments.errors import ExperimentError
from disagg.experiments.event_files import encode_step_ends
from disagg.experiments.experiment_file import load_experiment
from disagg.runtime.bench_rows import BenchRow
from disagg.runtime.kernel_intervals import AT_PLAN
from disagg.runtime.kernel_profile import VARIABLE, summary
from tests.profiled_steps import SERVING

SMALL = [
    "model.id=tiny-llama",
    "device=cpu",
    "cluster.profile=spec:cpu-2core",
    "cluster.mixed_servers.kv_cache={tokens_per_block: 4, max_tokens: 8192}",
    "cluster.mixed_servers.scheduler.max_batch_size=16",
]
DECODES = [
    *SMALL,
    "workload.dataset={type: synthetic, isl: 40, osl: 16}",
    "workload.max_tokens=16",
    "workload.phases=[{name: one, type: concurrency, concurrency: 1, requests: 2},"
    "{name: four, type: concurrency, concurrency: 4, requests: 12}]",
]
PREFILLS = [
    *SMALL,
    "cluster.mixed_servers.scheduler.max_num_tokens=256",
    "workload.dataset.isl={type: empirical, values: [32, 256], weights: [0.92, 0.08]}",
    "workload.phases.0.requests=60",
]


def run(file: Path, overrides: list[str], folder: Path) -> Path:
    assert run_file(file, overrides=overrides, backend="hardware", output=folder, timeout_s=60) == 0
    return folder


@pytest.mark.mpi
def test_steps_of_exactly_one_batch_size_and_context_are_found_in_a_run(tmp_path: Path) -> None:
    decodes = run(DECODE_FILE, DECODES, tmp_path / "decode")
    for batch, at_least in ((1, 20), (4, 20)):
        steps = decode_steps(decodes, batch, 48, slack=8)
        assert len(steps) >= at_least
        assert all(0 < seconds < 5 for seconds in steps)
    assert len(decode_steps(decodes, 4, 48, slack=2)) < len(decode_steps(decodes, 4, 48, slack=8))
    assert decode_steps(decodes, 4, 400, slack=8) == []
    assert decode_steps(decodes, 3000, 48) == []
    times = decode_step_times(decodes)
    assert len(times[(1, 4)]) >= 20
    assert decode_step_times(decodes, (-2.0, -1.0)) == {}
    assert overhead_rows(decodes, decodes, [])[0].ratio == pytest.approx(1.0)


@pytest.mark.mpi
def test_steps_of_nothing_but_whole_prompts_are_found_in_a_run(tmp_path: Path) -> None:
    prefills = run(PREFILL_FILE, PREFILLS, tmp_path / "prefill")
    assert len(prefill_steps(prefills, 8, 32)) >= 1
    assert len(prefill_steps(prefills, 1, 256)) >= 1
    assert prefill_steps(prefills, 2, 256) == []


@pytest.mark.parametrize("file", [DECODE_FILE, PREFILL_FILE])
def test_the_files_of_the_rows_are_valid_as_they_stand(file: Path) -> None:
    assert load_experiment(file, [], backend="hardware").warnings == ()


def test_a_row_is_followed_by_what_came_out_in_a_run_beside_the_same_floor() -> None:
    rows = [
        BenchRow("device copy", 4.2, unit="TB/s"),
        BenchRow(decode_name(64, 1024), 7.0, 6.4, 1.094, 1.1, True, "ms"),
        BenchRow(prefill_name(8, 1024), 190.0, 178.0, 0.937, 0.88, True, "ms"),
        BenchRow(decode_name(256, 1024), 15.0, 14.0, 1.07, 1.08, True, "ms"),
    ]
    steps = {decode_name(64, 1024): [0.008, 0.0072, 0.0071], prefill_name(8, 1024): [0.2], decode_name(256, 1024): []}
    found = with_in_run_rows(rows, steps)
    assert [row.name.endswith("in a run") for row in found] == [False, False, True, False, True, False]
    decode, prefill = found[2], found[4]
    assert (decode.measured, decode.ceiling, decode.met) == (pytest.approx(7.2), 6.4, False)
    assert decode.ratio == pytest.approx(7.2 / 6.4)
    assert (prefill.ratio, prefill.met) == (pytest.approx(0.89), True)
    both = [BenchRow(f"{decode_name(64, 1024)}, tp 2", 5.0, 4.0, 1.25, 1.1, False, "ms")]
    assert with_in_run_rows(both, steps, tp=2)[1].name == "decode step, batch 64, context 1024, tp 2, in a run"


# ---- idle time ------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, stage: str = "generation") -> Path:
    """A run of one executor: a step ends at each of 1 to 4 ms, one visit decodes from 1 to 3 ms."""
    stays = [
        {"executor": 2, "stage": stage, "first_step": 1, "started_s": 0.0005, "ended_s": 0.003},
        {"executor": 2, "stage": stage, "first_step": None, "started_s": None, "ended_s": 0.009},
        {"executor": 1, "stage": "context", "first_step": 1, "started_s": 0.0, "ended_s": 0.009},
    ]
    pq.write_table(pa.Table.from_pylist(stays), tmp_path / "stays.parquet")
    epochs = [{"executor": 2, "epoch": 1, "first_step": 1, "num_steps": 4, "num_decodes": 1, "num_chunks": 0}]
    pq.write_table(pa.Table.from_pylist(epochs), tmp_path / "steps.parquet")
    ends = {(2, 1): [1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000]}
    (tmp_path / "events.step-ends.bin").write_bytes(encode_step_ends(ends))
    ranks = [{"rank": 1, "executor": 1, "role": "context"}, {"rank": 2, "executor": 2, "role": stage}]
    (tmp_path / "manifest.json").write_text(json.dumps({"ranks": ranks}))
    return tmp_path


def profile_of(rank: int, **more: Any) -> dict[str, Any]:
    """A window that began 500 µs after the run's clock."""
    window = {"rank": rank, "window_us": 174.0, "began_monotonic_ns": 9_000_000, "origin_ns": 8_500_000}
    return {**window, **summary(SERVING, (0.0, 174.0)), "sampled_decoding": [(0.0, 174.0)], **more}


def test_a_generation_phase_decodes_from_its_kv_on_and_a_whole_request_from_its_first_token(tmp_path: Path) -> None:
    assert decoding_stretches(folder_of(tmp_path), 2, profile_of(2)) == [pytest.approx((0.0, 2500.0))]
    assert decoding_stretches(folder_of(tmp_path, "mixed"), 2, profile_of(2)) == [pytest.approx((500.0, 2500.0))]


def test_the_idle_share_is_of_the_time_in_which_something_was_to_be_decoded(tmp_path: Path) -> None:
    rows = idle_rows([profile_of(1), profile_of(2)], folder_of(tmp_path))
    assert rows[0].name == "time without a kernel while decoding, generation executor 2, rank 2"
    assert (rows[0].ratio, rows[0].goal, rows[0].met) == (pytest.approx(114 / 174), 0.03, False)
    assert "tables of the run" in rows[0].note
    by_name = {row.name.strip(): row for row in rows}
    assert by_name[f"gaps of 50 µs and more {AT_PLAN}"].measured == pytest.approx(100 / 174)
    assert by_name["gaps under 5 µs"].measured == pytest.approx(6 / 174)
    assert by_name["_argmax_merge → gemm"].note == f"1 gaps of 100 µs {AT_PLAN}"
    sampled = idle_rows([profile_of(2, origin_ns=None, sampled_decoding=[(0.0, 62.0)])], folder_of(tmp_path))
    assert sampled[0].ratio == pytest.approx(24 / 62)
    assert "samples" in sampled[0].note


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"error": "the run ended before the window began"}, "the run ended before"),
        ({"origin_ns": None, "sampled_decoding": []}, "nothing was decoded"),
    ],
)
def test_a_window_that_saw_nothing_is_an_error_that_says_what_to_change(
    tmp_path: Path, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ExperimentError, match=f"{told}.*--after"):
        idle_rows([profile_of(2, **more)], folder_of(tmp_path))


def test_the_profilers_cost_is_taken_from_steps_of_the_same_batch_size_within_the_window(tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    for folder in (plain, profiled):
        folder.mkdir()
        folder_of(folder)
    slower = {(2, 1): [1_000_000_000, 2_100_000_000, 3_200_000_000, 9_200_000_000]}
    (profiled / "events.step-ends.bin").write_bytes(encode_step_ends(slower))
    window = profile_of(2, window_us=4000.0)  # from 0.5 to 4.5 ms: the last step is not in it
    row = overhead_rows(plain, profiled, [window])[0]
    assert (row.measured, row.ceiling, row.ratio) == (pytest.approx(1.1), pytest.approx(1.0), pytest.approx(1.1))


def test_the_same_load_runs_without_and_with_the_profiler_and_gives_rows_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def run_file(file: Path, overrides: list[str], output: Path, **options: Any) -> int:
        wanted = os.environ.get(VARIABLE)
        asked.append((output.name, wanted))
        assert overrides == ["seed=3", "sweep={}", "repeats=1"]
        output.mkdir(parents=True)
        folder_of(output)
        if wanted is not None:
            profiles = Path(wanted.rsplit(",", 2)[0])
            profiles.mkdir()
            (profiles / "rank-2.json").write_text(json.dumps(profile_of(2, window_us=4000.0)))
        return 0

    monkeypatch.setattr(bench_idle, "run_file", run_file)
    file = Path(__file__).resolve().parent.parent / "benchmarks" / "h200" / "idle.yaml"
    rows = bench_idle.measure_idle(file, ["seed=3"], 4.0, 5.0, tmp_path, 60.0)
    assert asked == [("plain", None), ("profiled", f"{tmp_path}/profiles,4,5")]
    assert VARIABLE not in os.environ
    assert rows[0].goal == 0.03
    assert rows[-1].name.startswith("decode step under the profiler")
