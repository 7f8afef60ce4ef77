"""The table of metrics: what each is called, its unit, its formula, and which direction is better."""

from __future__ import annotations

from typing import Final

from msgspec import Struct


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
