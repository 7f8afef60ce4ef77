"""A naive cluster, written from the definitions alone: one step at a time, no epochs, no heaps, no closed forms.

The reference of the exactness test. Executors and links are lists and loops; what a step costs is summed step by step in
the cost model's own integer units; the calendar is a list searched for its least (instant, class, rank, number). The
orchestrator and its policies are the real ones: what is under test here is what executors and links tell it, and when.

An executor of depth 2 keeps two steps planned, each planned alone as soon as there is room for it: it knows then how many
tokens its requests will have when the step begins, and not which of them a stop ends before.
"""

from __future__ import annotations

from typing import Any

from disagg.core.commands import Deliver, Dispatched, Send, WakeAt
from disagg.core.config import ExecutorConfig
from disagg.core.cost import CostModel, StepFeatures
from disagg.core.events import (
    Arrive,
    Cancel,
    ContextStarted,
    Enqueue,
    FirstTokenOut,
    FirstTokens,
    KvWithdrawn,
    LeaseRenewed,
    MoveOut,
    Report,
    Response,
    RoleChanged,
    Wake,
)
from disagg.core.orchestrator import OrchestratorCore
from disagg.policies import registry
from disagg.policies.vocabulary import ContextPhaseParams, FinishReason, Request, RequestType
from tests.core_cases import Case, Step, Trace

MESSAGE, STEP_END = 1, 2
ERROR = "some error"  # texts are not compared
WAITING, PULLING, IN_FLIGHT, EARLY, READY, PREFILL, JOINING, DECODE, ENDING, HELD, LEAVING, GONE = range(12)


class Visitor:
    """A request at an executor: plain counters, all of them true at any time."""

    def __init__(self, request: Request, number: int, now: int) -> None:
        self.request, self.id, self.number, self.enqueued_at = request, request.id, number, now
        self.place = WAITING
        self.key: Any = 0
        self.kv = 0  # tokens written
        self.generated = 0
        self.ahead = 0  # steps planned in which it decodes
        self.kv_at_leave = 0  # of one that is in planned steps, and in no later ones
        self.to_compute = request.num_prompt_tokens
        self.blocks = 0
        self.was_preempted = False
        self.num_preemptions = 0
        self.started_at: int | None = None
        self.transfer_start: int | None = None
        self.kv_usable: int | None = None
        self.reader: int | None = None
        self.doom: str | None = None  # "cancelled" or ERROR
        self.moving = False  # goes on elsewhere once no step that it is in is left
        self.lease_until = 0
        self.stay_tokens = 0
        # early binding, as a context phase: who has asked, and the transfer that runs before the phase is done
        self.announces = False
        self.asker: tuple[int, int] | None = None
        self.early: EarlyTransfer | None = None
        self.served_at: int | None = None
        self.is_read = False
        # early binding, as a generation phase
        self.awaits = request.context_phase_params is not None and request.context_phase_params.is_promised
        self.pulled = 0
        self.withdrawn = False
        # prefix caching
        self.shared: list[int] = []  # hashes of its first blocks, which others may refer to
        self.cached = 0  # tokens that it found when it began, or asked for its KV
        self.found = 0  # tokens that it would have found when it was queued
        self.present = 0  # tokens that its reader has
        self.is_arriving = False  # some of its blocks wait for KV

    @property
    def left(self) -> int:
        return self.to_compute - self.kv

    @property
    def params(self) -> ContextPhaseParams:
        params = self.request.context_phase_params
        if params is None:
            raise AssertionError("not a generation-only request")
        return params

    @property
    def type(self) -> RequestType:
        return self.request.request_type


class Epoch:
    """Equal steps, one after the other."""

    def __init__(self, since: int) -> None:
        self.since = self.until = since
        self.steps = self.units = self.num_ended = 0
        self.shared_kv = 0  # tokens of its decodes that are read again, when it began
        self.is_closed = False


class Planned:
    """A step that runs, or will when those before it have ended."""

    def __init__(
        self, epoch: Epoch, start: int, decodes: list[Visitor], chunks: list[tuple[Visitor, int, int]]
    ) -> None:
        self.epoch, self.start, self.end = epoch, start, epoch.until
        self.decodes, self.chunks = decodes, chunks


