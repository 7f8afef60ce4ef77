"""Continuous batching in one executor: which requests the next steps run, and with which blocks.

Plans between steps and orders whole spans of them. Owns the waiting prompts, the decode batch, the KV blocks and the
epochs; knows nothing of messages, transfers or leases - `executor.py` does, and tells it what becomes ready or must go.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from ..policies.interfaces import BatchPolicy, PolicyError
from ..policies.vocabulary import BatchPlan, FinishReason, RequestType
from .blocks import BlockManager
from .commands import Chunk, Joined, Record, RunSteps, StopAfterStep
from .config import ExecutorConfig
from .decode_batch import DecodeBatch
from .events import StepsDone, Stopped
from .life_cycle import Cause, State
from .tables import StepRow
from .visit import Visit

CAPACITIES: Final = ("guaranteed_no_evict", "max_utilization")
_NO_BATCH: Final = BatchPlan()


class _WaitingPrompts:
    """Waiting prompts in queue order, read lazily: what is looked at and not taken is put back afterwards."""

    def __init__(self, heap: list[tuple[int, Any, int, Visit]]) -> None:
        self._heap = heap
        self._seen: list[tuple[int, Any, int, Visit]] = []

    def __iter__(self) -> Iterator[Visit]:
        yield from [entry[3] for entry in self._seen]
        while self._heap:
            entry = heapq.heappop(self._heap)
            if entry[3].state is not State.QUEUED:
                continue  # cancelled meanwhile
            self._seen.append(entry)
            yield entry[3]

    def put_back(self) -> None:
        for entry in self._seen:
            if entry[3].state is State.QUEUED:
                heapq.heappush(self._heap, entry)
        self._seen.clear()

    def find(self, request_id: int) -> Visit | None:
        return next((entry[3] for entry in self._seen if entry[3].id == request_id), None)


class _BatchView:
    """What the batch policy of this executor sees; see `policies.interfaces.BatchView`."""

    def __init__(self, scheduler: Scheduler, waiting: _WaitingPrompts, num_free_blocks: int, now: int) -> None:
        limits = scheduler.config.scheduler
        self.now = now
        self.role = scheduler.config.role
        self.num_decodes = len(scheduler.batch)
        self.num_free_blocks = num_free_blocks
        self.num_free_slots = scheduler.num_free_slots
        self.max_num_tokens = limits.max_num_tokens
        self.chunked = limits.chunked_context
        self.begun: list[Visit] = list(scheduler.prefilling.values())
        self.waiting: Iterable[Visit] = waiting


class _Epoch:
    """The life of a batch at constant rates: what its row will say."""

    __slots__ = (
        "chunks",
        "decodes",
        "end_at",
        "first_step",
        "num_cached",
        "num_done",
        "number",
        "row_head",
        "start_at",
    )

    def __init__(self, number: int, start_at: int, first_step: int, chunks: tuple[Chunk, ...], decodes: bool) -> None:
        self.number = number
        self.start_at = start_at
        self.end_at = start_at
        self.first_step = first_step  # running count of the executor's steps
        self.num_done = 0
        self.chunks = chunks
        self.decodes = decodes
        self.row_head: tuple[int, ...] = ()
        self.num_cached = sum(chunk.start for chunk in chunks)


class Ended(NamedTuple):
    """A sequence whose last token came in a plan. `last_step` is a running count of the executor's steps."""

    visit: Visit
    reason: FinishReason
    last_step: int


class Prefilled(NamedTuple):
    """A prompt whose last chunk was computed; `stopped` if the world ended the sequence at the token it gave."""

    visit: Visit
    stopped: bool


