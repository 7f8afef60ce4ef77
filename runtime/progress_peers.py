"""Which ranks of the world are alive: what ULFM says, what silence says, and who has said goodbye."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from .mpi_world import MpiWorld
from .progress_types import LIFE_CHANNEL, PeerDownError, ProgressError

_LATE_DATA_S: Final = 1.0  # data sent before a goodbye may complete after it


class PeerWatch(ABC):
    """Part of `Progress`; all of it runs on the progress thread, but for what is said to be read by others."""

    def __init__(self, world: MpiWorld, on_peer_down: Callable[[int], None], silence_limit_s: float | None) -> None:
        from mpi4py import MPI

        if silence_limit_s is not None and silence_limit_s <= 0:
            raise ValueError(f"silence_limit_s must be positive or None, not {silence_limit_s}")
        self._mpi = MPI
        self._world = world
        self._control = world.control
        self._down_handlers: list[Callable[[int], None]] = [on_peer_down]
        self._silence_limit_s = silence_limit_s
        self._ping_interval_s = 0.5 if silence_limit_s is None else min(0.5, silence_limit_s / 5)
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        self._down: set[int] = set()  # other threads may look
        self._silent: set[int] = set()  # those of `_down` that MPI does not know to be dead
        self._departed: dict[int, float] = {}  # when they said goodbye
        self._num_acknowledged = 0  # dead ranks, in ULFM's own list
        self._said_goodbye = False
        now = time.monotonic()
        self._heard = dict.fromkeys(self._peers, now)
        self._last_watch = self._last_ping = now
        self.failure: BaseException | None = None

    @abstractmethod
    def _begin_send(self, rank: int, channel: int, frame: bytes) -> None: ...

    @abstractmethod
    def _drop_frames(self, rank: int) -> None:
        """Forget frames from and for a dead rank."""

    @abstractmethod
    def _fail_transfers(self, rank: int, error: BaseException) -> None:
        """Fail what is in flight with `rank`."""

    def _watch(self, now: float) -> None:
        gap = now - self._last_watch
        self._last_watch = now
        for rank in self._failed_ranks():
            self._lose(rank, known_to_mpi=True)
        if now - self._last_ping >= self._ping_interval_s and not self._said_goodbye:
            self._last_ping = now
            for rank in self._peers:
                if rank not in self._down and rank not in self._departed:
                    self._begin_send(rank, LIFE_CHANNEL, b"")
        for rank, since in self._departed.items():
            if now - since > _LATE_DATA_S:
                self._fail_transfers(rank, PeerDownError(f"rank {rank} has said goodbye"))
        limit = self._silence_limit_s
        if limit is None:
            return
        if gap > limit / 2:  # this process itself was stopped for a while: the silence was ours
            for rank in self._heard:
                self._heard[rank] = now
        for rank in self._peers:
            if now - self._heard[rank] > limit and rank not in self._down and rank not in self._departed:
                self._lose(rank, known_to_mpi=False)

    def _failed_ranks(self) -> list[int]:
        """Ranks that ULFM has newly found dead, acknowledged."""
        if not self._world.fault_tolerant:
            return []
        failed = self._control.Get_failed()
        try:
            if failed.Get_size() == self._num_acknowledged:
                return []
            self._num_acknowledged = failed.Get_size()
            self._control.Ack_failed()
            whole = self._control.Get_group()
            ranks = self._mpi.Group.Translate_ranks(failed, None, whole)
            whole.Free()
        finally:
            failed.Free()
        return [int(rank) for rank in ranks if int(rank) not in self._down - self._silent]

    def _is_failure(self, error: Any) -> bool:
        codes = [getattr(self._mpi, f"ERR_{name}", None) for name in ("PROC_FAILED", "PROC_FAILED_PENDING", "REVOKED")]
        return error.Get_error_class() in codes

    def _see_error(self, rank: int, error: Any) -> None:
        if self._is_failure(error):
            self._lose(rank, known_to_mpi=True)
        else:
            self._keep(ProgressError(f"MPI failed towards rank {rank}: {error.Get_error_string()}"))
            self._lose(rank, known_to_mpi=False)

    def _lose(self, rank: int, known_to_mpi: bool) -> None:
        if known_to_mpi:
            self._silent.discard(rank)
        elif rank not in self._down:
            self._silent.add(rank)
        if rank in self._down:
            return
        self._down.add(rank)
        self._drop_frames(rank)
        self._fail_transfers(rank, PeerDownError(f"rank {rank} is down"))
        if rank in self._departed:  # it had said goodbye: its end is no news
            return
        for handler in list(self._down_handlers):
            self._call(handler, rank)

    # ---- callbacks ---------------------------------------------------------------------------------------------------

    def _call(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            callback(*args)
        except BaseException as error:
            self._keep(error)

    def _keep(self, error: BaseException) -> None:
        traceback.print_exception(error)
        if self.failure is None:
            self.failure = error
