"""The summary of a run: distributions of its requests' metrics, rates over the measured time, counts, warnings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..policies.vocabulary import FinishReason
from .executors import executor_summaries
from .gaps import Gaps, token_gaps
from .metric_table import METRICS, REQUEST_METRICS
from .metrics import INSTANTS, counted, measure, meets_objectives, window_s
from .run_warnings import warnings_of
from .runs import Run
from .statistics import weighted_percentiles

if TYPE_CHECKING:
    import pandas as pd

SUMMARY_VERSION: Final = 1
_MEASURED: Final = (  # what `measure` and `summary_of` look at
    "request_id", "phase", "num_prompt_tokens", "num_output_tokens", "finish_reason", "error", "num_attempts",
    *INSTANTS, "kv_transfer_overlap_s", "num_cached_tokens",
)  # fmt: skip


def percentile_name(percentile: float) -> str:
    return f"p{percentile:g}"


def _distribution(key: str, values: NDArray[np.float64], percentiles: tuple[float, ...]) -> dict[str, float | None]:
    known = values[np.isfinite(values)]
    if not len(known):
        return {f"{name}_{key}": None for name in ("mean", *map(percentile_name, percentiles), "min", "max")}
    found: dict[str, float | None] = {f"mean_{key}": float(known.mean())}
    for percentile, value in zip(percentiles, np.percentile(known, percentiles)):
        found[f"{percentile_name(percentile)}_{key}"] = float(value)
    return found | {f"min_{key}": float(known.min()), f"max_{key}": float(known.max())}


def _gap_distribution(gaps: Gaps, percentiles: tuple[float, ...]) -> dict[str, float | None]:
    found = {"mean_itl_s": gaps.mean}
    for percentile, value in zip(percentiles, weighted_percentiles(gaps.seconds, gaps.weights, percentiles)):
        found[f"{percentile_name(percentile)}_itl_s"] = value
    found["min_itl_s"] = float(gaps.seconds.min()) if len(gaps.seconds) else None
    found["max_itl_s"] = float(gaps.seconds.max()) if len(gaps.seconds) else None
    return found


def summarise(run_dir: Path) -> dict[str, Any]:
    """What summary.json holds: mean_, p50_, p90_, p95_, p99_, min_ and max_ of each per-request metric, rates, counts.

    Undefined values are None. Reads config.yaml and the Parquet files; manifest.json only if it is there already.
    Raises ReportError naming the file that cannot be read.
    """
    return summary_of(Run(Path(run_dir)))


def summary_of(run: Run) -> dict[str, Any]:
    """`summarise` of a run that is already open.

    Of each table only the columns that are needed are in memory, while they are: some 300 bytes a request at most.
    """
    requests, num_excluded = counted(run, _MEASURED)
    rows = measure(requests)
    del requests
    completed = rows["completed"]
    done = rows.loc[completed, ["num_prompt_tokens", "num_output_tokens", "num_cached_tokens"]]
    start, end = window_s(rows)
    reasons = rows["finish_reason"].astype(str).value_counts()
    errors = rows.loc[~completed, "error"].dropna().value_counts().head(20)
    objectives = run.objectives
    levels = _levels(rows, objectives)

    def per_gpu(value: float | None) -> float | None:
        return value / run.num_devices if value is not None and run.num_devices else None

    summary: dict[str, Any] = {
        "summary_version": SUMMARY_VERSION,
        "num_requests": len(rows),
        "num_completed": len(done),
        "num_failed": len(rows) - len(done),
        "num_excluded": num_excluded,
        "num_retried": int((rows["num_attempts"] > 1).sum()),
        "num_cut_outputs": _num_cut(run, rows),
        "finish_reasons": {reason.value: int(reasons.get(reason.value, 0)) for reason in FinishReason},
        "errors": {str(error): int(count) for error, count in errors.items()},
        "num_devices": run.num_devices or None,
        "duration_s": end - start,
        "slo": objectives or None,
        **levels,
        "num_input_tokens": int(done["num_prompt_tokens"].sum()),
        "num_output_tokens": int(done["num_output_tokens"].sum()),
    }
    attainment = objectives.get("attainment")
    if attainment is not None and levels["slo_attainment"] is not None:
        summary["slo_met"] = bool(levels["slo_attainment"] >= attainment)
    summary["num_cached_tokens"], summary["prefix_hit_rate"] = _prefix_hits(run, done)
    summary["goodput_per_gpu"] = per_gpu(summary["goodput"])
    summary["output_tokens_per_s_per_gpu"] = per_gpu(summary["throughput"])
    for key in REQUEST_METRICS:
        if key != "itl_s":
            summary |= _distribution(key, rows[key].to_numpy(np.float64), run.percentiles)
    timed = rows.loc[completed, ["request_id", "num_output_tokens", "ttft_s", "e2e_latency_s", "num_attempts"]]
    del rows, completed, done
    gaps = token_gaps(run, timed)
    summary |= _gap_distribution(gaps, run.percentiles)
    summary["num_requests_without_itl"] = gaps.num_left_out
    summary |= _transfers(run, start, end)
    summary |= executor_summaries(run, start, end)
    summary["units"] = {metric.key: metric.unit for metric in METRICS}
    summary["warnings"] = warnings_of(run, summary)
    return summary


def _levels(rows: pd.DataFrame, objectives: dict[str, float]) -> dict[str, float | None]:
    """Shares and rates over the measured time."""
    done = rows.loc[rows["completed"], ["num_prompt_tokens", "num_output_tokens"]]
    start, end = window_s(rows)
    met = meets_objectives(rows, objectives)
    has_slo = bool(set(objectives) - {"attainment"})

    def rate(amount: float) -> float | None:
        return float(amount) / (end - start) if end > start else None

    return {
        "slo_attainment": float(met.mean()) if has_slo and len(rows) else None,
        "goodput": rate(float(met.sum())) if has_slo else None,
        "request_throughput": rate(len(done)),
        "input_throughput": rate(float(done["num_prompt_tokens"].sum())),
        "throughput": rate(float(done["num_output_tokens"].sum())),
    }


def brief_summary(requests: pd.DataFrame, objectives: dict[str, float]) -> dict[str, Any]:
    """Of `requests` that count: the keys of `summary_of` that need no other table (no token gaps, transfers, executors)."""
    rows = measure(requests)
    found: dict[str, Any] = {"num_requests": len(rows), "num_completed": int(rows["completed"].sum())}
    found |= _levels(rows, objectives)
    for key in REQUEST_METRICS:
        if key != "itl_s":
            found |= _distribution(key, rows[key].to_numpy(np.float64), (50.0, 90.0, 99.0))
    return found


def _num_cut(run: Run, rows: pd.DataFrame) -> int:
    """Outputs that max_tokens cut short: the manifest's count if it has one, else all that ended at max_tokens."""
    known = run.manifest.get("num_cut_outputs")
    return known if isinstance(known, int) else int((rows["finish_reason"] == FinishReason.LENGTH.value).sum())


