"""`disagg bench cluster`: its options, its refusals, and its table, in simulation and on runs made by hand."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from typer.main import get_command

from disagg.core.tables import DecisionRow, StayRow, StepRow, TransferRow
from disagg.experiments import cli
from disagg.experiments.bench_options import BenchOptions
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.planned import request_of
from disagg.experiments.workload import Workload
from disagg.reports.bench_table import BENCH_METRICS, STATISTICS, bench_table, original_row
from disagg.reports.runs import Run
from tests.test_reports_runs import MS, config_of, request, write_run

DOCS = Path(__file__).parents[1] / "docs" / "bench-cluster.md"
TEXT = """\
schema_version: 1
name: bench
seed: 42
model: {id: tiny-llama}
device: cpu
cluster:
  profile: "spec:cpu-2core"
  context_servers: {num_instances: 1, kv_cache: {max_tokens: 8192}}
  generation_servers: {num_instances: 2, kv_cache: {max_tokens: 8192}}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {mean: 100, stddev: 30}, osl: 10}
  max_tokens: 16
  phases:
    - {name: warmup, type: concurrency, concurrency: 2, requests: 5, exclude_from_results: true}
    - {name: profiling, type: poisson, rate: 8, requests: 40}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(TEXT)
    return path


def expanded(file: Path, **options: Any) -> dict[str, Any]:
    return load_experiment(file, edit=BenchOptions(**options).apply).experiment.expanded()


# ---- options --------------------------------------------------------------------------------------------------------


def test_a_request_rate_replaces_the_measured_load_and_leaves_the_warm_up_phase(file: Path) -> None:
    warmup, measured = expanded(file, request_rate=3.5)["workload"]["phases"]
    assert (warmup["type"], warmup["concurrency"], warmup["requests"]) == ("concurrency", 2, 5)
    assert (measured["type"], measured["rate"], measured["requests"]) == ("poisson", 3.5, 40)


def test_constant_delays_and_concurrency_replace_poisson(file: Path) -> None:
    assert expanded(file, request_rate=3.0, poisson_delays=False)["workload"]["phases"][1]["type"] == "constant"
    assert expanded(file, poisson_delays=False)["workload"]["phases"][1]["rate"] == 8
    closed = expanded(file, concurrency=7)["workload"]["phases"][1]
    assert (closed["type"], closed["concurrency"], "rate" in closed) == ("concurrency", 7, False)


def test_samples_prompts_streaming_and_the_end_token_are_bounded_as_asked(file: Path) -> None:
    config = load_experiment(
        file, edit=BenchOptions(max_samples=9, max_prompt_length=60, streaming=False, eos_id=5).apply
    ).experiment
    planned = list(Workload(config, vocab_size=100))
    measured = [p for p in planned if not p.excluded]
    assert len(measured) == 9
    assert max(p.num_prompt_tokens for p in planned) == 60
    assert all(len(p.input_token_ids or ()) == p.num_prompt_tokens for p in planned)
    assert min(p.num_prompt_tokens for p in planned) < 60  # shorter ones stay as they are
    told = request_of(measured[0], config)
    assert (told.streaming, told.end_id) == (False, 5)


def test_one_value_goes_to_every_instance(file: Path) -> None:
    cluster = expanded(file, max_batch_size="3", scheduler_policy="max_utilization", chunked_context="false")["cluster"]
    for group in ("context_servers", "generation_servers"):
        scheduler = cluster[group]["scheduler"]
        assert (scheduler["max_batch_size"], scheduler["capacity"]) == (3, "max_utilization")
        assert scheduler["chunked_context"] is False


def test_values_of_their_own_make_instances_in_the_original_s_order(file: Path) -> None:
    cluster = expanded(file, max_batch_size="3,4,5", max_num_tokens="512", kv_max_tokens="1024,2048,4096")["cluster"]
    assert [i["role"] for i in cluster["instances"]] == ["context", "generation", "generation"]
    assert [i["scheduler"]["max_batch_size"] for i in cluster["instances"]] == [3, 4, 5]
    assert {i["scheduler"]["max_num_tokens"] for i in cluster["instances"]} == {512}
    assert [i["kv_cache"]["max_tokens"] for i in cluster["instances"]] == [1024, 2048, 4096]