class Scheduler:
    """`emit` takes its commands: RunSteps, StopAfterStep, and the row of each finished epoch."""

    def __init__(self, config: ExecutorConfig, batching: BatchPolicy, emit: Callable[[Any], object]) -> None:
        if config.scheduler.capacity not in CAPACITIES:
            raise PolicyError(f"capacity {config.scheduler.capacity!r}: allowed are {' and '.join(CAPACITIES)}")
        self.config = config
        self.evicts = config.scheduler.capacity == "max_utilization"
        self.blocks = BlockManager(config.num_blocks)
        self.batch = DecodeBatch(config.tokens_per_block)
        self.prefilling: dict[int, Visit] = {}  # begun, in order of beginning
        self.joining: list[Visit] = []  # prompts finished here, in the decode batch from the next plan on
        self.ready: dict[int, Visit] = {}  # KV is here, waiting for a place in the decode batch
        self.early: dict[int, Visit] = {}  # KV is here, and the context phase that it is of is not known to be done
        self.num_waiting = 0
        self.num_queued_tokens = 0
        self.num_steps = 0
        self.step_time = 0  # of the last finished epoch
        self.running: RunSteps | None = None  # the outstanding plan
        self.has_changed = False  # since the flag was last cleared: an epoch began, or the batch ran empty
        self.shown_kv = 0  # KV tokens of the decode batch at its last change
        self.shown_steps = 0
        self._shown_written = 0
        self._batching = batching
        self._emit = emit
        self._waiting: list[tuple[int, Any, int, Visit]] = []  # heap: preempted first, then the queue order
        self._left: list[int] = []  # delta not yet told to the driver
        self._joined: dict[int, Visit] = {}
        self._plan_number = 0
        self._num_epochs = 0
        self._epoch: _Epoch | None = None
        self._stop_asked = False
        self._grown = 0  # blocks appended to the decode batch since the epoch began (max_utilization)

    # ---- what is there ----------------------------------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        taken = len(self.batch) + len(self.prefilling) + len(self.joining)
        return self.config.scheduler.max_batch_size - taken

    @property
    def num_free_blocks(self) -> int:
        """Free at the next step boundary at least: those appended ahead of the running span come back if it is cut."""
        return self.blocks.num_free + self._grown

    @property
    def num_spare_blocks(self) -> int:
        """Free, and not needed by the decode batch's next step. For use between plans."""
        needed = self.batch.blocks_for(1) if self.evicts and self.batch.members else 0
        return self.blocks.num_free - needed

    def is_in_plan(self, visit: Visit) -> bool:
        run = self.running
        if run is None:
            return False
        return visit.id in self.batch.members or any(chunk.request_id == visit.id for chunk in run.chunks)

    def doomed(self) -> list[Visit]:
        """Visits given up while a plan named them."""
        groups = (self.batch.members.values(), self.joining, self.prefilling.values())
        return [visit for group in groups for visit in group if visit.doom is not None]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.tokens_per_block)

    def blocks_to_admit(self, visit: Visit) -> int:
        """Blocks taken at admission: everything it can ever need, or, under max_utilization, what it is about to write."""
        request = visit.request
        if request.request_type is RequestType.CONTEXT_ONLY or self.evicts:
            return self.blocks_for(visit.num_to_compute)
        return self.blocks_for(request.total_kv_tokens)

    # ---- what comes and goes ----------------------------------------------------------------------------------------

    def queue(self, visit: Visit, rank: int = 1) -> None:
        """A prompt to compute; rank 0, of preempted ones, goes before all others."""
        visit.num_blocks = self.blocks_to_admit(visit)
        heapq.heappush(self._waiting, (rank, visit.order_key, visit.serial, visit))
        self.num_waiting += 1
        self.num_queued_tokens += visit.num_tokens_left

    def remove(self, visit: Visit, state: State) -> None:
        """Forget a visit that was in `state`, wherever it is; its blocks stay its own. For use when no plan names it."""
        if state is State.QUEUED:
            self.num_waiting -= 1
            self.num_queued_tokens -= visit.num_tokens_left
        if visit.id in self.batch.members:
            self._leave_batch(visit)
        elif visit in self.joining:
            self.joining.remove(visit)
        self.prefilling.pop(visit.id, None)
        self.ready.pop(visit.id, None)
        self.early.pop(visit.id, None)

    def ask_to_stop(self) -> None:
        """Something could change the batch: end the span at the next boundary."""
        run = self.running
        if run is not None and not self._stop_asked and run.last_step > run.first_step:
            self._stop_asked = True
            self._emit(StopAfterStep(run.epoch))

    def steps_done(self, event: StepsDone, now: int) -> tuple[list[Ended], list[Prefilled]] | None:
        """Take a plan's end: sequences that ended, out of the batch, and prompts that were finished, in no place now.

        None for a plan that is not the outstanding one: it closes its own plan only.
        """
        run, epoch = self.running, self._epoch
        if run is None or epoch is None or event.plan != run.plan:
            return None
        self.running = None
        self._stop_asked = False
        steps = event.num_steps - epoch.num_done
        epoch.num_done = event.num_steps
        epoch.end_at = now
        self.num_steps += steps
        if run.decodes and self.batch.members:
            self.batch.advance(steps)
            if self.evicts and event.num_steps < run.last_step:
                self._give_back_unwritten(run)
        if event.error is not None:
            return [], []
        stopped = {stop.request_id: stop for stop in event.stopped}
        ended = self._leave_ended(stopped, event.num_steps)
        return ended, [Prefilled(v, v.id in stopped) for c in run.chunks if (v := self._chunk_done(c)) is not None]

    def _leave_ended(self, stopped: dict[int, Stopped], num_steps: int) -> list[Ended]:
        members = self.batch.members
        ended = [members[request_id] for request_id in stopped if request_id in members]
        ended += [visit for visit in self.batch.pop_finished() if visit.id not in stopped]
        told = []
        for visit in sorted(ended, key=lambda v: v.serial):
            self._leave_batch(visit)
            stop = stopped.get(visit.id)
            surplus = 0 if stop is None else num_steps - stop.step  # tokens of steps launched after the stop
            visit.num_generated -= surplus
            reason = FinishReason.LENGTH if stop is None else stop.reason
            told.append(Ended(visit, reason, self.num_steps - surplus))
        return told

    def _chunk_done(self, chunk: Chunk) -> Visit | None:
        """The visit, if that was its prompt's last chunk."""
        visit = self.prefilling[chunk.request_id]
        visit.num_kv_tokens += chunk.length
        if not chunk.is_last:
            return None
        del self.prefilling[visit.id]
        visit.num_generated += 1
        if visit.first_step is None:
            visit.first_step = self.num_steps
        return visit

    # ---- the planning pass, in this order: fill places, preempt, choose, run -------------------------------------------

    def fill_places(self) -> list[Visit]:
        """Prompts finished here enter the decode batch, then requests whose KV is ready; those latter."""
        entered = []
        for visit in self.joining:
            self._enter_batch(visit)
        self.joining.clear()
        while self.ready and self.num_free_slots > 0:
            visit = self.ready.pop(next(iter(self.ready)))
            visit.advance(Cause.JOIN)
            entered.append(visit)
            visit.first_step = self.num_steps + 1
            self._enter_batch(visit)
        return entered

    def _enter_batch(self, visit: Visit) -> None:
        self.batch.join(visit)
        self._joined[visit.id] = visit

    def _leave_batch(self, visit: Visit) -> None:
        self.batch.leave(visit)
        if self._joined.pop(visit.id, None) is None:
            self._left.append(visit.id)

    def preempt(self) -> bool:
        """Take blocks from the youngest until every decode can write its next token; whether any were taken.

        Never from a context phase whose blocks an early reader is at.
        """
        preempted = False
        if not self.evicts:
            return False
        while self.batch.members and self.batch.blocks_for(1) > self.blocks.num_free:
            prompts = (visit for visit in self.prefilling.values() if visit.pinned_by is None and not visit.is_read)
            victim = max((*self.batch.members.values(), *prompts), key=lambda v: v.serial)
            if victim.id in self.batch.members:
                self._leave_batch(victim)
            else:
                del self.prefilling[victim.id]
            self.blocks.free(victim.id)
            victim.advance(Cause.PREEMPT)
            victim.num_preemptions += 1
            victim.num_kv_tokens = 0
            victim.num_to_compute = victim.request.num_prompt_tokens + victim.num_generated
            self.queue(victim, 0)
            preempted = True
        return preempted

    def choose(self, now: int) -> tuple[BatchPlan, tuple[Chunk, ...]]:
        """Ask the batch policy, check its answer, and admit the prompts that it begins."""
        if not self.num_waiting and not self.prefilling:
            return _NO_BATCH, ()
        waiting = _WaitingPrompts(self._waiting)
        plan = self._ask_policy(waiting, now)
        chunks = self._begin(plan, waiting, now)
        waiting.put_back()
        return plan, chunks

    def run(self, plan: BatchPlan, chunks: tuple[Chunk, ...], now: int) -> None:
        """Order the next span, if there is anything to run."""
        if chunks or (self.batch.members and plan.decodes):
            self._start(chunks, plan.decodes, now)
            return
        self.close_epoch()
        if self.batch.members and plan.ask_again_at is None:
            raise PolicyError(f"{type(self._batching).__name__} stood the decode batch still and ran nothing else")

    def _ask_policy(self, waiting: _WaitingPrompts, now: int) -> BatchPlan:
        view = _BatchView(self, waiting, self.num_spare_blocks, now)
        plan = self._batching.plan(view)
        budget = self.config.scheduler.max_num_tokens - (len(self.batch) if plan.decodes else 0)
        if sum(chunk.num_tokens for chunk in plan.chunks) > budget and plan.chunks:
            total = sum(chunk.num_tokens for chunk in plan.chunks)
            raise PolicyError(
                f"{type(self._batching).__name__} planned {total} prompt tokens; at most {budget} are allowed"
            )
        return plan

    def _begin(self, plan: BatchPlan, waiting: _WaitingPrompts, now: int) -> tuple[Chunk, ...]:
        """Check the policy's chunks, admit the prompts that are new, and say what each chunk computes."""
        chunks = []
        seen = set()
        for chosen in plan.chunks:
            visit = self.prefilling.get(chosen.request_id) or waiting.find(chosen.request_id)
            if visit is None or chosen.request_id in seen or not 0 < chosen.num_tokens <= visit.num_tokens_left:
                raise PolicyError(
                    f"{type(self._batching).__name__} planned {chosen}, which is not there to compute: a plan names each"
                    " prompt once, one that has begun or that was read from `waiting` in this call, and tokens it has left"
                )
            seen.add(chosen.request_id)
            if visit.state is State.QUEUED:
                if self.num_free_slots <= 0 or visit.num_blocks > self.blocks.num_free:
                    raise PolicyError(
                        f"{type(self._batching).__name__} planned {chosen}, which takes a slot and {visit.num_blocks}"
                        f" blocks; free are {self.num_free_slots} slots and {self.blocks.num_free} blocks"
                    )
                self.blocks.allocate(visit.id, visit.num_blocks)
                visit.num_blocks = 0
                visit.advance(Cause.START)
                self.num_waiting -= 1
                self.num_queued_tokens -= visit.num_tokens_left
                self.prefilling[visit.id] = visit
                if visit.started_at is None:
                    visit.started_at = now
            is_last = chosen.num_tokens == visit.num_tokens_left
            table = self.blocks.blocks_of(visit.id)
            chunks.append(Chunk(visit.id, visit.num_kv_tokens, chosen.num_tokens, is_last, table))
        return tuple(chunks)

    def _start(self, chunks: tuple[Chunk, ...], decodes: bool, now: int) -> None:
        batch, epoch = self.batch, self._epoch
        continues = (
            epoch is not None
            and not (chunks or self._left or self._joined or epoch.chunks)
            and epoch.decodes == decodes
            and epoch.end_at == now
        )
        if not continues or epoch is None:
            self.close_epoch()
            self._num_epochs += 1
            epoch = self._epoch = _Epoch(self._num_epochs, now, self.num_steps + 1, chunks, decodes)
            self._grown = 0
            self.shown_kv = batch.num_kv_tokens
            self._shown_written = batch.num_blocks_written
            self.shown_steps = self.num_steps
            self.has_changed = True
        running = len(batch) if decodes else 0
        num_steps = 1
        if not chunks:
            num_steps = min(batch.steps_until_max_tokens(), self.config.max_span_steps)
            if self.evicts:
                num_steps = batch.steps_until_out_of_blocks(self.blocks.num_free, num_steps)
        joined = tuple(Joined(v.id, v.num_kv_tokens, self.blocks.blocks_of(v.id)) for v in self._joined.values())
        appended = self._grow(num_steps) if self.evicts and running else ()
        self._plan_number += 1
        kv = self.shown_kv
        done = epoch.num_done
        self.running = RunSteps(
            self._plan_number,
            epoch.number,
            done + 1,
            done + num_steps,
            tuple(self._left),
            joined,
            chunks,
            appended,
            running,
            kv if running else 0,
            decodes,
        )
        if not continues:
            epoch.row_head = (running, kv if running else 0, *self.block_counts())
        self._left.clear()
        self._joined.clear()
        self._emit(self.running)

    def _grow(self, num_steps: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Give each decode the blocks that it writes to in the next steps (max_utilization)."""
        appended = []
        for visit in self.batch.members.values():
            tokens = visit.num_kv_tokens + self.batch.step - visit.joined_step
            missing = self.blocks_for(tokens + num_steps) - len(self.blocks.blocks_of(visit.id))
            if missing > 0:
                appended.append((visit.id, self.blocks.extend(visit.id, missing)))
                self._grown += missing
        return tuple(appended)

    def _give_back_unwritten(self, run: RunSteps) -> None:
        """A span cut short: blocks appended for steps that were not run are free again."""
        for request_id, _ in run.appended:
            visit = self.batch.members[request_id]
            tokens = visit.num_kv_tokens + self.batch.step - visit.joined_step
            self._grown -= self.blocks.trim(request_id, self.blocks_for(tokens))

    def close_epoch(self) -> None:
        epoch = self._epoch
        if epoch is None:
            return
        self._epoch = None
        self.shown_kv = self.batch.num_kv_tokens
        self._shown_written = self.batch.num_blocks_written
        self.shown_steps = self.num_steps
        self._grown = 0
        if not self.batch.members:
            self.has_changed = True
        if not epoch.num_done:
            return
        self.step_time = (epoch.end_at - epoch.start_at) // epoch.num_done
        num_decodes, num_kv, *counts = epoch.row_head
        self._emit(
            Record(
                StepRow(
                    self.config.id,
                    epoch.number,
                    epoch.first_step,
                    epoch.num_done,
                    num_decodes,
                    num_kv,
                    len(epoch.chunks),
                    sum(chunk.length for chunk in epoch.chunks),
                    epoch.num_cached,
                    epoch.start_at,
                    epoch.end_at,
                    *counts,
                )
            )
        )

    def block_counts(self) -> tuple[int, int, int, int, int]:
        """free, reserved, used, held, quarantined, as of the last change of batch."""
        size = self.config.tokens_per_block
        written = self._shown_written if self._epoch is not None else self.batch.num_blocks_written
        for group in (self.prefilling.values(), self.joining, self.ready.values(), self.early.values()):
            written += sum(-(-visit.num_kv_tokens // size) for visit in group)
        blocks = self.blocks
        free = blocks.num_free + self._grown
        held, quarantined = blocks.num_held, blocks.num_quarantined
        return free, blocks.num_blocks - free - held - quarantined - written, written, held, quarantined