def _prefix_hits(run: Run, done: pd.DataFrame) -> tuple[int, float | None]:
    """Prompt tokens found cached, and their share; no share where nobody looks for any."""
    if "num_cached_tokens" not in done.columns:  # of a run recorded before there were any
        return 0, None
    cached, tokens = int(done["num_cached_tokens"].sum()), int(done["num_prompt_tokens"].sum())
    return cached, cached / tokens if tokens and run.reuses_blocks else None


def _transfers(run: Run, start: float, end: float) -> dict[str, Any]:
    rows = run.columns("transfers", ["start_s", "end_s", "ok", "num_tokens", "overlap_s"])
    rows = rows[(rows["start_s"] >= start) & (rows["start_s"] <= end)]
    ok = rows[rows["ok"].astype(bool)]
    tokens = int(ok["num_tokens"].sum())
    # one that was asked for early has mostly waited for its context phase: that time says nothing of the link
    timed = ok[ok["overlap_s"] == 0] if "overlap_s" in ok.columns else ok
    timed_tokens = int(timed["num_tokens"].sum())
    seconds = float((timed["end_s"] - timed["start_s"]).sum())
    size = run.kv_bytes_per_token
    return {
        "num_transfers": len(rows),
        "num_failed_transfers": len(rows) - len(ok),
        "transferred_tokens": tokens,
        "transferred_bytes": tokens * size if size else None,
        "transfer_rate_bytes_per_s": timed_tokens * size / seconds if size and seconds > 0 else None,
        "transfer_rate_tokens_per_s": timed_tokens / seconds if seconds > 0 else None,
    }
