"""Leader mode: an executor by itself, without an orchestrator. Its first rank enqueues and awaits, its user maps ids."""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, overload

from msgspec.structs import replace

from ..core.config import ExecutorConfig
from ..core.events import Cancel, Report, Shutdown
from ..core.tables import StayRow, StepRow
from ..policies.vocabulary import FinishReason, Request
from .clock import monotonic_ns
from .executor_answers import Answers, Response
from .executor_inbox import Arrived, Asked, RankDown, Submitted
from .executor_leader import LeaderSession, ToUser
from .executor_rank import ExecutorRank
from .executor_spec import HardwareSpec, Roster, SpecError, check_spec
from .executor_tokens import check_tokens
from .launcher import LaunchError
from .mpi_world import MpiWorld
from .rank_record import RankInfo, SessionConfig
from .wire import Goodbye, Ready, TokenChunk, TokenChunks

_MAX_STATS: Final = 1000  # rows kept until someone asks


def join(spec: HardwareSpec, world: MpiWorld | None) -> tuple[Roster, MpiWorld]:
    """The roster, and the world it needs. Raises LaunchError for a world of another size, and as `check_spec`."""
    roster = check_spec(spec)
    world = MpiWorld() if world is None else world
    if world.size != roster.num_ranks:
        raise LaunchError(f"this cluster needs exactly {roster.num_ranks} ranks, the MPI world has {world.size}")
    return roster, world


class Closing(ABC):
    """`with`: an orderly shutdown at the end, one that waits for nothing after an exception."""

    @abstractmethod
    def shutdown(self, drain: bool = True) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(drain=kind is None)


