"""Rate matching: what executors could do if they never waited, by the cost model alone.

TensorRT-LLM matches rates so: one generation executor needs (generation rate / context rate) context executors, hence
throughput per GPU = output tok/s / (context GPUs x generation rate / context rate + generation GPUs), where both rates are
requests/s of one executor and the GPUs are those of one. It knows no queues, no lengths that vary and no transfers: it
says what a cluster matched to its mean load does. It is no bound: it asks the TPOT objective of every step, where the
objective is one on a request's mean, and mean lengths in every batch, where a batch of shorter ones is faster.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Final

from msgspec.structs import replace

from ..core.config import ExecutorConfig
from ..core.cost import UNITS_PER_S, CostModel, StepFeatures
from ..core.measured_cost import MeasuredCost
from ..policies.vocabulary import Role
from .cluster import cluster_of
from .config import Experiment
from .workload import Workload

_SAMPLE: Final = 2_000
_MOST_BATCHES: Final = 64  # batch sizes tried with a mixed executor


@dataclass(frozen=True)
class Lengths:
    """Means of a workload: prompt and output tokens."""

    prompt: float
    output: float
    max_tokens: int


@dataclass(frozen=True)
class Arithmetic:
    """Rates in requests/s, of one executor. `matched_rate` is that of the cluster; `limited_by` says which side sets it.

    `matched_ratio`: context executors for one generation executor; `matched_throughput_per_gpu`: output tok/s then.
    """

    context_rate: float | None
    generation_rate: float | None
    mixed_rate: float | None
    matched_ratio: float | None
    matched_throughput_per_gpu: float | None
    matched_rate: float
    matched_rate_per_gpu: float
    limited_by: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def lengths_of(config: Experiment) -> Lengths:
    """Means over the first requests that count."""
    workload = Workload(config, with_block_hashes=False)
    rows = [
        (request.num_prompt_tokens, request.num_output_tokens)
        for request in islice((r for r in workload if not r.excluded), _SAMPLE)
    ]
    prompts, outputs = zip(*rows, strict=True)
    return Lengths(sum(prompts) / len(rows), sum(outputs) / len(rows), workload.max_tokens)


def arithmetic(config: Experiment, costs: dict[int, CostModel], lengths: Lengths) -> Arithmetic:
    """Of the experiment's cluster, whose executors of one role are equal, under its objectives."""
    executors: dict[Role, list[ExecutorConfig]] = {}
    for executor in cluster_of(config).executors:
        executors.setdefault(executor.role, []).append(executor)
    num_gpus = sum(_gpus(executor) for group in executors.values() for executor in group)
    slo = config.slo
    ttft = None if slo is None or slo.ttft_ms is None else slo.ttft_ms / 1e3
    tpot = None if slo is None or slo.tpot_ms is None else slo.tpot_ms / 1e3
    mixed = executors.get(Role.MIXED)
    if mixed:
        rate = mixed_rate(mixed[0], costs[mixed[0].id], lengths, tpot)
        matched = rate * len(mixed)
        return Arithmetic(None, None, rate, None, None, matched, matched / num_gpus, "mixed")
    contexts, generations = executors[Role.CONTEXT], executors[Role.GENERATION]
    context = context_rate(contexts[0], costs[contexts[0].id], lengths, ttft)
    generation = generation_rate(generations[0], costs[generations[0].id], lengths, tpot)
    sides = {"context": context * len(contexts), "generation": generation * len(generations)}
    ratio = generation / context if context else 0.0
    matched_gpus = _gpus(contexts[0]) * ratio + _gpus(generations[0])
    limited_by = min(sides, key=lambda side: sides[side])
    matched = sides[limited_by]
    return Arithmetic(
        context,
        generation,
        None,
        ratio,
        lengths.output * generation / matched_gpus,
        matched,
        matched / num_gpus,
        limited_by,
    )


