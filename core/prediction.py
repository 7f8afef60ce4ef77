"""Predictions from a cost profile: tables of step times, small enough to travel with a cluster's configuration.

A policy that predicts asks thousands of executors at once, which no exact cost model answers fast enough. So the model is
sampled once: a prompt's time by its length, a decode step's by its batch; both interpolated, and linear in the KV read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from msgspec import Struct

from ..policies.prediction import decode_tokens, pending_prompt_tokens
from .cost import UNIT_BITS, CostModel, StepFeatures

_MOST_TOKENS: Final = 1 << 24
_MOST_TIME: Final = 1 << 62  # picoseconds, seven weeks: what an event log can hold, and no prompt is waited for
_FAR: Final = 8192  # tokens before a chunk, or of KV, at which slopes are taken


class StepTimes(Struct, frozen=True):
    """Sampled times of one executor in picoseconds; knots ascend.

    `prefill` at `prefill_knots` prompt tokens, chunked; `prefill_pair` more for each (token, cached token before it).
    `decode` at `decode_knots` requests without KV; `decode_kv` more for each KV token read. `full_token`: a prompt token
    in a full step.
    """

    prefill_knots: tuple[int, ...]
    prefill: tuple[int, ...]
    prefill_pair: float
    decode_knots: tuple[int, ...]
    decode: tuple[int, ...]
    decode_kv: float
    full_token: float


class LinkTimes(Struct, frozen=True):
    """One direction between two executors: the rate of one transfer alone, and picoseconds that take none of it."""

    bytes_per_s: float
    latency: int = 0
    token_latency: float = 0.0  # for each KV token


class PredictionConfig(Struct, frozen=True):
    """`of_executor`: which of `tables` is each executor's, in order of their ids. A transfer: latency + tokens x rate.

    `links` are, for k kinds of executors, from kind i to kind j at i * k + j within a domain, and all of them once more between
    domains; None where no KV travels. `link_kind_of` is the kind of each executor.
    """

    tables: tuple[StepTimes, ...]
    of_executor: tuple[int, ...]
    transfer_latency: int = 0  # picoseconds
    transfer_token: float = 0.0  # picoseconds a KV token
    links: tuple[LinkTimes | None, ...] = ()
    link_kind_of: tuple[int, ...] = ()
    kv_bytes_per_token: int = 0


def step_times(cost: CostModel, max_num_tokens: int, max_batch_size: int) -> StepTimes:
    """Sample `cost` for an executor of these limits: eight knots an octave."""

    def chunk(before: int, length: int) -> int:
        return cost.step_time(StepFeatures(0, 0, ((before, length, True),))) >> UNIT_BITS

    def prompt(length: int) -> int:
        """Full chunks, whose times grow evenly with what lies before them, and what is left."""
        full, rest = divmod(length, max_num_tokens)
        total = full * first + slope * (full * (full - 1) // 2)
        return round(total) + (chunk(full * max_num_tokens, rest) if rest else 0)

    first = chunk(0, max_num_tokens)
    slope = (chunk(16 * max_num_tokens, max_num_tokens) - first) / 16
    lengths = sorted({round(2 ** (i / 8)) for i in range(8 * 24 + 1)} | {max_num_tokens, max_num_tokens + 1})
    batches = sorted(
        {round(2 ** (i / 8)) for i in range(8 * 24 + 1) if 2 ** (i / 8) <= max_batch_size} | {max_batch_size}
    )
    width = min(max_num_tokens, 1024)
    prompts = [(n, time) for n in lengths if n <= _MOST_TOKENS and (time := prompt(n)) < _MOST_TIME]

    def decode(batch: int, kv: int) -> int:
        return cost.step_time(StepFeatures(batch, kv)) >> UNIT_BITS

    return StepTimes(
        prefill_knots=tuple(n for n, _ in prompts),
        prefill=tuple(time for _, time in prompts),
        prefill_pair=max(chunk(_FAR, width) - chunk(0, width), 0) / (_FAR * width),
        decode_knots=tuple(batches),
        decode=tuple(decode(batch, 0) for batch in batches),
        decode_kv=max(decode(batches[-1], batches[-1] * _FAR) - decode(batches[-1], 0), 0) / (batches[-1] * _FAR),
        full_token=first / max_num_tokens,
    )


class TablePredictor:
    """Answers a policy's questions (`policies.prediction.Predictor`) from the tables."""

    def __init__(self, config: PredictionConfig, executors: Sequence[int]) -> None:
        """`executors`: the ids, in the order of `config.of_executor`."""
        self._config = config
        self._tables = [_Table(times) for times in config.tables]
        self._table_of = {e: self._tables[i] for e, i in zip(executors, config.of_executor, strict=True)}
        self._pools: dict[Any, list[tuple[_Table, Any]]] = {}  # of a pool of arrays: its tables, and whose they are

    def prefill_time(self, executors: Any, num_tokens: Any, num_cached: Any = 0) -> Any:
        return self._each(executors, lambda table, n, c: table.prefill(n) + table.times.prefill_pair * n * c,
                          num_tokens, num_cached)  # fmt: skip

    def queue_time(self, executors: Any) -> Any:
        return self._each(executors, lambda table, n: table.times.full_token * n, pending_prompt_tokens(executors))

    def step_time(self, executors: Any, num_requests: int = 0, num_kv_tokens: int = 0) -> Any:
        x = executors
        requests = x.running_requests + x.queued_requests + x.wire_requests + num_requests
        tokens = decode_tokens(x) + num_kv_tokens
        return self._each(x, lambda table, n, kv: table.decode(n) + table.times.decode_kv * kv, requests, tokens)

    def transfer_time(self, num_tokens: Any) -> Any:
        return self._config.transfer_latency + self._config.transfer_token * num_tokens

    def _each(self, executors: Any, ask: Any, *values: Any) -> Any:
        """`ask` of each executor's own table; `values` are numbers, or arrays over the executors."""
        if not hasattr(executors, "vectorised"):
            return ask(self._table_of[executors.executor_id], *values)
        groups = self._pools.get(executors)
        if groups is None:
            tables = [self._table_of[int(e)] for e in executors.executor_id]
            groups = [
                (table, np.array([i for i, its in enumerate(tables) if its is table]))
                for table in dict.fromkeys(tables)
            ]
            self._pools[executors] = groups
        if len(groups) == 1:
            return ask(groups[0][0], *values)
        answers = np.empty(len(executors))
        for table, rows in groups:
            answers[rows] = ask(table, *(v[rows] if isinstance(v, np.ndarray) else v for v in values))
        return answers


class _Table:
    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self._prefill = _Curve(times.prefill_knots, times.prefill)
        self._decode = _Curve(times.decode_knots, times.decode)

    def prefill(self, num_tokens: Any) -> Any:
        return self._prefill(num_tokens)

    def decode(self, num_requests: Any) -> Any:
        return self._decode(num_requests)


class _Curve:
    """Linear between knots, the last slope beyond them; below the first knot its value. Of numbers and of arrays."""

    def __init__(self, knots: Sequence[int], values: Sequence[int]) -> None:
        self._knots = [float(x) for x in knots]
        self._values = [float(y) for y in values]
        pairs = list(zip(self._knots, self._values))
        self._slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(pairs)] or [0.0]
        self._arrays = (np.array(self._knots), np.array(self._values), np.array(self._slopes))

    def __call__(self, x: Any) -> Any:
        last = len(self._slopes) - 1
        if isinstance(x, np.ndarray):
            knots, values, slopes = self._arrays
            places = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, last)
            return values[places] + slopes[places] * (np.maximum(x, knots[0]) - knots[places])
        i = min(max(bisect_right(self._knots, x) - 1, 0), last)
        return self._values[i] + self._slopes[i] * (max(x, self._knots[0]) - self._knots[i])