def test_a_kv_fraction_takes_the_place_of_a_number_of_tokens(file: Path) -> None:
    cache = expanded(file, kv_fraction="0.5")["cluster"]["generation_servers"]["kv_cache"]
    assert (cache["free_gpu_memory_fraction"], cache["max_tokens"]) == (0.5, None)


def test_a_trace_takes_the_place_of_the_dataset(file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:15:{46 + n}.6805900,{50 + n},4\n" for n in range(12))
    )
    config = load_experiment(file, edit=BenchOptions(dataset=trace, max_samples=7).apply).experiment
    assert [p.num_prompt_tokens for p in Workload(config)] == list(range(50, 62))


def samples(path: Path, *token_ids: list[int]) -> Path:
    path.write_text(json.dumps({"samples": [{"input_ids": ids, "output_len": 3, "task_id": -1} for ids in token_ids]}))
    return path


def test_the_original_s_own_data_set_gives_the_prompts_themselves(file: Path, tmp_path: Path) -> None:
    data = samples(tmp_path / "data.json", *([n, 7, 9, 4][: 2 + n % 3] for n in range(12)))
    options = BenchOptions(dataset=data, max_samples=7, max_prompt_length=3)
    config = load_experiment(file, edit=options.apply).experiment
    planned = list(Workload(config, vocab_size=100))
    assert [p.input_token_ids for p in planned] == [tuple([n, 7, 9][: min(2 + n % 3, 3)]) for n in range(12)]
    assert {p.num_output_tokens for p in planned} == {3}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "missing required field `samples`"),
        ("[", "data.json: "),
        ('{"samples": []}', "holds no rows"),
        ('{"samples": [{"input_ids": [], "output_len": 3}]}', "data.json:1: input length 0"),
        ('{"samples": [{"input_ids": [1], "output_len": 0}]}', "data.json:1: output length 0"),
        ('{"samples": [{"input_ids": [-1], "output_len": 1}]}', "samples[0].input_ids[0]"),
        ('{"samples": [{"input_ids": [1], "output_len": 1}]}', "wants 5 requests"),
    ],
)
def test_a_bad_data_set_is_refused_by_name(
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    text: str,
    told: str,
) -> None:
    data = tmp_path / "data.json"
    data.write_text(text)
    assert disagg("bench", "cluster", file, "--dataset", data, "--backend", "simulation") == 2
    printed = capsys.readouterr().err
    assert told in printed
    assert "Traceback" not in printed


def test_tokens_that_the_model_does_not_have_are_refused(file: Path, tmp_path: Path) -> None:
    data = samples(tmp_path / "data.json", *([100] for _ in range(12)))
    config = load_experiment(file, edit=BenchOptions(dataset=data, max_samples=7).apply).experiment
    with pytest.raises(ConfigError, match="token id 100; allowed with this model: 0 to 99"):
        list(Workload(config, vocab_size=100))


