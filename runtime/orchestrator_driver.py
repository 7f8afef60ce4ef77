"""Rank 0 of a cluster: obeys the orchestrator's core, and carries tokens and ends to whoever asked. Decides nothing.

A session is one core's life; ranks, weights and connections outlive it. What goes past the core (`enqueue`) is for
users who route by themselves, and for the warm-up; its ids never meet the core's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from ..core.commands import ORCHESTRATOR, Deliver, Dispatched, Drained, Record, Send, WakeAt
from ..core.event_log import FORMAT, LoggedCore, LogHeader
from ..core.events import (
    Arrive,
    Cancel,
    ContextStarted,
    Enqueue,
    FirstTokenOut,
    OrchestratorEvent,
    PeerDown,
    Report,
    Response,
    RoleChanged,
    Shutdown,
    Wake,
)
from ..core.orchestrator import OrchestratorCore
from ..policies.interfaces import PolicyError
from ..policies.vocabulary import FinishReason, Role
from .attempts import Attempts
from .clock import Clock
from .clock_offsets import ClockMeter
from .cluster_error import BROKE_CONTRACT, ClusterError, rank_error, session_error
from .executor_answers import PROMISED, Listener
from .executor_inbox import MESSAGE, Arrived, Asked, Inbox, RankDown, Submitted
from .executor_post import Post
from .executor_spec import Roster
from .mpi_world import MpiWorld
from .rank_record import DRAINED, RankInfo, RankRecord, session_config
from .session_record import SessionRecord, ShippedRecords
from .wire import (
    PROTOCOL_VERSION,
    Fault,
    Goodbye,
    Hello,
    HiddenStop,
    Ready,
    RecordsChunk,
    TokenChunk,
    TokenChunks,
)

FIRST_DIRECT_ID: Final = 1 << 40  # ids of requests that go past the core
_DRAIN_S: Final = 5.0  # held KV that nobody will read is given up after so long
_MAX_TOLD: Final = 4
_END_S: Final = 20.0
_GIVE_UP_S: Final = 1.0
_STALL_S: Final = 1.0
_WAKE: Final = Wake()
_encoder: Final = msgspec.msgpack.Encoder()
_info_decoder: Final = msgspec.json.Decoder(RankInfo)


class OrchestratorDriver:
    """Made on rank 0 while every other rank makes its `ExecutorRank`: it is collective.

    `start`, then sessions one after another (`open_session` … `close_session`), then `end`.
    """

    def __init__(self, world: MpiWorld, roster: Roster, listener: Listener) -> None:
        self.roster = roster
        self.clock = Clock()
        self.ranks: dict[int, RankInfo] = {}
        self.reports: dict[int, Report] = {}  # the latest of each executor
        self.on_deliver: Callable[[Deliver, int], None] | None = None  # with the instant
        self.listener = listener
        self._inbox = Inbox()
        self._post = Post(world, self._inbox, roster.spec.silence_limit_s)
        self.clocks = ClockMeter(self._post.progress)
        self._core: Any = None
        self._events: list[tuple[int, int, OrchestratorEvent]] = []
        self._wake_at: int | None = None
        self._gone: set[int] = set()
        self._attempts = Attempts()
        self._direct: dict[int, int] = {}  # requests past the core that are out: their executor
        self._held: dict[int, int] = {}  # those whose context phase is done, while nobody was told to read their KV
        self._log: list[bytes] = []
        self._record = SessionRecord()
        self._shipped = ShippedRecords(roster)
        self._state = "closed"  # open, core drained, executors told, closed
        self._drain = True
        self._said: set[int] = set()  # executors that have drained
        self._drain_until = 0.0
        self._num_told = 0
        self._visits: dict[int, int] = {}  # executor-level ids that an executor owes an answer for: it
        self._live: set[int] = set()  # users' requests that have not ended
        self._quiet_since = 0.0  # the core had no event from then on
        self.is_starting = False  # while nobody may die: warm-up
        self._thread: threading.Thread | None = None
        self.roles: dict[int, Role] = {}  # that executors serve at present
        self.failure: BaseException | None = None

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Wait until every rank has loaded. Raises ClusterError with what went wrong on which rank."""
        self._post.start()
        waiting = set(self.roster.executor_of)
        while waiting:
            for rank, body in self._bodies(None, waiting):
                if isinstance(body, Ready):
                    if body.error is not None:
                        raise rank_error(f"rank {rank} of executor {body.executor} cannot start: ", body.error)
                    self.ranks[rank] = info = _info_decoder.decode(body.info)
                    self._note_blocks(info)
                    waiting.discard(rank)
        self.clocks.measure_start(sorted(self.ranks))

    def _note_blocks(self, info: RankInfo) -> None:
        """An executor on a GPU sizes its KV by the memory that it finds."""
        config = self.roster.configs[info.executor]
        if info.num_blocks not in (0, config.num_blocks):
            self.roster = self.roster.with_config(msgspec.structs.replace(config, num_blocks=info.num_blocks))

    def open_session(self, record: bool = True) -> None:
        """Begin with a fresh core everywhere, at instant 0 of a new clock."""
        orchestrator = self.roster.spec.orchestrator
        config = session_config(record, sends_early=orchestrator.generation_binding != "at_context_done")
        self.clock = Clock(config.origin_ns)
        self._log, self._record, self._shipped = [], SessionRecord(), ShippedRecords(self.roster)
        self._core = OrchestratorCore(orchestrator)
        if record:
            self._core = LoggedCore(self._core, LogHeader(FORMAT, orchestrator=orchestrator), self._log.append)
        self._events, self._wake_at = [], None
        self._attempts, self._direct, self._held = Attempts(), {}, {}
        self.roles = {executor: config.role for executor, config in self.roster.configs.items()}
        self._visits, self._live, self._quiet_since = {}, set(), time.monotonic()
        waiting = set()
        for executor in self._living():
            leader, of_executor = self._leader(executor), self.roster.configs[executor]
            own = msgspec.structs.replace(
                config,
                origin_ns=config.origin_ns + self.clocks.start_offset_ns(leader),
                seed=of_executor.seed,
                reuses_blocks=of_executor.enable_block_reuse,
            )
            self._post.send(leader, Hello(PROTOCOL_VERSION, executor, _encoder.encode(own)))
            waiting.add(leader)
        while waiting:
            for rank, body in self._bodies(None, waiting):
                if isinstance(body, Ready):
                    waiting.discard(rank)
        for executor in self._gone:  # it died in an earlier session
            self._events.append((MESSAGE, executor, PeerDown(executor)))
        self._state, self._said, self._num_told = "open", set(), 0
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._thread.start()

    def close_session(self, drain: bool = True) -> SessionRecord:
        """Finish what is there, or fail it, and collect the records. Raises what the session failed with."""
        self._inbox.put(Asked(Shutdown(drain)))
        self.wait_closed()
        self._shipped.complete(self._record, self._log)
        return self._record

    def wait_closed(self, timeout_s: float | None = None) -> None:
        """Until the session is over. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self.failure is not None:
            raise self.failure

    def end(self) -> dict[int, RankRecord]:
        """Tell all ranks to end, take what they alone know, and leave MPI."""
        self._state = "closed"
        waiting = {rank for rank, executor in self.roster.executor_of.items() if executor not in self._gone}
        self.clocks.measure_end(sorted(waiting))
        for rank in sorted(waiting):
            self._post.send(rank, Goodbye())
        deadline = time.monotonic() + _END_S
        while waiting and time.monotonic() < deadline:
            for rank, body in self._bodies(deadline - time.monotonic(), waiting, deaths_matter=False):
                if isinstance(body, Goodbye) and body.reason != DRAINED:
                    waiting.discard(rank)
        self._post.close()
        return self._shipped.of_ranks()

    def abandon(self) -> None:
        """Give the cluster up after an error: tell all ranks to leave, and leave MPI with them."""
        self._state = "closed"
        self._post.start()
        for rank, executor in self.roster.executor_of.items():
            if executor not in self._gone:
                self._post.send(rank, Goodbye("the run was given up"))
        self._post.give_up(_GIVE_UP_S)

    # ---- any thread --------------------------------------------------------------------------------------------------

    def submit(self, submitted: Submitted) -> None:
        """Give a user's request to the core. Its id must be below FIRST_DIRECT_ID and is the user's to choose."""
        self._inbox.put(submitted)

    def cancel(self, request_id: int) -> None:
        self._inbox.put(Asked(Cancel(request_id)))

    def change_role(self, executor: int, role: Role) -> None:
        """An operator's order. What came of it is in the decisions; one that cannot be obeyed is recorded as refused."""
        self._inbox.put(Asked(RoleChanged(executor, role.value)))

    def num_stalled(self) -> int:
        """Users' requests that will never end by themselves: no executor has work, no timer runs, nothing has happened
        for a while. All of them are held by a policy.
        """
        is_busy = self._visits or self._direct or self._events or self._wake_at is not None or self._state != "open"
        if is_busy or time.monotonic() - self._quiet_since < _STALL_S:
            return 0
        return len(self._live)

    def _bodies(
        self, timeout_s: float | None, waiting: set[int], deaths_matter: bool = True
    ) -> Iterable[tuple[int, Any]]:
        """What arrives outside a session; ranks that die are taken out of `waiting`."""
        for item in self._inbox.take(timeout_s):
            if isinstance(item, RankDown):
                executor = self.roster.core_of(item.rank)
                self._gone.add(executor)
                for rank in self.roster.placements[executor].participant_ids:
                    waiting.discard(rank)
                if deaths_matter:
                    raise self._died(item.rank)
            elif isinstance(item, Arrived):
                if isinstance(item.body, RecordsChunk):
                    self._shipped.keep(item.rank, item.body)
                elif isinstance(item.body, Fault):
                    raise rank_error(f"executor {self.roster.core_of(item.rank)}: ", item.body.error)
                else:
                    yield item.rank, item.body

    def _died(self, rank: int) -> ClusterError:
        executor = self.roster.core_of(rank)
        return ClusterError(f"rank {rank} of executor {executor} died while the cluster was starting")

    # ---- the session's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._state != "closed":
                self._wake(self._inbox.take(self._timeout_s()))
        except PolicyError as error:
            self._broken(ClusterError(f"{BROKE_CONTRACT}{error}"))
        except SystemExit as error:  # must not end the process as if the run had wanted it
            self._broken(ClusterError(f"a policy raised SystemExit: {error.code}"))
        except BaseException as error:
            self._broken(error)

    def _broken(self, error: BaseException) -> None:
        self.failure = error
        self.listener.broken(str(error) if isinstance(error, ClusterError) else f"{type(error).__name__}: {error}")

    def _timeout_s(self) -> float | None:
        if self._events:
            return 0.0
        times = [] if self._wake_at is None else [self.clock.seconds_until(self._wake_at)]
        if self._state == "executors told":
            times.append(max(0.0, self._drain_until - time.monotonic()))
        return min(times) if times else None

    def _wake(self, items: list[Any]) -> None:
        """Take in everything that has arrived, as one instant."""
        now = self.clock.now()
        for item in items:
            if isinstance(item, Arrived):
                self._message(item.rank, item.body)
            elif isinstance(item, RankDown):
                self._rank_down(item.rank)
            elif isinstance(item, Submitted):
                self._submitted(item)
            elif isinstance(item, Asked):
                self._asked(item)
        if self._wake_at is not None and now >= self._wake_at:
            self._wake_at = None
            self._events.append((MESSAGE, ORCHESTRATOR, _WAKE))
        if self._events:
            self._quiet_since = time.monotonic()
            events, self._events = sorted(self._events, key=lambda event: event[:2]), []
            for _, _, event in events:
                self._obey(self._core.handle(event, now, True), now)
            self._obey(self._core.handle(None, now), now)
        if self._state == "core drained" and not (self._drain and self._direct):
            self._tell_executors(self._drain)
        if self._state == "executors told":
            self._drain_executors()

    def _message(self, rank: int, body: Any) -> None:
        executor = self.roster.core_of(rank)
        if executor in self._gone:
            return
        if isinstance(body, TokenChunk):
            self._tokens(body)
        elif isinstance(body, TokenChunks):
            for chunk in body.chunks:
                self._tokens(chunk)
        elif isinstance(body, Response):
            if body.report is not None:
                self.reports[executor] = body.report
            self._visits.pop(body.request_id, None)
            if body.request_id >= FIRST_DIRECT_ID:
                self._answered_directly(body)
            else:
                self._events.append((MESSAGE, executor, body))
        elif isinstance(body, Report):
            self.reports[executor] = body
            self._events.append((MESSAGE, executor, body))
        elif isinstance(body, (ContextStarted, FirstTokenOut)):
            self._events.append((MESSAGE, executor, body))
        elif isinstance(body, RecordsChunk):
            self._shipped.keep(rank, body)
        elif isinstance(body, Fault):
            raise session_error(executor, body.error)
        elif isinstance(body, Goodbye):
            self._said.add(executor)

    def _answered_directly(self, response: Response) -> None:
        executor = self._direct.pop(response.request_id, None)
        if executor is None:
            return
        if response.context_phase_params is not None:
            self._held[response.request_id] = executor
        reason = FinishReason.ERROR if response.error is not None else response.finish_reason
        self.listener.ended(response.request_id, reason, response.error, response.context_phase_params)

    def _tokens(self, chunk: TokenChunk) -> None:
        request_id = chunk.request_id
        if request_id < FIRST_DIRECT_ID:
            owner = self._attempts.owner_of(request_id)
            if owner is None:
                return  # from before a retry
            request_id = owner
        self.listener.tokens(request_id, chunk.first_index, chunk.token_ids)

    def _rank_down(self, rank: int) -> None:
        executor = self.roster.core_of(rank)
        if executor in self._gone:
            return
        if self.is_starting:
            raise self._died(rank)
        self._gone.add(executor)
        self._events.append((MESSAGE, executor, PeerDown(executor)))
        self._visits = {r: e for r, e in self._visits.items() if e != executor}
        for request_id in [r for r, e in self._direct.items() if e == executor]:
            del self._direct[request_id]
            self.listener.ended(request_id, FinishReason.ERROR, f"executor {executor} is gone", None)

    def _submitted(self, item: Submitted) -> None:
        request = item.request
        if item.executor is None:
            if item.output_length is not None:
                self._attempts.output_lengths[request.id] = item.output_length
            self._live.add(request.id)
            self._events.append((MESSAGE, ORCHESTRATOR, Arrive(request)))
            return
        if self._state != "open":
            self.listener.ended(request.id, FinishReason.ERROR, "the orchestrator is shutting down", None)
        elif item.executor in self._gone:
            self.listener.ended(request.id, FinishReason.ERROR, f"executor {item.executor} is gone", None)
        elif request.context_phase_params is not None and request.context_phase_params.is_promised:
            self.listener.ended(request.id, FinishReason.ERROR, PROMISED, None)
        else:
            self._direct[request.id] = item.executor
            if request.context_phase_params is not None:
                self._held.pop(request.context_phase_params.req_id, None)
            if item.output_length is not None:
                self._post.send(self._leader(item.executor), HiddenStop(request.id, item.output_length))
            self._post.send(self._leader(item.executor), Enqueue(request))

    def _asked(self, item: Asked) -> None:
        event = item.event
        if isinstance(event, Cancel) and event.request_id >= FIRST_DIRECT_ID:
            executor = self._direct.get(event.request_id) or self._held.pop(event.request_id, None)
            if executor is not None and executor not in self._gone:
                self._post.send(self._leader(executor), event)
            return
        if isinstance(event, Shutdown):
            self._drain = event.drain
        self._events.append((MESSAGE, item.sender, event))

    # ---- obeying -----------------------------------------------------------------------------------------------------

    def _obey(self, commands: list[Any], now: int) -> None:
        for command in commands:
            match command:
                case Dispatched():
                    self._dispatched(command)
                case Send():
                    if isinstance(command.message, RoleChanged):
                        self.roles[command.to] = Role(command.message.role)
                    if command.to not in self._gone:
                        self._post.send(self._leader(command.to), command.message)
                case Deliver():
                    self._deliver(command, now)
                case Record():
                    self._record.rows.append(command.row)
                case WakeAt():
                    self._wake_at = command.first
                case Drained():
                    self._state = "core drained"

    def _dispatched(self, command: Dispatched) -> None:
        request = command.executor_request
        if command.executor not in self._gone:
            self._visits[request.id] = command.executor
        self._attempts.dispatched(command)
        length = self._attempts.output_lengths.get(command.request_id)
        if length is not None and command.executor not in self._gone:
            self._post.send(self._leader(command.executor), HiddenStop(request.id, length))

    def _deliver(self, deliver: Deliver, now: int) -> None:
        if self.on_deliver is not None:
            self.on_deliver(deliver, now)
        if deliver.finish_reason is None:
            return  # the token itself came before
        self._live.discard(deliver.request_id)
        self._attempts.ended(deliver.request_id)
        error = deliver.error
        if error is None and deliver.finish_reason in (FinishReason.ERROR, FinishReason.REJECTED):
            error = deliver.finish_reason.value
        self.listener.ended(deliver.request_id, deliver.finish_reason, error, None)

    def _tell_executors(self, drain: bool) -> None:
        self._state = "executors told"
        self._num_told += 1
        self._drain_until = time.monotonic() + _DRAIN_S
        for executor in self._living():
            if executor not in self._said:
                self._post.send(self._leader(executor), Shutdown(drain))

    def _drain_executors(self) -> None:
        """Wait for the executors' own end, but not for the leases of KV that nobody will read."""
        left = [executor for executor in self._living() if executor not in self._said]
        if not left:
            self._state = "closed"
        elif time.monotonic() >= self._drain_until:
            if self._num_told >= _MAX_TOLD:
                raise ClusterError(f"executors {left} did not end their session")
            self._tell_executors(False)

    def _living(self) -> list[int]:
        return [executor for executor in self.roster.configs if executor not in self._gone]

    def _leader(self, executor: int) -> int:
        return self.roster.leader_of(executor)
