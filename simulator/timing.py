"""Where a simulated cluster takes its times from: models, or the record of a hardware run.

The drivers ask for instants, never for durations they would add up themselves, so that a recorded run can be given back
exactly as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from ..core.commands import RunSteps, ServeKv
from ..core.cost import UNIT_BITS, CostModel, StepFeatures
from ..core.epoch_times import EpochTimes
from ..core.measured_cost import MeasuredCost
from ..core.overheads import NO_GAPS, LaunchGaps, MessageLatency


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

    def message_arrives(self, sender: int, receiver: int, now: int) -> tuple[int, int]:
        """When the next message from `sender` arrives, and its place among the messages of that instant."""
        ...

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        """When a wake-up asked for `at` is given, and its place among the messages of that instant."""
        ...

    def transfer_ends(self, source: int, command: ServeKv) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """When the reader has its KV and when the source is rid of its pin, each with its place among the messages of
        that instant; None to let the links decide.
        """
        ...


class ModelTiming:
    """Step times from a cost model per executor, constant message latencies, optional noise of the steps.

    `gaps`, by executor: what the first step of an epoch takes more than such a step takes inside one. `num_outside` of
    `num_epochs` began outside what the cost model was measured for. Noise is one factor per epoch, keyed by (seed,
    executor, number of the epoch there), so that it does not depend on the order in which executors run: 1 + jitter * z,
    z uniform in [-sqrt(3), sqrt(3)] (standard deviation `jitter`).
    """

    may_be_late = True

    def __init__(
        self,
        costs: Mapping[int, CostModel],
        message_latency: int | MessageLatency,
        jitter: float = 0.0,
        seed: int = 0,
        gaps: Mapping[int, LaunchGaps] | None = None,
    ) -> None:
        if isinstance(message_latency, int):
            message_latency = MessageLatency.same(message_latency)
        self.num_epochs = 0
        self.num_outside = 0
        self._costs = costs
        self._latency = message_latency
        self._jitter = jitter
        self._seed = seed
        self._gaps = gaps or {}
        self._latencies: dict[tuple[int, int], int] = {}
        self._open: dict[int, EpochTimes] = {}
        self._began: dict[int, int] = {}
        self._before: dict[int, tuple[str, int]] = {}  # what the last epoch was, and when it ended

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        if run.first_step > 1:
            self._began[executor] += self._gaps.get(executor, NO_GAPS).continued
            return
        chunks = tuple([(chunk.start, chunk.length, chunk.is_last) for chunk in run.chunks])
        features = StepFeatures(run.num_decodes, run.num_kv_tokens, chunks)
        factor = self._factor(executor, run.epoch) if self._jitter else 1 << UNIT_BITS
        cost = self._costs[executor]
        self.num_epochs += 1
        if isinstance(cost, MeasuredCost) and not cost.covers(features):
            self.num_outside += 1
        self._open[executor] = EpochTimes(cost, features, factor)
        self._began[executor] = now + self._gap(executor, run, now)

    def _gap(self, executor: int, run: RunSteps, now: int) -> int:
        gaps = self._gaps.get(executor, NO_GAPS)
        if gaps is NO_GAPS:
            return 0
        before, ended = self._before.get(executor, ("idle", now))
        self._before[executor] = ("chunk" if run.chunks else "decode", now)
        return gaps.of("idle" if ended < now else before, bool(run.chunks), len(run.joined), len(run.left))

    def _factor(self, executor: int, epoch: int) -> int:
        key = hashlib.blake2b(f"{self._seed}/{executor}/{epoch}".encode(), digest_size=8).digest()
        uniform = int.from_bytes(key, "big") / 2**64
        return round((1 + self._jitter * (2 * uniform - 1) * 3**0.5) * (1 << UNIT_BITS))

    def end_of_step(self, executor: int, k: int) -> int:
        at = self._began[executor] + self._open[executor].end_of(k)
        if executor in self._before:
            self._before[executor] = (self._before[executor][0], at)  # the last one asked for is the one that comes
        return at

    def step_by(self, executor: int, done: int, at: int, last: int) -> int:
        return max(done + 1, self._open[executor].step_by(at - self._began[executor], last))

    def message_arrives(self, sender: int, receiver: int, now: int) -> tuple[int, int]:
        latency = self._latencies.get((sender, receiver))
        if latency is None:
            latency = self._latencies[sender, receiver] = max(1, self._latency.of(sender, receiver))
        return now + latency, sender

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        return max(at, now + 1), core

    def transfer_ends(self, source: int, command: ServeKv) -> None:
        return None
