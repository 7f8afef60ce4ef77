"""The orchestrator's knowledge of who holds which prompt blocks: from its own dispatches, bounded, asked for."""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.core.fleet import Fleet
from disagg.core.prefix_index import PrefixIndex
from disagg.policies.views import VECTORISE_FROM
from tests.policy_views import BLOCK, SIZES, fleet_of, made, prompt, report, send


def matches(index: PrefixIndex, executors: list[int], hashes: tuple[int, ...]) -> list[int]:
    counts = dict.fromkeys(executors, 0)
    for depth, holders in index.levels(hashes):
        for executor in executors:
            if holders >> index.place(executor) & 1:
                counts[executor] = depth
    return list(counts.values())


def an_index(num_blocks: int = 100, executors: int = 3) -> PrefixIndex:
    index = PrefixIndex(dict.fromkeys(range(1, executors + 1), num_blocks))
    index.levels(())
    return index


def test_a_match_is_as_long_as_what_both_prompts_begin_with() -> None:
    index = an_index()
    index.used(1, (1, 2, 3, 4))
    index.used(2, (1, 2, 9))
    assert matches(index, [1, 2, 3], (1, 2, 3, 5)) == [3, 2, 0]
    assert matches(index, [1, 2, 3], (1, 2, 3, 4, 6)) == [4, 2, 0]
    assert matches(index, [1, 2, 3], (7,)) == [0, 0, 0]


def test_nothing_is_remembered_before_the_first_question() -> None:
    index = PrefixIndex({1: 10})
    index.used(1, (1, 2))
    assert matches(index, [1], (1, 2)) == [0]
    index.used(1, (1, 2))
    assert matches(index, [1], (1, 2)) == [2]


def test_the_least_recently_used_blocks_go_first_and_from_the_end_of_a_prompt() -> None:
    index = an_index(num_blocks=5)
    index.used(1, (1, 2, 3))
    index.used(1, (1, 8, 9))  # 1 2 3 8 9: full
    index.used(1, (20,))
    assert matches(index, [1], (1, 2, 3)) == [2]  # 3 was the oldest: it goes before 2, which it needs
    assert matches(index, [1], (1, 8, 9)) == [3]
    index.used(1, (1, 2))
    index.used(1, (21, 22))
    assert matches(index, [1], (1, 8, 9)) == [1]
    assert matches(index, [1], (1, 2)) == [2]
    assert index.num_blocks(1) == 5


def test_of_a_prompt_longer_than_the_pool_the_beginning_is_kept() -> None:
    index = an_index(num_blocks=3)
    index.used(1, tuple(range(1, 9)))
    assert matches(index, [1], tuple(range(1, 9))) == [3]


def test_events_of_an_executor_s_cache_can_take_the_place_of_dispatches() -> None:
    index = PrefixIndex(dict.fromkeys((1, 2, 3), 100), reporting=(2,))
    index.levels(())
    index.heard(2, (0, 1, 2, 3))
    index.heard(2, (2, 3, 77, 2))  # 3 is gone, 77 was never there, 2 was known already
    index.used(2, (1, 2, 3))
    assert matches(index, [1, 2, 3], (1, 2, 3)) == [0, 2, 0]
    assert index.num_blocks(2) == 2
    index.lost(2)
    assert matches(index, [1, 2, 3], (1, 2, 3)) == [0, 0, 0]
    assert index.num_blocks(2) == 0


def test_who_is_gone_holds_nothing() -> None:
    index = an_index()
    index.used(1, (1, 2))
    index.used(2, (1,))
    index.lost(1)
    assert matches(index, [1, 2, 3], (1, 2)) == [0, 1, 0]
    assert index.num_blocks(1) == 0