class Executor(Closing):
    """Leader mode: this process as a rank of its executor. The first rank of each executor enqueues and awaits.

    Serves context-only, generation-only and whole requests, whatever its role; the role is a word for policies.
    Raises SpecError, TransportError, ModelError or LaunchError for what cannot be.
    """

    def __init__(self, spec: HardwareSpec, world: MpiWorld | None = None) -> None:
        if not spec.leader_mode:
            raise SpecError("an Executor of one's own needs leader_mode; with an orchestrator, ranks call `serve`")
        self._roster, self._world = join(spec, world)
        origin = _agreed_origin(self._world)
        self._rank = ExecutorRank(self._world, self._roster)
        self.info: RankInfo = self._rank.load()
        self.executor_id: int = self._rank.executor
        self._answers = Answers()
        self._ids = itertools.count(1)
        self._steps: deque[StepRow] = deque(maxlen=_MAX_STATS)
        self._stays: deque[StayRow] = deque(maxlen=_MAX_STATS)
        self._report: Report | None = None
        self._failure: BaseException | None = None
        self._is_shut_down = False
        self._session: LeaderSession | None = None
        if self._rank.is_leader:
            self._await_followers()
            self._session = self._rank.open_session(
                SessionConfig(origin, sends_early=False), self._said, self._recorded
            )
        else:
            self._rank.post.send(self._leader, Ready(self.executor_id))
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Executor:
        return self

    @property
    def config(self) -> ExecutorConfig:
        return self._roster.configs[self.executor_id]

    def can_enqueue_requests(self) -> bool:
        """Whether this process is its executor's first rank, and not shut down."""
        return self._rank.is_leader and not self._is_shut_down

    def enqueue_request(self, request: Request, output_length: int | None = None) -> int:
        """The id to await. `output_length`: a scripted end, for models whose random weights never stop by themselves.

        Raises TokenError for missing or foreign token ids, RuntimeError where this rank cannot enqueue.
        """
        return self.enqueue_requests([request], [output_length])[0]

    def enqueue_requests(
        self, requests: Sequence[Request], output_lengths: Sequence[int | None] | None = None
    ) -> list[int]:
        """As `enqueue_request`, for many: all of them or, if one is refused here, none."""
        if not self.can_enqueue_requests():
            raise RuntimeError(
                f"rank {self._world.rank} of executor {self.executor_id} cannot enqueue: it is shut down, or not the "
                f"executor's first rank, which is rank {self._leader}"
            )
        self._check_alive()
        for each in requests:
            check_tokens(each, self._roster.shape.vocab_size)
        ids = []
        lengths = output_lengths if output_lengths is not None else [None] * len(requests)
        for each, length in zip(requests, lengths, strict=True):
            request_id = next(self._ids)
            self._answers.expect(request_id, each.streaming)
            self._rank.inbox.put(Submitted(self._roster.named(replace(each, id=request_id)), length))
            ids.append(request_id)
        return ids

    @overload
    def await_responses(self, ids: int | None = None, timeout: float | None = None) -> list[Response]: ...
    @overload
    def await_responses(self, ids: Sequence[int], timeout: float | None = None) -> list[list[Response]]: ...

    def await_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """See `Answers.await_responses`: one id, many, or None for any; `timeout` in seconds."""
        return self._answers.await_responses(ids, timeout)

    def num_responses_ready(self) -> int:
        return self._answers.num_ready()

    def cancel_request(self, request_id: int) -> None:
        """Its final response says `cancelled`, unless it ended before. Unknown ids are ignored."""
        self._rank.inbox.put(Asked(Cancel(request_id)))

    def get_latest_iteration_stats(self) -> list[StepRow]:
        """Batches (runs of equal steps) that ended since the last call."""
        return _taken(self._steps)

    def get_latest_request_stats(self) -> list[StayRow]:
        """Requests that ended here since the last call; a context-only one when its compute has."""
        return _taken(self._stays)

    def latest_report(self) -> Report | None:
        """The executor's load as it last reported it."""
        return self._report

    def shutdown(self, drain: bool = True) -> None:
        """`drain`: finish what is there, and wait until held KV was read or its lease ran out; else fail all of it.

        Followers wait for their leader. Raises what the executor failed with.
        """
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if self._rank.is_leader:
            self._rank.inbox.put(Asked(Shutdown(drain)))
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._rank.close()

    # ---- the executor's thread ---------------------------------------------------------------------------------------

    @property
    def _leader(self) -> int:
        return self._roster.leader_of(self.executor_id)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"executor {self.executor_id} has failed: {self._failure}") from self._failure

    def _await_followers(self) -> None:
        waiting = set(self._rank.followers)
        while waiting:
            for item in self._rank.inbox.take(None):
                if isinstance(item, RankDown) and item.rank in waiting:
                    raise RuntimeError(f"rank {item.rank} of executor {self.executor_id} could not start")
                if isinstance(item, Arrived) and isinstance(item.body, Ready):
                    waiting.discard(item.rank)

    def _run(self) -> None:
        try:
            session = self._session
            if session is None:
                self._rank.follow()
                return
            while not session.is_drained:
                session.wake(self._rank.inbox.take(session.timeout_s()))
            for rank in self._rank.followers:
                self._rank.post.send(rank, Goodbye())
        except BaseException as error:
            self._failure = error
            self._answers.broken(f"{type(error).__name__}: {error}")

    def _said(self, body: ToUser) -> None:
        if isinstance(body, TokenChunk | TokenChunks):
            for chunk in body.chunks if isinstance(body, TokenChunks) else (body,):
                self._answers.tokens(chunk.request_id, chunk.first_index, chunk.token_ids)
        elif isinstance(body, Report):
            self._report = body
        else:
            self._report = body.report or self._report
            reason = FinishReason.ERROR if body.error is not None else body.finish_reason
            self._answers.ended(body.request_id, reason, body.error, body.context_phase_params)

    def _recorded(self, row: Any) -> None:
        if isinstance(row, StepRow):
            self._steps.append(row)
        elif isinstance(row, StayRow):
            self._stays.append(row)


def _taken(rows: deque[Any]) -> list[Any]:
    taken = []
    while rows:
        taken.append(rows.popleft())
    return taken


def _agreed_origin(world: MpiWorld) -> int:
    """Rank 0's reading, on every rank."""
    buffer = bytearray(monotonic_ns().to_bytes(8, "big"))
    world.data.Bcast(buffer, root=0)
    return int.from_bytes(buffer, "big")
