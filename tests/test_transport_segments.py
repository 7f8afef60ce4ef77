"""What may be sent, what has arrived, and in how few runs it can be copied."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.kv_layout import KvLayout
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool
from disagg.runtime.kv_runs import copy_in_host_memory, runs_of
from disagg.runtime.transport_segments import Incoming, Outgoing, Outline, Segment, SegmentError, Written

RANGES = (((0, 3), (0, 2)), ((3, 5), (1, 2)))  # two pieces of unlike weight
TOKENS = 30


def outline() -> Outline:
    return Outline(RANGES, TOKENS, row_bytes=8)


def test_nothing_is_cut_before_it_is_written_nor_for_less_than_it_is_worth() -> None:
    written, outgoing = Written(), Outgoing(outline())
    assert outgoing.cut(written, 1, 1 << 30) == []
    written.advance((0, 2), 10)
    assert outgoing.cut(written, 2 * 10 * 32 + 1, 1 << 30) == []
    assert outgoing.cut(written, 2 * 10 * 32, 1 << 30) == [Segment((0, 2), (0, 10))]
    assert outgoing.cut(written, 1, 1 << 30) == []
    written.advance((0, 5), TOKENS)
    assert outgoing.cut(written, 1, 1 << 30) == [Segment((0, 2), (10, 30)), Segment((2, 5), (0, 30))]
    assert outgoing.is_over()


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(0, 40), st.booleans()), max_size=30),
    at_most=st.integers(1, 3000),
)
def test_every_byte_is_cut_once_and_arrives_once_however_it_is_written(
    steps: list[tuple[int, int, int, bool]], at_most: int
) -> None:
    written, whole = Written(), outline()
    outgoing, incoming = Outgoing(whole), Incoming(whole)
    total = 0
    for start, length, tokens, is_all in [*steps, (0, 5, 0, True)]:
        if is_all:
            written.advance_all()
        else:
            written.advance((start, min(5, start + length)), tokens)
        for segment in outgoing.cut(written, 1, at_most):
            size = whole.bytes_of(segment)
            assert size <= max(at_most, 32)  # or one token of one layer
            assert size == sum(
                (l1 - l0) * (h1 - h0) * 2 * 8 * (segment.tokens[1] - segment.tokens[0])
                for (l0, l1), (h0, h1) in whole.pieces_of(segment)
            )
            total += size
            incoming.announce(segment)
            incoming.arrive(segment)
    assert outgoing.is_over()
    assert incoming.is_whole()
    assert total == whole.num_bytes


@pytest.mark.parametrize(
    ("segment", "why"),
    [
        (Segment((0, 2), (5, 9)), "begins at token 5"),
        (Segment((0, 6), (0, 9)), "no place in this transfer"),
        (Segment((2, 2), (0, 9)), "empty or too long"),
        (Segment((0, 2), (0, 31)), "empty or too long"),
    ],
)
def test_a_segment_that_leaves_a_gap_or_the_transfer_is_refused_and_changes_nothing(segment: Segment, why: str) -> None:
    incoming = Incoming(outline())
    with pytest.raises(SegmentError, match=why):
        incoming.announce(segment)
    incoming.announce(Segment((0, 5), (0, 30)))
    with pytest.raises(SegmentError, match="begins at token 0, but layer 0 is at 30"):
        incoming.announce(Segment((0, 5), (0, 30)))


@pytest.mark.parametrize(
    ("blocks", "into", "num_runs"),
    [
        ([2, 3, 4], [5, 6, 7], 1),  # neighbours at both ends
        ([2, 3, 4], [5, 6, 1], 2),
        ([4, 2, 0], [1, 5, 3], 3),
    ],
)
def test_neighbouring_blocks_are_copied_as_one_run(blocks: list[int], into: list[int], num_runs: int) -> None:
    pools = [KvPages(KvLayout(1, 1, (2,), 2, 4, "float32"), 0, 8, 4) for _ in range(2)]
    pools[0].pool.normal_()
    places = [KvPool.of(pages).place((0, 2), (0, 2), 0, 0) for pages in pools]
    copy = KvCopy(places[0], places[1], 2, 2, 12, 16)
    sources, _, sizes = zip(*runs_of(copy, blocks, into), strict=True)
    assert len(sources) == num_runs  # a block holds all layers, K and V
    assert sum(sizes) == pools[0].pack(blocks, 12, (0, 2), (0, 2)).nbytes
    copy_in_host_memory(copy, blocks, into)
    assert pools[1].pack(into, 12, (0, 2), (0, 2)).equal(pools[0].pack(blocks, 12, (0, 2), (0, 2)))
