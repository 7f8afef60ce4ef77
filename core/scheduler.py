"""Continuous batching in one executor: which requests the next steps run, and with which blocks.

Plans between steps and orders whole spans of them. Owns the prompts, the decode batch, the KV blocks and the epochs; knows
nothing of messages, transfers or leases - `executor.py` does, and tells it what becomes ready or must go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ..policies.interfaces import BatchPolicy, PolicyError
from ..policies.vocabulary import BatchPlan
from .blocks import BlockManager
from .capacity import Capacity
from .commands import Chunk, Joined, RunSteps, StopAfterStep
from .config import ExecutorConfig
from .decode_batch import DecodeBatch
from .epochs import BlockCounts, Epoch, Epochs
from .events import StepsCommitted, StepsDone, Stopped
from .life_cycle import Cause, State
from .prefix_cache import PrefixCache
from .prompts import Prompts, Room
from .tails import Ended, Over, Prefilled, Stop, Tail, ended_at
from .visit import Visit, serial_of

_NO_CHUNKS: Final = BatchPlan()
_NOBODY: Final[frozenset[int]] = frozenset()


def _serial_of_end(end: Ended) -> int:
    return end.visit.serial


class Scheduler:
    """`emit` takes its commands: RunSteps, StopAfterStep, and the row of each finished epoch."""

    def __init__(self, config: ExecutorConfig, batching: BatchPolicy, emit: Callable[[Any], object]) -> None:
        self.config = config
        self.role = config.role  # that it serves now
        self.cache = PrefixCache(config.num_blocks, config.tokens_per_block) if config.enable_block_reuse else None
        self.blocks = BlockManager(config.num_blocks) if self.cache is None else self.cache
        self.batch = DecodeBatch(config.tokens_per_block)
        self.capacity = Capacity(config, self.blocks, self.batch)
        self.prompts = Prompts(config, batching, self.capacity, self.blocks, self.cache)
        self.prefilling = self.prompts.begun
        self.joining: list[Visit] = []  # prompts finished here, in the decode batch from the next plan on
        self.ready: dict[int, Visit] = {}  # KV is here, waiting for a place in the decode batch
        self.early: dict[int, Visit] = {}  # KV is here, and the context phase that it is of is not known to be done
        self.num_steps = 0
        self.running: RunSteps | None = None  # the plan whose end is open
        self.tails: deque[Tail] = deque()  # committed plans before it that have not ended
        self.has_changed = False  # since the flag was last cleared: an epoch began, or the batch ran empty
        self.shown_kv = 0  # KV tokens of the decode batch at its last change
        self._shown_shared_kv = 0  # of those, tokens of blocks that are read again
        self.shown_steps = 0
        self.has_doomed = False  # a visit was given up since `doomed` was last asked
        self._shown_written = 0
        self._batching = batching
        self._emit = emit
        self._plan_number = 0
        self._epochs = Epochs(config.id, emit)
        self._stopped: dict[int, Visit] = {}  # in the batch, though the world ended them in a step before
        self._stop_asked = False

    # ---- what is there ----------------------------------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        taken = len(self.batch) + len(self.prefilling) + len(self.joining)
        return self.config.scheduler.max_batch_size - taken

    @property
    def num_free_blocks(self) -> int:
        """Free at the next step boundary at least: those appended ahead of the running span come back if it is cut."""
        return self.blocks.num_free + self.capacity.num_ahead

    @property
    def num_spare_blocks(self) -> int:
        """Free, and not needed by the decode batch's next step. While a plan runs, for use where nothing evicts only."""
        needed = self.batch.blocks_for(1) if self.capacity.evicts and self.batch.members else 0
        return self.blocks.num_free - needed

    @property
    def has_begun(self) -> bool:
        """Whether anything runs, or can without further blocks."""
        return bool(self.prefilling or self.joining or self.ready or self.batch.members or self.tails)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to plan, nor an epoch to close."""
        if self.prompts.num_waiting or self.has_begun:
            return False
        return self._epochs.open is None and not self.has_doomed

    @property
    def is_end_quiet(self) -> bool:
        """Whether the end of the only committed plan, if no stop comes with it, changes no plan that is made or to be made."""
        if (
            len(self.tails) != 1
            or self.prompts.num_waiting
            or self.has_doomed
            or self._stopped
            or self.tails[0].given_up
        ):
            return False
        if self.running is not None:
            return True
        return not (self.batch.members or self.prefilling or self.joining or self.ready or self._epochs.open)

    @property
    def step_time(self) -> int:
        """Picoseconds a step of the last epoch that is over."""
        return self._epochs.step_time

    def is_in_plan(self, visit: Visit) -> bool:
        """Whether a plan that has not ended names it."""
        run = self.running
        if run is not None and any(chunk.request_id == visit.id for chunk in run.chunks):
            return True
        if visit.id in self.batch.members:
            return run is not None or bool(self.tails)
        return self.is_leaving(visit)

    def is_leaving(self, visit: Visit) -> bool:
        """Whether it is out of the batch, and committed steps still touch its blocks."""
        return any(visit.id in tail.leaving for tail in self.tails)

    def doomed(self) -> list[Visit]:
        """Visits given up, or to be moved, while a plan named them, and that nothing touches now. For use between plans.

        Where committed steps still touch them they only leave the batch; the end of those steps tells of them.
        """
        if not self.has_doomed:
            return []
        self.has_doomed = False
        if self.tails:
            for visit in [v for v in self.batch.members.values() if v.doom is not None or v.is_moving]:
                if visit.joined_step < self.tails[-1].decode_step:  # else it has joined since, and is in no steps yet
                    self._leave_batch(visit)
                    self.tails[-1].take(visit, has_ended=False)
        groups = (self.batch.members.values(), self.joining, self.prefilling.values())
        return [v for group in groups for v in group if v.doom is not None or v.is_moving]

    # ---- what comes and goes ----------------------------------------------------------------------------------------

    def remove(self, visit: Visit, state: State) -> None:
        """Forget a visit that was in `state`, wherever it is; its blocks stay its own. For use when no plan names it."""
        if state is State.QUEUED:
            self.prompts.no_longer_waits(visit)
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

    def steps_committed(self, event: StepsCommitted) -> None:
        """The open plan's end is certain: who ends with it leaves the batch, and the next plan may be made."""
        run, epoch = self.running, self._epochs.open
        if run is None or epoch is None or event.plan != run.plan:
            return
        if run.chunks:
            raise ValueError(f"plan {run.plan} was committed, but has chunks: what they yield is not there yet")
        self._advance(run, self._epochs.committed(epoch, event.num_steps))
        self._note_stops(event.stopped, event.num_steps, self.batch.step, self.num_steps)
        self.tails.append(Tail(run, epoch, event.num_steps, self.batch.step, self.num_steps))
        for visit in self._pop_ended():
            self.tails[-1].take(visit, has_ended=True)

    def steps_done(self, event: StepsDone, now: int) -> Over | None:
        """Take a plan's end: sequences that ended, out of the batch, and prompts that were finished, in no place now.

        None for a plan that is not outstanding: it closes its own plan only.
        """
        if self.tails and event.plan == self.tails[0].run.plan:
            return self._tail_over(event, now)
        run, epoch = self.running, self._epochs.open
        if run is None or epoch is None or event.plan != run.plan:
            return None
        self._advance(run, self._epochs.done(epoch, event.num_steps, now))
        if event.error is not None:
            return Over(run, [], [], [])
        self._note_stops(event.stopped, event.num_steps, self.batch.step, self.num_steps)
        stopped = {stop.request_id for stop in event.stopped} if event.stopped else _NOBODY
        ended = [ended_at(visit, self.batch.step, self.num_steps) for visit in self._pop_ended()]
        prefilled = [
            Prefilled(v, v.id in stopped)
            for c in run.chunks
            if (v := self.prompts.chunk_done(c, self.num_steps)) is not None
        ]
        return Over(run, ended, prefilled, [])

    def _tail_over(self, event: StepsDone, now: int) -> Over:
        """A committed plan has ended. Whom the world ended in its last steps leaves the batch with the open plan."""
        tail = self.tails.popleft()
        self._epochs.tail_over(tail.epoch, now)
        if event.error is not None:
            self._fail_after(tail, event.error)
            return tail.over()
        self._note_stops(event.stopped, tail.num_steps, tail.decode_step, tail.last_step, tail)
        over = tail.over()
        run = self.running
        if self._stopped and run is not None and run.decodes:
            self.ask_to_stop()
        elif self._stopped:
            for visit in self._pop_ended():
                if run is not None:  # the batch stands still, and is shown as it was
                    self._shown_written -= self.capacity.blocks_for(visit.num_kv_tokens)
                if self.tails:
                    self.tails[-1].take(visit, has_ended=True)
                else:
                    over.ended.append(ended_at(visit, self.batch.step, self.num_steps))
            over.ended.sort(key=_serial_of_end)
        return over

    def _fail_after(self, tail: Tail, error: str) -> None:
        """A committed plan has failed, and with it everything that plans after it compute for who was in it."""
        tail.fail(error)
        for later in self.tails:
            later.fail(error)
        for visit in self.batch.members.values():
            if visit.joined_step < tail.decode_step:
                visit.doom = visit.doom or error
        self.has_doomed = True
        self.ask_to_stop()

    def _advance(self, run: RunSteps, num_steps: int) -> None:
        """The open plan is over, or as good as over, after `num_steps` steps."""
        self.running = None
        self._stop_asked = False
        self.num_steps += num_steps
        if run.decodes and self.batch.members:
            self.batch.advance(num_steps)
            if self.capacity.evicts:
                self.capacity.give_back_unwritten(run)

    def _note_stops(
        self, stops: tuple[Stopped, ...], num_steps: int, decode_step: int, last_step: int, tail: Tail | None = None
    ) -> None:
        """Remember where the world ended sequences; the counts are those after step `num_steps` of the stops' epoch."""
        for stop in stops:
            since = num_steps - stop.step
            visit = self.batch.members.get(stop.request_id)
            if visit is not None:
                self._stopped[visit.id] = visit
            else:
                tails = (*self.tails, tail) if tail is not None else ()
                visit = next((t.leaving[stop.request_id] for t in tails if stop.request_id in t.leaving), None)
            if visit is not None:
                visit.stop = Stop(stop.reason, decode_step - since, last_step - since)

    def _pop_ended(self) -> list[Visit]:
        """Out of the batch with those that the world ended and those that have reached `max_tokens`."""
        stopped, ended = self._stopped, self.batch.pop_finished()
        if stopped and not ended:
            ended = list(stopped.values())
        elif stopped:
            ended = [*stopped.values(), *[visit for visit in ended if visit.id not in stopped]]
        if len(ended) > 1:
            ended.sort(key=serial_of)
        for visit in ended:
            self._leave_batch(visit)
        return ended

    # ---- the planning pass, in this order: fill places, preempt, choose, run -------------------------------------------

    def fill_places(self) -> list[Visit]:
        """Prompts finished here enter the decode batch, then requests whose KV is ready; those latter."""
        if not self.joining and not self.ready:
            return []
        entered: list[Visit] = []
        for visit in self.joining:
            self.batch.join(visit)
        self.joining.clear()
        while self.ready and self.num_free_slots > 0:
            visit = self.ready.pop(next(iter(self.ready)))
            visit.advance(Cause.JOIN)
            entered.append(visit)
            visit.first_step = self.num_steps + 1
            self.batch.join(visit)
        return entered

    def _leave_batch(self, visit: Visit) -> None:
        self.batch.leave(visit)
        self._stopped.pop(visit.id, None)

    def must_wait(self) -> bool:
        """Whether blocks would have to be taken that committed steps still write: then the plan is made after those."""
        if not self.capacity.evicts or not self.tails or not self.batch.members:
            return False
        return self.batch.blocks_for(1) > self.blocks.num_free

    def preempt(self) -> bool:
        """Take blocks from the youngest until every decode can write its next token; whether any were taken.

        Never from a context phase whose blocks an early reader is at.
        """
        return self.capacity.evicts and self._preempt()

    def _preempt(self) -> bool:
        preempted = False
        while self.batch.members and self.batch.blocks_for(1) > self.blocks.num_free:
            prompts = (visit for visit in self.prefilling.values() if visit.pinned_by is None and not visit.is_read)
            victim = max((*self.batch.members.values(), *prompts), key=serial_of)
            if victim.id in self.batch.members:
                self._leave_batch(victim)
            else:
                del self.prefilling[victim.id]
            self.blocks.free(victim.id)
            victim.advance(Cause.PREEMPT)
            victim.num_preemptions += 1
            victim.num_kv_tokens = 0
            victim.num_to_compute = victim.request.num_prompt_tokens + victim.num_generated
            self.prompts.queue(victim, 0)
            preempted = True
        return preempted

    def choose(self, now: int, may_admit: bool = True) -> tuple[BatchPlan, tuple[Chunk, ...]]:
        """Ask the batch policy, check its answer, and admit the prompts that it begins; `may_admit`: there may be any."""
        if not (self.prompts.num_waiting and may_admit) and not self.prefilling:
            return _NO_CHUNKS, ()
        room = Room(len(self.batch), self.num_spare_blocks, self.num_free_slots)
        return self.prompts.choose(self.role, room, now, may_admit)

    def run(self, plan: BatchPlan, chunks: tuple[Chunk, ...], now: int) -> None:
        """Order the next span, if there is anything to run."""
        if chunks or (self.batch.members and plan.decodes):
            self._start(chunks, plan.decodes, now)
            return
        self.close_epoch()
        if self.batch.members and plan.ask_again_at is None:
            raise PolicyError(f"{type(self._batching).__name__} stood the decode batch still and ran nothing else")

    def note_generated(self, visit: Visit) -> None:
        """It has ended, and the world names its generated blocks: others may find them. The last token is not written."""
        size, request = self.config.tokens_per_block, visit.request
        named = request.block_hashes
        if self.cache is None or len(named) != request.num_prompt_tokens // size:
            return  # a chain with a gap in it
        num_full = (request.num_prompt_tokens + visit.num_generated - 1) // size
        self.cache.register(visit.id, named + visit.output_hashes, num_full, visit.pinned_by is None)

    def _start(self, chunks: tuple[Chunk, ...], decodes: bool, now: int) -> None:
        batch, epoch = self.batch, self._epochs.open
        continues = (
            epoch is not None
            and not (chunks or self.batch.left or self.batch.joined or epoch.chunks)
            and epoch.decodes == decodes
            and (epoch.num_tails > 0 or epoch.end_at == now)
        )
        if not continues or epoch is None:
            epoch = self._new_epoch(chunks, decodes, now)
        running = len(batch) if decodes else 0
        num_steps = 1
        if not chunks:
            num_steps = min(batch.steps_until_max_tokens(), self.config.max_span_steps)
            if self.capacity.evicts:
                num_steps = batch.steps_until_out_of_blocks(self.blocks.num_free, num_steps)
                if self.cache is not None:  # what is evicted for a step that is not run would be lost for nothing
                    num_empty = max(self.cache.num_empty, batch.blocks_for(1))
                    num_steps = batch.steps_until_out_of_blocks(num_empty, num_steps)
        joined: tuple[Joined, ...] = ()
        if batch.joined:
            joined = tuple([Joined(v.id, v.num_kv_tokens, self.blocks.blocks_of(v.id)) for v in batch.joined.values()])
        appended = self.capacity.append(num_steps) if self.capacity.evicts and running else ()
        self._plan_number += 1
        kv = self.shown_kv
        done = epoch.num_done
        self.running = RunSteps(
            self._plan_number,
            epoch.number,
            done + 1,
            done + num_steps,
            tuple(batch.left) if batch.left else (),
            joined,
            chunks,
            appended,
            running,
            kv if running else 0,
            decodes,
            self._shown_shared_kv if running else 0,
        )
        if not continues:
            epoch.num_decodes, epoch.num_kv_tokens = running, kv if running else 0
            epoch.num_shared_kv = self.running.num_shared_kv
            epoch.block_counts = self.block_counts()
        self.batch.told()
        self._emit(self.running)

    def _new_epoch(self, chunks: tuple[Chunk, ...], decodes: bool, now: int) -> Epoch:
        self._show()
        self.has_changed = True
        return self._epochs.begin(now, self.num_steps + 1, chunks, decodes, bool(self.tails))

    def close_epoch(self) -> None:
        if self._epochs.open is None:
            return
        self._epochs.close()
        self._show()
        if not self.batch.members:
            self.has_changed = True

    def _show(self) -> None:
        """What is told of the batch is true as of now."""
        self.shown_kv = self.batch.num_kv_tokens
        if self.cache is not None:
            self._shown_shared_kv = min(self.cache.num_read_again * self.config.tokens_per_block, self.shown_kv)
        self._shown_written = self.batch.num_blocks_written
        self.shown_steps = self.num_steps
        self.capacity.num_ahead = 0

    def block_counts(self) -> BlockCounts:
        """free, reserved, used, held, quarantined, cached; as of the last change of batch."""
        size = self.config.tokens_per_block
        written = self._shown_written if self._epochs.open is not None else self.batch.num_blocks_written
        if self.prefilling:
            for visit in self.prefilling.values():
                written += -(-visit.num_kv_tokens // size)
        if self.ready:
            for visit in self.ready.values():
                written += -(-visit.num_kv_tokens // size)
        if self.early:
            for visit in self.early.values():
                written += -(-visit.num_kv_tokens // size)
        for visit in self.joining:
            written += -(-visit.num_kv_tokens // size)
        if self.tails:
            for tail in self.tails:
                for visit in tail.leaving.values():
                    written += -(-visit.num_kv_tokens // size)
        blocks = self.blocks
        free, cached = blocks.num_free + self.capacity.num_ahead, 0
        if self.cache is not None:
            cached = self.cache.num_cached
            free -= cached
            written += self.cache.num_in_use - self.cache.num_written_references  # those that are shared count once
        held, quarantined = blocks.num_held, blocks.num_quarantined
        return (
            free,
            blocks.num_blocks - free - held - quarantined - cached - written,
            written,
            held,
            quarantined,
            cached,
        )