class Slow:
    """The same knowledge, kept plainly."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[int, OrderedDict[int, None]] = {}

    def used(self, executor: int, hashes: tuple[int, ...]) -> None:
        held = self.held.setdefault(executor, OrderedDict())
        for block in reversed(hashes[: self.room]):
            held.pop(block, None)
            held[block] = None
        while len(held) > self.room:
            held.popitem(last=False)

    def match(self, executor: int, hashes: tuple[int, ...]) -> int:
        held = self.held.get(executor, OrderedDict())
        return next((i for i, block in enumerate(hashes) if block not in held), len(hashes))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), room=st.integers(1, 12))
def test_the_index_says_what_looking_block_by_block_would(seed: int, room: int) -> None:
    draw = Random(seed)
    index, slow = an_index(room), Slow(room)
    nodes: dict[tuple[int, ...], int] = {}  # a hash names its whole prefix

    def a_prompt() -> tuple[int, ...]:
        path = tuple(draw.randrange(2) for _ in range(draw.randrange(8)))
        return tuple(nodes.setdefault(path[: i + 1], len(nodes) + 1) for i in range(len(path)))

    for _ in range(40):
        executor, hashes = draw.randint(1, 3), a_prompt()
        index.used(executor, hashes)
        slow.used(executor, hashes)
        asked = a_prompt()
        assert matches(index, [1, 2, 3], asked) == [slow.match(e, asked) for e in (1, 2, 3)]
        assert [index.num_blocks(e) for e in (1, 2, 3)] == [len(slow.held.get(e, ())) for e in (1, 2, 3)]


# ---- as policies see it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_a_pool_and_its_rows_tell_the_same_matches_in_blocks_and_tokens(n: int) -> None:
    fleet = fleet_of("c" * n)
    policy: Any = made("kv_cache_aware")
    request = prompt((1, 2, 3, 4))
    pool = fleet.at(0).context
    assert list(pool.prefix_match(request)) == [0] * n
    send(fleet, policy, prompt((1, 2)), 2)
    send(fleet, policy, prompt((1, 2, 3, 4)), 3)
    assert list(pool.prefix_match(request)) == [0, 2, 4] + [0] * (n - 3)
    assert list(pool.cached_tokens(request)) == [0, 20, 40] + [0] * (n - 3)
    assert list(pool.uncached_tokens(request)) == [45, 25, 5] + [45] * (n - 3)
    for row in pool:
        assert row.prefix_match(request) == pool.prefix_match(request)[row.index]
        assert row.cached_tokens(request) == pool.cached_tokens(request)[row.index]
        assert row.uncached_tokens(request) == pool.uncached_tokens(request)[row.index]
    assert list(pool.prefix_blocks) == [0, 2, 4] + [0] * (n - 3)
    fleet.lost(3)
    assert list(pool.prefix_match(request)) == [0, 2, 0] + [0] * (n - 3)


def test_one_token_of_a_prompt_is_always_computed() -> None:
    fleet = fleet_of("c")
    request = prompt((1, 2), tokens=2 * BLOCK)
    fleet.at(0).context.prefix_match(request)
    fleet.dispatched(1, 20, request.block_hashes)
    assert fleet.at(0).context[0].cached_tokens(request) == 19


def test_generation_executors_hold_the_kv_they_were_sent_and_pools_are_told_apart() -> None:
    roles = "c" * VECTORISE_FROM + "g" * VECTORISE_FROM
    fleet = fleet_of(roles)
    view = fleet.at(0)
    request = prompt((1, 2, 3))
    view.context.prefix_match(request)
    fleet.dispatched(VECTORISE_FROM + 2, 35, request.block_hashes)
    assert not np.any(view.context.prefix_match(request))
    assert list(view.generation.prefix_match(request)) == [0, 3] + [0] * (VECTORISE_FROM - 2)


def test_executors_that_report_their_blocks_hold_what_they_say_and_nothing_that_they_were_only_sent() -> None:
    """Executor 1 reuses blocks, 2 does not: of 2 it is guessed."""
    fleet = fleet_of("cc")
    fleet = Fleet([replace(fleet.configs[1], enable_block_reuse=True), fleet.configs[2]], 0)
    pool, request = fleet.at(0).context, prompt((1, 2, 3))
    report(fleet, 1, cache_events=(0, 1, 2, 3, 8), blocks_free=90, blocks_cached=4)  # before anybody has asked
    assert list(pool.prefix_match(request)) == [3, 0]
    assert list(fleet.at(0).context.kv_blocks_free) == [94, 100]
    other = prompt((1, 2, 5))
    for executor in (1, 2):
        fleet.dispatched(executor, 35, other.block_hashes)
    assert list(pool.prefix_match(other)) == [2, 3]
    assert list(pool.prefix_blocks) == [3, 3]
    report(fleet, 1, cache_events=(2, 3, 8, 5), blocks_free=91, blocks_cached=3)
    assert list(pool.prefix_match(request)) == [2, 2]
    assert list(pool.prefix_match(other)) == [3, 3]
    assert pool.uncached_tokens(other)[0] == 5


def test_a_report_that_comes_after_its_executor_has_died_brings_no_blocks_back() -> None:
    fleet = fleet_of("cc")
    fleet = Fleet([replace(config, enable_block_reuse=True) for config in fleet.configs.values()], 0)
    pool, request = fleet.at(0).context, prompt((1, 2, 3))
    report(fleet, 1, cache_events=(0, 1, 2, 3))
    fleet.lost(1)
    report(fleet, 1, cache_events=(0, 1, 2, 3))
    assert list(pool.prefix_match(request)) == [0, 0]
    assert fleet.prefixes.num_blocks(1) == 0


def test_a_request_without_hashes_matches_nothing() -> None:
    fleet = fleet_of("cc")
    fleet.at(0).context.prefix_match(prompt())
    fleet.dispatched(1, 100, ())
    assert list(fleet.at(0).context.prefix_match(prompt())) == [0, 0]


@pytest.mark.parametrize("n", SIZES)
def test_matches_cannot_be_written_into(n: int) -> None:
    matched = fleet_of("c" * n).at(0).context.prefix_match(prompt((1,)))
    with pytest.raises((TypeError, ValueError)):
        matched[0] = 1
