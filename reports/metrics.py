"""What is measured: one table of metrics, the measures of each request, and the summary of a run.

Instants are computed in integer picoseconds, so that a request's dispatch delay and stages sum to its e2e latency.
Requests of warm-up phases (`exclude_from_results`) count nowhere. Latencies are those of completed requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ..policies.vocabulary import PS_PER_S, FinishReason
from .executors import executor_summaries
from .gaps import Gaps, token_gaps
from .runs import Run, columns_of
from .statistics import min_observations, weighted_percentiles

if TYPE_CHECKING:
    import pandas as pd

SUMMARY_VERSION: Final = 1
COMPLETED: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)
DISPATCH_DELAY_THAT_MATTERS: Final = 0.05  # p99 of the delay over the median TTFT


class Metric(Struct, frozen=True):
    """One line of the table. `key` is its name in summaries and tables; `better` is lower, higher or neither.

    `per_request`: there is a value a request, and summaries carry mean_, p50_, … of it; otherwise one value a run.
    """

    key: str
    label: str
    unit: str
    formula: str
    better: str = "lower"
    elsewhere: str = ""
    per_request: bool = True


STAGES: Final = ("queue_time_ctx_s", "prefill_time_s", "queue_time_gen_s", "kv_transfer_time_s", "decode_time_s")

METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        "ttft_s",
        "TTFT",
        "s",
        "first token reaches rank 0 (in the context's response, not the generation's copy) − intended send",
        elsewhere="time to first token everywhere; TensorRT-LLM's context latency leaves queueing out",
    ),
    Metric(
        "tpot_s",
        "TPOT",
        "s",
        "(e2e − TTFT) / (output tokens − 1); undefined for one output token, which meets the objective",
        elsewhere="AIPerf: inter-token latency (ITL)",
    ),
    Metric(
        "itl_s",
        "ITL",
        "s",
        "every gap between two output tokens of a request, pooled over requests, the hand-off's gap included",
        elsewhere="AIPerf: inter-chunk latency (ICL)",
    ),
    Metric(
        "e2e_latency_s", "E2E latency", "s", "end (last token at rank 0) − intended send", elsewhere="request latency"
    ),
    Metric(
        "normalized_latency_s",
        "Normalized latency",
        "s/token",
        "e2e / output tokens",
        elsewhere="NTPOT; normalized latency in vLLM's paper",
    ),
    Metric(
        "output_tokens_per_s_per_user",
        "Output tokens/s per user",
        "tokens/s",
        "1 / TPOT of each request",
        "higher",
        "AIPerf: output token throughput per user; InferenceX: interactivity",
    ),
    Metric(
        "dispatch_delay_s",
        "Dispatch delay",
        "s",
        "actual send − intended send: how late the load source was",
        elsewhere="what coordinated omission hides",
    ),
    Metric("queue_time_ctx_s", "Context queue", "s", "first step that computes the prompt begins − actual send"),
    Metric("prefill_time_s", "Prefill", "s", "first token at rank 0 − first step that computes the prompt begins"),
    Metric(
        "queue_time_gen_s",
        "Generation queue",
        "s",
        "the generation executor asks for the KV − first token; 0 on a mixed executor, and where it asked before",
    ),
    Metric(
        "kv_transfer_time_s",
        "KV transfer",
        "s",
        "every rank has the KV − the generation executor asks for it, or first token where it asked before (early binding);"
        " 0 on a mixed executor",
    ),
    Metric(
        "decode_time_s",
        "Decode",
        "s",
        "end − KV usable (− first token where no KV was moved)",
        elsewhere="generation latency",
    ),
    Metric(
        "kv_transfer_overlap_s",
        "KV transfer during the context phase",
        "s",
        "end of the context phase − the source began to send its KV, 0 where it began later; not part of any stage",
        "neither",
    ),
    Metric(
        "goodput",
        "Goodput",
        "requests/s",
        "requests that meet all objectives / duration",
        "higher",
        "DistServe, vLLM, AIPerf: goodput",
        per_request=False,
    ),
    Metric(
        "goodput_per_gpu",
        "Goodput per GPU",
        "requests/s/GPU",
        "goodput / GPUs of all executors",
        "higher",
        per_request=False,
    ),
    Metric(
        "slo_attainment",
        "SLO attainment",
        "share",
        "share of requests that meet all objectives; failed, rejected and cancelled ones are misses",
        "higher",
        per_request=False,
    ),
    Metric(
        "request_throughput",
        "Request throughput",
        "requests/s",
        "completed requests / duration (first intended send to last end)",
        "higher",
        per_request=False,
    ),
    Metric(
        "input_throughput",
        "Input throughput",
        "tokens/s",
        "prompt tokens of completed requests / duration",
        "higher",
        per_request=False,
    ),
    Metric(
        "throughput",
        "Output throughput",
        "tokens/s",
        "output tokens of completed requests / duration",
        "higher",
        "output token throughput",
        per_request=False,
    ),
    Metric(
        "output_tokens_per_s_per_gpu",
        "Output tokens/s per GPU",
        "tokens/s/GPU",
        "output throughput / GPUs of all executors",
        "higher",
        "InferenceX: throughput per GPU",
        per_request=False,
    ),
    Metric(
        "prefix_hit_rate",
        "Prefix hit rate",
        "share",
        "prompt tokens whose KV was there when their prompt began / prompt tokens, of completed requests; undefined where no"
        " executor reuses blocks",
        "higher",
        "cached prompt tokens / prompt tokens: vLLM, SGLang",
        per_request=False,
    ),
    Metric(
        "kv_occupancy",
        "KV occupancy",
        "share",
        "1 − blocks free or cached / blocks, over time and executors; block counts as of the last batch begun",
        "neither",
        per_request=False,
    ),
    Metric(
        "blocks_held",
        "Held blocks",
        "blocks",
        "blocks kept for a transfer after the context's response, over time, summed over executors",
        per_request=False,
    ),
    Metric(
        "busy_share",
        "Busy share",
        "share",
        "time with a batch running / duration, mean over executors",
        "neither",
        "GPU busy share",
        per_request=False,
    ),
    Metric(
        "transfer_rate_bytes_per_s",
        "Transfer rate",
        "bytes/s",
        "KV bytes moved / time in transfer, over successful transfers asked for after their context phase",
        "higher",
        "KV transfer throughput",
        per_request=False,
    ),
)
BY_KEY: Final = {metric.key: metric for metric in METRICS}
REQUEST_METRICS: Final = tuple(metric.key for metric in METRICS if metric.per_request)
_EXCLUDED: Final = "excluded"  # a column that the writer of run directories adds
_INSTANTS: Final = (
    "arrival_s", "dispatch_s", "context_start_s", "first_token_s", "transfer_start_s", "kv_usable_s", "end_s"
)  # fmt: skip
_MEASURED: Final = (  # what `measure` and `summary_of` look at
    "request_id", "phase", "num_prompt_tokens", "num_output_tokens", "finish_reason", "error", "num_attempts",
    *_INSTANTS, "kv_transfer_overlap_s", "num_cached_tokens",
)  # fmt: skip


# ---- requests -------------------------------------------------------------------------------------------------------


def _to_ps(seconds: pd.Series[Any]) -> NDArray[np.int64]:
    """Instants in integer picoseconds; a missing one is the smallest int64."""
    values = seconds.to_numpy(np.float64, na_value=np.nan)
    missing = ~np.isfinite(values)
    instants: NDArray[np.int64] = np.rint(np.where(missing, 0.0, values) * PS_PER_S).astype(np.int64)
    instants[missing] = np.iinfo(np.int64).min
    return instants


def instants_ps(requests: pd.DataFrame) -> NDArray[np.int64]:
    """The seven instants of each request, (n, 7), in the order of `_INSTANTS`.

    A missing instant, or one before its predecessor (early binding, a retry), is its predecessor's: that stage is 0.
    """
    instants = np.empty((7, len(requests)), dtype=np.int64)
    for i, name in enumerate(_INSTANTS):
        instants[i] = _to_ps(requests[name])
    np.minimum(instants[1:6], instants[6], out=instants[1:6])
    np.maximum.accumulate(instants, axis=0, out=instants)
    return instants.T


def measure(requests: pd.DataFrame) -> pd.DataFrame:
    """One row a request, in order of arrival, with a column for each per-request metric; undefined values are NaN.

    Adds `completed`. `itl_s` is pooled and has no column.
    """
    order = np.lexsort((requests["request_id"].to_numpy(), requests["arrival_s"].to_numpy()))
    rows = requests.take(order).reset_index(drop=True)
    done = rows["finish_reason"].isin(COMPLETED).to_numpy() & rows["first_token_s"].notna().to_numpy()
    instants = instants_ps(rows)
    tokens = rows["num_output_tokens"].to_numpy(np.float64)

    def seconds(ps: NDArray[np.int64], known: NDArray[np.bool_] = done) -> NDArray[np.float64]:
        return np.where(known, ps / PS_PER_S, np.nan)

    arrival, dispatch, _, first_token, _, _, end = instants.T
    columns: dict[str, NDArray[Any]] = {
        "completed": done,
        "ttft_s": seconds(first_token - arrival),
        "e2e_latency_s": seconds(end - arrival),
        "dispatch_delay_s": seconds(dispatch - arrival, np.ones(len(rows), dtype=np.bool_)),
    }
    gaps = np.where(tokens > 1, tokens - 1, np.nan)
    columns["tpot_s"] = seconds(end - first_token) / gaps
    columns["normalized_latency_s"] = columns["e2e_latency_s"] / np.where(tokens > 0, tokens, np.nan)
    with np.errstate(divide="ignore"):
        rate = 1.0 / columns["tpot_s"]
    columns["output_tokens_per_s_per_user"] = np.where(np.isfinite(rate), rate, np.nan)
    for i, stage in enumerate(STAGES):
        columns[stage] = seconds(instants[:, i + 2] - instants[:, i + 1])
    moved = done & rows["transfer_start_s"].notna().to_numpy()
    overlap = np.zeros(len(rows))
    if "kv_transfer_overlap_s" in rows.columns:  # of a run recorded before there was any: none
        overlap = rows["kv_transfer_overlap_s"].fillna(0.0).to_numpy(np.float64)
    columns["kv_transfer_overlap_s"] = np.where(moved, overlap, np.nan)
    return rows.assign(**columns)


def measured(run: Run) -> pd.DataFrame:
    """`measure` of the run's requests without those of warm-up phases."""
    return measure(_counted(run, columns_of("requests"))[0])


