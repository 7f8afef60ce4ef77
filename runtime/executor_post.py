"""The post office of one rank: bodies go out as numbered frames, frames come in as items of an inbox."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from .clock import Clock
from .executor_inbox import Arrived, Inbox, RankDown
from .progress import Progress, ProgressError
from .wire import Body, WireEnd, WireError

if TYPE_CHECKING:
    from .mpi_world import MpiWorld


class Post:
    """`send` may be called from any thread; what comes in is put into `inbox`, in order per sender."""

    def __init__(self, world: MpiWorld, inbox: Inbox, silence_limit_s: float | None = 30.0) -> None:
        self.rank = world.rank
        self._world = world
        self.progress = Progress(world, self._opened, self._lost, silence_limit_s=silence_limit_s)
        self._inbox = inbox
        self._wire = WireEnd(world.rank, Clock().read)
        self._sealing = threading.Lock()  # the numbers of a pair must leave in their order
        self._started = False

    def start(self) -> None:
        """Begin to make MPI progress. Harmless if called twice."""
        if not self._started:
            self._started = True
            self.progress.start()

    def send(self, rank: int, body: Body) -> bool:
        """False: the rank is gone. A message to this very rank goes straight into the inbox. Raises WireError."""
        if rank == self.rank:
            self._inbox.put(Arrived(rank, body))
            return True
        with self._sealing:
            try:
                return self.progress.send(rank, self._wire.seal(rank, body))
            except ProgressError:
                return False

    def give_up(self, patience_s: float) -> None:
        """As `close`, but wait for nobody longer than that: a rank that is busy will find the others gone."""
        try:
            self.progress.stop(timeout_s=patience_s, goodbye_wait_s=patience_s)
        finally:
            lost = bool(self.progress.down_ranks or self.progress.unheard_ranks)
            self._world.finalize(lost_ranks=lost)

    def close(self) -> None:
        """End progress and leave MPI, after everybody has said what they had to say.

        MPI_Finalize sometimes waits for ever where two ranks died within milliseconds (Open MPI 5.0.11, ULFM), though
        their deaths are known to all: after a death it is skipped, on all ranks alike.
        """
        self.progress.stop()
        self._world.finalize(lost_ranks=bool(self.progress.down_ranks))

    def _opened(self, rank: int, frame: bytes) -> None:
        try:
            body = self._wire.open(rank, frame).body
        except WireError as error:
            print(f"disagg: rank {self.rank} takes rank {rank} for lost: {error}", file=sys.stderr, flush=True)
            self._inbox.put(RankDown(rank, str(error)))
            return
        self._inbox.put(Arrived(rank, body))

    def _lost(self, rank: int) -> None:
        self._inbox.put(RankDown(rank))
