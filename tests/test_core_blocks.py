"""Blocks: each in exactly one state, none lost, none given out twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg.core.blocks import BlockManager
from disagg.core.decode_batch import DecodeBatch
from disagg.core.errors import BlockError
from disagg.core.free_blocks import FreeBlocks
from disagg.core.life_cycle import State
from disagg.core.visit import Visit
from disagg.policies.vocabulary import Request
from tests.core_cases import Case, core_of, make_case, simulate

TOTAL = 12


class BlocksMachine(RuleBasedStateMachine):
    """The manager beside a model of it: a dictionary from owner to (state, block ids)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(TOTAL)
        self.model: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.next_owner = 0

    @property
    def free(self) -> int:
        return TOTAL - sum(len(ids) for _, ids in self.model.values())

    def owner(self, data: st.DataObject, *states: str) -> int | None:
        owners = [owner for owner, (state, _) in self.model.items() if state in states]
        return data.draw(st.sampled_from(owners)) if owners else None

    @rule(n=st.integers(0, TOTAL + 2))
    def allocate(self, n: int) -> None:
        owner = self.next_owner = self.next_owner + 1
        if n > self.free:
            with pytest.raises(BlockError, match="free"):
                self.blocks.allocate(owner, n)
            assert self.blocks.blocks_of(owner) == ()
        else:
            self.model[owner] = ("assigned", self.blocks.allocate(owner, n))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), n=st.integers(0, 4))
    def extend(self, data: st.DataObject, n: int) -> None:
        owner = self.owner(data, "assigned")
        if owner is None:
            return
        had = self.model[owner][1]
        if n > self.free:
            with pytest.raises(BlockError):
                self.blocks.extend(owner, n)
            assert self.blocks.blocks_of(owner) == had
        else:
            self.model[owner] = ("assigned", had + self.blocks.extend(owner, n))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), keep=st.integers(0, 6))
    def trim(self, data: st.DataObject, keep: int) -> None:
        owner = self.owner(data, "assigned")
        if owner is not None:
            had = self.model[owner][1]
            assert self.blocks.trim(owner, keep) == max(0, len(had) - keep)
            self.model[owner] = ("assigned", had[:keep])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        owner = self.owner(data, "assigned")
        if owner is not None:
            self.blocks.hold(owner)
            self.model[owner] = ("held", self.model[owner][1])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        owner = self.owner(data, "assigned", "held")
        if owner is not None:
            self.blocks.quarantine(owner)
            self.model[owner] = ("quarantined", self.model[owner][1])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        owner = self.owner(data, "assigned", "held", "quarantined")
        if owner is not None:
            assert self.blocks.free(owner) == len(self.model.pop(owner)[1])
            assert self.blocks.free(owner) == 0

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        self.blocks.check()
        ids = Counter(block for _, blocks in self.model.values() for block in blocks)
        assert all(count == 1 and 0 <= block < TOTAL for block, count in ids.items())
        assert self.blocks.num_free == self.free
        for state, count in (
            ("assigned", self.blocks.num_assigned),
            ("held", self.blocks.num_held),
            ("quarantined", self.blocks.num_quarantined),
        ):
            assert count == sum(len(blocks) for s, blocks in self.model.values() if s == state)
        for owner, (_, blocks) in self.model.items():
            assert self.blocks.blocks_of(owner) == blocks


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.lists(st.tuples(st.sampled_from(["take", "give back", "give back one"]), st.integers(0, TOTAL)), max_size=30))
def test_blocks_are_given_out_last_freed_first_and_fresh_ones_from_the_lowest_on(moves: list[tuple[str, int]]) -> None:
    free, stack = FreeBlocks(TOTAL), [*reversed(range(TOTAL))]  # the last of which goes first
    taken: list[tuple[int, ...]] = []
    for move, number in moves:
        if move == "take" and number <= len(stack):
            cut = len(stack) - number
            expected = tuple(stack[cut:])
            del stack[cut:]
            taken.append(free.take(number))
            assert taken[-1] == expected
        elif move == "give back" and taken:
            table = taken.pop(number % len(taken))
            free.extend(table)
            stack += table
        elif move == "give back one" and taken and taken[-1]:
            free.append(taken[-1][0])
            stack.append(taken[-1][0])
            taken[-1] = taken[-1][1:]
        assert len(free) == len(stack)
    assert sorted(free) == sorted(stack)


def test_the_check_sees_a_block_that_was_lost() -> None:
    blocks = BlockManager(4)
    blocks.allocate(1, 2)
    blocks._assigned[1] = blocks._assigned[1][:1]
    with pytest.raises(BlockError, match="3 accounted for of 4"):
        blocks.check()


def test_the_check_sees_a_block_given_out_twice() -> None:
    blocks = BlockManager(4)
    table = blocks.allocate(1, 2)
    blocks._free.append(table[0])
    with pytest.raises(BlockError, match="given out twice"):
        blocks.check()


# ---- blocks that a decode batch will need, by counting -------------------------------------------------------------


@given(
    st.integers(1, 8),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(0, 20),
    st.integers(0, 12),
    st.integers(1, 40),
)
def test_a_decode_batch_foresees_the_step_at_which_blocks_run_out(
    size: int, lengths: list[int], steps_before: int, num_free: int, at_most: int
) -> None:
    batch = DecodeBatch(size)
    for i, length in enumerate(lengths):
        if i == 1:
            batch.advance(steps_before)  # so that members have joined at different steps
        visit = Visit(Request(i, 1, 10**6), i, 0, 0, State.GENERATION_RUNNING)
        visit.num_kv_tokens = length
        batch.join(visit)
    kv = [v.num_kv_tokens + batch.step - v.joined_step for v in batch.members.values()]
    assert batch.num_kv_tokens == sum(kv)
    assert batch.num_blocks_written == sum(-(-tokens // size) for tokens in kv)
    needed = [sum(-(-(tokens + k) // size) - -(-tokens // size) for tokens in kv) for k in range(at_most + 1)]
    assert [batch.blocks_for(k) for k in range(at_most + 1)] == needed
    assert batch.steps_until_out_of_blocks(num_free, at_most) == max(
        k for k in range(at_most + 1) if needed[k] <= num_free
    )


def test_a_decode_batch_ends_each_member_once_even_if_it_left_and_came_back_for_the_same_step() -> None:
    batch = DecodeBatch(4)
    visit = Visit(Request(1, 5, 3), 1, 0, 0, State.GENERATION_RUNNING)
    visit.num_kv_tokens, visit.num_generated = 5, 1
    batch.join(visit)
    batch.leave(visit)
    batch.join(visit)
    assert batch.steps_until_max_tokens() == 2
    batch.advance(2)
    assert batch.pop_finished() == [visit]


# ---- whole lives ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False).map(make_case))
def test_no_block_is_ever_lost_and_all_are_free_when_all_is_over(case: Case) -> None:
    """`simulate` runs the invariants of each executor after every instant at which it acts."""
    trace = simulate(case)
    assert trace.cluster is not None
    for executor in case.config.executors:
        core = core_of(trace.cluster, executor.id)
        core.check()
        assert core.visits == {}
        assert core.blocks.num_free == executor.num_blocks
        report = core.report()
        assert (report.blocks_free, report.queued_requests, report.running_requests) == (executor.num_blocks, 0, 0)
        assert (report.decode_kv_tokens, report.queued_prefill_tokens, report.inflight_prefill_tokens) == (0, 0, 0)
