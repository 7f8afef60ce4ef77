"""Who won: candidates by goodput per GPU, with intervals over seeds and paired differences from the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..reports.statistics import Estimate, paired_over_repeats, t_interval
from .plan import Entry, Search
from .plan_search import Found


@dataclass(frozen=True)
class Rank:
    """One finalist. `rate` is the mean over seeds of the highest rate (requests/s) at which the objectives are met.

    `per_gpu` has its interval; `behind` is best − this, paired by seed (None for the best itself). `is_apart` says that the
    difference is distinguishable: its interval leaves out 0 and it is larger than the distance of two rates. `outside` is
    the share of its batches whose times are extrapolated, for the profile was measured up to smaller ones.
    """

    entry: Entry
    rate: float
    least_rate: float
    attainment: float | None
    limits: tuple[str, ...]
    per_gpu: Estimate
    behind: Estimate | None = None
    is_apart: bool = False
    outside: float = 0.0


def rank(search: Search) -> list[Rank]:
    """The finalists without an error, best first. Equal means: fewer GPUs, then the order of the space."""
    finalists = [entry for entry in search.entries if entry.finals and entry.error is None]
    found = [_measure(entry) for entry in finalists]
    found.sort(key=lambda each: (-(each.per_gpu.value or 0.0), each.entry.num_gpus))
    if not found or not found[0].rate:
        return found
    best = found[0]
    return [best, *(_against(best, each, search.plan.tolerance) for each in found[1:])]


def _measure(entry: Entry) -> Rank:
    rates = [each.rate for each in entry.finals]
    attained = [each.attainment for each in entry.finals if each.attainment is not None]
    return Rank(
        entry,
        rate=sum(rates) / len(rates),
        least_rate=min(rates),
        attainment=min(attained) if attained else None,
        limits=limits_of(entry.finals),
        per_gpu=t_interval([rate / entry.num_gpus for rate in rates]).from_zero(),
        outside=share_outside(entry.finals),
    )


def share_outside(found: Sequence[Found]) -> float:
    """Of the batches of these searches, at the rates found."""
    counts = [each.outside for each in found]
    return sum(outside for outside, _ in counts) / max(1, sum(batches for _, batches in counts))


def limits_of(finals: list[Found]) -> tuple[str, ...]:
    """What stands against a higher rate, the most frequent reason first."""
    reasons = [each.limit for each in finals if each.limit]
    return tuple(sorted(set(reasons), key=lambda reason: (-reasons.count(reason), reason)))


def _against(best: Rank, other: Rank, tolerance: float) -> Rank:
    behind = paired_over_repeats(
        [each.rate / best.entry.num_gpus for each in best.entry.finals],
        [each.rate / other.entry.num_gpus for each in other.entry.finals],
    )
    larger = (behind.value or 0.0) > tolerance * (best.per_gpu.value or 0.0)
    one_seed = len(best.entry.finals) == 1
    return Rank(**{**vars(other), "behind": behind, "is_apart": larger and behind.excludes_zero and not one_seed})


# ---- as plain values ------------------------------------------------------------------------------------------------


def plain_search(search: Search, ranks: list[Rank]) -> dict[str, Any]:
    """Everything that was found, JSON-ready. Rates in requests/s."""
    slo = search.base.slo
    ranked = {id(each.entry) for each in ranks}
    return {
        "format_version": 2,
        "experiment": search.base.name,
        "objectives": None
        if slo is None
        else {key: getattr(slo, key) for key in ("ttft_ms", "tpot_ms", "e2e_ms", "attainment")},
        "lengths": asdict(search.lengths),
        "tolerance": search.plan.tolerance,
        "horizon_s": search.horizon_s,
        "seeds": list(search.seeds),
        "num_simulations": search.num_probes,
        "num_requests": search.num_requests,
        "num_requests_simulated": search.num_known,
        "ranking": [_plain_rank(each, number) for number, each in enumerate(ranks, start=1)],
        "not_ranked": [
            {
                "candidate": entry.candidate.label,
                "gpus": entry.num_gpus,
                "why": entry.error or entry.left_out or "no rate meets the objectives",
                "screened_goodput_per_gpu": None if entry.screened is None else entry.screened_per_gpu,
                "batches_outside_measured_range": share_outside([] if entry.screened is None else [entry.screened]),
                "rate_matching": entry.arithmetic.plain(),
            }
            for entry in search.entries
            if id(entry) not in ranked
        ],
        "unfit": [{"candidate": each.label, "why": each.why} for each in search.unfit],
    }


def _plain_rank(each: Rank, number: int) -> dict[str, Any]:
    def interval(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}

    entry = each.entry
    return {
        "rank": number,
        "candidate": entry.candidate.label,
        "role": entry.role,
        "gpus": entry.num_gpus,
        "cluster": asdict(entry.candidate.shape),
        "routers": entry.candidate.routers,
        "goodput": each.rate,
        "goodput_per_gpu": interval(each.per_gpu),
        "rates": [found.rate for found in entry.finals],
        "attainment": each.attainment,
        "batches_outside_measured_range": each.outside,
        "limited_by": list(each.limits),
        "missed_above": [None if found.above is None else found.above["missed"] for found in entry.finals],
        "behind_best_per_gpu": interval(each.behind),
        "distinguishable_from_best": each.is_apart if number > 1 else None,
        "rate_matching": entry.arithmetic.plain(),
    }
