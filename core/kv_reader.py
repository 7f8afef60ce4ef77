"""The reader's side of handing KV over: which generation phases wait for theirs, when each is asked for, what has come.

A generation phase waits here from its coming until it enters the decode batch. In the policy's order it takes blocks and asks
the source for its KV; one whose KV is held by this very executor takes that over in place. What ends a visit is not
decided here: where a wait is hopeless, that is said.
"""

from __future__ import annotations

import heapq
from typing import Any, Final

from ..policies.interfaces import QueueOrder
from ..policies.vocabulary import ContextPhaseParams
from .agenda import Agenda
from .commands import ORCHESTRATOR, PrepareReceive, ReceiveKv, Send
from .config import ExecutorConfig
from .events import KvWithdrawn, LeaseRenewed
from .life_cycle import Cause, State
from .local_kv import LocalKv
from .prefix_cache import PrefixCache
from .queue_orders import hears_of_served
from .scheduler import Scheduler
from .timers import Timers
from .visit import Visit, is_canned, params_of

_BEFORE_DECODE: Final[tuple[State, ...]] = (State.GENERATION_QUEUED, State.KV_IN_FLIGHT, State.KV_EARLY, State.KV_READY)


class KvReader:
    """`visits` are all of the executor's, by request id. `reserve_blocks` stay free of KV that is pulled."""

    def __init__(
        self,
        config: ExecutorConfig,
        scheduler: Scheduler,
        visits: dict[int, Visit],
        order: QueueOrder,
        timers: Timers,
        agenda: Agenda,
        reserve_blocks: int,
    ) -> None:
        self.config = config
        self.in_flight: dict[int, Visit] = {}  # transfers that may still write
        self.local = LocalKv(scheduler.blocks, visits)  # generation phases whose KV is here: no pulls
        self.num_pulls = 0  # generation phases whose KV is not yet asked for, those in `local` included
        self.num_kv_tokens = 0  # of generation phases not yet in the decode batch
        self.has_canned = False  # a generation phase whose context phase was skipped has been seen
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._visits = visits
        self._order = order
        self._tells_order = hears_of_served(order)
        self._timers = timers
        self._agenda = agenda
        self._reserve_blocks = reserve_blocks
        self._overlaps = config.overlap
        # heap of those whose KV is elsewhere: those whose context phase is done go first
        self._pulls: list[tuple[bool, Any, int, Visit]] = []
        self._heartbeat_armed = False

    @property
    def num_coming(self) -> int:
        """Generation phases that are not in the decode batch yet."""
        scheduler = self._scheduler
        return self.num_pulls + len(self.in_flight) + len(scheduler.early) + len(scheduler.ready)

    @property
    def has_queued(self) -> bool:
        """Whether any may be waiting to ask; stale entries count."""
        return bool(self._pulls) or bool(self.local)

    @property
    def pulls_at_once(self) -> bool:
        """Whether free blocks are nobody else's: running steps take none of them, and no prompt waits for them here."""
        if not self._overlaps:
            return False  # between steps only
        return not self._scheduler.capacity.evicts and not self._scheduler.prompts.num_waiting

    @property
    def is_receiving(self) -> bool:
        """Whether KV comes that is all written at its source, for a request that was not given up."""
        return any(not visit.awaits_token and visit.doom is None for visit in self.in_flight.values())

    # ---- what comes and goes ----------------------------------------------------------------------------------------

    def enqueue(self, visit: Visit, now: int) -> None:
        """A generation phase has come."""
        params = params_of(visit.request)
        visit.num_generated = params.num_generated
        visit.num_to_compute = params.num_kv_tokens  # what it brings; once preempted, what it must compute again
        visit.num_blocks = self._scheduler.capacity.blocks_to_admit(visit)
        self.has_canned = self.has_canned or params.executor == ORCHESTRATOR
        visit.awaits_token = params.is_promised
        self._queue(visit, now)
        self.num_pulls += 1
        self.num_kv_tokens += visit.request.num_prompt_tokens
        if not self._heartbeat_armed:
            self._heartbeat_armed = True
            self._timers.set(now + self.config.lease // 3, "heartbeat")

    def _queue(self, visit: Visit, now: int) -> None:
        """It waits for blocks to receive its KV into; no longer than it may, once its context phase is done."""
        is_local = params_of(visit.request).executor == self.config.id
        if is_local:
            self.local.put(visit)
        else:
            heapq.heappush(self._pulls, (visit.awaits_token, visit.order_key, visit.serial, visit))
            if self._scheduler.cache is not None:
                self._look(visit, self._scheduler.cache)
        if not visit.awaits_token:
            self._timers.set(now + self.config.pull_timeout, "pull", visit.id)
        if (is_local or not self.pulls_at_once) and visit.num_blocks <= self._scheduler.num_free_blocks:
            self._scheduler.ask_to_stop()

    def joined(self, visit: Visit) -> None:
        """It has entered the decode batch."""
        self.num_kv_tokens -= visit.request.num_prompt_tokens

    def forget(self, visit: Visit, state: State) -> None:
        """It was given up while in `state`: its KV is not to come any more, or to no use."""
        if state in _BEFORE_DECODE:
            self.num_kv_tokens -= visit.request.num_prompt_tokens
        if state is State.GENERATION_QUEUED:
            self.num_pulls -= 1

    def arrived(self, visit: Visit, now: int) -> None:
        """All of its KV is here: it may enter the decode batch, or waits to hear of its first token."""
        scheduler = self._scheduler
        visit.num_kv_tokens = params_of(visit.request).num_kv_tokens
        cache = scheduler.cache
        if cache is not None and not is_canned(visit.request):
            cache.arrived(visit.id)
            scheduler.prompts.note_written(visit)
            self.blocks_came_free()  # or whoever waits finds more here, and needs fewer
        if visit.awaits_token:
            visit.advance(Cause.KV_COMES_FIRST)
            scheduler.early[visit.id] = visit
        else:
            visit.advance(Cause.KV_ARRIVES)
            visit.kv_usable_at = now
            scheduler.ready[visit.id] = visit

    def first_token(self, visit: Visit | None, now: int) -> None:
        """The context phase of one that was bound early is done: from now on it may only take so long."""
        if visit is None or not visit.awaits_token:
            return
        self._agenda.has_news = True
        visit.awaits_token = False
        visit.first_token_at = now
        if visit.state is State.GENERATION_QUEUED:
            self._queue(visit, now)
        elif visit.state is State.KV_IN_FLIGHT:
            self._limit_transfer(visit, now)
        elif visit.state is State.KV_EARLY:
            del self._scheduler.early[visit.id]
            visit.advance(Cause.FIRST_TOKEN)
            visit.kv_usable_at = now
            self._scheduler.ready[visit.id] = visit
            if self._scheduler.num_free_slots > 0:
                self._scheduler.ask_to_stop()

    def _limit_transfer(self, visit: Visit, now: int) -> None:
        config, tokens = self.config, params_of(visit.request).num_kv_tokens
        limit = config.transfer_timeout_base + config.transfer_timeout_per_token * tokens
        self._timers.set(now + limit, "transfer", visit.id)

    def blocks_came_free(self) -> None:
        """If anything here waits for blocks, the span ends for it at the next boundary."""
        scheduler = self._scheduler
        pulls_wait = self.local or (self.num_pulls and not self.pulls_at_once)
        if pulls_wait or (scheduler.prompts.num_waiting and scheduler.num_free_slots > 0):
            scheduler.ask_to_stop()

    def heartbeat(self, now: int) -> None:
        """One renewal per executor whose KV this one still means to read."""
        self._heartbeat_armed = False
        if self.local.first() is not None:
            self._agenda.is_impatient = self._agenda.must_plan = True
        wanted: dict[int, list[int]] = {}
        for is_promise, _, _, visit in sorted(self._pulls, key=lambda entry: entry[2]):
            params = visit.request.context_phase_params
            if visit.state is not State.GENERATION_QUEUED or is_promise != visit.awaits_token:
                continue  # a stale entry
            if params is not None and params.executor != ORCHESTRATOR:
                wanted.setdefault(params.executor, []).append(params.req_id)
        for executor, ids in wanted.items():
            self._agenda.out.append(Send(executor, LeaseRenewed(tuple(ids))))
        if self.local.renew(now + self.config.lease) or wanted:
            self._heartbeat_armed = True
            self._timers.set(now + self.config.lease // 3, "heartbeat")

    # ---- asking for KV ----------------------------------------------------------------------------------------------

    def pull(self, now: int) -> None:
        """Reserve blocks for generation phases, in order, and ask for their KV; none while one waits whose KV is here."""
        scheduler, blocks = self._scheduler, self._blocks
        cache = scheduler.cache
        if self.local and self.local.first() is not None:
            return
        while self._pulls:
            is_promise, _, _, visit = self._pulls[0]
            if visit.state is not State.GENERATION_QUEUED or is_promise != visit.awaits_token:
                heapq.heappop(self._pulls)
                continue
            # an executor that holds nothing has nothing to reserve for, and a large request must fit at last
            reserve = self._reserve_blocks if blocks.num_free < blocks.num_blocks else 0
            if cache is not None:
                self._look(visit, cache)
            if visit.num_blocks > scheduler.num_spare_blocks - reserve:
                return
            if cache is not None and visit.num_kv_tokens:
                if not cache.confirm(visit, scheduler.capacity.blocks_to_admit(visit)):
                    continue
            heapq.heappop(self._pulls)
            self._begin(visit, now)

    def _begin(self, visit: Visit, now: int) -> None:
        """The blocks are there for it: reserve them, and ask."""
        scheduler, cache = self._scheduler, self._scheduler.cache
        self._taken_up(visit, now)
        if cache is not None:
            cache.share(visit, scheduler.capacity.blocks_to_admit(visit), is_arriving=True)
            visit.num_cached_tokens = visit.num_kv_tokens
        blocks = self._blocks.allocate(visit.id, visit.num_blocks)
        visit.num_blocks = 0
        params = params_of(visit.request)
        if params.executor == ORCHESTRATOR:
            self.arrived(visit, now)
            if scheduler.num_free_slots > 0:
                scheduler.ask_to_stop()
            return
        self.in_flight[visit.id] = visit
        used = blocks[: scheduler.capacity.blocks_for(params.num_kv_tokens)]
        if visit.num_cached_tokens:
            self._agenda.out.append(self._receive_rest(visit, params, used))
        else:
            ask = PrepareReceive if visit.awaits_token else ReceiveKv
            self._agenda.out.append(ask(visit.id, params.executor, params.req_id, params.num_kv_tokens, used))
        if not visit.awaits_token:
            self._limit_transfer(visit, now)

    def _taken_up(self, visit: Visit, now: int) -> None:
        if self._tells_order:
            self._order.on_served(visit.request, visit.order_key, now)
        self.num_pulls -= 1
        visit.advance(Cause.PULL)
        visit.transfer_start_at = now
        self._agenda.has_news = True

    def _look(self, visit: Visit, cache: PrefixCache) -> None:
        """What of the KV that it is about to receive is here already, and how many blocks it takes besides.

        Only of KV that is whole: what is sent while it is computed is sent from its beginning.
        """
        visit.num_blocks = self._scheduler.capacity.blocks_to_admit(visit)
        if not visit.awaits_token and params_of(visit.request).executor != ORCHESTRATOR:
            cache.look(visit, visit.num_blocks)

    def _receive_rest(self, visit: Visit, params: ContextPhaseParams, blocks: tuple[int, ...]) -> ReceiveKv:
        present = visit.num_cached_tokens
        missing = blocks[present // self.config.tokens_per_block :]
        return ReceiveKv(visit.id, params.executor, params.req_id, params.num_kv_tokens - present, missing, present)

    # ---- KV that is here already ------------------------------------------------------------------------------------

    def take_over(self, now: int) -> tuple[Visit, str] | None:
        """Let generation phases whose KV is here have it, in order. One that must be given up, and why; None: none.

        Each keeps the blocks of its prompt while it waits for more. Where nothing else will give any back they would wait for
        each other for ever; then the youngest is to be given up, until the first can run.
        """
        while (visit := self.local.first()) is not None:
            source = self.local.source_of(visit)
            if source is None:
                self.local.drop_first()
                return visit, "its KV is not held here any more"
            if visit.num_blocks > max(self._scheduler.num_spare_blocks, 0):
                if not self._stands_still():
                    return None
                why = "the executor stood still: generation phases waited for blocks that others of them held"
                return self.local.last(), why
            self._taken_up(visit, now)
            self.local.take_over(visit, source)
            self.arrived(visit, now)
        return None

    def _stands_still(self) -> bool:
        """Whether nothing here will give blocks back by itself: nothing runs or can, and nothing is read or written.

        KV that a reader elsewhere may still ask for is waited for, but not past a heartbeat: it may wait for this one too.
        """
        scheduler = self._scheduler
        if scheduler.running is not None or scheduler.has_begun or self.in_flight or scheduler.early:
            return False
        held = [visit for visit in self._visits.values() if visit.state is State.CONTEXT_DONE]
        if any(visit.pinned_by is not None for visit in self._visits.values()):
            return False
        wanted_here = self.local.sources()
        return self._agenda.is_impatient or all(visit.id in wanted_here for visit in held)

    def withdraw(self) -> None:
        """Nothing runs, and something that could lacks blocks: take early reservations back.

        An early reservation waits for a context phase that may wait, elsewhere, for blocks that what is stuck here holds:
        without this the two might wait for each other.
        """
        is_stuck = self._scheduler.prompts.num_waiting or (self._pulls and not self._pulls[0][0]) or self.local
        if not is_stuck:
            return
        for visit in self.in_flight.values():
            if visit.awaits_token and not visit.is_withdrawn and visit.doom is None:
                visit.is_withdrawn = True
                params = params_of(visit.request)
                self._agenda.out.append(Send(params.executor, KvWithdrawn(params.req_id, self.config.id, visit.id)))
