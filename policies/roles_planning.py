"""Role policies that plan: how many executors each phase needs, from what has arrived and what the predictor says.

Both count arrivals since they were last asked and take the next interval to be like the last (Dynamo's constant forecast).
They deal with context, generation and parked executors; mixed ones they leave as they are. Rates are means over executors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from random import Random
from typing import Any, NamedTuple

from .interfaces import RolePolicy
from .parameters import number
from .registry import register
from .routing_pools import kv_in_use, pending_prompts
from .views import ExecutorRow, FleetView
from .vocabulary import PS_PER_MS, PS_PER_S, ChangeRole, Request, Role


class _Idle(NamedTuple):
    """An executor as a predictor sees it that has nothing to do."""

    executor_id: int
    role: Role
    max_num_tokens: int
    step_time_ps: int
    running_requests: int = 0
    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    inflight_prefill_tokens: int = 0
    decode_kv_tokens: int = 0
    wire_requests: int = 0
    wire_tokens: int = 0


class Demand(NamedTuple):
    """What an interval brought: requests, and means over them. Output lengths are those of requests that ended in it, of
    which a policy may know; before any, the declared bounds.
    """

    num_requests: int
    prompt_tokens: float
    output_tokens: float


class _Planning(RolePolicy):
    name = ""

    def __init__(self, *, rng: Random, interval_s: float) -> None:
        super().__init__(rng=rng)
        self.interval_ps = round(number(self.name, "interval_s", interval_s, 1e-6) * PS_PER_S)
        self._arrived: list[tuple[int, int]] = []  # prompt tokens, max_tokens
        self._ended: list[int] = []  # output tokens

    def on_arrival(self, request: Request, fleet: FleetView) -> None:
        self._arrived.append((request.num_prompt_tokens, request.max_tokens))

    def on_ended(self, request: Request, num_output_tokens: int, fleet: FleetView) -> None:
        if num_output_tokens:
            self._ended.append(num_output_tokens)

    def take_demand(self) -> Demand | None:
        """Of the interval that is over, None if nobody arrived in it."""
        arrived, ended = self._arrived, self._ended
        self._arrived, self._ended = [], []
        if not arrived:
            return None
        n = len(arrived)
        outputs = ended or [most for _, most in arrived]
        return Demand(n, sum(prompt for prompt, _ in arrived) / n, sum(outputs) / len(outputs))


def _serving(fleet: FleetView) -> list[ExecutorRow]:
    """Healthy executors that may be given either role, those that have one before parked ones."""
    return [row for pool in (fleet.context, fleet.generation, fleet.parked) for row in pool.healthy_rows]


def prefill_time(row: ExecutorRow, num_tokens: float) -> float:
    """Picoseconds for a prompt, with nothing else to do."""
    return float(row.predictor.prefill_time(_idle(row), max(round(num_tokens), 1)))


def _idle(row: ExecutorRow) -> _Idle:
    return _Idle(int(row.executor_id), Role.GENERATION, int(row.max_num_tokens), int(row.step_time_ps))


def decode_time(row: ExecutorRow, batch: int, demand: Demand) -> float:
    """Picoseconds a decode step of `batch` requests, each half-way through its answer."""
    kv = round(batch * (demand.prompt_tokens + demand.output_tokens / 2))
    return float(row.predictor.step_time(_idle(row), batch, kv))


def most_requests(row: ExecutorRow, demand: Demand) -> int:
    """The decode batch that its limits and its KV allow, at least 1."""
    tokens = row.kv_blocks_total * row.tokens_per_block
    return max(1, min(int(row.max_batch_size), int(tokens / (demand.prompt_tokens + demand.output_tokens))))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


@register("rate_matching", kind="roles", source="TensorRT-LLM, rate matching of context and generation")
class RateMatching(_Planning):
    """The most of min(n * context rate, (N - n) * generation rate): n of the N executors compute prompts, the others generate.

    Rates in requests/s an executor: context 1 / prefill time of the mean prompt; generation batch / (output tokens *
    step time) with the largest batch. TensorRT-LLM rates a split by output tokens/s / (context GPUs * generation rate /
    context rate + generation GPUs), which is most where both rates meet; with N executors to divide, this is that. One
    executor, the least loaded of its pool, changes in an interval.
    """

    name = "rate_matching"

    def __init__(self, *, rng: Random, interval_s: float = 5.0) -> None:
        super().__init__(rng=rng, interval_s=interval_s)

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        demand = self.take_demand()
        rows = [*fleet.context.healthy_rows, *fleet.generation.healthy_rows]
        if demand is None or len(rows) < 3:
            return ()
        context = _mean(1 / prefill_time(row, demand.prompt_tokens) for row in rows)
        generation = _mean(self._generation_rate(row, demand) for row in rows)
        most = max(range(1, len(rows)), key=lambda n: min(n * context, (len(rows) - n) * generation))
        if most > len(fleet.context.healthy_rows):
            row = min(fleet.generation.healthy_rows, key=kv_in_use)
            return (ChangeRole(row.executor_id, Role.CONTEXT),)
        if most < len(fleet.context.healthy_rows):
            row = min(fleet.context.healthy_rows, key=pending_prompts)
            return (ChangeRole(row.executor_id, Role.GENERATION),)
        return ()

    def _generation_rate(self, row: ExecutorRow, demand: Demand) -> float:
        batch = most_requests(row, demand)
        return batch / (max(demand.output_tokens - 1, 1) * decode_time(row, batch, demand))


@register("planner", kind="roles", source="Dynamo planner, throughput-based floor and load-based scaling")
class Planner(_Planning):
    """Each phase gets max(floor, active +- 1) executors of the set; who is not needed is parked.

    Floor: ceil(tokens/s forecast / tokens/s an executor); prompt tokens over those of a prefill of the mean prompt, output
    tokens over those of the largest decode batch whose step meets the TPOT objective. +1 if the estimate (TTFT: queue +
    prefill of the mean prompt; TPOT: the next step) of every active executor misses the objective, -1 if every one is below
    `down` times it. Objectives are `ttft_ms` and `tpot_ms`, by default those of the last request that had one. Executors that
    are short go to the context phase first; one at home in a role is taken for it first.
    """

    name = "planner"

    def __init__(
        self,
        *,
        rng: Random,
        interval_s: float = 5.0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        down: float = 0.5,
    ) -> None:
        super().__init__(rng=rng, interval_s=interval_s)
        self.down = number(self.name, "down", down, 0, 1)
        self._ttft = None if ttft_ms is None else number(self.name, "ttft_ms", ttft_ms) * PS_PER_MS
        self._tpot = None if tpot_ms is None else number(self.name, "tpot_ms", tpot_ms) * PS_PER_MS
        self._asked_ttft, self._asked_tpot = self._ttft, self._tpot

    def on_arrival(self, request: Request, fleet: FleetView) -> None:
        super().on_arrival(request, fleet)
        if self._ttft is None and request.ttft_objective is not None:
            self._asked_ttft = request.ttft_objective
        if self._tpot is None and request.tpot_objective is not None:
            self._asked_tpot = request.tpot_objective

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        demand = self.take_demand()
        rows = _serving(fleet)
        if demand is None or len(rows) < 2:
            return ()
        context = max(self._context_floor(rows, demand), self._by_load(
            fleet.context.healthy_rows, self._asked_ttft, lambda row: _ttft(row, demand)
        ))  # fmt: skip
        generation = max(self._generation_floor(rows, demand), self._by_load(
            fleet.generation.healthy_rows, self._asked_tpot, lambda row: row.predictor.step_time(row)
        ))  # fmt: skip
        context = min(max(context, 1), len(rows) - 1)
        generation = min(max(generation, 1), len(rows) - context)
        return _deal(rows, {Role.CONTEXT: context, Role.GENERATION: generation}, fleet)

    def _context_floor(self, rows: Sequence[ExecutorRow], demand: Demand) -> int:
        """Prompts of the interval, one after the other, over the interval."""
        return ceil(demand.num_requests * _mean(prefill_time(r, demand.prompt_tokens) for r in rows) / self.interval_ps)

    def _generation_floor(self, rows: Sequence[ExecutorRow], demand: Demand) -> int:
        def per_token(row: ExecutorRow) -> float:
            batch = self._largest_batch(row, demand)
            return decode_time(row, batch, demand) / batch

        return ceil(demand.num_requests * demand.output_tokens * _mean(map(per_token, rows)) / self.interval_ps)

    def _largest_batch(self, row: ExecutorRow, demand: Demand) -> int:
        """The most requests a step of which meets the TPOT objective, by bisection: more take longer. At least 1."""
        least, most = 1, most_requests(row, demand)
        while self._asked_tpot is not None and least < most:
            middle = (least + most + 1) // 2
            if decode_time(row, middle, demand) <= self._asked_tpot:
                least = middle
            else:
                most = middle - 1
        return most

    def _by_load(self, rows: Sequence[ExecutorRow], objective: float | None, estimate: Any) -> int:
        """As many as there are, one more or one fewer."""
        if objective is None or not rows:
            return 0
        estimates = [float(estimate(row)) for row in rows]
        up = all(each > objective for each in estimates)
        down = all(each < self.down * objective for each in estimates)
        return len(rows) + up - down


def _ttft(row: ExecutorRow, demand: Demand) -> float:
    return float(row.predictor.queue_time(row)) + prefill_time(row, demand.prompt_tokens)


def _deal(rows: Sequence[ExecutorRow], wanted: dict[Role, int], fleet: FleetView) -> list[ChangeRole]:
    """Changes that give each role as many executors as it wants, and park the others.

    Whoever has the role keeps it, the busiest first; then come those that are at home in it, then the others, by id.
    """
    left = list(rows)
    changes = []
    for role, count in wanted.items():
        # those that the next role will keep are asked last
        ranked = sorted(left, key=lambda row: _fitness(row, role, fleet))
        for row in ranked[:count]:
            left.remove(row)
            if row.role is not role:
                changes.append(ChangeRole(row.executor_id, role))
    changes += [ChangeRole(row.executor_id, Role.PARKED) for row in left if row.role is not Role.PARKED]
    return changes


def _fitness(row: ExecutorRow, role: Role, fleet: FleetView) -> tuple[int, int, int]:
    if row.role is role:
        return (0, -int(row.active_requests), int(row.executor_id))
    is_at_home = fleet.home[row.executor_id] is role
    return (1 if row.role is Role.PARKED else 2, not is_at_home, int(row.executor_id))
