"""How many KV blocks the requests of an executor take, and when: at once, or, under max_utilization, as they are written."""

from __future__ import annotations

from ..policies import registry
from ..policies.interfaces import CapacityPolicy
from ..policies.vocabulary import RequestType
from .blocks import BlockManager
from .commands import RunSteps
from .config import ExecutorConfig
from .decode_batch import DecodeBatch
from .visit import Visit, total_kv_tokens


class Capacity:
    """`evicts`: blocks are taken as they are written, and taken from others when they run out."""

    def __init__(self, config: ExecutorConfig, blocks: BlockManager, batch: DecodeBatch) -> None:
        policy: type[CapacityPolicy] = registry.load(config.scheduler.capacity, "capacity")
        self.evicts = policy.evicts
        self.num_ahead = 0  # blocks appended to the decode batch since the epoch began
        self._tokens_per_block = config.tokens_per_block
        self._blocks = blocks
        self._batch = batch

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_block)

    def blocks_to_admit(self, visit: Visit) -> int:
        """Blocks taken at admission: everything it can ever need, or, under max_utilization, what it is about to write."""
        request = visit.request
        if request.request_type is RequestType.CONTEXT_ONLY or self.evicts:
            return self.blocks_for(visit.num_to_compute)
        return self.blocks_for(total_kv_tokens(request))

    def append(self, num_steps: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Give each decode the blocks that it writes to in the next steps (max_utilization)."""
        appended = []
        for visit in self._batch.members.values():
            tokens = visit.num_kv_tokens + self._batch.step - visit.joined_step
            missing = self.blocks_for(tokens + num_steps) - len(self._blocks.blocks_of(visit.id))
            if missing > 0:
                appended.append((visit.id, self._blocks.extend(visit.id, missing)))
                self.num_ahead += missing
        return tuple(appended)

    def give_back_unwritten(self, run: RunSteps) -> None:
        """A span cut short: blocks appended for steps that were not run are free again."""
        for request_id, _ in run.appended:
            visit = self._batch.members[request_id]
            tokens = visit.num_kv_tokens + self._batch.step - visit.joined_step
            self.num_ahead -= self._blocks.trim(request_id, self.blocks_for(tokens))
