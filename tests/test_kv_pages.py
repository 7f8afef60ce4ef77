from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.kv_layout import KvLayout, transfer_plan
from disagg.runtime.kv_pages import KvPageError, KvPages, needed_bytes

LAYERS, HEADS, HEAD_DIM, BLOCKS = 5, 4, 6, 12
LAYOUTS = [
    (1, (5,)),
    (2, (5,)),
    (4, (5,)),
    (8, (5,)),
    (1, (2, 3)),
    (2, (4, 1)),
    (4, (1, 1, 3)),
    (8, (3, 2)),
]


def layout(tp: int, stages: tuple[int, ...], dtype: str = "float32") -> KvLayout:
    return KvLayout(tp, len(stages), stages, HEADS, HEAD_DIM, dtype)


def executor(tp: int, stages: tuple[int, ...], block: int, dtype: str = "float32", fill: bool = False) -> list[KvPages]:
    """All ranks' pages; filled, they hold slices of the same full cache."""
    whole = torch.randn(LAYERS, 2, BLOCKS, HEADS, block, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    ranks = []
    for rank in range(tp * len(stages)):
        pages = KvPages(layout(tp, stages, dtype), rank, BLOCKS, block)
        if fill:
            pages.pool.copy_(whole[slice(*pages.layers), :, :, slice(*pages.heads)])
        ranks.append(pages)
    return ranks


@settings(max_examples=60, deadline=None)
@given(
    source=st.sampled_from(LAYOUTS),
    destination=st.sampled_from(LAYOUTS),
    block=st.sampled_from([1, 2, 4]),
    other_block=st.sampled_from([2, 3, 4]),
    num_tokens=st.integers(1, 12),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_kv_packed_in_one_layout_and_unpacked_in_another_keeps_every_checksum(
    source: tuple[int, tuple[int, ...]],
    destination: tuple[int, tuple[int, ...]],
    block: int,
    other_block: int,
    num_tokens: int,
    dtype: str,
) -> None:
    senders, receivers = executor(*source, block, dtype, fill=True), executor(*destination, other_block, dtype)
    blocks = [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6][: -(-num_tokens // block)]
    into = [2, 6, 4, 1, 8, 11][: -(-num_tokens // other_block)]
    for piece in transfer_plan(senders[0].layout, receivers[0].layout):
        packed = senders[piece.source_rank].pack(blocks, num_tokens, piece.layers, piece.heads)
        assert packed.is_contiguous()
        receivers[piece.destination_rank].unpack(packed, into, num_tokens, piece.layers, piece.heads)
    for receiver in receivers:
        found = receiver.checksums(into, num_tokens, receiver.layers, receiver.heads)
        assert found.shape[2] == len(into)
        for sender in senders:
            for layer in range(*sender.layers):
                for head in range(*sender.heads):
                    if receiver.layers[0] <= layer < receiver.layers[1] and (
                        receiver.heads[0] <= head < receiver.heads[1]
                    ):
                        sent = sender.checksums(
                            blocks, num_tokens, (layer, layer + 1), (head, head + 1), tokens_per_block=other_block
                        )
                        assert torch.equal(sent[0, 0], found[layer - receiver.layers[0], head - receiver.heads[0]])


def test_unpack_touches_no_other_block_and_no_token_past_the_end() -> None:
    (source,), (target,) = executor(1, (5,), 4, fill=True), executor(1, (5,), 4)
    target.pool.fill_(99.0)
    target.unpack(source.pack([1, 2], 6, (1, 3), (0, 2)), [5, 7], 6, (1, 3), (0, 2))
    changed = (target.pool != 99.0).nonzero()
    assert {int(layer) for layer in changed[:, 0]} == {1, 2}
    assert {int(head) for head in changed[:, 3]} == {0, 1}
    assert {(int(b), int(t)) for b, t in changed[:, [2, 4]]} == {(5, t) for t in range(4)} | {(7, 0), (7, 1)}


def test_a_checksum_sees_one_flipped_bit_a_swap_and_a_swap_of_k_with_v() -> None:
    (pages,) = executor(1, (5,), 4, fill=True)
    everything = ((0, LAYERS), (0, HEADS))
    before = pages.checksums([3, 4], 8, *everything)
    cell = (2, 1, 4, 3)  # layer, v, block, head

    def now() -> list[list[int]]:
        return (pages.checksums([3, 4], 8, *everything) != before).nonzero().tolist()

    saved = pages.pool.clone()
    pages.pool[cell].view(torch.int32)[2, 5] ^= 1
    assert now() == [[2, 3, 1]]
    pages.pool.copy_(saved)
    pages.pool[2, 1, 4, 3, [0, 1]] = saved[2, 1, 4, 3, [1, 0]]
    assert now() == [[2, 3, 1]]
    pages.pool.copy_(saved)
    pages.pool[2, [0, 1], 4, 3] = saved[2, [1, 0], 4, 3]
    assert now() == [[2, 3, 1]]


def test_a_checksum_counts_only_the_tokens_of_a_partial_block() -> None:
    (pages,) = executor(1, (5,), 4, fill=True)
    before = pages.checksums([3, 4], 6, (0, 5), (0, 4))
    pages.pool[:, :, 4, :, 2:] = 5.0
    assert torch.equal(pages.checksums([3, 4], 6, (0, 5), (0, 4)), before)
    pages.pool[:, :, 4, :, 1:] = 5.0
    assert (pages.checksums([3, 4], 6, (0, 5), (0, 4)) != before).all(dim=0).all(dim=0).tolist() == [False, True]


@pytest.mark.parametrize(("tp", "stages"), LAYOUTS)
def test_a_rank_allocates_its_own_kv_and_nothing_else(tp: int, stages: tuple[int, ...]) -> None:
    ranks = executor(tp, stages, 4, "bfloat16")
    whole = LAYERS * 2 * BLOCKS * HEADS * 4 * HEAD_DIM * 2
    assert all(
        p.nbytes == p.pool.untyped_storage().nbytes() == needed_bytes(p.layout, p.rank, BLOCKS, 4) for p in ranks
    )
    assert sum(pages.nbytes for pages in ranks) == whole * max(1, tp // HEADS)


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "layers", "heads", "why"),
    [
        ([1], 5, (0, 2), (0, 2), "need 2 block ids"),
        ([1, 2, 3], 5, (0, 2), (0, 2), "need 2 block ids"),
        ([1, 12], 5, (0, 2), (0, 2), "0 to 11"),
        ([-1, 2], 5, (0, 2), (0, 2), "0 to 11"),
        ([], 0, (0, 2), (0, 2), "0 tokens"),
        ([1, 2], 5, (1, 3), (0, 2), "layers"),
        ([1, 2], 5, (0, 2), (1, 3), "heads"),
        ([1, 2], 5, (1, 1), (0, 2), "layers"),
    ],
)
def test_pages_that_a_rank_does_not_have_are_refused(
    blocks: list[int], num_tokens: int, layers: tuple[int, int], heads: tuple[int, int], why: str
) -> None:
    pages = KvPages(layout(2, (2, 3)), 0, BLOCKS, 4)
    with pytest.raises(KvPageError, match=why):
        pages.pack(blocks, num_tokens, layers, heads)


def test_packed_kv_of_the_wrong_size_or_dtype_is_refused_and_nothing_is_written() -> None:
    pages = KvPages(layout(1, (5,)), 0, BLOCKS, 4)
    good = torch.ones(1, 2, 4, 6, HEAD_DIM)
    for bad in (good[:, :, :, :5], good[:, :, :3], good.bfloat16()):
        with pytest.raises(KvPageError, match="expected"):
            pages.unpack(bad, [1, 2], 6, (0, 1), (0, 4))
    assert not pages.pool.any()