def _counted(run: Run, names: Sequence[str]) -> tuple[pd.DataFrame, int]:
    """The requests that count, with the columns asked for; and how many do not."""
    requests = run.columns("requests", [*names, _EXCLUDED])
    left_out = requests["phase"].isin(run.warmup_phases)
    if _EXCLUDED in requests.columns:  # the burst with which a closed loop fills an idle cluster, too
        left_out |= requests[_EXCLUDED].fillna(False).astype(bool)
    num_left_out = int(left_out.sum())
    return (requests[~left_out] if num_left_out else requests), num_left_out


def meets_objectives(rows: pd.DataFrame, objectives: dict[str, float]) -> NDArray[np.bool_]:
    """Which requests meet all objectives, (n,).

    An undefined TPOT (one output token) meets its objective; a request that did not complete meets none.
    """
    met: NDArray[np.bool_] = rows["completed"].to_numpy(np.bool_)
    for key in ("ttft_s", "tpot_s", "e2e_latency_s"):
        if key in objectives:
            values = rows[key].to_numpy(np.float64)
            met = met & ((values <= objectives[key]) | np.isnan(values))
    return met


def window_s(rows: pd.DataFrame) -> tuple[float, float]:
    """The measured time: first intended send to last end, in seconds of the run's clock."""
    return (float(rows["arrival_s"].min()), float(rows["end_s"].max())) if len(rows) else (0.0, 0.0)


