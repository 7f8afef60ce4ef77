"""The decode batch of an executor, whose progress is arithmetic.

One counter, `step`, counts the decode steps this executor ever ran. A member that joined at step j with L tokens of KV
has L + (step - j) of them now; nothing is written per member and step. What the core must know of the future - when the
first member reaches `max_tokens`, when the blocks run out - follows from sums kept at joins and leaves:

- the sum of KV tokens is `_kv_at_zero + size * step`;
- a member needs a new block for its next token when its KV fills whole blocks, that is when
  (L - j + step) mod tokens_per_block = 0: a histogram of (L - j) mod tokens_per_block says how many do at each step.
"""

from __future__ import annotations

import heapq

from .visit import Visit


class DecodeBatch:
    def __init__(self, tokens_per_block: int) -> None:
        self.step = 0
        self.members: dict[int, Visit] = {}
        self.num_blocks_written = 0
        self._tokens_per_block = tokens_per_block
        self._kv_at_zero = 0
        self._residues = [0] * tokens_per_block
        self._ends: list[tuple[int, int, Visit]] = []  # (step of max_tokens, serial, member); stale entries are skipped
        self.joined: dict[int, Visit] = {}  # the net change that the driver was not told yet
        self.left: list[int] = []

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_kv_tokens(self) -> int:
        return self._kv_at_zero + len(self.members) * self.step

    def join(self, visit: Visit) -> None:
        visit.joined_step = self.step
        self.members[visit.id] = visit
        offset = visit.num_kv_tokens - self.step
        self._kv_at_zero += offset
        self._residues[offset % self._tokens_per_block] += 1
        self.num_blocks_written += -(-visit.num_kv_tokens // self._tokens_per_block)
        end = self.step + visit.request.max_tokens - visit.num_generated
        heapq.heappush(self._ends, (end, visit.serial, visit))
        self.joined[visit.id] = visit

    def leave(self, visit: Visit) -> None:
        """Take the member out; its own counts of KV and generated tokens become true again."""
        del self.members[visit.id]
        steps = self.step - visit.joined_step
        offset = visit.num_kv_tokens - visit.joined_step
        visit.num_kv_tokens += steps
        visit.num_generated += steps
        visit.joined_step = -1
        self._kv_at_zero -= offset
        self._residues[offset % self._tokens_per_block] -= 1
        self.num_blocks_written -= -(-visit.num_kv_tokens // self._tokens_per_block)
        if self.joined.pop(visit.id, None) is None:
            self.left.append(visit.id)

    def told(self) -> None:
        """The driver knows who has joined and left."""
        if self.left:
            self.left.clear()
        if self.joined:
            self.joined.clear()

    def advance(self, num_steps: int) -> None:
        if self.members:
            self.num_blocks_written += self.blocks_for(num_steps)
        self.step += num_steps

    def blocks_for(self, num_steps: int) -> int:
        """New blocks that the batch writes to in the next `num_steps` steps."""
        size = self._tokens_per_block
        cycles, rest = divmod(num_steps, size)
        residues = self._residues
        first = -self.step % size
        total = cycles * len(self.members)
        for i in range(first, first - rest, -1):
            total += residues[i]  # below 0 from the end: residues go round
        return total

    def steps_until_max_tokens(self) -> int:
        """Steps until the first member has generated `max_tokens`; at least 1. The batch must not be empty."""
        ends = self._ends
        while self._is_stale(ends[0]):
            heapq.heappop(ends)
        return ends[0][0] - self.step

    def pop_finished(self) -> list[Visit]:
        """Members that have just reached `max_tokens`, still in the batch, in order of serial."""
        finished: list[Visit] = []
        ends = self._ends
        while ends and ends[0][0] <= self.step:
            entry = heapq.heappop(ends)
            # a member that left and came back may have two entries for the same step
            if not self._is_stale(entry) and (not finished or finished[-1] is not entry[2]):
                finished.append(entry[2])
        return finished

    def steps_until_out_of_blocks(self, num_free: int, at_most: int) -> int:
        """The most steps, up to `at_most`, whose new blocks are no more than `num_free`."""
        size = self._tokens_per_block
        if -(-at_most // size) * len(self.members) <= num_free:  # a cheap bound that usually decides
            return at_most
        steps = num_free // len(self.members) * size
        blocks = num_free // len(self.members) * len(self.members)
        first = -self.step % size
        while steps < at_most:
            blocks += self._residues[(first - steps) % size]
            if blocks > num_free:
                return steps
            steps += 1
        return at_most

    def _is_stale(self, entry: tuple[int, int, Visit]) -> bool:
        """Left since, or left and joined again: then its end is counted from another step."""
        end, _, visit = entry
        if self.members.get(visit.id) is not visit:
            return True
        return end != visit.joined_step + visit.request.max_tokens - visit.num_generated
