"""The table of `disagg bench cluster`: what TensorRT-LLM's disaggServerBenchmark reports, from a run directory.

One line a metric: its name, the original's, the unit, the formula. Times are in milliseconds, as the original's are.
Percentiles are nearest-rank, so every one of them was observed. Requests of warm-up phases count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .executors import by_executor, executor_summaries
from .gaps import STEP_TIMES, Epochs, visits
from .metrics import instants_ps, measured, window_s
from .runs import Run

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
STATISTICS: Final = ("avg", "max", "min", "p99", "p90", "p50")
COLUMNS: Final = ("metric", "original", "unit", "n", "value", *STATISTICS, "formula")
_PS_PER_MS: Final = 1e9
_MS: Final = 1000.0


class BenchMetric(Struct, frozen=True):
    """`original`: its name in disaggServerBenchmark, without avg_, max_, … A distribution has one value a request.

    `needs`: shown only if the run streams, or if KV transfer times are asked for; empty: always.
    """

    name: str
    original: str
    unit: str
    formula: str
    is_distribution: bool = True
    needs: str = ""
    higher_is_better: bool = False


BENCH_METRICS: Final[tuple[BenchMetric, ...]] = (
    BenchMetric("samples", "num_samples", "", "requests that completed", False),
    BenchMetric(
        "context_error_samples",
        "num_context_error_samples",
        "",
        "requests that failed, were rejected or cancelled before their first token",
        False,
    ),
    BenchMetric(
        "generation_error_samples",
        "num_gen_error_samples",
        "",
        "requests that failed or were cancelled after their first token",
        False,
    ),
    BenchMetric("total_latency", "total_latency", "ms", "last end − first intended send", False),
    BenchMetric("sequence_throughput", "seq_throughput", "seq/sec", "samples / total latency", False),
    BenchMetric(
        "token_throughput", "token_throughput", "token/sec", "output tokens of the samples / total latency", False
    ),
    BenchMetric(
        "user_tokens_per_second",
        "user_tokens_per_second",
        "tokens/sec/user",
        "mean over samples of 1 / inter-token latency (first interval included)",
        False,
        "streaming",
    ),
    BenchMetric("sequence_latency", "sequence_latency", "ms", "end (last token at rank 0) − intended send"),
    BenchMetric(
        "context_latency",
        "context_latency",
        "ms",
        "first token at rank 0 − intended send: waiting and prefill, no KV transfer; of all that reached a first token",
    ),
    BenchMetric(
        "generation_latency",
        "gen_latency",
        "ms",
        "end − start of the generation phase: the first token, or the phase's routing decision if that came later",
    ),
    BenchMetric(
        "time_to_generation_first_token",
        "time_to_gen_first_token",
        "ms",
        "second output token (the generation phase's own first) − start of the generation phase: KV transfer included",
        needs="streaming",
    ),
    BenchMetric(
        "inter_token_latency",
        "inter_token_latency",
        "ms",
        "generation latency / (output tokens − 1), of requests with at least 2",
        needs="streaming",
    ),
    BenchMetric(
        "inter_token_latency_without_first",
        "exclude_first_iter_inter_token_latency",
        "ms",
        "(end − second output token) / (output tokens − 2), of requests with at least 3",
        needs="streaming",
    ),
    BenchMetric(
        "context_queueing_latency",
        "context_req_queueing_latency",
        "ms",
        "first step that computes the prompt begins − the orchestrator was given the request",
    ),
    BenchMetric(
        "generation_queueing_latency",
        "gen_req_queueing_latency",
        "ms",
        "the generation executor asks for the KV − start of the generation phase",
    ),
    BenchMetric(
        "kv_transfer_latency",
        "gen_req_kv_cache_transfer_latency",
        "ms",
        "every rank of the reader has the KV − the reader asks for it; of successful transfers",
        needs="transfers",
    ),
    BenchMetric(
        "kv_transfer_throughput",
        "gen_req_kv_cache_transfer_throughput",
        "Gb/sec",
        "8 · KV bytes of the prompt / KV transfer latency / 1e9; pXX is what XX % of the transfers reach",
        needs="transfers",
        higher_is_better=True,
    ),
)


class BenchLine(Struct, frozen=True):
    """One line: `value` of a single number, or the six statistics of `n` observations; None where there are none."""

    metric: BenchMetric
    n: int
    value: float | None = None
    statistics: tuple[float | None, ...] = (None,) * len(STATISTICS)

    def columns(self) -> dict[str, Any]:
        """By the names of COLUMNS."""
        metric = self.metric
        head = {"metric": metric.name, "original": metric.original, "unit": metric.unit, "n": self.n}
        return {**head, "value": self.value, **dict(zip(STATISTICS, self.statistics)), "formula": metric.formula}


def bench_table(run: Run, *, transfers: bool = True) -> list[BenchLine]:
    """The lines of BENCH_METRICS that apply to the run. Raises ReportError for a run that cannot be read."""
    values = _values(run)
    streams = bool((run.config.get("workload") or {}).get("streaming", True))
    shown = {"": True, "streaming": streams, "transfers": transfers}
    lines = []
    for metric in BENCH_METRICS:
        if not shown[metric.needs]:
            continue
        found = values[metric.name]
        if isinstance(found, np.ndarray):
            known = found[np.isfinite(found)]
            lines.append(BenchLine(metric, len(known), statistics=_statistics(known, metric.higher_is_better)))
        else:
            lines.append(BenchLine(metric, 0 if found is None else 1, found))
    return lines


def iteration_table(run: Run) -> list[dict[str, Any]]:
    """What the steps of each executor were like, in the measured time (the original's iteration statistics)."""
    entries: list[dict[str, Any]] = executor_summaries(run, *window_s(measured(run)))["executors"]
    return entries


def original_row(lines: list[BenchLine]) -> dict[str, Any]:
    """The lines as one row under the original's names, such as `avg_sequence_latency(ms)`."""
    row: dict[str, Any] = {}
    for line in lines:
        name = line.metric.original + (f"({line.metric.unit})" if line.metric.unit else "")
        if line.metric.is_distribution:
            row |= {f"{statistic}_{name}": value for statistic, value in zip(STATISTICS, line.statistics)}
        else:
            row[name] = line.value
    return row


def write_bench_table(lines: list[BenchLine], folder: Path, csv: Path | None = None) -> None:
    """`bench.csv` and `bench.parquet` in `folder`, one row a metric; `csv`: one row under the original's names."""
    import pandas as pd

    frame = pd.DataFrame([line.columns() for line in lines], columns=list(COLUMNS))
    numbers = ["value", *STATISTICS]
    frame[numbers] = frame[numbers].astype("float64")
    frame.to_csv(folder / "bench.csv", index=False)
    frame.to_parquet(folder / "bench.parquet", index=False, compression="zstd")
    if csv is not None:
        pd.DataFrame([original_row(lines)]).to_csv(csv, index=False)


def _statistics(values: Floats, higher_is_better: bool) -> tuple[float | None, ...]:
    if not len(values):
        return (None,) * len(STATISTICS)
    ranks = [1.0, 10.0, 50.0] if higher_is_better else [99.0, 90.0, 50.0]
    percentiles = np.percentile(values, ranks, method="inverted_cdf")
    return (float(values.mean()), float(values.max()), float(values.min()), *map(float, percentiles))


# ---- the values -----------------------------------------------------------------------------------------------------


def _values(run: Run) -> dict[str, Floats | float | None]:
    rows = measured(run)
    done = rows["completed"].to_numpy(np.bool_)
    first_seen = rows["first_token_s"].notna().to_numpy()
    start, end = window_s(rows)
    duration = end - start
    tokens = rows["num_output_tokens"].to_numpy(np.float64)
    arrival, dispatch, context_start, first_token, transfer_start, _, ended = _milliseconds(rows)
    generates = done & (tokens >= 2)
    began = _generation_start(run, rows, first_token)
    second = _second_token(run, rows[generates]).reindex(rows["request_id"]).to_numpy(np.float64) * _MS
    generation = np.where(generates, ended - began, np.nan)
    interval = generation / np.maximum(tokens - 1, 1)
    asked = rows["transfer_start_s"].notna().to_numpy()
    latency, throughput = _transfers(run, start, end)
    with np.errstate(divide="ignore"):
        speed = _MS / interval
    speed = speed[np.isfinite(speed)]
    return {
        "samples": float(done.sum()),
        "context_error_samples": float((~done & ~first_seen).sum()),
        "generation_error_samples": float((~done & first_seen).sum()),
        "total_latency": duration * _MS,
        "sequence_throughput": float(done.sum()) / duration if duration > 0 else None,
        "token_throughput": float(tokens[done].sum()) / duration if duration > 0 else None,
        "user_tokens_per_second": float(speed.mean()) if len(speed) else None,
        "sequence_latency": np.where(done, ended - arrival, np.nan),
        "context_latency": np.where(first_seen, first_token - arrival, np.nan),
        "generation_latency": generation,
        "time_to_generation_first_token": np.where(generates, np.maximum(second - began, 0.0), np.nan),
        "inter_token_latency": interval,
        "inter_token_latency_without_first": np.where(
            done & (tokens >= 3), (ended - second) / np.maximum(tokens - 2, 1), np.nan
        ),
        "context_queueing_latency": np.where(done, context_start - dispatch, np.nan),
        "generation_queueing_latency": np.where(generates & asked, np.maximum(transfer_start - began, 0.0), np.nan),
        "kv_transfer_latency": latency,
        "kv_transfer_throughput": throughput,
    }


def _milliseconds(rows: pd.DataFrame) -> Iterator[Floats]:
    """The seven instants of `metrics.instants_ps`, each (n,), in milliseconds."""
    return iter((instants_ps(rows) / _PS_PER_MS).T)


def _generation_start(run: Run, rows: pd.DataFrame, first_token_ms: Floats) -> Floats:
    """When each request's generation phase began, (n,), in milliseconds."""
    decisions = run.columns("decisions", ["request_id", "stage", "answer", "at_s"])
    routed = decisions[(decisions["stage"] == "generation") & (decisions["answer"] == "route")]
    last = routed.groupby("request_id")["at_s"].max().reindex(rows["request_id"]).to_numpy(np.float64) * _MS
    return np.fmax(first_token_ms, last)


def _second_token(run: Run, rows: pd.DataFrame) -> pd.Series[Any]:
    """When the second output token was made, in seconds by request id: the end less the steps after it.

    Missing for requests whose token times do not follow from one stay (preempted, retried, moved).
    """
    import pandas as pd

    found = rows[["request_id", "num_output_tokens", "num_attempts", "end_s"]].merge(visits(run), on="request_id")
    steps = pd.to_numeric(found["first_step"]).notna() & pd.to_numeric(found["last_step"]).notna()
    whole = found["num_tokens"] == found["num_output_tokens"] - (found["stage"] == "generation")
    found = found[steps & whole & (found["num_preemptions"] == 0) & (found["num_attempts"] <= 1)]
    times: dict[int, float] = {}
    visited = dict(by_executor(found))
    for executor, steps_of_it in by_executor(run.columns("steps", STEP_TIMES)):
        epochs = Epochs(steps_of_it)
        if not len(epochs.first) or executor not in visited:
            continue
        group = visited[executor]
        is_mixed = (group["stage"] == "mixed").astype(np.int64)  # its first step made the first token
        first = group["first_step"].astype(np.int64) + is_mixed
        after = epochs.time_of(group["last_step"].astype(np.int64)) - epochs.time_of(first)
        times |= dict(zip(group["request_id"].astype(int), group["end_s"].astype(np.float64) - after))
    return pd.Series(times, dtype="float64")


def _transfers(run: Run, start_s: float, end_s: float) -> tuple[Floats, Floats]:
    """Latencies (ms) and rates (Gb/s) of the successful transfers in the measured time."""
    transfers = run.columns("transfers", ["start_s", "end_s", "ok", "num_tokens"])
    transfers = transfers[transfers["ok"].astype(bool) & transfers["start_s"].between(start_s, end_s)]
    seconds = (transfers["end_s"] - transfers["start_s"]).to_numpy(np.float64)
    bits = transfers["num_tokens"].to_numpy(np.float64) * (run.kv_bytes_per_token or np.nan) * 8
    with np.errstate(divide="ignore", invalid="ignore"):
        return seconds * _MS, np.where(seconds > 0, bits / seconds / 1e9, np.nan)
