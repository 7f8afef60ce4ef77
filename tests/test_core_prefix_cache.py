"""Prefix caching in one executor: blocks found again by their hashes, shared, and evicted when they are needed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_

from disagg.core.commands import ORCHESTRATOR, PrepareReceive, ReceiveKv, Record
from disagg.core.errors import BlockError
from disagg.core.events import Cancel, Enqueue, KvReceived, KvRequested, KvTaken, Report, StepsDone, Stopped
from disagg.core.life_cycle import State
from disagg.core.prefix_cache import PrefixCache
from disagg.core.tables import StepRow
from disagg.core.visit import Visit
from disagg.policies.vocabulary import Request, RequestType, Role
from tests.core_cases import Case, core_of, make_reuse_case, simulate
from tests.core_desk import ExecutorDesk, asks, both, context, generation


def desk_of(role: Role = Role.MIXED, num_blocks: int = 100, **changes: Any) -> ExecutorDesk:
    """Blocks of 4 tokens, found again."""
    return ExecutorDesk(role, num_blocks, enable_block_reuse=True, **changes)


def named(enqueue: Enqueue, *hashes: int) -> Enqueue:
    return with_(enqueue, request=with_(enqueue.request, block_hashes=hashes))


def blocks(desk: ExecutorDesk) -> tuple[int, ...]:
    """free, reserved, used, held, quarantined, cached; the news are not taken."""
    return desk.core.scheduler.block_counts()


def told(desk: ExecutorDesk) -> list[tuple[int, ...]]:
    """The news of blocks that came and went, report by report."""
    messages = [getattr(command, "message", None) for command in desk.history]
    reports = [m if isinstance(m, Report) else getattr(m, "report", None) for m in messages]
    return [report.cache_events for report in reports if report is not None and report.cache_events]


def chunk_of(desk: ExecutorDesk) -> tuple[int, int, int]:
    """(request, first token computed, tokens computed) of the one chunk of the outstanding plan."""
    assert desk.run is not None
    (chunk,) = desk.run.chunks
    return chunk.request_id, chunk.start, chunk.length


def finish(desk: ExecutorDesk, request: Enqueue, at: int) -> None:
    """Serve a whole request of one output token."""
    desk.give(request, at=at)
    desk.end_steps(at=at + 10)


# ---- what a prompt finds --------------------------------------------------------------------------------------------


def test_a_prompt_computes_only_what_is_behind_the_blocks_that_are_cached() -> None:
    desk = desk_of()
    finish(desk, named(both(1, 10, 1), 71, 72), at=0)
    assert blocks(desk) == (98, 0, 0, 0, 0, 2)  # the third block was half full: it has no name
    desk.give(named(both(2, 14, 1), 71, 72, 73), at=20)
    assert chunk_of(desk) == (2, 8, 6)
    desk.end_steps(at=30)
    assert desk.response.num_cached_tokens == 8


def test_one_token_at_least_is_computed() -> None:
    """A prompt of two blocks, both of which are there: the second is computed anew, and given back for the one there."""
    desk = desk_of()
    finish(desk, named(both(1, 8, 1), 71, 72), at=0)
    desk.give(named(both(2, 8, 1), 71, 72), at=20)
    assert chunk_of(desk) == (2, 4, 4)
    desk.end_steps(at=30)
    assert desk.response.num_cached_tokens == 4
    assert blocks(desk) == (98, 0, 0, 0, 0, 2)


def test_two_prompts_that_run_share_blocks_which_count_once() -> None:
    desk = desk_of()
    desk.give(named(both(1, 10, 9), 71, 72), at=0)
    desk.end_steps(at=10)
    desk.give(named(both(2, 10, 9), 71, 72), at=11)
    desk.end_steps(2, at=20)
    assert desk.run is not None
    assert chunk_of(desk) == (2, 8, 2)
    tables = [desk.core.blocks.blocks_of(i) for i in (1, 2)]
    assert tables[0][:2] == tables[1][:2]
    assert not set(tables[0][2:]) & set(tables[1][2:])
    # each may need 18 tokens, 5 blocks: 2 of them in common, so 8 in all; written are 3 of the one, 2 + 1 of the other
    assert blocks(desk) == (92, 5, 3, 0, 0, 0)


def test_a_plan_says_how_many_kv_tokens_of_its_decodes_are_read_again() -> None:
    """Three that begin with the same two blocks of 4, one of them with a third in common with nobody; then one ends."""
    desk = desk_of()
    desk.give(named(both(1, 10, 9), 71, 72), at=0)
    desk.end_steps(at=10)
    assert desk.run is not None
    assert (desk.run.num_kv_tokens, desk.run.num_shared_kv) == (10, 0)  # alone
    desk.give(named(both(2, 13, 9), 71, 72, 73), named(both(3, 9, 9), 71, 72), at=11)
    desk.end_steps(2, at=20)
    assert (desk.run.num_decodes, desk.run.num_kv_tokens, desk.run.num_shared_kv) == (
        1,
        12,
        12,
    )  # no more than it reads
    desk.end_steps(at=30)
    assert (desk.run.num_decodes, desk.run.num_shared_kv) == (3, 2 * 8)
    desk.end_steps(1, Stopped(1, 1), at=40)
    assert (desk.run.num_decodes, desk.run.num_shared_kv) == (2, 8)
    rows = [command.row for command in desk.history if isinstance(command, Record)]
    assert [row.num_shared_kv for row in rows if isinstance(row, StepRow)][-3:] == [0, 12, 16]


def test_without_prefix_caching_nothing_is_read_again() -> None:
    desk = ExecutorDesk()
    desk.give(named(both(1, 10, 9), 71, 72), named(both(2, 10, 9), 71, 72), at=0)
    desk.end_steps(at=10)
    assert desk.run is not None
    assert (desk.run.num_decodes, desk.run.num_shared_kv) == (2, 0)


def test_blocks_of_equal_prompts_that_run_side_by_side_become_one() -> None:
    desk = desk_of()
    desk.give(named(both(1, 9, 9), 71, 72), named(both(2, 9, 9), 71, 72), at=0)
    assert desk.run is not None
    assert [chunk.start for chunk in desk.run.chunks] == [0, 0]
    before = desk.free
    desk.end_steps(at=10)
    assert desk.free == before + 2
    assert desk.run is not None
    one, other = desk.run.joined
    assert one.blocks[:2] == other.blocks[:2]
    assert one.blocks[2] != other.blocks[2]


def test_a_prompt_that_fits_only_with_what_is_cached_is_admitted() -> None:
    """Of 6 blocks 1 runs in 3, two of them named: 2, which needs 4 in all, fits because it shares two."""
    desk = desk_of(num_blocks=6)
    desk.give(named(both(1, 9, 4), 71, 72), at=0)
    desk.end_steps(at=10)
    desk.give(named(both(2, 13, 4), 71, 72, 73), at=11)
    assert desk.asked_to_stop
    desk.end_steps(2, at=12)
    assert chunk_of(desk) == (2, 8, 5)


def test_a_prompt_that_would_take_cached_blocks_from_under_itself_waits() -> None:
    """Cached blocks that it shares are no longer to be had for the rest of it: 2 cached and 1 empty are not 4."""
    desk = desk_of(num_blocks=6)
    finish(desk, named(both(1, 8, 1), 71, 72), at=0)
    desk.give(named(both(2, 9, 4)), at=20)  # takes 3, all empty
    assert blocks(desk)[5] == 2
    desk.end_steps(at=30)
    desk.give(named(both(3, 13, 4), 71, 72, 73), at=31)
    assert not desk.asked_to_stop
    assert desk.core.visits[3].state is State.QUEUED


# ---- eviction -------------------------------------------------------------------------------------------------------


def test_the_least_recently_released_go_first_and_of_one_prompt_the_last() -> None:
    desk = desk_of(num_blocks=6)
    finish(desk, named(both(1, 12, 1), 71, 72, 73), at=0)
    finish(desk, named(both(2, 8, 1), 81, 82), at=20)
    finish(desk, named(both(3, 9, 1), 71, 72), at=40)  # used again, 71 and 72 are younger than 81, and 73 the oldest
    desk.give(both(4, 12, 1), at=60)  # 1 empty, 2 to be evicted
    assert told(desk) == [(0, 71, 72, 73), (0, 81, 82), (2, 73, 82)]


def test_what_came_and_went_between_two_reports_is_not_told() -> None:
    desk = desk_of(num_blocks=3)
    finish(desk, named(both(1, 12, 1), 71, 72, 73), at=0)
    finish(desk, named(both(2, 12, 1), 81, 82, 83), at=20)
    finish(desk, named(both(3, 12, 1), 71, 72, 73), at=40)
    assert told(desk) == [(0, 71, 72, 73), (3, 73, 72, 71), (0, 81, 82, 83), (3, 83, 82, 81), (0, 71, 72, 73)]
    cache = PrefixCache(3, 4)
    for owner, hashes in enumerate(((71, 72), (81, 82, 83), (71, 72))):
        cache.allocate(owner, len(hashes))
        cache.register(owner, hashes, len(hashes), True)
        cache.free(owner)
    assert cache.news() == cache.news() == (0, 81, 71, 72)  # 82 and 83 came and went
    cache.forget_news()
    assert cache.news() == ()


@pytest.mark.parametrize("present", [-4, 6, 8, 400])
def test_a_reader_that_has_what_cannot_be_is_refused(present: int) -> None:
    """The prompt has 8 tokens in blocks of 4: a reader has 0 or 4 of them, and none when it asks early."""
    desk = desk_of(Role.CONTEXT)
    desk.until_context_done(1, prompt=8)
    desk.give(with_(asks(1), num_present=present))
    assert not desk.served.ok
    assert f"its reader says it has {present} tokens" in str(desk.served.error)
    desk.give(context(2, prompt=8))
    desk.give(with_(asks(2), num_present=4))
    assert "at most 0 tokens" in str(desk.served.error)


def test_a_report_that_is_looked_at_takes_no_news() -> None:
    desk = desk_of()
    desk.give(named(both(1, prompt=8, max_tokens=1), 71, 72))
    assert desk.run is not None
    done = StepsDone(desk.run.plan, desk.run.epoch, 1)
    desk.core.handle(done, 5, True)
    assert desk.report.cache_events == desk.report.cache_events == (0, 71, 72)
    desk.give(at=5)
    assert told(desk) == [(0, 71, 72)]
    assert desk.report.cache_events == ()


def test_what_was_generated_behind_canned_kv_is_not_found() -> None:
    """Its context phase was skipped: the KV of its prompt is of nothing, and what was generated goes on from it."""
    desk = desk_of(Role.GENERATION)
    desk.give(named(generation(1, prompt=8, max_tokens=20, source=ORCHESTRATOR), 71, 72))
    assert desk.run is not None
    run, desk.run = desk.run, None
    desk.give(StepsDone(run.plan, run.epoch, 6, (Stopped(1, 6),), block_hashes=((1, (73,)),)), at=20)
    assert blocks(desk) == (100, 0, 0, 0, 0, 0)


def test_a_span_evicts_nothing_for_steps_that_it_may_not_run() -> None:
    """Under max_utilization: 1 decodes, 1 block is empty, 2 are cached; its span ends where it would evict."""
    desk = desk_of(num_blocks=4, capacity="max_utilization")
    finish(desk, named(both(1, 8, 1), 71, 72), at=0)
    desk.give(both(2, 4, 12), at=20)
    desk.end_steps(at=30)
    assert desk.run is not None
    assert (desk.run.first_step, desk.run.last_step) == (1, 4)  # its second block
    desk.end_steps(at=40)
    assert desk.run is not None
    assert (desk.run.first_step, desk.run.last_step) == (5, 8)
    assert blocks(desk)[5] == 1  # 72 went


# ---- both phases ----------------------------------------------------------------------------------------------------


def test_a_context_executor_keeps_blocks_cached_when_their_kv_was_taken() -> None:
    desk = desk_of(Role.CONTEXT)
    desk.give(named(context(1, 10), 71, 72))
    desk.end_steps(at=10)
    assert blocks(desk) == (97, 0, 0, 3, 0, 0)
    desk.give(asks(1), at=20)
    desk.give(KvTaken(1), at=30)
    assert blocks(desk) == (98, 0, 0, 0, 0, 2)
    desk.give(named(context(2, 12), 71, 72, 73), at=40)
    assert chunk_of(desk) == (2, 8, 4)


def test_blocks_that_are_held_can_be_shared_and_are_held_again() -> None:
    desk = desk_of(Role.CONTEXT)
    desk.give(named(context(1, 10), 71, 72))
    desk.end_steps(at=10)
    desk.give(named(context(2, 12), 71, 72, 73), at=20)
    assert blocks(desk) == (96, 1, 2, 1, 0, 0)  # held are the third block of 1, used the two that 2 refers to
    desk.give(Cancel(2), at=21)
    desk.end_steps(at=30)
    assert blocks(desk) == (96, 0, 0, 3, 0, 1)


def test_a_generation_executor_receives_only_the_kv_that_it_lacks() -> None:
    desk = desk_of(Role.GENERATION)
    desk.give(named(generation(1, 10), 71, 72))
    assert desk.pull == ReceiveKv(1, 1, 77, 10, desk.core.blocks.blocks_of(1)[:3])
    desk.give(KvReceived(1, True), at=10)
    desk.give(named(generation(2, 14, source_id=78), 71, 72, 73), at=20)
    table = desk.core.blocks.blocks_of(2)
    assert table[:2] == desk.core.blocks.blocks_of(1)[:2]
    assert desk.pull == ReceiveKv(2, 1, 78, 6, table[2:4], 8)
    desk.give(KvReceived(2, True), at=40)
    assert desk.core.visits[2].num_kv_tokens == 14


def test_a_source_sends_what_the_reader_lacks() -> None:
    desk = desk_of(Role.CONTEXT)
    desk.give(named(context(1, 14), 71, 72, 73))
    desk.end_steps(at=10)
    table = desk.core.blocks.blocks_of(1)
    desk.give(KvRequested(1, 9, 50, 8), at=20)
    assert (desk.served.num_tokens, desk.served.blocks) == (6, table[2:])


def test_kv_that_is_asked_for_early_is_received_whole() -> None:
    desk = desk_of(Role.GENERATION)
    desk.give(named(generation(1, 10), 71, 72))
    desk.give(KvReceived(1, True), at=10)
    promised = named(generation(2, 14), 71, 72, 73)
    params = promised.request.context_phase_params
    assert params is not None
    params = with_(params, is_promised=True)
    desk.give(with_(promised, request=with_(promised.request, context_phase_params=params)), at=20)
    (ask,) = desk.of(PrepareReceive)
    assert (ask.num_tokens, len(ask.blocks)) == (14, 4)


def test_generated_blocks_are_found_once_their_sequence_has_ended() -> None:
    """Prompt of 6, 7 tokens generated, the last not written: 12 tokens, 3 blocks, named by the world at the end."""
    desk = desk_of()
    desk.give(named(both(1, 6, 20), 71), at=0)
    desk.end_steps(at=10)
    assert desk.run is not None
    run, desk.run = desk.run, None
    desk.give(StepsDone(run.plan, run.epoch, 6, (Stopped(1, 6),), block_hashes=((1, (72, 73)),)), at=20)
    assert blocks(desk) == (97, 0, 0, 0, 0, 3)
    desk.give(named(both(2, 16, 1), 71, 72, 73, 74), at=30)
    assert chunk_of(desk) == (2, 12, 4)


def test_what_is_generated_behind_an_unnamed_block_is_not_found() -> None:
    desk = desk_of()
    desk.give(named(both(1, 9, 20), 71), at=0)  # its second block has no name
    desk.end_steps(at=10)
    assert desk.run is not None
    run, desk.run = desk.run, None
    desk.give(StepsDone(run.plan, run.epoch, 6, (Stopped(1, 6),), block_hashes=((1, (73,)),)), at=20)
    assert blocks(desk) == (99, 0, 0, 0, 0, 1)


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    desk = desk_of(num_blocks=5, capacity="max_utilization")
    desk.give(named(both(1, 7, 9), 61), named(both(2, 8, 9), 71, 72), at=0)
    desk.end_steps(at=10)
    while not desk.core.visits[2].num_preemptions:
        desk.end_steps(at=desk.now + 10)
    while desk.run is not None and not desk.run.chunks:
        desk.end_steps(at=desk.now + 10)
    request_id, start, _ = chunk_of(desk)
    assert (request_id, start % 4, start > 0) == (2, 0, True)


def test_more_hashes_than_full_blocks_are_refused() -> None:
    desk = desk_of()
    desk.give(named(both(1, 11, 1), 71, 72, 73))
    assert desk.response.error == "3 block hashes: a prompt of 11 tokens has 2 full blocks of 4"


# ---- the blocks -----------------------------------------------------------------------------------------------------


def visit_of(id: int, num_tokens: int, *hashes: int) -> Visit:
    request = Request(id, num_tokens, 1, RequestType.CONTEXT_ONLY, block_hashes=hashes)
    return Visit(request, id, 0, 0, State.QUEUED)


def test_the_check_sees_a_reference_too_few() -> None:
    cache = PrefixCache(4, 4)
    cache.allocate(1, 2)
    cache.register(1, (71, 72), 2, True)
    cache.check()
    cache._references[cache.blocks_of(1)[0]] = 0
    with pytest.raises(BlockError, match="references"):
        cache.check()


def test_what_is_looked_for_is_the_longest_prefix_that_is_here() -> None:
    cache = PrefixCache(8, 4)
    cache.allocate(1, 3)
    cache.register(1, (71, 72, 73), 3, True)
    for hashes, found in (((71, 72, 73, 74), 12), ((71, 72, 99, 73), 8), ((99, 72), 0), ((), 0)):
        visit = visit_of(2, 17, *hashes)
        cache.look(visit, 5)
        assert (visit.num_kv_tokens, visit.num_blocks) == (found, 5 - found // 4)
    cache.free(1)
    visit = visit_of(2, 17, 71, 72, 73, 74)
    cache.look(visit, 5)
    assert (visit.num_kv_tokens, visit.num_blocks) == (12, 5)  # nobody's: to take them is to take three


def test_names_that_are_no_prefix_chain_are_a_miss() -> None:
    """72 and 73 are here behind 71, which is what 72 stands for; behind 99 nothing of them is found."""
    desk = desk_of()
    desk.give(named(both(1, prompt=16, max_tokens=1), 71, 72, 73, 74))
    desk.end_steps()
    desk.give(named(both(2, prompt=16, max_tokens=1), 99, 72, 73, 74), named(both(3, prompt=16, max_tokens=1), 71, 72))
    assert desk.run is not None
    assert [(chunk.request_id, chunk.start) for chunk in desk.run.chunks] == [(2, 0), (3, 8)]
    desk.end_steps()
    assert desk.free == 100


def test_kv_by_names_that_are_no_prefix_chain_is_received_whole() -> None:
    desk = desk_of(Role.GENERATION)
    desk.give(named(generation(1, prompt=16, max_tokens=2), 71, 72, 73, 74))
    desk.give(KvReceived(1, True))
    desk.give(named(generation(2, prompt=16, max_tokens=2), 99, 72, 73, 74))
    assert (desk.pull.num_tokens, len(desk.pull.blocks)) == (16, 4)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False).map(make_reuse_case))
def test_no_block_is_lost_in_clusters_that_share_prefixes_and_none_is_anybodys_when_all_is_over(case: Case) -> None:
    """`simulate` checks each executor's blocks, references and counts after every instant at which it acts."""
    trace = simulate(case)
    assert trace.cluster is not None
    index = trace.cluster.core if not hasattr(trace.cluster.core, "core") else trace.cluster.core.core
    for executor in case.config.executors:
        core = core_of(trace.cluster, executor.id)
        core.check()
        assert core.visits == {}
        free, _, _, _, _, cached = core.scheduler.block_counts()
        assert free + cached == executor.num_blocks
        assert index.fleet.prefixes.num_blocks(executor.id) == cached
