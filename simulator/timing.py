"""Where a simulated cluster takes its times from: models, or the record of a hardware run.

The drivers ask for instants, never for durations they would add up themselves, so that a recorded run can be given back
exactly as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from ..core.commands import RunSteps, ServeKv
from ..core.cost import UNIT_BITS, CostModel, StepFeatures, end_of_step, steps_by


class Timing(Protocol):
    """All instants in picoseconds of the simulation's clock."""

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        """`run` opens an epoch (its first step) at `now`."""
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
    """Step times from a cost model per executor, a constant message latency, optional noise of the steps.

    Noise is one factor per epoch, keyed by (seed, executor, number of the epoch there), so that it does not depend on the
    order in which executors run: 1 + jitter * z, z uniform in [-sqrt(3), sqrt(3)] (standard deviation `jitter`).
    """

    def __init__(
        self, costs: Mapping[int, CostModel], message_latency: int, jitter: float = 0.0, seed: int = 0
    ) -> None:
        self._costs = costs
        self._latency = max(1, message_latency)
        self._jitter = jitter
        self._seed = seed
        self._open: dict[int, tuple[CostModel, StepFeatures, int, int]] = {}

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        chunks = tuple((chunk.start, chunk.length, chunk.is_last) for chunk in run.chunks)
        features = StepFeatures(run.num_decodes, run.num_kv_tokens, chunks)
        factor = self._factor(executor, run.epoch) if self._jitter else 1 << UNIT_BITS
        self._open[executor] = (self._costs[executor], features, now, factor)

    def _factor(self, executor: int, epoch: int) -> int:
        key = hashlib.blake2b(f"{self._seed}/{executor}/{epoch}".encode(), digest_size=8).digest()
        uniform = int.from_bytes(key, "big") / 2**64
        return round((1 + self._jitter * (2 * uniform - 1) * 3**0.5) * (1 << UNIT_BITS))

    def end_of_step(self, executor: int, k: int) -> int:
        model, features, start, factor = self._open[executor]
        return start + end_of_step(model, features, k, factor)

    def step_by(self, executor: int, done: int, at: int, last: int) -> int:
        model, features, start, factor = self._open[executor]
        return max(done + 1, steps_by(model, features, at - start, last, factor))

    def message_arrives(self, sender: int, receiver: int, now: int) -> tuple[int, int]:
        return now + self._latency, sender

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        return max(at, now + 1), core

    def transfer_ends(self, source: int, command: ServeKv) -> None:
        return None
