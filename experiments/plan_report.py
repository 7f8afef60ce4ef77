"""A finished search as text: the ranking, the arithmetic beside it, and why the winner won."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from .cluster import cluster_of
from .plan import Entry, Search
from .plan_arithmetic import full_step
from .plan_ranking import Rank
from .run_simulation import costs_of

_MOST_LINES: Final = 20
_MARK: Final = "*"


def print_plan(search: Search, ranks: Sequence[Rank], winner: dict[str, Any] | None) -> None:
    for line in plan_lines(search, ranks, winner):
        print(line)


def plan_lines(search: Search, ranks: Sequence[Rank], winner: dict[str, Any] | None) -> list[str]:
    slo = search.base.slo
    named = [
        f"{name} {value:g} ms"
        for name, value in (
            ("TTFT", slo and slo.ttft_ms),
            ("TPOT", slo and slo.tpot_ms),
            ("latency", slo and slo.e2e_ms),
        )
        if value
    ]
    share = f"{100 * slo.attainment:g} %" if slo else ""
    lines = [
        f"{search.base.name}: {', '.join(named)}, met by {share} of the requests;"
        f" prompts {search.lengths.prompt:.0f}, outputs {search.lengths.output:.0f} tokens on average",
        f"{len(search.entries)} candidates, {search.num_probes} simulations;"
        f" {_percent(search.num_known, search.num_requests)} of their requests had to be simulated",
        "",
        "goodput per GPU: highest rate (requests/s) that meets the objectives, over GPUs; 95 % interval over"
        f" {len(search.seeds)} seeds; rates tried are {100 * search.plan.tolerance:g} % apart",
    ]
    rows: list[tuple[str, ...]] = [
        ("", "cluster", "routers", "GPUs", "goodput", "per GPU", "interval", "limit", "against the best")
    ]
    for number, each in enumerate(ranks[:_MOST_LINES], start=1):
        rows.append(
            (
                str(number),
                each.entry.candidate.shape.label,
                each.entry.candidate.routers,
                str(each.entry.num_gpus),
                f"{each.rate:.3g}",
                f"{each.per_gpu.value or 0:.3g}{_MARK if each.outside else ''}",
                _interval(each.per_gpu.low, each.per_gpu.high),
                ", ".join(each.limits) or "-",
                _against(each, number),
            )
        )
    lines += [*_table(rows), *_extrapolated(ranks[:_MOST_LINES])]
    lines += ["", "rate matching: requests/s of one executor that never waits, and what follows for the cluster"]
    rows = [
        ("", "cluster", "context", "generation", "mixed", "matched rate", "per GPU", "reached", "limit", "ideal ratio")
    ]
    for number, each in enumerate(ranks[:_MOST_LINES], start=1):
        arithmetic = each.entry.arithmetic
        matched = "-"
        if arithmetic.matched_ratio is not None and arithmetic.matched_throughput_per_gpu is not None:
            matched = f"{arithmetic.matched_ratio:.2f} : 1, {arithmetic.matched_throughput_per_gpu:.0f} tok/s/GPU"
        rows.append(
            (
                str(number),
                each.entry.candidate.shape.label,
                _number(arithmetic.context_rate),
                _number(arithmetic.generation_rate),
                _number(arithmetic.mixed_rate),
                f"{arithmetic.matched_rate:.3g}",
                f"{arithmetic.matched_rate_per_gpu:.3g}",
                _percent(each.rate, arithmetic.matched_rate),
                arithmetic.limited_by,
                matched,
            )
        )
    lines += _table(rows)
    above = sum(each.rate > each.entry.arithmetic.matched_rate for each in ranks)
    if above:
        lines.append(
            f"{above} of {len(ranks)} do more than rate matching says, which is no bound: it asks TPOT of every step, not of"
            " a request's mean, takes every request for one of mean length, and knows no end of a run before the backlog shows"
        )
    lines += ["", *_why(search, ranks), *_others(search)]
    if winner is not None:
        lines += ["", f"winner: {winner['candidate']}, every seed met the objectives at {winner['rate']:g} requests/s",
                  f"wrote {winner['file']}; next: disagg run {winner['file']} [--backend hardware]"]  # fmt: skip
    return lines


def _extrapolated(ranks: Sequence[Rank]) -> list[str]:
    """What the mark means, with the share of each."""
    shares = [f"{100 * each.outside:.2g} % of {number}" for number, each in enumerate(ranks, start=1) if each.outside]
    if not shares:
        return []
    return [
        f"{_MARK} extrapolated: batches outside the measured range of the profile ({', '.join(shares)}); calibrate with"
        " executors that run such steps before you rely on it"
    ]


def _why(search: Search, ranks: Sequence[Rank]) -> list[str]:
    """The best of either role, what holds each back, and what each wastes by its nature."""
    lines: list[str] = []
    for role in ("disaggregated", "mixed"):
        first = next((each for each in ranks if each.entry.role == role), None)
        if first is None or not first.rate:
            continue
        above = [found.above for found in first.entry.finals if found.above is not None]
        missed: dict[str, int] = {}
        for verdict in above:
            for key, count in verdict["missed"].items():
                missed[key] = missed.get(key, 0) + count
        held = [f"{count} missed {key}" for key, count in sorted(missed.items(), key=lambda item: -item[1])]
        held += ["the backlog grows"] if "backlog grows" in first.limits else []
        matched = first.entry.arithmetic.matched_rate_per_gpu
        beside = f", rate matching {matched:.3g}" if matched else ""
        lines.append(
            f"best {role}: {first.entry.candidate.shape.label}, {first.per_gpu.value or 0:.3g} requests/s/GPU"
            f"{beside}; at the next rate, over {len(above)} seeds: {', '.join(held) or '-'}"
        )
        why = _mixed_why(search, first.entry) if role == "mixed" else _apart_why(first.entry)
        lines += [f"  {line}" for line in why]
    return lines


def _apart_why(entry: Entry) -> list[str]:
    """How far the numbers of executors are from the ratio that rate matching wants."""
    found, shape = entry.arithmetic, entry.candidate.shape
    if not (found.context_rate and found.generation_rate and shape.context and shape.generation):
        return []
    sides = {
        "context": found.context_rate * shape.context.num_instances,
        "generation": found.generation_rate * shape.generation.num_instances,
    }
    idle = max(sides, key=lambda side: sides[side])
    return [
        "phases apart: no decode waits for a prompt, but whole executors seldom match; at the matched rate the"
        f" {idle} side idles {_percent(sides[idle] - found.matched_rate, sides[idle])} of the time"
    ]


def _mixed_why(search: Search, entry: Entry) -> list[str]:
    """What prompts do to the decodes that share their steps."""
    experiment, slo = entry.candidate.experiment, search.base.slo
    executor = cluster_of(experiment).executors[0]
    tokens, seconds, is_beyond = full_step(executor, costs_of(experiment)[executor.id], search.lengths)
    step = f"a step with {tokens} prompt tokens takes {1e3 * seconds:.3g} ms{' (extrapolated)' if is_beyond else ''}"
    text = f"mixed: nothing idles for want of the other phase, but {step}"
    if slo is None or slo.tpot_ms is None:
        return [text]
    if 1e3 * seconds <= slo.tpot_ms:
        return [f"{text}, which TPOT {slo.tpot_ms:g} ms allows in every step"]
    return [f"{text}, more than TPOT {slo.tpot_ms:g} ms: only few of a request's steps may be such"]


def _others(search: Search) -> list[str]:
    def count(entries: Sequence[Entry], why: str) -> list[str]:
        number = sum(entry.left_out == why for entry in entries)
        return [f"{number} {why}"] if number else []

    told = [*count(search.entries, "rate matching"), *count(search.entries, "screened out")]
    lines = [f"not ranked: {', '.join(told)}"] if told else []
    if search.unfit:
        reasons = sorted({each.why for each in search.unfit})
        lines.append(f"cannot be built: {len(search.unfit)}, e.g. {reasons[0]}")
    return lines


def _against(each: Rank, number: int) -> str:
    if number == 1:
        return "best"
    if each.behind is None or each.behind.value is None:
        return "-"
    if len(each.entry.finals) == 1:
        return f"-{each.behind.value:.3g} per GPU (one seed)"
    return f"-{each.behind.value:.3g} per GPU" if each.is_apart else "not distinguishable"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g} … {high:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
