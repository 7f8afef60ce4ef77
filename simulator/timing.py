"""Where a simulated cluster takes its times from: models, or the record of a hardware run.

The drivers ask for instants, never for durations they would add up themselves, so that a recorded run can be given back
exactly as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from ..core.commands import ORCHESTRATOR, RunSteps, ServeKv
from ..core.cost import UNIT_BITS, CostModel, StepFeatures
from ..core.epoch_times import EpochTimes
from ..core.launch_gaps import gap_of
from ..core.measured_cost import MeasuredCost
from ..core.overheads import NO_GAPS, LaunchGaps, MessageLatency, num_token_ids


class Timing(Protocol):
    """All instants in picoseconds of the simulation's clock."""

    may_be_late: bool  # whether what nobody waits for may be given to cores after its instant, with that instant

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        """`run` opens an epoch (its first step) at `now`, or goes on with the open one (`first_step` > 1)."""
        ...

    def end_of_step(self, executor: int, k: int) -> int:
        """When step k of the open epoch ends."""
        ...

    def step_by(self, executor: int, done: int, at: int, last: int) -> int:
        """The least step k in (done, last] of the open epoch that ends at or after `at`, or `last`."""
        ...

    def message_arrives(self, sender: int, receiver: int, now: int, message: object) -> tuple[int, int]:
        """When `message`, the next one from `sender`, arrives, and its place among the messages of that instant.

        Not before any that the same sender sent there earlier.
        """
        ...

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        """When a wake-up asked for `at` is given, and its place among the messages of that instant."""
        ...

    def transfer_ends(self, source: int, command: ServeKv) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """When the reader has its KV and when the source is rid of its pin, each with its place among the messages of
        that instant; None to let the links decide.
        """
        ...


class _Clock:
    """One executor: its open epoch and when that began, the last end of a step that was asked for, what ran before.

    `decode_error`, `chunk_error`: factors in 2^-20, the same through a run, of steps without and with chunks.
    """

    def __init__(self, cost: CostModel, gaps: LaunchGaps, decode_error: int, chunk_error: int) -> None:
        self.cost = cost
        self.measured = cost if isinstance(cost, MeasuredCost) else None
        self.gaps = gaps
        self.decode_error = decode_error
        self.chunk_error = chunk_error
        self.epoch = EpochTimes(cost, StepFeatures(0, 0), 1 << UNIT_BITS)
        self.began = 0
        self.ended = 0
        self.factor = 1 << UNIT_BITS  # of the time of the epoch's steps
        # when the first of the steps with chunks began that have followed each other since; after a rest so much earlier as
        # is left of the load before it
        self._loaded_since = 0
        self._before = "idle"
        self._num_leaving = 0  # transfers of KV from here that are under way
        self._leaving_since = 0
        self._kept = 0  # of the rest since `ended`, how long KV left, up to the last end of all transfers

    def gap(self, run: RunSteps, now: int) -> int:
        """What lies between the plan before and `run`, which is to begin at `now`; `factor` is set to that of its steps."""
        gaps = self.gaps
        if gaps is NO_GAPS:
            return 0
        before = "idle" if self.ended < now else self._before
        if gaps.millionths_under_load:
            if before != "chunk" or not run.chunks:
                rested_behind_chunks = before == "idle" and self._before == "chunk"
                self._loaded_since = now - (self._load_left(now) if rested_behind_chunks and run.chunks else 0)
            self.factor = (1 << UNIT_BITS) * (1_000_000 + gaps.slower(now - self._loaded_since)) // 1_000_000
            self._kept = 0
        self.ended = now
        self._before = "chunk" if run.chunks else "decode"
        by_kernels = False
        if run.chunks and gaps.kernels and self.measured is not None:
            num_tokens = sum([chunk.length for chunk in run.chunks])
            by_kernels = self.measured.runs_by_kernels(run.num_decodes, len(run.chunks), num_tokens)
        return gap_of(gaps, before, bool(run.chunks), len(run.joined), len(run.left), run.num_decodes, by_kernels)

    def _load_left(self, now: int) -> int:
        """Picoseconds of load behind a rest from `ended` to `now`."""
        kept = self._kept + (self._rested_since_kv_leaves(now) if self._num_leaving else 0)
        return self.gaps.left_after_rest(self.ended - self._loaded_since, now - self.ended - kept)

    def _rested_since_kv_leaves(self, now: int) -> int:
        return max(0, now - max(self._leaving_since, self.ended))

    def kv_leaves(self, now: int) -> None:
        if not self._num_leaving:
            self._leaving_since = now
        self._num_leaving += 1

    def kv_left(self, now: int) -> None:
        self._num_leaving -= 1
        if not self._num_leaving:
            self._kept += self._rested_since_kv_leaves(now)