def test_a_data_set_without_times_cannot_be_sent_at_its_times(file: Path, tmp_path: Path) -> None:
    data = samples(tmp_path / "data.json", *([1] for _ in range(50)))
    override = 'workload.phases=[{"name": "profiling", "type": "trace", "requests": 5}]'
    with pytest.raises(ConfigError, match="a trace's arrivals need a trace"):
        load_experiment(file, [override], edit=BenchOptions(dataset=data).apply)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("--request-rate 3 --concurrency 4", 2, "--request-rate and --concurrency exclude each other"),
        ("--request-rate 0", 2, "--request-rate 0: must be more than 0"),
        ("--concurrency 0", 2, "--concurrency 0: must be at least 1"),
        ("--concurrency 2 --no-poisson-delays", 2, "--poisson-delays concerns a request rate"),
        ("--max-samples 0", 2, "--max-samples 0"),
        ("--max-prompt-length -3", 2, "--max-prompt-length -3"),
        ("--eos-id 9999999999", 2, "--eos-id 9999999999: sampling.end_id"),
        ("--max-batch-size 0", 2, "--max-batch-size 0: cluster.context_servers.scheduler.max_batch_size"),
        ("--max-num-tokens 1,2", 2, "--max-num-tokens 1,2: 2 values for 3 instances"),
        ("--kv-fraction 1.5", 2, "--kv-fraction 1.5: cluster"),
        ("--chunked-context perhaps", 2, "must be true or false"),
        ("--scheduler-policy static_batch", 2, "--scheduler-policy static_batch"),
        ("--dataset nowhere.csv", 2, "--dataset nowhere.csv"),
        ("--dataset-type azure", 2, "--dataset-type needs --dataset"),
        ("--warm-up -1", 2, "--warm-up -1"),
        ("--timeout 0", 2, "--timeout 0"),
        ("--output-csv /nonexistent/folder/x.csv", 2, "--output-csv /nonexistent/folder/x.csv"),
        ("--host a --hostfile b", 2, "--host and --hostfile exclude each other"),
        ("--host nowhere.invalid:3", 2, "nowhere.invalid"),
        ("--host localhost:x", 2, "--host localhost:x: slots"),
        ("--host localhost:1", 3, "need 3 ranks, and the hosts have 1 slots"),
        ("--hostfile nowhere", 2, "--hostfile nowhere: cannot be read"),
        ("--launch-agent sh", 2, "--launch-agent needs --host or --hostfile"),
        ("--host nowhere.invalid:3 --launch-agent /nonexistent/agent", 2, "--launch-agent /nonexistent/agent"),
        ("--backend simulation --host a", 2, "--backend simulation starts none"),
        ("--backend cloud", 2, "must be one of simulation, hardware"),
        ("--set cluster.nonsense=1", 2, "unknown key 'nonsense'"),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_starts(
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    told: str,
) -> None:
    output = tmp_path / "out"
    found = disagg("bench", "cluster", file, "--output", output, *arguments.split())
    printed = capsys.readouterr()
    if "nowhere.invalid:3" in arguments and found == 3:
        pytest.skip("there is no ssh here, which is told first")
    assert found == code
    assert told in printed.err
    assert "Traceback" not in printed.err
    assert not output.exists()


