"""A maker of small run directories, which the other tests of the reports use, and tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
import yaml

from disagg.core.tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow
from disagg.reports.runs import TABLES, ReportError, Run, columns_of, find_runs

MS = 10**9  # picoseconds
NUM_BLOCKS = 4096


def frame_of(rows: Sequence[Any], table: str) -> pd.DataFrame:
    """Rows of core/tables.py as they are stored: picoseconds become float seconds."""
    values = {name: [] for name in columns_of(table)}
    for row in rows:
        for field in msgspec.structs.fields(TABLES[table]):
            value = getattr(row, field.name)
            if field.name.endswith("_ps"):
                values[field.name.removesuffix("_ps") + "_s"].append(None if value is None else value / 1e12)
            else:
                values[field.name].append(list(value) if isinstance(value, tuple) else value)
    frame = pd.DataFrame(values)
    for name in frame.columns:
        if name.endswith("_s"):
            frame[name] = frame[name].astype("float64")
    return frame


def request(request_id: int = 0, **changes: Any) -> RequestRow:
    """A disaggregated request of 5 output tokens; instants in milliseconds for easy sums, changed by keyword."""
    row = RequestRow(
        request_id, "profiling", "", None, 100, 512, 5, "stop", None, 1, 1, 3,
        arrival_ps=0, dispatch_ps=1 * MS, context_start_ps=11 * MS, first_token_ps=51 * MS,
        transfer_start_ps=56 * MS, kv_usable_ps=66 * MS, end_ps=146 * MS,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def config_of(policy: str = "round_robin", rate: float = 8.0, backend: str = "simulation", **changes: Any) -> dict:
    config: dict[str, Any] = {
        "schema_version": 1,
        "name": "llama8b-2c2g",
        "seed": 42,
        "model": {"id": "llama-3.1-8b", "dtype": "bfloat16"},
        "backend": backend,
        "cluster": {
            "profile": "spec:h200",
            "context_servers": {"num_instances": 2, "tensor_parallel_size": 1},
            "generation_servers": {"num_instances": 2, "tensor_parallel_size": 1},
            "mixed_servers": None,
            "instances": None,
        },
        "policy": {
            "context_router": {"name": policy},
            "generation_router": {"name": "least_kv"},
            "admission": {"name": "accept_all"},
        },
        "workload": {
            "dataset": {"type": "synthetic", "isl": {"type": "normal", "mean": 1024, "stddev": 128}, "osl": 32},
            "max_tokens": 512,
            "phases": [
                {"name": "warmup", "type": "concurrency", "requests": 4, "exclude_from_results": True},
                {"name": "profiling", "type": "poisson", "rate": rate, "requests": 100, "exclude_from_results": False},
            ],
        },
        "slo": {"ttft_ms": 400.0, "tpot_ms": 12.0, "e2e_ms": None, "attainment": 0.99},
        "report": {"percentiles": [50, 90, 95, 99]},
    }
    return config | changes


def write_run(
    directory: Path,
    config: dict | None = None,
    manifest: dict | None = None,
    **tables: Sequence[Any] | pd.DataFrame,
) -> Path:
    """A run directory with the given rows; a table that is not given is empty."""
    directory.mkdir(parents=True)
    config = config_of() if config is None else config
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name in TABLES:
        rows = tables.get(name, ())
        frame = rows if isinstance(rows, pd.DataFrame) else frame_of(rows, name)
        frame.to_parquet(directory / f"{name}.parquet", compression="zstd", index=False)
    whole = {"backend": config["backend"], "seed": config["seed"], "repeat": 0, "configuration_hash": "c0ffee"}
    (directory / "manifest.json").write_text(json.dumps(whole | (manifest or {})))
    return directory


def serve(
    policy: str = "round_robin",
    *,
    num_requests: int = 100,
    rate: float = 8.0,
    seed: int = 42,
    speed: float = 1.0,
    jitter: float = 0.0,
    osl: int = 32,
) -> dict[str, list[Any]]:
    """Rows of a little cluster: executors 1 and 2 prefill one prompt at a time, 3 and 4 decode in batches.

    `round_robin` alternates, any other policy takes the executor that is free first. Arrivals and lengths depend on
    the seed alone, so that policies see the same requests.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1000.0 / rate, num_requests)
    prompts = np.clip(rng.lognormal(6.6, 1.0, num_requests), 16, 16000).astype(int)
    outputs = 1 + rng.poisson(osl - 1, num_requests)
    noise = np.random.default_rng(seed + 1).normal(0.0, jitter, num_requests)
    arrivals = (np.cumsum(gaps) * MS).astype(np.int64)
    rows: dict[str, list[Any]] = {name: [] for name in TABLES}
    free = {1: 0, 2: 0}
    waiting: dict[int, list[tuple[int, int, dict[str, Any]]]] = {3: [], 4: []}
    count = {1: 0, 2: 0, 3: 0, 4: 0}

    def step(executor: int, steps: int, start: int, end: int, decodes: int, chunk: int, used: int, held: int) -> int:
        first = count[executor] + 1
        count[executor] += steps
        rows["steps"].append(
            StepRow(executor, len(rows["steps"]), first, steps, decodes, used * 32, int(chunk > 0), chunk, 0, start,
                    end, NUM_BLOCKS - used - held, 0, used, held, 0)
        )  # fmt: skip
        return first

    for i, (arrival, prompt, output) in enumerate(zip(arrivals.tolist(), prompts.tolist(), outputs.tolist())):
        context = 1 + i % 2 if policy == "round_robin" else min(free, key=lambda e: (free[e], e))
        generation = 3 + i % 2
        dispatch = arrival
        start = max(dispatch + MS // 10, free[context])
        duration = int((8 * MS + prompt * 0.15 * MS) * speed * max(0.2, 1 + noise[i]))
        free[context] = start + duration
        held = prompt // 32 if i % 3 else 0
        first = step(context, 1, start, start + duration, 0, prompt, prompt // 32 + 1, held)
        rows["stays"].append(
            StayRow(context, 2 * i, "context", 1, first, first, 0, dispatch + MS // 10, start, start + duration, i)
        )
        ready = start + duration + MS // 10
        versions = (i, i)
        rows["decisions"].append(DecisionRow(i, "context", "route", context, None, None, arrival, versions, 5 * MS))
        known = {"request": i, "prompt": prompt, "output": output, "arrival": arrival, "dispatch": dispatch,
                 "context": context, "start": start, "first": ready}  # fmt: skip
        if output == 1:
            rows["requests"].append(
                RequestRow(i, "warmup" if i < 4 else "profiling", "", None, prompt, 512, 1, "stop", None, 1, context,
                           None, arrival, dispatch, start, ready, None, None, ready)
            )  # fmt: skip
            continue
        asked = ready + MS // 5
        usable = asked + int(prompt * 0.002 * MS) + MS
        rows["transfers"].append(
            TransferRow(2 * i + 1, context, generation, prompt, prompt // 32 + 1, asked, usable, True, None, i)
        )
        waiting[generation].append((usable, asked, known))
    for executor, queue in waiting.items():
        queue.sort(key=lambda entry: entry[0])
        now, batch = 0, []
        while queue or batch:
            if not batch:
                now = max(now, queue[0][0])
            while queue and queue[0][0] <= now:
                usable, asked, known = queue.pop(0)
                batch.append([known["output"] - 1, usable, asked, known, now, count[executor] + 1])
            length = int((6 * MS + 0.2 * MS * len(batch)) * speed)
            steps = min(entry[0] for entry in batch)
            if queue:
                steps = max(1, min(steps, -(-(queue[0][0] - now) // length)))
            used = sum(entry[3]["prompt"] // 32 + 2 for entry in batch)
            step(executor, steps, now, now + steps * length, len(batch), 0, min(used, NUM_BLOCKS), 0)
            now += steps * length
            for entry in batch:
                entry[0] -= steps
            for _, usable, asked, known, joined, first in [entry for entry in batch if entry[0] == 0]:
                i = known["request"]
                rows["stays"].append(
                    StayRow(executor, 2 * i + 1, "generation", known["output"] - 1, first, count[executor], 0,
                            asked - MS // 10, joined, now, i)
                )  # fmt: skip
                rows["requests"].append(
                    RequestRow(i, "warmup" if i < 4 else "profiling", "", None, known["prompt"], 512, known["output"],
                               "stop", None, 1, known["context"], executor, known["arrival"], known["dispatch"],
                               known["start"], known["first"], asked, usable, now + MS // 10)
                )  # fmt: skip
            batch = [entry for entry in batch if entry[0] > 0]
    return rows


# ---- reading --------------------------------------------------------------------------------------------------------


def test_instants_are_columns_in_seconds() -> None:
    assert "arrival_s" in columns_of("requests")
    assert not any(name.endswith("_ps") for table in TABLES for name in columns_of(table))


def test_runs_are_found_below_a_directory_and_only_once(tmp_path: Path) -> None:
    for point in ("a", "b"):
        for repeat in range(2):
            write_run(tmp_path / point / str(repeat), requests=[request()])
    runs = find_runs([tmp_path, tmp_path / "a"])
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs] == ["a/0", "a/1", "b/0", "b/1"]


def test_a_run_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "done", requests=[request()])
    write_run(tmp_path / ".next.partial-12", requests=[request()])
    assert [run.path.name for run in find_runs([tmp_path])] == ["done"]


def test_a_directory_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no run found.*manifest\.json") as caught:
        find_runs([tmp_path])
    assert str(tmp_path) in str(caught.value)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])


def test_a_truncated_table_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", requests=[request()])
    file = run / "requests.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ReportError, match=r"requests\.parquet.*truncated"):
        _ = Run(run).requests


def test_a_missing_requests_table_is_an_error_but_missing_transfers_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", requests=[request()])
    (run / "transfers.parquet").unlink()
    assert len(Run(run).transfers) == 0
    (run / "requests.parquet").unlink()
    with pytest.raises(ReportError, match=r"requests\.parquet.*not a complete run"):
        _ = Run(run).requests


def test_a_table_without_a_column_names_it(tmp_path: Path) -> None:
    frame = frame_of([request()], "requests").drop(columns=["first_token_s"])
    run = write_run(tmp_path / "run", requests=frame)
    with pytest.raises(ReportError, match="lacks the columns first_token_s"):
        _ = Run(run).requests


def test_some_columns_are_read_without_the_others_and_not_kept(tmp_path: Path) -> None:
    rows = [request(number, num_cached_tokens=number) for number in range(3)]
    run = Run(write_run(tmp_path / "run", requests=rows))
    found = run.columns("requests", ["end_s", "num_cached_tokens", "excluded"])
    assert set(found.columns) == {"end_s", "num_cached_tokens"}
    assert found["num_cached_tokens"].tolist() == [0, 1, 2]
    assert "requests" not in vars(run)
    frame_of(rows, "requests").drop(columns=["num_cached_tokens", "error"]).to_parquet(run.path / "requests.parquet")
    assert run.columns("requests", ["num_cached_tokens"])["num_cached_tokens"].tolist() == [0, 0, 0]  # an older run
    with pytest.raises(ReportError, match="lacks the columns error"):
        run.columns("requests", ["error"])
    (run.path / "steps.parquet").unlink()
    assert run.columns("steps", ["executor", "start_s"]).columns.tolist() == ["executor", "start_s"]


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", requests=[request()])
    (run / "manifest.json").write_text(text)
    with pytest.raises(ReportError, match=r"manifest\.json"):
        _ = Run(run).backend


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object/apply:os.getcwd []"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", requests=[request()])
    (run / "config.yaml").write_text(text)
    with pytest.raises(ReportError, match=r"config\.yaml"):
        _ = Run(run).config


def test_devices_are_counted_over_groups_and_instances(tmp_path: Path) -> None:
    config = config_of()
    config["cluster"]["context_servers"]["tensor_parallel_size"] = 2
    config["cluster"]["instances"] = [{"role": "mixed", "tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
    assert Run(write_run(tmp_path / "run", config)).num_devices == 2 * 2 + 2 + 4


def test_roles_follow_from_the_stages_an_executor_served(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", **serve(num_requests=20)))
    assert run.roles == {1: "context", 2: "context", 3: "generation", 4: "generation"}


def test_kv_bytes_of_a_preset_model(tmp_path: Path) -> None:
    # K and V, 32 layers, 8 heads of 128, two bytes each
    assert Run(write_run(tmp_path / "run")).kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