def context_rate(executor: ExecutorConfig, cost: CostModel, lengths: Lengths, ttft: float | None) -> float:
    """Prompts/s of steps as full as the token budget allows; 0 if one prompt alone takes longer than the objective."""
    prompt, budget = max(1, round(lengths.prompt)), executor.scheduler.max_num_tokens
    if prompt > budget:
        seconds = sum(
            _seconds(cost, StepFeatures(0, 0, ((at, min(budget, prompt - at), at + budget >= prompt),)))
            for at in range(0, prompt, budget)
        )
        return 0.0 if ttft is not None and seconds > ttft else 1 / seconds
    best = 0.0
    for prompts in range(1, 1 + min(budget // prompt, executor.scheduler.max_batch_size)):
        seconds = _seconds(cost, StepFeatures(0, 0, ((0, prompt, True),) * prompts))
        if ttft is None or seconds <= ttft:
            best = max(best, prompts / seconds)
    return best


def generation_rate(executor: ExecutorConfig, cost: CostModel, lengths: Lengths, tpot: float | None) -> float:
    """Requests/s of the largest batch that its slots, its KV and the objective allow; 0 if one request is too slow."""
    steps = max(1.0, lengths.output - 1)
    low, high = 0, batch_that_fits(executor, lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if tpot is None or _seconds(cost, _decodes(middle, lengths)) <= tpot:
            low = middle
        else:
            high = middle - 1
    return 0.0 if low == 0 else low / (steps * _seconds(cost, _decodes(low, lengths)))


def mixed_rate(executor: ExecutorConfig, cost: CostModel, lengths: Lengths, tpot: float | None) -> float:
    """Requests/s of an executor that in every step decodes a batch and computes the prompt tokens that keep it full."""
    steps = max(1.0, lengths.output - 1)
    most = batch_that_fits(executor, lengths)
    best = 0.0
    for batch in sorted({max(1, round(most ** (i / _MOST_BATCHES))) for i in range(_MOST_BATCHES + 1)}):
        per_step = batch / steps
        tokens = round(per_step * lengths.prompt)
        if batch > most or batch + tokens > executor.scheduler.max_num_tokens:
            break
        decodes = _decodes(batch, lengths)
        seconds = _seconds(cost, replace(decodes, chunks=_chunks(tokens, max(1, round(lengths.prompt)))))
        if tpot is None or seconds <= tpot:
            best = max(best, per_step / seconds)
    return best


def full_step(executor: ExecutorConfig, cost: CostModel, lengths: Lengths) -> tuple[int, float, bool]:
    """Prompt tokens of the fullest step of a mixed executor that decodes one request, the seconds that it takes, and
    whether they are extrapolated: beyond what a measured cost was measured for.
    """
    tokens = min(executor.scheduler.max_num_tokens - 1, round(lengths.prompt) * executor.scheduler.max_batch_size)
    chunks = _chunks(tokens, max(1, round(lengths.prompt)))
    step = replace(_decodes(1, lengths), chunks=chunks)
    return tokens, _seconds(cost, step), isinstance(cost, MeasuredCost) and not cost.covers(step)


def batch_that_fits(executor: ExecutorConfig, lengths: Lengths) -> int:
    """Requests whose blocks, reserved up to max_tokens, fit beside each other, at most max_batch_size."""
    tokens = lengths.prompt + lengths.max_tokens
    if executor.scheduler.capacity == "max_utilization":
        tokens = lengths.prompt + lengths.output
    blocks = max(1, -(-round(tokens) // executor.tokens_per_block))
    return min(executor.scheduler.max_batch_size, executor.num_blocks // blocks)


def _decodes(batch: int, lengths: Lengths) -> StepFeatures:
    return StepFeatures(batch, round(batch * (lengths.prompt + lengths.output / 2)))


def _chunks(tokens: int, prompt: int) -> tuple[tuple[int, int, bool], ...]:
    """`tokens` of prompts in one step: whole ones, and a part of one from about its middle."""
    whole, rest = divmod(tokens, prompt)
    parts = ((0, prompt, True),) * whole
    return parts if rest == 0 else (*parts, ((prompt - rest) // 2, rest, False))


def _seconds(cost: CostModel, features: StepFeatures) -> float:
    return cost.step_time(features) / UNITS_PER_S


def _gpus(executor: ExecutorConfig) -> int:
    return executor.tensor_parallel_size * executor.pipeline_parallel_size
