"""The prompts of an executor: those that wait, those that have begun, and which chunks of them the next step computes."""

from __future__ import annotations

import heapq
from typing import Any

from ..policies.interfaces import BatchPolicy, PolicyError
from ..policies.vocabulary import BatchPlan, ChunkPlan, Role, plain_integer
from .batch_view import BatchView, WaitingPrompts
from .blocks import BlockManager
from .capacity import Capacity
from .commands import Chunk
from .config import ExecutorConfig
from .life_cycle import Cause, State
from .prefix_cache import MatchedPrompts, PrefixCache
from .visit import Visit


class Room:
    """What a planning pass may take, beside what has begun: places in the batch, and blocks."""

    __slots__ = ("num_decodes", "num_free_slots", "num_spare_blocks")

    def __init__(self, num_decodes: int, num_spare_blocks: int, num_free_slots: int) -> None:
        self.num_decodes = num_decodes
        self.num_spare_blocks = num_spare_blocks
        self.num_free_slots = num_free_slots


class Prompts:
    """`cache` may be None: then no blocks are shared."""

    def __init__(
        self,
        config: ExecutorConfig,
        batching: BatchPolicy,
        capacity: Capacity,
        blocks: BlockManager,
        cache: PrefixCache | None,
    ) -> None:
        self.num_waiting = 0
        self.num_queued_tokens = 0
        self.begun: dict[int, Visit] = {}  # in order of beginning
        self._limits = config.scheduler
        self._batching = batching
        self._capacity = capacity
        self._blocks = blocks
        self._cache = cache
        self._tokens_per_block = config.tokens_per_block
        self._waiting: list[tuple[int, Any, int, Visit]] = []  # heap: preempted first, then the queue order

    @property
    def num_begun_tokens(self) -> int:
        """Of those that have begun, what is still to be computed."""
        num_tokens = 0
        if self.begun:
            for visit in self.begun.values():
                num_tokens += visit.num_tokens_left
        return num_tokens

    # ---- what comes and goes ----------------------------------------------------------------------------------------

    def queue(self, visit: Visit, rank: int = 1) -> None:
        """A prompt to compute; rank 0, of preempted ones, goes before all others."""
        visit.num_blocks = self._capacity.blocks_to_admit(visit)
        if self._cache is not None:
            self._cache.look(visit, visit.num_blocks)
            visit.num_found_tokens, visit.num_kv_tokens = visit.num_kv_tokens, 0
        heapq.heappush(self._waiting, (rank, visit.order_key, visit.serial, visit))
        self.num_waiting += 1
        self.num_queued_tokens += visit.num_to_compute - visit.num_found_tokens

    def no_longer_waits(self, visit: Visit) -> None:
        """It has begun, or was given up; its entry in the queue is stale by its state."""
        self.num_waiting -= 1
        self.num_queued_tokens -= visit.num_to_compute - visit.num_found_tokens

    def chunk_done(self, chunk: Chunk, num_steps: int) -> Visit | None:
        """The visit, if that was its prompt's last chunk; `num_steps` counts the executor's steps."""
        visit = self.begun[chunk.request_id]
        visit.num_kv_tokens += chunk.length
        if self._cache is not None:
            self.note_written(visit)
        if not chunk.is_last:
            return None
        del self.begun[visit.id]
        visit.num_generated += 1
        if visit.first_step is None:
            visit.first_step = num_steps
        return visit

    def note_written(self, visit: Visit) -> None:
        """Its KV was written up to `num_kv_tokens`: others may find its blocks."""
        if self._cache is None:
            return
        num_full = visit.num_kv_tokens // self._tokens_per_block
        self._cache.register(visit.id, visit.request.block_hashes, num_full, visit.pinned_by is None)

    # ---- planning ---------------------------------------------------------------------------------------------------

    def choose(self, role: Role, room: Room, now: int, may_admit: bool) -> tuple[BatchPlan, tuple[Chunk, ...]]:
        """Ask the batch policy, check its answer, and admit the prompts that it begins; `may_admit`: there may be any."""
        waiting = WaitingPrompts(self._waiting if may_admit else [])
        if self._cache is not None and may_admit:
            waiting = MatchedPrompts(self._waiting, self._cache, self._capacity.blocks_to_admit)
        plan = self._ask_policy(role, room, waiting, now)
        while self._cache is not None and not self._confirm(plan, waiting, self._cache):
            plan = self._ask_policy(role, room, waiting, now)  # which sees that nothing is found of some
        chunks = self._begin(plan, room, waiting, now)
        waiting.put_back()
        return plan, chunks

    def _ask_policy(self, role: Role, room: Room, waiting: WaitingPrompts, now: int) -> BatchPlan:
        view = BatchView(
            role,
            self._limits,
            now,
            room.num_decodes,
            room.num_spare_blocks,
            room.num_free_slots,
            list(self.begun.values()),
            waiting,
        )
        plan = self._batching.plan(view)
        if not isinstance(plan, BatchPlan) or not isinstance(plan.chunks, (tuple, list)):
            raise PolicyError(
                f"{type(self._batching).__name__} answered {plan!r}; allowed: a BatchPlan of a tuple of chunks"
            )
        budget = self._limits.max_num_tokens - (room.num_decodes if plan.decodes else 0)
        total = 0
        for chunk in plan.chunks:
            if not isinstance(chunk, ChunkPlan):
                raise PolicyError(f"{type(self._batching).__name__} planned {chunk!r}; allowed: a ChunkPlan")
            total += chunk.num_tokens if type(chunk.num_tokens) is int else plain_integer(chunk.num_tokens, chunk)
        if total > budget and plan.chunks:
            raise PolicyError(
                f"{type(self._batching).__name__} planned {total} prompt tokens; at most {budget} are allowed"
            )
        return plan

    def _begin(self, plan: BatchPlan, room: Room, waiting: WaitingPrompts, now: int) -> tuple[Chunk, ...]:
        """Check the policy's chunks, admit the prompts that are new, and say what each chunk computes."""
        chunks = []
        seen = set()
        if self._cache is not None:  # before anything is evicted
            self._share(plan, waiting)
        for chosen in plan.chunks:
            visit = self.begun.get(chosen.request_id) or waiting.find(chosen.request_id)
            if visit is None or chosen.request_id in seen or not 0 < chosen.num_tokens <= visit.num_tokens_left:
                raise PolicyError(
                    f"{type(self._batching).__name__} planned {chosen}, which is not there to compute: a plan names each"
                    " prompt once, one that has begun or that was read from `waiting` in this call, and tokens it has left"
                )
            seen.add(chosen.request_id)
            if visit.state is State.QUEUED:
                self._admit(visit, chosen, room, now)
            is_last = chosen.num_tokens == visit.num_tokens_left
            table = self._blocks.blocks_of(visit.id)
            chunks.append(Chunk(visit.id, visit.num_kv_tokens, chosen.num_tokens, is_last, table))
        return tuple(chunks)

    def _admit(self, visit: Visit, chosen: ChunkPlan, room: Room, now: int) -> None:
        if room.num_free_slots <= 0 or visit.num_blocks > self._blocks.num_free:
            raise PolicyError(
                f"{type(self._batching).__name__} planned {chosen}, which takes a slot and {visit.num_blocks}"
                f" blocks; free are {room.num_free_slots} slots and {self._blocks.num_free} blocks"
            )
        self._blocks.allocate(visit.id, visit.num_blocks)
        visit.num_blocks = 0
        visit.advance(Cause.START)
        self.no_longer_waits(visit)
        room.num_free_slots -= 1
        self.begun[visit.id] = visit
        if visit.started_at is None:
            visit.started_at = now

    def _confirm(self, plan: BatchPlan, waiting: WaitingPrompts, cache: PrefixCache) -> bool:
        """Whether the names of all prompts that begin are the prefix chains they were taken for; others lose theirs."""
        are_chains = True
        for chosen in plan.chunks:
            visit = waiting.find(chosen.request_id)
            if visit is not None and visit.state is State.QUEUED and visit.num_kv_tokens:
                are_chains &= cache.confirm(visit, self._capacity.blocks_to_admit(visit))
        return are_chains

    def _share(self, plan: BatchPlan, waiting: WaitingPrompts) -> None:
        """Give prompts that begin the blocks that are here already."""
        for chosen in plan.chunks:
            visit = waiting.find(chosen.request_id)
            if self._cache is not None and visit is not None and visit.state is State.QUEUED:
                self._cache.share(visit, self._capacity.blocks_to_admit(visit))
                if visit.started_at is None and visit.transfer_start_at is None:
                    visit.num_cached_tokens = visit.num_kv_tokens