class ModelTiming:
    """Step times from a cost model per executor, message latencies, optional noise of the steps.

    `gaps`, by executor: what the first step of an epoch takes more than such a step takes inside one. `num_outside` of
    `num_epochs` began outside what the cost model was measured for. Noise is two factors. One is drawn for each epoch,
    keyed by (seed, executor, number of the epoch there), so that it does not depend on the order in which executors run:
    1 + jitter * z, z uniform in [-sqrt(3), sqrt(3)] (standard deviation `jitter`). The other, 1 + error * z, is drawn once
    for each executor, of its epochs with chunks and of the others: hardware scatters, a cost model is off all along.
    """

    may_be_late = True

    def __init__(
        self,
        costs: Mapping[int, CostModel],
        message_latency: int | MessageLatency,
        jitter: float = 0.0,
        seed: int = 0,
        gaps: Mapping[int, LaunchGaps] | None = None,
        error: float = 0.0,
    ) -> None:
        if isinstance(message_latency, int):
            message_latency = MessageLatency.same(message_latency)
        self.num_epochs = 0
        self.num_outside = 0
        self._jitter = jitter
        self._is_noisy = jitter > 0 or error > 0
        self._seed = seed
        self._into, self._from, self._between = (
            max(1, at)
            for at in (message_latency.into_executor, message_latency.from_executor, message_latency.between_executors)
        )
        self._prompt_token = message_latency.prompt_token
        self._arrived: dict[int, int] = {}  # by executor, the arrival of what it was sent last; used with prompts only
        gaps = gaps or {}
        self._clocks = {
            executor: _Clock(
                cost,
                gaps.get(executor, NO_GAPS),
                self._factor(error, f"{executor}/decode"),
                self._factor(error, f"{executor}/chunks"),
            )
            for executor, cost in costs.items()
        }
        self.load_drains = any(of_one.load_drain > 0 for of_one in gaps.values())  # and is to be told of transfers

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        clock = self._clocks[executor]
        if run.first_step > 1:
            clock.began += clock.gaps.continued
            return
        chunks: tuple[tuple[int, int, bool], ...] = ()
        if run.chunks:
            chunks = tuple([(chunk.start, chunk.length, chunk.is_last) for chunk in run.chunks])
        features = StepFeatures(run.num_decodes, run.num_kv_tokens, chunks, run.num_shared_kv)
        factor = self._noise(clock, executor, run) if self._is_noisy else 1 << UNIT_BITS
        self.num_epochs += 1
        if clock.measured is not None and not clock.measured.covers(features):
            self.num_outside += 1
        clock.began = now + clock.gap(run, now)
        clock.epoch = EpochTimes(clock.cost, features, factor * clock.factor >> UNIT_BITS)

    def _noise(self, clock: _Clock, executor: int, run: RunSteps) -> int:
        factor = clock.chunk_error if run.chunks else clock.decode_error
        if self._jitter:
            factor = factor * self._factor(self._jitter, f"{executor}/{run.epoch}") >> UNIT_BITS
        return factor

    def _factor(self, share: float, name: str) -> int:
        key = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        uniform = int.from_bytes(key, "big") / 2**64
        return round((1 + share * (2 * uniform - 1) * 3**0.5) * (1 << UNIT_BITS))

    def end_of_step(self, executor: int, k: int) -> int:
        clock = self._clocks[executor]
        at = clock.ended = clock.began + clock.epoch.end_of(k)  # the last one asked for is the one that comes
        return at

    def step_by(self, executor: int, done: int, at: int, last: int) -> int:
        clock = self._clocks[executor]
        return max(done + 1, clock.epoch.step_by(at - clock.began, last))

    def message_arrives(self, sender: int, receiver: int, now: int, message: object) -> tuple[int, int]:
        if sender == ORCHESTRATOR:
            if self._prompt_token:
                return self._in_order(receiver, now + self._into + num_token_ids(message) * self._prompt_token), sender
            return now + self._into, sender
        if receiver == ORCHESTRATOR:
            return now + self._from, sender
        if self._prompt_token:
            return self._in_order(receiver, now + self._between), sender
        return now + self._between, sender

    def _in_order(self, executor: int, at: int) -> int:
        """When what would arrive at `at` is given to `executor`: not before what it was sent earlier.

        By whomever: an executor opens its messages one after another. So whoever was told of a request there, and asks for
        its KV, does not get ahead of the request itself.
        """
        at = self._arrived[executor] = max(at, self._arrived.get(executor, 0))
        return at

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        return max(at, now + 1), core

    def transfer_ends(self, source: int, command: ServeKv) -> None:
        return None

    def kv_leaves(self, source: int, now: int) -> None:
        """A transfer from `source` begins; `kv_left` is to be told of its end. To be called where `load_drains`."""
        self._clocks[source].kv_leaves(now)

    def kv_left(self, source: int, now: int) -> None:
        self._clocks[source].kv_left(now)
