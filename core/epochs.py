"""The epochs of one executor: how its steps are counted, and when each epoch began and ended.

An epoch is the life of a batch at constant rates. A plan may be made while committed steps before it are still running:
its epoch begins when the last of those ends, and the row of an epoch is written when the last of its own steps has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from .commands import Chunk, Record
from .tables import StepRow

BlockCounts = tuple[int, int, int, int, int, int]  # free, reserved, used, held, quarantined, cached


class Epoch:
    """`num_done` counts its steps that are done or certain; `first_step` is in the executor's running count of steps."""

    __slots__ = (
        "block_counts",
        "chunks",
        "decodes",
        "end_at",
        "first_step",
        "is_closed",
        "num_cached",
        "num_decodes",
        "num_done",
        "num_kv_tokens",
        "num_shared_kv",
        "num_tails",
        "number",
        "start_at",
    )

    def __init__(self, number: int, start_at: int, first_step: int, chunks: tuple[Chunk, ...], decodes: bool) -> None:
        self.number = number
        self.start_at = start_at
        self.end_at = start_at
        self.first_step = first_step
        self.num_done = 0
        self.num_tails = 0  # committed plans of it that have not ended
        self.is_closed = False
        self.chunks = chunks
        self.decodes = decodes
        # for its row, at its beginning
        self.num_decodes = 0
        self.num_kv_tokens = 0  # of those decodes
        self.num_shared_kv = 0
        self.block_counts: BlockCounts = (0, 0, 0, 0, 0, 0)
        self.num_cached = sum(chunk.start for chunk in chunks)


class Epochs:
    """`emit` takes the Record of each epoch that is over."""

    def __init__(self, executor: int, emit: Callable[[Any], object]) -> None:
        self.open: Epoch | None = None
        self.step_time = 0  # picoseconds a step of the last epoch that is over
        self._executor = executor
        self._emit = emit
        self._number = 0
        self._queued: deque[Epoch] = deque()  # behind committed steps that still run

    def begin(self, now: int, first_step: int, chunks: tuple[Chunk, ...], decodes: bool, is_behind: bool) -> Epoch:
        """Open an epoch in the place of the one that is open. `is_behind`: committed steps run before it."""
        self.close()
        self._number += 1
        self.open = Epoch(self._number, now, first_step, chunks, decodes)
        if is_behind:
            self._queued.append(self.open)
        return self.open

    def committed(self, epoch: Epoch, num_steps: int) -> int:
        """A plan of it will end after `num_steps` of its steps; how many are new."""
        new, epoch.num_done = num_steps - epoch.num_done, num_steps
        epoch.num_tails += 1
        return new

    def done(self, epoch: Epoch, num_steps: int, now: int) -> int:
        """A plan of it that was not committed has ended after `num_steps` of its steps; how many are new."""
        new, epoch.num_done = num_steps - epoch.num_done, num_steps
        epoch.end_at = now
        return new

    def tail_over(self, epoch: Epoch, now: int) -> None:
        """A committed plan of it has ended. If it was the epoch's last, the next epoch begins now."""
        epoch.end_at = now
        epoch.num_tails -= 1
        if epoch.is_closed and not epoch.num_tails:
            self._write(epoch)
            if self._queued:
                self._queued.popleft().start_at = now

    def close(self) -> None:
        """No plan of the open epoch follows."""
        epoch, self.open = self.open, None
        if epoch is not None:
            epoch.is_closed = True
            if not epoch.num_tails:
                self._write(epoch)

    def _write(self, epoch: Epoch) -> None:
        if not epoch.num_done:
            return
        self.step_time = (epoch.end_at - epoch.start_at) // epoch.num_done
        num_tokens = 0
        for chunk in epoch.chunks:
            num_tokens += chunk.length
        free, reserved, used, held, quarantined, cached = epoch.block_counts
        row = StepRow(
            self._executor,
            epoch.number,
            epoch.first_step,
            epoch.num_done,
            epoch.num_decodes,
            epoch.num_kv_tokens,
            len(epoch.chunks),
            num_tokens,
            epoch.num_cached,
            epoch.start_at,
            epoch.end_at,
            free,
            reserved,
            used,
            held,
            quarantined,
            cached,
            epoch.num_shared_kv,
        )
        self._emit(Record(row))
