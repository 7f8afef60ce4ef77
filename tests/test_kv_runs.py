"""Copies by runs carry the same rows as any other, and touch no block that is not the request's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.blocks import BlockManager
from disagg.core.kv_layout import KvLayout
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool, packed_place
from disagg.runtime.kv_runs import copy_in_host_memory, run_bytes, runs_of

LAYERS, HEADS, DIM, BLOCKS = 3, 4, 4, 12


def pages(block: int) -> KvPages:
    made = KvPages(KvLayout(1, 1, (LAYERS,), HEADS, DIM, "float32"), 0, BLOCKS, block)
    made.pool.normal_()
    return made


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    first = draw(st.integers(0, size - 1))
    return first, draw(st.integers(first + 1, size))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_runs_carry_the_rows_asked_for_and_touch_no_other_block(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    blocks = data.draw(st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4])))
    source, target = (pages(size) for size in blocks)
    end = data.draw(st.integers(1, 20))
    first = data.draw(st.integers(0, end - 1))
    layers, heads = data.draw(ranges(LAYERS)), data.draw(ranges(HEADS))
    tables = [data.draw(st.permutations(range(BLOCKS)))[: -(-end // size)] for size in blocks]
    if first:  # what came before is there already
        had = [table[: -(-first // size)] for table, size in zip(tables, blocks, strict=True)]
        target.unpack(source.pack(had[0], first, layers, heads), had[1], first, layers, heads)
    before = target.pool.clone()
    copy = KvCopy(
        KvPool.of(source).place(layers, heads, first, 0),
        KvPool.of(target).place(layers, heads, first, 0),
        layers[1] - layers[0],
        heads[1] - heads[0],
        end - first,
        DIM * 4,
    )
    copy_in_host_memory(copy, tables[0], tables[1])
    assert target.pack(tables[1], end, layers, heads).equal(source.pack(tables[0], end, layers, heads))
    others = [block for block in range(BLOCKS) if block not in tables[1]]
    assert target.pool[:, :, others].equal(before[:, :, others])
    kept = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    kept[slice(*layers), slice(*heads)] = False
    moved = target.pool.permute(0, 3, 1, 2, 4, 5)[kept], before.permute(0, 3, 1, 2, 4, 5)[kept]
    assert moved[0].equal(moved[1])


@settings(max_examples=60, deadline=None)
@given(end=st.integers(1, 20), block=st.sampled_from([2, 4]), layers=ranges(LAYERS), heads=ranges(HEADS))
def test_runs_into_a_packed_buffer_fill_it_and_nothing_beyond(
    end: int, block: int, layers: tuple[int, int], heads: tuple[int, int]
) -> None:
    source = pages(block)
    table = list(reversed(range(-(-end // block))))
    expected = source.pack(table, end, layers, heads)
    buffer = torch.full((expected.numel() + 8,), -1.0)
    num_heads = heads[1] - heads[0]
    place = packed_place(buffer.data_ptr(), num_heads, end, DIM * 4)
    own = KvPool.of(source).place(layers, heads, 0, 0)
    copy_in_host_memory(KvCopy(own, place, layers[1] - layers[0], num_heads, end, DIM * 4), table, [])
    assert buffer[:-8].view(expected.shape).equal(expected)
    assert bool((buffer[-8:] == -1).all())


def test_a_request_with_all_its_layers_and_heads_is_one_run_a_block() -> None:
    source, target = pages(4), pages(4)
    places = [KvPool.of(each).place((0, LAYERS), (0, HEADS), 0, 0) for each in (source, target)]
    copy = KvCopy(places[0], places[1], LAYERS, HEADS, 10, DIM * 4)
    _, _, sizes = zip(*runs_of(copy, [7, 3, 5], [1, 4, 9]), strict=True)
    assert run_bytes(copy) == sizes[0]
    assert list(sizes) == [LAYERS * 2 * HEADS * 4 * DIM * 4] * 3


def test_blocks_that_follow_each_other_at_both_ends_are_one_run() -> None:
    source, target = pages(4), pages(4)
    places = [KvPool.of(each).place((0, LAYERS), (0, HEADS), 2, 0) for each in (source, target)]
    copy = KvCopy(places[0], places[1], LAYERS, HEADS, 14, DIM * 4)
    starts, into, sizes = zip(*runs_of(copy, [2, 3, 5, 6, 9], [4, 5, 6, 7, 9]), strict=True)
    block = LAYERS * 2 * HEADS * 4 * DIM * 4
    assert list(sizes) == [2 * block, 2 * block]  # the fifth block holds none of the 14 tokens from token 2 on
    assert [at - source.pool.data_ptr() for at in starts] == [2 * block, 5 * block]
    assert [at - target.pool.data_ptr() for at in into] == [4 * block, 6 * block]


def test_blocks_as_a_fresh_pool_gives_them_are_one_run() -> None:
    manager = BlockManager(BLOCKS)
    tables = [manager.allocate(owner, 5) for owner in (1, 2)]
    source, target = pages(4), pages(4)
    places = [KvPool.of(each).place((0, LAYERS), (0, HEADS), 0, 0) for each in (source, target)]
    copy = KvCopy(places[0], places[1], LAYERS, HEADS, 20, DIM * 4)
    assert len(list(runs_of(copy, *tables))) == 1
    copy_in_host_memory(copy, *tables)
    whole = ((0, LAYERS), (0, HEADS))
    assert target.pack(tables[1], 20, *whole).equal(source.pack(tables[0], 20, *whole))
    assert len(list(runs_of(copy, tables[0], tables[1][::-1]))) == 5  # not neighbours in one order


def test_runs_are_short_where_heads_are_re_laid_out() -> None:
    source, target = pages(4), pages(4)
    places = [KvPool.of(each).place((0, LAYERS), (1, 3), 0, 0) for each in (source, target)]
    copy = KvCopy(places[0], places[1], LAYERS, 2, 8, DIM * 4)
    _, _, sizes = zip(*runs_of(copy, [7, 3], [1, 4]), strict=True)
    assert run_bytes(copy) == sizes[0] == 2 * 4 * DIM * 4
    assert len(sizes) == 2 * LAYERS * 2
