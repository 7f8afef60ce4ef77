"""What a reader of a run's numbers must know before trusting them."""

from __future__ import annotations

import math
from typing import Any, Final

from .metrics import COMPLETED
from .runs import Run
from .statistics import min_observations

DISPATCH_DELAY_THAT_MATTERS: Final = 0.05  # p99 of the delay over the median TTFT


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
