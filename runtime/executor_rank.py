"""One rank of an executor, from joining the world to leaving it: builds the engine, then leads or follows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

from .clock import Clock
from .clock_offsets import answer_probes
from .collectives import Collectives, SingleRank
from .devices import check_device, check_weights_fit
from .engine import Engine
from .engine_build import build_stepper, executor_collectives
from .executor_engine import EngineThread
from .executor_inbox import Arrived, Inbox, RankDown, StepReport
from .executor_kv import RankTransfers
from .executor_leader import ExecutorRecord, LeaderSession, ToUser, obey_kv_order
from .executor_post import Post
from .executor_spec import Roster
from .kernel_profile import KernelProfile
from .model_place import Place
from .mpi_world import MpiWorld
from .rank_record import DRAINED, ExecutorBrokenError, RankInfo, RankRecord, SessionConfig, session_of
from .stepper import Stepper
from .transport import KvTransport, make_transport
from .transport_world import throttle_of
from .weights import load_weights, random_weights
from .wire import PROTOCOL_VERSION, Fault, Goodbye, Hello, KvPart, PlanGrant, Ready, RecordsChunk

ORCHESTRATOR_RANK: Final = 0
_PIECE_BYTES: Final = 16 << 20
_SWITCH_S: Final = 1e-4  # a thread that a GPU waits for must not wait 5 ms, Python's own choice, for the interpreter
_encoder: Final = msgspec.msgpack.Encoder()


class ExecutorRank:
    """This process as a rank of its executor. Made by all ranks of the world at the same time: it is collective.

    `on_answer`, in leader mode, hears what the core says to its user. Raises ModelError for a bad checkpoint,
    TransportError where no transport is configured.
    """

    def __init__(self, world: MpiWorld, roster: Roster) -> None:
        self.roster = roster
        self.rank = world.rank
        self.executor = roster.executor_of[world.rank]
        self.inbox = Inbox()
        self.clock = Clock()
        self.post = Post(world, self.inbox, roster.spec.silence_limit_s)
        answer_probes(self.post.progress)
        self._world = world
        self._participants = roster.placements[self.executor].participant_ids
        self._place = Place.of(
            roster.shape,
            roster.layouts[self.executor].tp,
            roster.layouts[self.executor].pp,
            self._participants.index(world.rank),
            roster.layouts[self.executor].layers_per_stage,
        )
        self._collectives: Collectives = SingleRank()
        self._group: Any = None
        if len(self._participants) > 1:
            self._group = world.group(self._participants, tag=self.executor)
        self._stepper: Stepper | None = None
        self._profile: KernelProfile | None = None
        self._engine: Engine | None = None
        self._device = roster.device_of(world.rank)
        if self._device != "cpu":
            sys.setswitchinterval(_SWITCH_S)
        self._engine_thread = EngineThread(self._on_step, self._device)
        self._transport: KvTransport | None = None
        self._transfers: RankTransfers | None = None
        self._down: list[RankDown] = []  # of other executors: later sessions must know

    @property
    def is_leader(self) -> bool:
        return self.rank == self._participants[0]

    @property
    def followers(self) -> tuple[int, ...]:
        return self._participants[1:]

    # ---- building ----------------------------------------------------------------------------------------------------

    def load(self) -> RankInfo:
        """Start MPI progress, load the weights, take memory for the KV, and warm the engine up."""
        spec, config = self.roster.spec, self.roster.configs[self.executor]
        device = self._device
        check_device(device)
        self.post.start()
        check_weights_fit(self._place, device)
        self._collectives = executor_collectives(self._group, self._place, device)
        if spec.model.folder is not None:
            self._weights = load_weights(spec.model.folder, self._place, device)
        else:
            self._weights = random_weights(self._place, spec.model.seed, device)
        fraction = self.roster.placements[self.executor].free_gpu_memory_fraction
        built = build_stepper(
            self._place, self._weights, config, self._collectives, self._group, device, fraction, spec.record_margins
        )
        self._pages, self._stepper = built.pages, built.stepper
        if self._pages.num_blocks != config.num_blocks:
            config = msgspec.structs.replace(config, num_blocks=self._pages.num_blocks)
            self.roster = self.roster.with_config(config)
        if spec.transport is not None:
            self._transport = make_transport(
                spec.transport,
                self.post.progress,
                self._pages,
                verify=spec.verify_kv,
                survives_peer_loss=True,
                throttle=throttle_of(self.roster, self.rank),
                devices=self.roster.devices_on(self._world.hostname, self._world.hostnames),
            )
        self._transfers = RankTransfers(self.roster, self.rank, self._transport, self._on_part, spec.verify_kv)
        self._profile = KernelProfile(
            self.rank,
            device,
            lambda: self._engine.num_decodes if self._engine is not None else 0,
            lambda: self.clock.origin_ns,
        )
        return RankInfo(
            self.rank,
            self.executor,
            self._world.hostname,
            os.getpid(),
            device,
            self._pages.nbytes,
            self._weights.nbytes,
            self._pages.layers,
            self._pages.heads,
            self._pages.num_blocks,
            built.free_bytes,
            None if self._transport is None else self._transport.description,
            self._collectives.description,
        )

    def new_engine(self, *, sends_early: bool = True) -> None:
        """An engine with an empty batch, on the same weights and pages. `sends_early`: it tells of layers."""
        self._engine = Engine(
            self.roster.shape,
            self._weights,
            self._place,
            self._pages,
            self._collectives,
            self._device,
            stepper=self._stepper,
            record_margins=self.roster.spec.record_margins,
        )
        tells = sends_early and self.roster.configs[self.executor].layerwise
        if tells and self._transfers is not None and self._transport is not None:
            self._engine.on_layers = self._transfers.on_layers
        self._engine_thread.use(self._engine)
        if self._transfers is not None:
            self._transfers.checksums.clear()

    def open_session(
        self,
        config: SessionConfig,
        to_user: Callable[[ToUser], None],
        on_record: Callable[[Any], None] | None = None,
    ) -> LeaderSession:
        """Begin a session as leader: a fresh core, and a fresh engine on every rank of the executor."""
        self.clock = Clock(config.origin_ns)
        hello = Hello(PROTOCOL_VERSION, self.executor, _encoder.encode(config))
        for rank in self.followers:
            self.post.send(rank, hello)
        self.new_engine(sends_early=config.sends_early)
        if self._transfers is None:
            raise RuntimeError("a session needs a loaded rank")
        for item in self._down:
            self.inbox.put(item)
        own = self.roster.configs[self.executor]
        if config.seed is not None:
            own = msgspec.structs.replace(own, seed=config.seed)
        if config.reuses_blocks is not None:
            own = msgspec.structs.replace(own, enable_block_reuse=config.reuses_blocks)
        roster = self.roster.with_config(own)
        return LeaderSession(
            roster,
            self.executor,
            self.clock,
            self._engine_thread,
            self._transfers,
            self.post.send,
            to_user,
            log=config.record,
            on_record=on_record,
        )

    def rank_record(self) -> RankRecord:
        margins = tuple(self._engine.margins) if self._engine is not None else ()
        return RankRecord(self.rank, margins, tuple(self._transfers.checksums) if self._transfers is not None else ())

    def close(self) -> None:
        """Stop the threads and leave MPI, after everybody has said what they had to say."""
        self._engine_thread.stop()
        if self._profile is not None:
            self._profile.finish()
        if self._transport is not None:
            self._transport.close()
        self.post.close()

    # ---- from other threads ------------------------------------------------------------------------------------------

    def _on_step(self, report: StepReport) -> None:
        if self.is_leader:
            self.inbox.put(report)
        elif report.error is not None and report.applied:
            self.inbox.put(report)  # one that was not applied is refused by all ranks alike, so the leader knows

    def _on_part(self, part: KvPart) -> None:
        if self.is_leader:
            self.inbox.put(Arrived(self.rank, part))
        else:
            self.post.send(self._participants[0], part)

    # ---- following ---------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Obey the leader until it, or rank 0, says goodbye. Raises ExecutorBrokenError when its executor is broken."""
        leader = self._participants[0]
        while True:
            for item in self.inbox.take(None):
                if isinstance(item, RankDown):
                    self._check_down(item.rank)
                elif isinstance(item, StepReport):
                    raise ExecutorBrokenError(f"rank {self.rank}: a step failed half-way: {item.error}")
                elif isinstance(item, Arrived) and isinstance(item.body, Goodbye):
                    return
                elif isinstance(item, Arrived) and item.rank == leader:
                    self._obey(item.body)

    def _obey(self, body: Any) -> None:
        if isinstance(body, PlanGrant):
            self._engine_thread.grant(body)
        elif isinstance(body, Hello):
            config = session_of(body)
            self.new_engine(sends_early=config.sends_early)
        elif self._transfers is not None:
            obey_kv_order(self._transfers, body)

    def _check_down(self, rank: int) -> None:
        if rank in self._participants or (rank == ORCHESTRATOR_RANK and not self.roster.spec.leader_mode):
            raise ExecutorBrokenError(f"rank {self.rank} of executor {self.executor} ends: rank {rank} is down")

    # ---- serving an orchestrator -------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Orchestrator mode: load, report, and do what rank 0 says until it says goodbye."""
        try:
            info = self.load()
        except Exception as error:
            self.post.start()
            self.post.send(ORCHESTRATOR_RANK, Ready(self.executor, error=_text(error)))
            self._await_goodbye()
            return
        self.post.send(ORCHESTRATOR_RANK, Ready(self.executor, msgspec.json.encode(info)))
        if self.is_leader:
            self._lead()
        else:
            self.follow()
        if self.roster.spec.verify_kv or self.roster.spec.record_margins:
            self._ship("rank", _encoder.encode(self.rank_record()))
        self.post.send(ORCHESTRATOR_RANK, Goodbye())

    def _await_goodbye(self) -> None:
        while True:
            for item in self.inbox.take(None):
                if isinstance(item, RankDown):
                    self._check_down(item.rank)
                elif isinstance(item, Arrived) and isinstance(item.body, Goodbye):
                    return

    def _lead(self) -> None:
        session: LeaderSession | None = None
        shipped = False
        while True:
            items = self.inbox.take(None if session is None else session.timeout_s())
            rest = []
            for item in items:
                body = item.body if isinstance(item, Arrived) else None
                if isinstance(body, Hello):
                    try:
                        config = session_of(body)
                        session, shipped = self.open_session(config, self._to_orchestrator), False
                    except (Exception, SystemExit) as error:
                        self._fault(error)
                        raise
                    self.post.send(ORCHESTRATOR_RANK, Ready(self.executor))
                elif isinstance(body, Goodbye) and item.rank == ORCHESTRATOR_RANK:
                    return
                elif isinstance(item, RankDown) and item not in self._down:
                    self._check_down(item.rank)
                    self._down.append(item)
                    rest.append(item)
                else:
                    rest.append(item)
            if session is None:
                continue
            try:
                session.wake(rest)
            except ExecutorBrokenError:
                raise
            except (Exception, SystemExit) as error:
                self._fault(error)
                raise
            if session.is_drained and not shipped:
                shipped = True
                self._ship_record(session.record)
                self.post.send(ORCHESTRATOR_RANK, Goodbye(DRAINED))

    def _fault(self, error: BaseException) -> None:
        self.post.send(ORCHESTRATOR_RANK, Fault(_text(error)))
        self._await_goodbye()  # so that the fault gets there: this process is about to kill itself

    def _to_orchestrator(self, body: ToUser) -> None:
        self.post.send(ORCHESTRATOR_RANK, body)

    def _ship_record(self, record: ExecutorRecord) -> None:
        self._ship("log", b"".join(record.log))
        self._ship("rows", _encoder.encode(record.rows))
        self._ship("steps", _encoder.encode(record.step_ends))
        self._ship("parts", _encoder.encode(record.parts))

    def _ship(self, kind: str, data: bytes) -> None:
        """In pieces; an empty piece ends the kind."""
        for start in range(0, len(data), _PIECE_BYTES):
            self.post.send(ORCHESTRATOR_RANK, RecordsChunk(kind, data[start : start + _PIECE_BYTES]))
        self.post.send(ORCHESTRATOR_RANK, RecordsChunk(kind, b""))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:4096]
