"""The copy kernel, on a GPU or else in the interpreter on host memory, against what KvPages does with torch."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
triton = pytest.importorskip("triton", reason="triton is not installed")

from disagg.core.kv_layout import KvLayout, Range  # noqa: E402
from disagg.runtime.kv_kernels import copy_rows, warm_copy  # noqa: E402
from disagg.runtime.kv_pages import KvPages  # noqa: E402
from disagg.runtime.kv_places import KvCopy, KvPool, packed_place  # noqa: E402

LAYERS, HEADS, NUM_BLOCKS = 5, 4, 12


def make(heads: int, size: int, head_dim: int, dtype: str, *, rank: int = 0) -> KvPages:
    return KvPages(KvLayout(HEADS // heads, 1, (LAYERS,), HEADS, head_dim, dtype), rank, NUM_BLOCKS, size, DEVICE)


def table(blocks: list[int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32, device=DEVICE)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([2, 4, 8])),
    layers=st.sampled_from([(0, 5), (2, 3), (1, 4)]),
    heads=st.sampled_from([(0, 2), (1, 2)]),
    tokens=st.sampled_from([(0, 12), (3, 11), (5, 6), (0, 7), (8, 12)]),
    head_dim=st.sampled_from([4, 6, 8, 16]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    max_programs=st.sampled_from([1, 3, 1000]),
)
def test_pages_copied_between_pools_of_any_layout_are_those_that_torch_would_copy(
    sizes: tuple[int, int],
    layers: Range,
    heads: Range,
    tokens: Range,
    head_dim: int,
    dtype: str,
    max_programs: int,
) -> None:
    source, target = make(2, sizes[0], head_dim, dtype), make(4, sizes[1], head_dim, dtype)
    expected = make(4, sizes[1], head_dim, dtype)
    source.pool.normal_()
    order = [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6]
    blocks, into = order[: -(-tokens[1] // sizes[0])], order[::-1][: -(-tokens[1] // sizes[1])]
    expected.unpack(source.pack(blocks, tokens[1], layers, heads, tokens[0]), into, tokens[1], layers, heads, tokens[0])
    tables = table(blocks), table(into)
    pools = KvPool.of(source), KvPool.of(target)
    copy = KvCopy(
        pools[0].place(layers, heads, tokens[0], tables[0].data_ptr()),
        pools[1].place(layers, heads, tokens[0], tables[1].data_ptr()),
        layers[1] - layers[0],
        heads[1] - heads[0],
        tokens[1] - tokens[0],
        pools[0].row_bytes,
    )
    copy_rows(copy, tile=16, max_programs=max_programs)
    assert torch.equal(target.pool, expected.pool)


@pytest.mark.parametrize("tokens", [(0, 12), (3, 11), (5, 6)])
def test_the_same_kernel_packs_and_unpacks(tokens: Range) -> None:
    source, target = make(4, 4, 8, "bfloat16"), make(2, 8, 8, "bfloat16", rank=1)
    source.pool.normal_()
    layers, heads, count = (1, 4), (2, 4), tokens[1] - tokens[0]
    blocks, into = [3, 1, 9][: -(-tokens[1] // 4)], [5, 2][: -(-tokens[1] // 8)]
    buffer = torch.zeros(3, 2, 2, count, 8, dtype=torch.bfloat16, device=DEVICE)
    pools, tables = (KvPool.of(source), KvPool.of(target)), (table(blocks), table(into))
    packed = packed_place(buffer.data_ptr(), 2, count, 16)
    copy_rows(KvCopy(pools[0].place(layers, heads, tokens[0], tables[0].data_ptr()), packed, 3, 2, count, 16))
    assert torch.equal(buffer, source.pack(blocks, tokens[1], layers, heads, tokens[0]))
    copy_rows(KvCopy(packed, pools[1].place(layers, heads, tokens[0], tables[1].data_ptr()), 3, 2, count, 16))
    assert torch.equal(target.pack(into, tokens[1], layers, heads, tokens[0]), buffer)


def test_warming_the_kernels_up_changes_no_page() -> None:
    pages = make(2, 4, 8, "bfloat16", rank=1)
    pages.pool.normal_()
    before = pages.pool.clone()
    warm_copy(pages)
    assert torch.equal(pages.pool, before)


def test_a_place_outside_the_pool_is_refused() -> None:
    pool = KvPool.of(make(2, 4, 8, "bfloat16"))
    with pytest.raises(ValueError, match="not in a pool"):
        pool.place((0, 5), (1, 3), 0, 8)