# ---- the summary ----------------------------------------------------------------------------------------------------


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
    requests, num_excluded = _counted(run, _MEASURED)
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


def warnings_of(run: Run, summary: dict[str, Any]) -> list[str]:
    """What a reader of the run's numbers must know, one sentence each."""
    found: list[str] = []
    n = summary["num_requests"]
    if not n:
        return ["No request outside warm-up phases: nothing was measured."]
    delay, ttft = summary.get("p99_dispatch_delay_s"), summary.get("p50_ttft_s")
    if delay and ttft and delay > DISPATCH_DELAY_THAT_MATTERS * ttft:
        found.append(
            f"The load source was late: p99 dispatch delay is {delay * 1e3:.3g} ms, {delay / ttft:.0%} of the median "
            "TTFT. Latencies count from the intended send and include it."
        )
    if summary["num_failed"]:
        reasons = ", ".join(
            f"{count} {name}" for name, count in summary["finish_reasons"].items() if count and name not in COMPLETED
        )
        found.append(
            f"{summary['num_failed']} of {n} requests did not complete ({reasons}): latencies leave them out, SLO "
            "attainment counts them as misses."
        )
    cut = summary["num_cut_outputs"]
    if cut:
        found.append(f"{cut} of {n} outputs were cut at max_tokens: their true length is greater.")
    if summary["num_retried"]:
        found.append(f"{summary['num_retried']} of {n} requests took more than one attempt.")
    if summary["num_requests_without_itl"]:
        found.append(
            f"ITL leaves out {summary['num_requests_without_itl']} requests whose token times do not follow from the "
            "records (preempted, retried or moved)."
        )
    if summary["num_failed_transfers"]:
        found.append(f"{summary['num_failed_transfers']} of {summary['num_transfers']} KV transfers failed.")
    if run.is_oracle:
        found.append("A policy of this run is an oracle: it was told true output lengths, which no real policy knows.")
    needed = min_observations(99.0)
    if summary["num_completed"] < needed:
        found.append(
            f"n too small for p99: {summary['num_completed']} requests completed, {needed} are needed for a 95 % "
            "interval."
        )
    if not math.isfinite(summary["duration_s"]) or summary["duration_s"] <= 0:
        found.append("The measured time is 0 s: rates are undefined.")
    return found