def test_results_that_are_there_are_left_alone_and_only_options_that_exist_are_named(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ("bench", "cluster", file, "--backend", "simulation", "--output", tmp_path / "out")
    assert disagg(*call) == 0
    assert disagg(*call) == 2
    printed = capsys.readouterr().err
    assert "is not empty; allowed: --overwrite, or another folder" in printed
    assert disagg(*call, "--overwrite") == 0


def test_a_benchmark_of_which_no_request_was_served_says_why(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    never = "cluster.cache_transceiver={backend: mpi, kv_transfer_timeout_ms: 0.001, on_failure: fail}"
    call = ("bench", "cluster", file, "--backend", "simulation", "--output", tmp_path / "out", "--set", never)
    assert disagg(*call) == 3
    assert "no request could be served; the first: the KV transfer took over 0 ms" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_this_machine_by_its_name_is_looked_at_before_anything_starts(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    gpu = ("--set", "device=cuda", "--set", "cluster.cache_transceiver.backend=auto")
    assert disagg("bench", "cluster", file, "--host", "localhost:3", "--output", tmp_path / "out", *gpu) == 3
    printed = capfd.readouterr()
    assert "device: cuda cannot be had" in printed.err
    assert "cannot start" not in printed.err  # no rank was there to say so
    assert "Traceback" not in printed.err


# ---- the table ------------------------------------------------------------------------------------------------------


def stay(request_id: int, first: int, last: int, tokens: int, stage: str = "generation") -> StayRow:
    return StayRow(3, 100 + request_id, stage, tokens, first, last, 0, 56 * MS, 66 * MS, 146 * MS, request_id)


def steps(first: int, count: int, start_ms: int, end_ms: int) -> StepRow:
    return StepRow(3, first, first, count, 1, 0, 0, 0, 0, start_ms * MS, end_ms * MS, 100, 0, 0, 0, 0)


def by_hand(tmp_path: Path, **config: Any) -> Run:
    """Two requests that complete, one that fails before its first token and one after it.

    A completed one: sent at 0, given to the orchestrator at 1, begins at 11, first token at 51, transfer from 56 to 66,
    four steps of 20 ms from 66 on; its last token is at rank 0 at 146. The second is the same, routed later, at 54.
    """
    failed = {"finish_reason": "error", "error": "lost", "end_ps": 100 * MS}
    rows = [
        request(0),
        request(1, arrival_ps=-10 * MS),
        request(2, first_token_ps=None, transfer_start_ps=None, kv_usable_ps=None, **failed),
        request(3, kv_usable_ps=None, **failed),
    ]
    decisions = [
        DecisionRow(0, "context", "route", 1, None, None, 1 * MS, (), None),
        DecisionRow(1, "generation", "hold", None, None, None, 52 * MS, (), None),
        DecisionRow(1, "generation", "route", 3, None, None, 54 * MS, (), None),
    ]
    transfers = [
        TransferRow(100, 1, 3, 100, 4, 56 * MS, 66 * MS, True, None, 0),
        TransferRow(103, 1, 3, 100, 4, 56 * MS, 90 * MS, False, "lost", 3),
    ]
    stays = [stay(0, 1, 4, 4), stay(1, 1, 4, 4)]
    path = write_run(
        tmp_path / "run",
        config=config_of(**config),
        requests=rows,
        decisions=decisions,
        transfers=transfers,
        stays=stays,
        steps=[steps(1, 4, 66, 146)],
    )
    return Run(path)


def test_every_metric_of_a_run_made_by_hand(tmp_path: Path) -> None:
    found = {line.metric.name: line for line in bench_table(by_hand(tmp_path))}
    values = {name: line.value for name, line in found.items() if not line.metric.is_distribution}
    assert values["samples"] == 2
    assert values["context_error_samples"] == 1
    assert values["generation_error_samples"] == 1
    assert values["total_latency"] == pytest.approx(156)  # −10 to 146
    assert values["sequence_throughput"] == pytest.approx(2 / 0.156)
    assert values["token_throughput"] == pytest.approx(10 / 0.156)
    intervals = [(146 - 51) / 4, (146 - 54) / 4]
    assert values["user_tokens_per_second"] == pytest.approx(sum(1000 / i for i in intervals) / 2)
    means = {name: line.statistics[0] for name, line in found.items() if line.metric.is_distribution}
    assert means["sequence_latency"] == pytest.approx((146 + 156) / 2)
    assert means["context_latency"] == pytest.approx((51 + 61 + 51) / 3)  # with the one that failed later
    assert means["generation_latency"] == pytest.approx((95 + 92) / 2)
    assert means["time_to_generation_first_token"] == pytest.approx(((86 - 51) + (86 - 54)) / 2)
    assert means["inter_token_latency"] == pytest.approx(sum(intervals) / 2)
    assert means["inter_token_latency_without_first"] == pytest.approx(20)
    assert means["context_queueing_latency"] == pytest.approx(10)
    assert means["generation_queueing_latency"] == pytest.approx(((56 - 51) + (56 - 54)) / 2)
    assert (found["kv_transfer_latency"].n, means["kv_transfer_latency"]) == (1, pytest.approx(10))
    assert means["kv_transfer_throughput"] == pytest.approx(8 * 100 * 131072 / 0.010 / 1e9)


def test_percentiles_are_observed_values_and_those_of_a_rate_count_from_the_top(tmp_path: Path) -> None:
    transfers = [TransferRow(n, 1, 3, 100, 4, 56 * MS, (56 + n) * MS, True, None, 0) for n in range(1, 11)]
    path = write_run(tmp_path / "run", requests=[request(0)], transfers=transfers)
    found = {line.metric.name: dict(zip(STATISTICS, line.statistics)) for line in bench_table(Run(path))}
    latency, rate = found["kv_transfer_latency"], found["kv_transfer_throughput"]
    assert [latency[name] for name in ("min", "p50", "p90", "p99", "max")] == pytest.approx([1, 5, 9, 10, 10])
    gigabits = 8 * 100 * 131072 / 1e9
    assert [rate[name] for name in ("max", "p90", "p99", "min")] == pytest.approx(
        [gigabits / 0.001, gigabits / 0.010, gigabits / 0.010, gigabits / 0.010]
    )


def test_without_streaming_or_transfer_times_their_metrics_are_left_out(tmp_path: Path) -> None:
    workload = {**config_of()["workload"], "streaming": False}
    run = by_hand(tmp_path, workload=workload)
    shown = {line.metric.name for line in bench_table(run, transfers=False)}
    assert {metric.name for metric in BENCH_METRICS if not metric.needs} == shown


def test_a_run_in_which_nothing_completed_still_has_a_table(tmp_path: Path) -> None:
    failed = request(
        0, finish_reason="error", error="x", first_token_ps=None, transfer_start_ps=None, kv_usable_ps=None
    )
    lines = bench_table(Run(write_run(tmp_path / "run", requests=[failed])))
    assert {line.metric.name: line.value for line in lines}["context_error_samples"] == 1
    assert all(set(line.statistics) == {None} for line in lines if line.metric.is_distribution)


def test_the_original_s_names_lead_its_csv(tmp_path: Path) -> None:
    row = original_row(bench_table(by_hand(tmp_path)))
    assert row["num_samples"] == 2
    assert row["total_latency(ms)"] == pytest.approx(156)
    assert row["avg_sequence_latency(ms)"] == pytest.approx(151)
    assert row["p99_exclude_first_iter_inter_token_latency(ms)"] == pytest.approx(20)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_simulated_benchmark_prints_and_writes_one_table(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output, original = tmp_path / "out", tmp_path / "original.csv"
    arguments = ["--backend", "simulation", "--output", output, "--max-samples", "20", "--output-csv", original]
    assert disagg("bench", "cluster", file, *arguments, "--iteration-stats", "--seed", "7") == 0
    printed = capsys.readouterr().out
    for metric in BENCH_METRICS:
        assert metric.name in printed
    assert "iteration statistics" in printed
    table = pd.read_parquet(output / "bench.parquet")
    assert list(table["metric"]) == [metric.name for metric in BENCH_METRICS]
    assert list(pd.read_csv(output / "bench.csv")["metric"]) == list(table["metric"])
    assert table.set_index("metric").loc["samples", "value"] == 20
    (row,) = csv.DictReader(original.open())
    assert float(row["num_samples"]) == 20
    assert (output / "report.html").is_file()
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 7
    summary = json.loads((output / "summary.json").read_text())
    latency = table.set_index("metric").loc["sequence_latency"]
    assert latency["avg"] == pytest.approx(summary["mean_e2e_latency_s"] * 1000)


def test_json_is_all_that_is_printed_and_a_sweep_has_a_table_each(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = 'sweep={"policy.router.name": [round_robin, least_tokens]}'
    output = tmp_path / "out"
    arguments = ["--backend", "simulation", "--output", output, "--set", sweep, "--concurrency", "4", "--json"]
    assert disagg("bench", "cluster", file, *arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert [list(run["values"].values()) for run in told["runs"]] == [["round_robin"], ["least_tokens"]]
    for run in told["runs"]:
        assert {metric["metric"] for metric in run["metrics"]} == {metric.name for metric in BENCH_METRICS}
        assert (Path(run["directory"]) / "bench.csv").is_file()


def test_every_option_of_the_documentation_exists_and_every_option_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    command = get_command(cli.app).commands["bench"].commands["cluster"]  # type: ignore[attr-defined]
    real = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    real = {option for option in real if option.startswith("--")}
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.partition("<!-- other programs -->")[0]))
    assert written - real == set()
    assert real - written - {"--help"} == set()


def test_every_metric_is_documented_with_the_original_s_name() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for metric in BENCH_METRICS:
        assert f"| `{metric.name}` | `{metric.original}` |" in text