class NaiveExecutor:
    def __init__(self, config: ExecutorConfig, cost: CostModel, cluster: NaiveCluster) -> None:
        self.config, self.cost, self.cluster, self.id = config, cost, cluster, config.id
        self.evicts = config.scheduler.capacity == "max_utilization"
        order = config.scheduler.queue_order
        self.order = registry.create(order.name, "queue_order", order.params, seed="any")
        self.visitors: list[Visitor] = []  # in order of arrival
        self.prefill: list[Visitor] = []  # in order of beginning
        self.ready: list[Visitor] = []  # in order of arrival of their KV
        self.joining: list[Visitor] = []
        self.decodes: list[Visitor] = []
        _, depth, plans_ahead = cluster.case.launch
        self.depth = depth if plans_ahead else 1
        self.steps: list[Planned] = []
        self.last: tuple[list[int], bool] | None = (
            None  # decodes and whether there were chunks, of the last step planned
        )
        self.epoch: Epoch | None = None
        self.num_steps = 0
        self.seen = [0, 0]
        self.shown_kv = self.shown_written = self.shown_steps = self.step_time = 0
        self.grown = 0  # blocks that decodes got since the batch last changed
        self.changed = False
        self.has_reported = False
        self.has_heard = False
        self.responses: list[Response] = []
        self.heartbeat = False
        self.is_impatient = False  # in this instant: waits for no reader elsewhere
        self.num_pulled = 0
        self.known: dict[int, int] = {}  # hash of each block that can be found: when its last user let go of it
        self.num_let_go = 0
        self.told: set[int] = set()  # hashes that the orchestrator knows of
        self.stored: list[int] = []  # in order, some of them gone again

    # ---- small questions --------------------------------------------------------------------------------------------

    def at(self, place: int) -> list[Visitor]:
        return [v for v in self.visitors if v.place == place]

    def blocks_for(self, tokens: int) -> int:
        return (tokens + self.config.tokens_per_block - 1) // self.config.tokens_per_block

    @property
    def free(self) -> int:
        return self.empty + len(self.unused())

    @property
    def empty(self) -> int:
        return self.config.num_blocks - len(self.known) - sum(v.blocks - len(v.shared) for v in self.visitors)

    def unused(self) -> list[int]:
        return [name for name in self.known if not any(name in v.shared for v in self.visitors)]

    def found(self, v: Visitor) -> list[int]:
        """Of the blocks that it could begin with, those that are here; one token at least is left."""
        found: list[int] = []
        if self.config.enable_block_reuse:
            for name in v.request.block_hashes[: (v.to_compute - 1) // self.config.tokens_per_block]:
                if name not in self.known:
                    break
                found.append(name)
        return found

    def price(self, v: Visitor, found: list[int]) -> int:
        """Blocks that nobody else could have, if it is admitted."""
        unused = self.unused()
        return self.to_admit(v) - sum(name not in unused for name in found)

    def evict(self) -> None:
        while self.empty < 0:
            oldest = min(self.unused(), key=lambda name: self.known[name])
            del self.known[oldest]

    def register(self, v: Visitor, hashes: tuple[int, ...], num_tokens: int) -> None:
        """Its tokens are written so far: others may find its blocks. One found here already takes the place of its own."""
        if not self.config.enable_block_reuse:
            return
        for name in hashes[len(v.shared) : num_tokens // self.config.tokens_per_block]:
            if name not in self.known:
                self.known[name] = 0
                self.stored.append(name)
            elif v.reader is not None:
                return
            v.shared.append(name)

    def let_go(self, v: Visitor) -> None:
        for name in reversed(v.shared):
            self.num_let_go += 1
            self.known[name] = self.num_let_go
        v.shared, v.blocks, v.is_arriving = [], 0, False

    @property
    def slots(self) -> int:
        taken = len(self.decodes) + len(self.prefill) + len(self.joining)
        return self.config.scheduler.max_batch_size - taken

    def to_admit(self, v: Visitor) -> int:
        if v.type is RequestType.CONTEXT_ONLY or self.evicts:
            return self.blocks_for(v.to_compute)
        return self.blocks_for(v.request.num_prompt_tokens + v.request.max_tokens - 1)

    def wanted_by_decodes(self) -> int:
        if not self.evicts:
            return 0
        return sum(self.blocks_for(v.kv + v.ahead + 1) - self.blocks_for(v.kv + v.ahead) for v in self.decodes)

    # ---- what it hears ----------------------------------------------------------------------------------------------

    def hear(self, message: Any) -> None:
        now = self.cluster.now
        self.has_heard = True
        if isinstance(message, Enqueue):
            self.enqueue(message.request, now, message.announces_start)
        elif isinstance(message, FirstTokens):
            for v in self.visitors:
                if v.id == message.request_id and v.awaits:
                    self.first_token(v, now)
        elif isinstance(message, KvWithdrawn):
            for v in self.visitors:
                if v.id == message.request_id and v.asker == (message.reader, message.reader_id):
                    self.turn_away(v)
        elif isinstance(message, MoveOut):
            for v in self.visitors:
                if v.id == message.request_id and v.place in (DECODE, JOINING, ENDING) and v.doom is None:
                    v.moving = True
        elif isinstance(message, Cancel):
            for v in list(self.visitors):
                if v.id == message.request_id:
                    self.give_up(v, "cancelled")
        elif isinstance(message, LeaseRenewed):
            for v in self.visitors:
                if v.id in message.request_ids:
                    self.renew(v, now)

    def enqueue(self, request: Request, now: int, announces: bool) -> None:
        self.seen[0] += 1
        self.seen[1] += request.num_prompt_tokens
        if self.must_refuse(request):
            self.responses.append(Response(request.id, self.id, FinishReason.ERROR, 0, ERROR))
            return
        v = Visitor(request, self.seen[0], now)
        v.key = self.order.key(request, now)
        v.announces = announces
        self.visitors.append(v)
        v.found = len(self.found(v)) * self.config.tokens_per_block
        if v.type is RequestType.GENERATION_ONLY:
            v.place, v.generated, v.to_compute = PULLING, v.params.num_generated, v.params.num_kv_tokens
            if not v.awaits:
                self.cluster.later(now + self.config.pull_timeout, MESSAGE, self.id, self.waits_too_long, v)
            if not self.heartbeat:
                self.heartbeat = True
                self.cluster.later(now + self.config.lease // 3, MESSAGE, self.id, self.beat, None)

    def first_token(self, v: Visitor, now: int) -> None:
        """Its context phase is done: the time that it may take runs from here."""
        v.awaits = False
        if v.place == PULLING:
            self.cluster.later(now + self.config.pull_timeout, MESSAGE, self.id, self.waits_too_long, v)
        elif v.place == IN_FLIGHT:
            self.cluster.later(now + self.config.transfer_timeout_base, MESSAGE, self.id, self.pull_takes_too_long, v)
        elif v.place == EARLY:
            v.place, v.kv_usable = READY, now
            self.ready.append(v)

    def must_refuse(self, request: Request) -> bool:
        scheduler = self.config.scheduler
        kind = request.request_type
        tokens = request.num_prompt_tokens
        if kind is not RequestType.CONTEXT_ONLY:
            tokens += request.max_tokens - 1
        if self.blocks_for(tokens) > self.config.num_blocks:
            return True
        if scheduler.chunked_context:
            return False
        may_be_recomputed = self.evicts and kind is not RequestType.CONTEXT_ONLY
        at_once = tokens if may_be_recomputed else request.num_prompt_tokens
        return (may_be_recomputed or kind is not RequestType.GENERATION_ONLY) and at_once > scheduler.max_num_tokens

    def renew(self, v: Visitor, now: int) -> None:
        v.lease_until = now + self.config.lease
        self.cluster.later(v.lease_until, MESSAGE, self.id, self.lease_ends, v)

    def lease_ends(self, v: Visitor) -> None:
        if v.place == HELD and v.doom is None and v.lease_until <= self.cluster.now:
            self.cluster.touch(self)
            self.give_up(v, ERROR)

    def beat(self, _: Any) -> None:
        self.heartbeat = False
        if self.local():
            self.is_impatient = True
            self.cluster.touch(self)
        sources: dict[int, list[int]] = {}
        for v in self.at(PULLING):
            sources.setdefault(v.params.executor, []).append(v.params.req_id)
        for source, ids in sources.items():
            if source != self.id:
                self.cluster.send(self.id, source, LeaseRenewed(tuple(ids)))
        for v in self.at(PULLING):
            if v.params.executor == self.id and (holder := self.holder_for(v)) is not None:
                self.renew(holder, self.cluster.now)
        if sources:
            self.heartbeat = True
            self.cluster.later(self.cluster.now + self.config.lease // 3, MESSAGE, self.id, self.beat, None)

    def asked_for_kv(self, item: tuple[int, int, int, int]) -> None:
        request_id, reader, reader_id, present = item
        self.has_heard = True
        self.cluster.touch(self)
        for v in self.visitors:
            if v.id != request_id or v.doom is not None or v.reader is not None or v.asker is not None or v.is_read:
                continue
            if v.place == HELD or (v.type is RequestType.CONTEXT_ONLY and v.place in (WAITING, PREFILL)):
                v.asker, v.present = (reader, reader_id), present
                if v.place == HELD:
                    self.serve(v)
                elif v.place == PREFILL:
                    self.serve_early(v)
                return
        self.refuse(reader, reader_id)

    def refuse(self, reader: int, reader_id: int) -> None:
        self.cluster.post(self.id, self.cluster.executors[reader].kv_came, (reader_id, False))

    def turn_away(self, v: Visitor) -> None:
        if v.asker is not None:
            self.refuse(*v.asker)
            v.asker = None

    def serve(self, v: Visitor) -> None:
        """All of its KV is there."""
        if v.asker is not None:
            (v.reader, reader_id), v.asker = v.asker, None
            self.cluster.transfer(self.id, v.reader, v.kv - v.present, (v, reader_id))

    def serve_early(self, v: Visitor) -> None:
        """Its blocks are there: what is written goes at once, the rest group by group as steps write it."""
        if v.asker is None or not self.config.layerwise:
            return
        (v.reader, reader_id), v.asker = v.asker, None
        v.served_at = self.cluster.now
        v.early = EarlyTransfer(self.cluster, self.id, v, v.reader, reader_id)
        if v.kv:
            v.early.segment(v.kv)
        for step in self.steps:
            for other, _, length in step.chunks:
                if other is v:
                    v.early.compute(length, step.start, step.end)

    def kv_came(self, item: tuple[int, bool]) -> None:
        request_id, ok = item
        now = self.cluster.now
        self.has_heard = True
        self.cluster.touch(self)
        for v in list(self.visitors):
            if v.id != request_id or v.place != IN_FLIGHT:
                continue
            if v.doom is not None:
                self.forget(v)
            elif ok:
                v.kv, v.is_arriving = v.params.num_kv_tokens, False
                self.register(v, v.request.block_hashes, v.kv)
                if v.awaits:
                    v.place = EARLY
                else:
                    v.place, v.kv_usable = READY, now
                    self.ready.append(v)
            else:
                self.fail(v, ERROR, recomputable=True)

    def kv_was_read(self, v: Visitor, ok: bool = True) -> None:
        self.has_heard = True
        self.cluster.touch(self)
        if v.place in (HELD, LEAVING):
            self.forget(v)
        elif v.place != GONE:
            v.reader, v.is_read = None, ok
            if not ok:
                v.served_at = None

    def waits_too_long(self, v: Visitor) -> None:
        if v.place == PULLING:
            self.cluster.touch(self)
            self.fail(v, ERROR, recomputable=True)

    def pull_takes_too_long(self, v: Visitor) -> None:
        if v.place == IN_FLIGHT and v.doom is None:
            self.cluster.touch(self)
            v.doom = ERROR
            self.answer_failure(v, ERROR, recomputable=True)

    # ---- ends -------------------------------------------------------------------------------------------------------

    def forget(self, v: Visitor) -> None:
        v.place = GONE
        self.let_go(v)
        for group in (self.visitors, self.prefill, self.ready, self.joining, self.decodes):
            if v in group:
                group.remove(v)

    def leave(self, v: Visitor) -> None:
        """It is over, but its reader is still at its blocks."""
        v.place = LEAVING
        for group in (self.prefill, self.joining):
            if v in group:
                group.remove(v)

    def give_up(self, v: Visitor, why: str) -> None:
        if v.doom is not None or v.place == LEAVING:
            return
        in_step = v.place == ENDING or (bool(self.steps) and v in self.decodes)
        in_step = in_step or any(v is chunk[0] for step in self.steps for chunk in step.chunks)
        if v.place == HELD:
            if v.reader is None:
                self.forget(v)
            else:
                v.doom = why
        elif v.place == IN_FLIGHT:
            v.doom = why
            self.answer_failure(v, why, recomputable=False)
        elif in_step:
            v.doom = why
        else:
            self.fail(v, why, recomputable=False)

    def fail(self, v: Visitor, why: str, *, recomputable: bool) -> None:
        if v.place == PULLING and v.params.executor == self.id:
            if (holder := self.holder_for(v)) is not None:
                self.forget(holder)
        elif v.place == PULLING and not v.awaits:
            self.cluster.send(self.id, v.params.executor, Cancel(v.params.req_id))
        self.turn_away(v)
        if v.early is not None and v.reader is not None:
            v.doom = why
            self.leave(v)
            if v.kv < v.request.num_prompt_tokens:
                v.early.abort()
        else:
            self.forget(v)
        self.answer_failure(v, why, recomputable=recomputable)

    def answer_failure(self, v: Visitor, why: str, *, recomputable: bool) -> None:
        cancelled = why == "cancelled"
        self.responses.append(
            Response(
                v.id,
                self.id,
                FinishReason.CANCELLED if cancelled else FinishReason.ERROR,
                v.generated,
                error=None if cancelled else ERROR,
                recomputable=recomputable,
                context_start=v.started_at,
                transfer_start=v.transfer_start,
                kv_usable=v.kv_usable,
                num_cached_tokens=v.cached,
            )
        )
        self.stay(v)

    def finish(self, v: Visitor) -> None:
        stopped = v.generated == self.cluster.true_length(v.id)
        size, prompt = self.config.tokens_per_block, v.request.num_prompt_tokens
        if len(v.request.block_hashes) == prompt // size:
            names = v.request.block_hashes + self.cluster.output_hashes(v.id)
            self.register(v, names, prompt + v.generated - 1)
        self.turn_away(v)
        if v.reader is not None:
            self.leave(v)
        else:
            self.forget(v)
        self.responses.append(
            Response(
                v.id,
                self.id,
                FinishReason.STOP if stopped else FinishReason.LENGTH,
                v.generated,
                context_start=v.started_at,
                transfer_start=v.transfer_start,
                kv_usable=v.kv_usable,
                num_cached_tokens=v.cached,
                last_token=self.cluster.now,
            )
        )
        self.stay(v)

    def move(self, v: Visitor) -> None:
        """No step has it any more: its KV waits to be read from where it goes on."""
        for group in (self.decodes, self.joining):
            if v in group:
                group.remove(v)
        v.place, v.blocks = HELD, self.blocks_for(v.kv)
        self.renew(v, self.cluster.now)
        self.responses.append(
            Response(
                v.id,
                self.id,
                None,
                v.generated,
                context_phase_params=ContextPhaseParams(v.id, self.id, v.kv, num_generated=v.generated),
                context_start=v.started_at,
                transfer_start=v.transfer_start,
                kv_usable=v.kv_usable,
                num_cached_tokens=v.cached,
                last_token=self.cluster.now,
            )
        )
        self.stay(v)

    def stay(self, v: Visitor) -> None:
        started = v.started_at if v.started_at is not None else v.kv_usable
        tokens = v.generated - (v.params.num_generated if v.type is RequestType.GENERATION_ONLY else 0)
        self.cluster.trace.stays.append((self.id, v.id, tokens, started, self.cluster.now, v.num_preemptions))

    # ---- steps ------------------------------------------------------------------------------------------------------

    def has_ended(self, v: Visitor) -> bool:
        return v.generated >= min(v.request.max_tokens, self.cluster.true_length(v.id))

    def step_ends(self, _: Any) -> None:
        step, now = self.steps.pop(0), self.cluster.now
        chunks = step.chunks
        self.cluster.touch(self)
        step.epoch.num_ended += 1
        self.note_step_time(step.epoch)
        shown = tuple((v.id, first, length) for v, first, length in chunks)
        ids = tuple(sorted(v.id for v in step.decodes))
        self.cluster.trace.steps[self.id].append(Step(step.start, now, ids, shown))
        for v in step.decodes:
            v.kv += 1
            v.ahead -= 1
            v.generated += not self.has_ended(v)  # else it is computed for nothing
        for v, _, length in chunks:
            v.kv += length
            self.register(v, v.request.block_hashes, v.kv)
        over = sorted((v for v in step.decodes if not v.ahead), key=lambda v: v.number)
        for v in over:
            if self.has_ended(v):
                if self.steps and v.place == DECODE:  # in the batch, which stands still in the step to come
                    self.shown_written -= self.blocks_for(v.kv)
                self.finish(v)
        for v in over:
            if v.place == ENDING and not self.has_ended(v):
                if v.doom is None:
                    self.move(v)
                else:
                    self.fail(v, v.doom, recomputable=False)
        for v, _, _ in chunks:
            if v.left:
                continue
            v.generated += 1
            self.prefill.remove(v)
            if self.has_ended(v):
                self.finish(v)
            elif v.type is RequestType.CONTEXT_ONLY and v.doom is None:
                v.place = HELD
                if v.is_read:
                    self.forget(v)
                else:
                    self.renew(v, now)
                    self.serve(v)
                params = ContextPhaseParams(v.id, self.id, v.request.num_prompt_tokens)
                self.responses.append(
                    Response(
                        v.id,
                        self.id,
                        None,
                        1,
                        context_phase_params=params,
                        context_start=v.started_at,
                        last_token=now,
                        kv_overlap=None if v.served_at is None else now - v.served_at,
                        num_cached_tokens=v.cached,
                    )
                )
                self.stay(v)
            else:
                v.place = JOINING
                self.joining.append(v)
                whole = v.type is RequestType.CONTEXT_AND_GENERATION
                if whole and v.request.streaming and v.generated == 1 and v.doom is None:
                    self.cluster.send(self.id, 0, FirstTokenOut(v.id, v.started_at))

    def plan(self) -> None:
        self.plan_steps()
        self.is_impatient = False

    def plan_steps(self) -> None:
        """Once an instant: all steps for which there is room. Nothing is planned behind a step with chunks."""
        while len(self.steps) < self.depth and not (self.steps and self.steps[-1].chunks):
            num_planned = len(self.steps)
            self.plan_step()
            self.tell()
            if len(self.steps) == num_planned:
                return
        if not self.evicts and not self.at(WAITING):
            self.pull()  # steps run, and none of them needs the blocks that are free
        self.tell()

    def plan_step(self) -> None:
        for v in list(self.decodes):
            if v.doom or v.moving or self.has_ended(v) or v.generated + v.ahead >= v.request.max_tokens:
                if v.ahead:
                    self.decodes.remove(v)
                    v.place, v.kv_at_leave = ENDING, v.kv + v.ahead
        for v in [v for v in self.decodes if v.doom] + [v for v in (*self.joining, *self.prefill) if v.doom]:
            self.fail(v, v.doom or "", recomputable=False)
        for v in [v for v in (*self.decodes, *self.joining) if v.moving]:
            self.move(v)
        self.join()
        if self.steps and self.decodes and self.wanted_by_decodes() > self.free:
            self.close_epoch()  # whose blocks are to be taken is not decided while steps write to them
            self.last = None
            return
        while self.preempt():
            while self.preempt():
                pass
            self.join()
        chunks, with_decodes = self.choose()
        for v, _, _ in chunks:
            if v.announces:
                v.announces = False
                self.cluster.send(self.id, 0, ContextStarted(v.id))
            self.serve_early(v)
        self.pull()
        self.begin(chunks, self.decodes if with_decodes else [])
        if not self.steps and (self.at(WAITING) or any(not v.awaits for v in self.at(PULLING))):
            self.withdraw()

    def withdraw(self) -> None:
        """It stands still for want of blocks: those that it keeps for context phases not done are asked back."""
        for v in sorted(self.at(IN_FLIGHT), key=lambda v: v.pulled):
            if v.awaits and not v.withdrawn and v.doom is None:
                v.withdrawn = True
                self.cluster.send(self.id, v.params.executor, KvWithdrawn(v.params.req_id, self.id, v.id))

    def holder_for(self, v: Visitor) -> Visitor | None:
        """Who holds the KV here that `v` goes on from, if nobody else reads it."""
        for holder in self.at(HELD):
            if holder.id == v.params.req_id and holder.doom is None and holder.reader is None and holder.asker is None:
                return holder
        return None

    def local(self) -> list[Visitor]:
        """Those that wait and whose KV is here, in order."""
        here = [v for v in self.at(PULLING) if v.params.executor == self.id]
        return sorted(here, key=lambda v: (v.key, v.number))

    def stands_still(self) -> bool:
        """Nothing here will give blocks back by itself: nothing runs or is about to, and nothing is read or written."""
        if self.steps or self.decodes or self.prefill or self.joining or self.ready:
            return False
        if any(v.place in (IN_FLIGHT, EARLY, LEAVING) or v.reader is not None for v in self.visitors):
            return False
        wanted_here = [v.params.req_id for v in self.local()]
        return self.is_impatient or all(v.id in wanted_here for v in self.at(HELD))

    def take_over(self) -> None:
        """Generation phases whose KV is here need no transfer: they get its blocks, and what they lack beside them.

        Where they would wait for each other for ever the youngest is given up, and what it holds with it.
        """
        while waiting := self.local():
            v = waiting[0]
            holder = self.holder_for(v)
            if holder is None:
                self.fail(v, ERROR, recomputable=True)
                continue
            if self.to_admit(v) - holder.blocks > max(self.free - self.wanted_by_decodes(), 0):
                if not self.stands_still():
                    return
                self.fail(waiting[-1], ERROR, recomputable=True)
                continue
            v.shared, holder.shared = holder.shared, []
            self.forget(holder)
            self.order.on_served(v.request, v.key, self.cluster.now)
            v.blocks = self.to_admit(v)
            self.evict()
            v.transfer_start = v.kv_usable = self.cluster.now
            v.place, v.kv = READY, v.params.num_kv_tokens
            self.ready.append(v)

    def join(self) -> None:
        self.take_over()
        for v in list(self.joining):
            self.joining.remove(v)
            v.place = DECODE
            self.decodes.append(v)
        while self.ready and self.slots > 0:
            v = self.ready.pop(0)
            v.place = DECODE
            self.decodes.append(v)

    def preempt(self) -> bool:
        if not self.decodes or self.wanted_by_decodes() <= self.free:
            return False
        unpinned = [v for v in self.prefill if v.reader is None and not v.is_read]
        youngest = max([*self.decodes, *unpinned], key=lambda v: v.number)
        for group in (self.decodes, self.prefill):
            if youngest in group:
                group.remove(youngest)
        youngest.place, youngest.was_preempted = WAITING, True
        youngest.num_preemptions += 1
        self.let_go(youngest)
        youngest.kv = 0
        youngest.to_compute = youngest.request.num_prompt_tokens + youngest.generated
        youngest.found = len(self.found(youngest)) * self.config.tokens_per_block
        return True

    def choose(self) -> tuple[list[tuple[Visitor, int, int]], bool]:
        """Chunks of the next step, begun prompts first, and whether the decodes run in it."""
        scheduler = self.config.scheduler
        alone = scheduler.batching.name == "prefill_first"
        budget = scheduler.max_num_tokens - (0 if alone else len(self.decodes))
        chunks = []
        for v in self.prefill:
            if budget > 0:
                length = min(v.left, budget)
                chunks.append((v, v.kv, length))
                budget -= length
        blocks = self.free - self.wanted_by_decodes()
        admitted = []
        for v in sorted(self.at(WAITING), key=lambda v: (not v.was_preempted, v.key, v.number)):
            if self.local():
                break  # what comes free is theirs
            found = self.found(v)
            kv = len(found) * self.config.tokens_per_block
            left = v.to_compute - kv
            if budget <= 0 or self.slots <= len(admitted) or self.price(v, found) > blocks:
                break
            if not scheduler.chunked_context and left > budget:
                break
            length = min(left, budget)
            chunks.append((v, kv, length))
            budget -= length
            blocks -= self.price(v, found)
            admitted.append((v, kv, found))
        for v, kv, found in admitted:
            v.kv, v.shared, v.blocks = kv, found, len(found)
            v.place = PREFILL
            self.prefill.append(v)
            if v.started_at is None:
                v.started_at = self.cluster.now
                self.order.on_served(v.request, v.key, self.cluster.now)
                v.cached = kv if v.transfer_start is None else v.cached
        for v, _, _ in admitted:
            v.blocks = self.to_admit(v)
            self.evict()
        return chunks, not (alone and chunks)

    def pull(self) -> None:
        now = self.cluster.now
        for v in sorted(self.at(PULLING), key=lambda v: (v.awaits, v.key, v.number)):
            if self.local():
                return
            reserve = self.config.pull_reserve_blocks if self.free < self.config.num_blocks else 0
            found = [] if v.awaits else self.found(v)
            if self.price(v, found) > self.free - self.wanted_by_decodes() - reserve:
                return
            v.shared, v.cached = found, len(found) * self.config.tokens_per_block
            v.blocks, v.is_arriving = self.to_admit(v), True
            self.evict()
            self.order.on_served(v.request, v.key, now)
            v.place, v.transfer_start = IN_FLIGHT, now
            self.num_pulled += 1
            v.pulled = self.num_pulled
            if not v.awaits:
                self.cluster.later(
                    now + self.config.transfer_timeout_base, MESSAGE, self.id, self.pull_takes_too_long, v
                )
            source = self.cluster.executors[v.params.executor]
            self.cluster.post(self.id, source.asked_for_kv, (v.params.req_id, self.id, v.id, v.cached))

    def begin(self, chunks: list[tuple[Visitor, int, int]], decodes: list[Visitor]) -> None:
        now = self.cluster.now
        runs = bool(chunks or decodes)
        ids = [v.id for v in decodes]
        epoch = self.epoch
        if not runs or chunks or self.last != (ids, False) or epoch is None:
            if runs or self.last is not None:
                self.changed = True
                self.show()
            self.close_epoch()
        self.last = None
        if not runs:
            return
        start = max(now, self.steps[-1].end) if self.steps else now
        kv = sum(v.kv + v.ahead for v in decodes)
        if self.epoch is None:
            self.epoch = Epoch(start)
            self.epoch.shared_kv = min(self.read_again() * self.config.tokens_per_block, kv)
        epoch = self.epoch
        self.num_steps += 1
        model_chunks = tuple((first, length, first + length == v.to_compute) for v, first, length in chunks)
        epoch.units += self.cost.step_time(StepFeatures(len(decodes), kv, model_chunks, epoch.shared_kv))
        epoch.steps += 1
        epoch.until = epoch.since + max(epoch.units >> 20, epoch.steps)
        for v in decodes:
            v.ahead += 1
            if self.evicts:
                missing = self.blocks_for(v.kv + v.ahead) - v.blocks
                v.blocks += missing
                self.grown += missing
                self.evict()
        if self.free < 0:
            raise AssertionError(f"executor {self.id} has given out more blocks than it has")
        step = Planned(epoch, start, list(decodes), chunks)
        self.steps.append(step)
        self.last = (ids, bool(chunks))
        self.cluster.later(step.end, STEP_END, self.id, self.step_ends, None)
        for v, _, length in chunks:
            if v.early is not None and v.reader is not None:
                v.early.compute(length, step.start, step.end)

    def running(self) -> list[Visitor]:
        """Those whose blocks neither are held nor wait for a reader that nobody wants any more."""
        return [v for v in self.visitors if not self.is_held(v) and not self.is_doomed(v)]

    def is_held(self, v: Visitor) -> bool:
        return v.place == HELD and not v.doom

    def is_doomed(self, v: Visitor) -> bool:
        return v.place == LEAVING or (v.doom is not None and v.place in (HELD, IN_FLIGHT))

    def read_again(self) -> int:
        """Blocks that those who run, and have their KV, refer to after another has."""
        running = self.running()
        in_use = {name for v in running for name in v.shared}
        return max(0, sum(len(v.shared) for v in running if not v.is_arriving) - len(in_use))

    def show(self) -> None:
        """What is told of the batch is true of the step to be planned."""
        self.shown_kv = sum(v.kv + v.ahead for v in self.decodes)
        self.shown_written = sum(self.blocks_for(v.kv + v.ahead) for v in self.decodes)
        self.shown_steps = self.num_steps
        self.grown = 0

    def close_epoch(self) -> None:
        epoch, self.epoch = self.epoch, None
        if epoch is not None:
            self.show()
            epoch.is_closed = True
            self.note_step_time(epoch)

    def note_step_time(self, epoch: Epoch) -> None:
        if epoch.is_closed and epoch.num_ended == epoch.steps:
            self.step_time = (epoch.until - epoch.since) // epoch.steps

    # ---- what it tells ----------------------------------------------------------------------------------------------

    def tell(self) -> None:
        if self.responses:
            for response in self.responses[:-1]:
                self.cluster.send(self.id, 0, response)
            last = self.responses[-1]
            fields = {name: getattr(last, name) for name in last.__struct_fields__}
            self.cluster.send(self.id, 0, Response(**{**fields, "report": self.report()}))
            self.responses = []
        elif self.changed or (self.has_heard and not self.has_reported):
            self.cluster.send(self.id, 0, self.report())
        else:
            return
        self.changed = False
        self.has_reported = True

    def report(self) -> Report:
        held = [v for v in self.visitors if self.is_held(v)]
        doomed = [v for v in self.visitors if self.is_doomed(v)]
        running = self.running()
        early = self.at(EARLY)
        in_use = {name for v in running for name in v.shared}
        only_held = {name for v in held for name in v.shared} - in_use
        only_doomed = {name for v in doomed for name in v.shared} - in_use - only_held
        held_blocks = sum(v.blocks - len(v.shared) for v in held) + len(only_held)
        quarantined = sum(v.blocks - len(v.shared) for v in doomed) + len(only_doomed)
        free, cached = self.empty + self.grown, len(self.unused())
        decode_written = sum(self.blocks_for(v.kv + v.ahead) for v in self.decodes)
        written = self.shown_written if self.epoch is not None else decode_written
        written += sum(self.blocks_for(v.kv) for v in (*self.prefill, *self.joining, *self.ready, *early))
        written += sum(self.blocks_for(v.kv_at_leave) for v in self.at(ENDING))
        written += len(in_use) - sum(len(v.shared) for v in running if not v.is_arriving)
        last_first = dict.fromkeys(reversed(self.stored))
        came = tuple(name for name in reversed(last_first) if name in self.known and name not in self.told)
        gone = tuple(name for name in self.told if name not in self.known)
        self.told, self.stored = set(self.known), []
        coming = [v for v in self.visitors if v.place in (PULLING, IN_FLIGHT, EARLY, READY) and not v.doom]
        waiting = self.at(WAITING)
        return Report(
            self.id,
            self.seen[0],
            self.seen[1],
            len(waiting) + len(self.at(PULLING)) + len(self.at(IN_FLIGHT)) + len(early) + len(self.ready),
            len(self.prefill) + len(self.joining) + len(self.decodes),
            sum(v.left - v.found for v in waiting),
            sum(v.left for v in self.prefill),
            self.shown_kv + sum(v.request.num_prompt_tokens for v in coming),
            free,
            self.config.num_blocks - free - held_blocks - quarantined - cached - written,
            written,
            held_blocks,
            quarantined,
            self.shown_steps,
            self.step_time,
            True,
            (len(gone), *gone, *came) if gone or came else (),
            cached,
        )


class NaiveLink:
    """Transfers that share a rate equally; what is left of each is written down anew at every change."""

    def __init__(self, cluster: NaiveCluster, source: int, units_per_byte: float) -> None:
        self.cluster, self.source, self.units_per_byte = cluster, source, units_per_byte
        self.active: list[list[Any]] = []  # [units of service left, number, done]
        self.updated_at = 0
        self.version = 0

    def start(self, item: tuple[int, int, Any]) -> None:
        num_bytes, number, done = item
        self.progress()
        self.active.append([max(1, round(num_bytes * self.units_per_byte)), number, done])
        self.next()

    def progress(self) -> None:
        now = self.cluster.now
        each = ((now - self.updated_at) << 20) // len(self.active) if self.active else 0
        for transfer in self.active:
            transfer[0] -= each
        self.updated_at = now

    def next(self) -> None:
        self.version += 1
        if self.active:
            left = max(0, min(transfer[0] for transfer in self.active)) * len(self.active)
            wait = left // 2**20 + (left % 2**20 > 0)
            self.cluster.later(self.cluster.now + wait, MESSAGE, self.source, self.end, self.version)

    def end(self, version: int) -> None:
        if version != self.version:
            return
        self.progress()
        first = min(self.active, key=lambda transfer: (transfer[0], transfer[1]))
        self.active.remove(first)
        self.next()
        first[2]()


class EarlyTransfer:
    """KV on its way to a reader while its context phase computes it: an eighth of each chunk at each eighth of its step."""

    def __init__(self, cluster: NaiveCluster, source: int, visitor: Visitor, reader: int, reader_id: int) -> None:
        self.cluster, self.source, self.visitor = cluster, source, visitor
        self.reader, self.reader_id = reader, reader_id
        self.to_come = visitor.request.num_prompt_tokens  # bytes, one a token
        self.on_link = 0
        self.aborted = False

    def compute(self, length: int, start: int, end: int) -> None:
        for eighth in range(1, 9):
            num_bytes = length * eighth // 8 - length * (eighth - 1) // 8
            at = max(self.cluster.now, start + (end - start) * eighth // 8)
            if num_bytes:
                self.cluster.later(at, MESSAGE, self.source, self.segment, num_bytes)

    def segment(self, num_bytes: int) -> None:
        if not self.aborted:
            self.on_link += 1
            self.cluster.to_link(self.source, self.reader, num_bytes, lambda: self.through(num_bytes))

    def through(self, num_bytes: int) -> None:
        self.on_link -= 1
        self.to_come -= num_bytes
        if not self.on_link and (self.aborted or not self.to_come):
            self.over(None)

    def abort(self) -> None:
        self.aborted = True
        if not self.on_link:
            self.cluster.post(self.source, self.over, None)

    def over(self, _: Any) -> None:
        self.cluster.executors[self.reader].kv_came((self.reader_id, not self.aborted))
        self.cluster.executors[self.source].kv_was_read(self.visitor, not self.aborted)


class NaiveCluster:
    """Run it with `run()`; `trace` then says what happened."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.trace = Trace()
        self.now = 0
        self.calendar: list[tuple[int, int, int, int, Any, Any]] = []
        self.number = 0
        self.num_transfers = 0
        self.touched: list[NaiveExecutor] = []
        self.orchestrator = OrchestratorCore(case.config)
        self.orchestrator_touched = False
        self.wake_version = 0
        self.hidden = {request.id: length for _, request, length in case.arrivals}
        self.lengths: dict[int, int] = {}
        self.names: dict[int, tuple[int, ...]] = {}
        self.executors = {e.id: NaiveExecutor(e, case.costs[e.id], self) for e in case.config.executors}
        self.links: dict[tuple[int, int], NaiveLink] = {}
        for at, request_id in case.cancels:
            self.later(at, 0, 0, self.to_orchestrator, Cancel(request_id))
        for at, executor, role in case.switches:
            self.later(at, 0, 0, self.to_orchestrator, RoleChanged(executor, role))
        for at, request, _ in case.arrivals:
            self.later(at, MESSAGE, 0, self.to_orchestrator, Arrive(request))

    def later(self, at: int, kind: int, rank: int, call: Any, argument: Any) -> None:
        if at < self.now:
            raise AssertionError("nothing can be put into the past")
        self.number += 1
        self.calendar.append((at, kind, rank, self.number, call, argument))

    def touch(self, executor: NaiveExecutor) -> None:
        """Something has happened to it, so that it plans at the end of this instant. A timer by itself is nothing."""
        if executor not in self.touched:
            self.touched.append(executor)

    def post(self, sender: int, call: Any, argument: Any) -> None:
        self.later(self.now + self.case.message_latency, MESSAGE, sender, call, argument)

    def send(self, sender: int, to: int, message: Any) -> None:
        if to == 0:
            self.post(sender, self.to_orchestrator, message)
        else:
            self.post(sender, self.to_executor, (to, message))

    def to_executor(self, item: tuple[int, Any]) -> None:
        executor = self.executors[item[0]]
        self.touch(executor)
        executor.hear(item[1])

    def to_orchestrator(self, event: Any) -> None:
        self.trace.heard.append((self.now, event))
        self.orchestrator_touched = True
        self.obey(self.orchestrator.handle(event, self.now, True))

    def obey(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self.send(0, command.to, command.message)
            elif isinstance(command, Dispatched):
                self.lengths[command.executor_request.id] = self.hidden[command.request_id]
                self.names[command.executor_request.id] = self.case.output_hashes.get(command.request_id, ())
            elif isinstance(command, Deliver):
                self.trace.delivered.append(command)
            elif isinstance(command, WakeAt):
                self.wake_version += 1
                if command.at is not None:
                    self.later(max(command.at, self.now + 1), MESSAGE, 0, self.wake, self.wake_version)

    def wake(self, version: int) -> None:
        if version == self.wake_version:
            self.to_orchestrator(Wake())

    def true_length(self, executor_request: int) -> int:
        return self.lengths[executor_request]

    def output_hashes(self, executor_request: int) -> tuple[int, ...]:
        return self.names[executor_request]

    def transfer(self, source: int, reader: int, num_bytes: int, item: tuple[Visitor, int]) -> None:
        visitor, reader_id = item

        def done() -> None:
            self.executors[reader].kv_came((reader_id, True))
            self.executors[source].kv_was_read(visitor)

        self.to_link(source, reader, num_bytes, done)

    def to_link(self, source: int, reader: int, num_bytes: int, done: Any) -> None:
        link = self.links.get((source, reader))
        if link is None:
            units_per_byte = (10**12 * 2**20) / self.case.link_bytes_per_s
            link = self.links[source, reader] = NaiveLink(self, source, units_per_byte)
        self.num_transfers += 1
        at = self.now + self.case.link_latency
        self.later(at, MESSAGE, source, link.start, (num_bytes, self.num_transfers, done))

    def run(self) -> Trace:
        while self.calendar or self.touched or self.orchestrator_touched:
            entry = min(self.calendar, key=lambda e: e[:4], default=None)
            if entry is None or entry[0] > self.now:
                self.end_instant()
                entry = min(self.calendar, key=lambda e: e[:4], default=None)
            if entry is None:
                break
            self.calendar.remove(entry)
            self.now = entry[0]
            entry[4](entry[5])
        return self.trace

    def end_instant(self) -> None:
        """Nothing more happens now: the orchestrator and each executor concerned plan, once."""
        if self.orchestrator_touched:
            self.orchestrator_touched = False
            self.obey(self.orchestrator.handle(None, self.now))
        touched, self.touched = sorted(self.touched, key=lambda e: e.id), []
        for executor in touched:
            executor.plan()


def run_reference(case: Case) -> Trace:
    """The whole life of a case in the naive cluster, which knows no kills."""
    if case.kills:
        raise ValueError("the reference knows no kills")
    return NaiveCluster(case).run()
