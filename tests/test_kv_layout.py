from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.core.kv_layout import KvLayout, transfer_plan
from disagg.core.model_shapes import PRESETS, ModelError

HEAD_COUNTS = (1, 2, 4, 6, 8)


@st.composite
def stages(draw: st.DrawFn, num_layers: int) -> tuple[int, ...]:
    pp = draw(st.integers(1, min(num_layers, 5)))
    cuts = draw(st.sets(st.integers(1, num_layers - 1), min_size=pp - 1, max_size=pp - 1)) if pp > 1 else set()
    bounds = [0, *sorted(cuts), num_layers]
    return tuple(stop - start for start, stop in pairwise(bounds))


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    num_heads = draw(st.sampled_from(HEAD_COUNTS))
    num_layers = draw(st.integers(1, 12))
    fitting = [tp for tp in range(1, 17) if num_heads % tp == 0 or tp % num_heads == 0]
    sides = []
    for _ in range(2):
        split = draw(stages(num_layers))
        sides.append(KvLayout(draw(st.sampled_from(fitting)), len(split), split, num_heads, 64, "bfloat16"))
    return sides[0], sides[1]


def cells(layers: tuple[int, int], heads: tuple[int, int]) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(*layers) for head in range(*heads)]


@given(layout_pairs())
def test_each_destination_rank_gets_each_layer_and_head_it_holds_exactly_once(pair: tuple[KvLayout, KvLayout]) -> None:
    source, destination = pair
    plan = transfer_plan(source, destination)
    for rank in range(destination.num_ranks):
        sent = Counter(cell for p in plan if p.destination_rank == rank for cell in cells(p.layers, p.heads))
        needed = cells(destination.layers_of(rank), destination.heads_of(rank))
        assert sent == Counter(needed)


@given(layout_pairs())
def test_a_source_rank_sends_only_what_it_holds_and_no_piece_is_empty(pair: tuple[KvLayout, KvLayout]) -> None:
    source, destination = pair
    for piece in transfer_plan(source, destination):
        assert cells(piece.layers, piece.heads)
        assert set(cells(piece.layers, piece.heads)) <= set(
            cells(source.layers_of(piece.source_rank), source.heads_of(piece.source_rank))
        )


@given(layout_pairs())
def test_a_pair_of_ranks_has_one_piece_at_most(pair: tuple[KvLayout, KvLayout]) -> None:
    pairs = [(piece.source_rank, piece.destination_rank) for piece in transfer_plan(*pair)]
    assert len(pairs) == len(set(pairs))


@given(layout_pairs())
def test_source_replicas_send_alike_up_to_a_layer_per_destination_rank(pair: tuple[KvLayout, KvLayout]) -> None:
    source, destination = pair
    plan = transfer_plan(source, destination)
    load: Counter[int] = Counter()
    for piece in plan:
        load[piece.source_rank] += len(cells(piece.layers, piece.heads))
    if source.num_replicas % destination.num_replicas and destination.num_replicas % source.num_replicas:
        return  # such numbers of replicas cannot be dealt out evenly
    for first in range(0, source.num_ranks, source.num_replicas):
        loads = [load[first + replica] for replica in range(source.num_replicas)]
        slack = 0 if destination.num_replicas % source.num_replicas == 0 else destination.num_ranks
        assert max(loads) - min(loads) <= slack


@given(layout_pairs())
def test_the_ranks_of_a_layout_hold_every_layer_and_head_as_often_as_it_has_replicas(
    pair: tuple[KvLayout, KvLayout],
) -> None:
    layout = pair[0]
    held = Counter(
        cell for rank in range(layout.num_ranks) for cell in cells(layout.layers_of(rank), layout.heads_of(rank))
    )
    assert set(held) == set(cells((0, layout.num_layers), (0, layout.num_kv_heads)))
    assert set(held.values()) == {layout.num_replicas}


def test_heads_of_a_rank_follow_the_stated_formula() -> None:
    wide = KvLayout(8, 1, (2,), 2, 64, "float32")
    assert [wide.heads_of(t) for t in range(8)] == [(0, 1)] * 4 + [(1, 2)] * 4
    narrow = KvLayout(2, 2, (3, 1), 4, 64, "float32")
    assert [(narrow.layers_of(r), narrow.heads_of(r)) for r in range(4)] == [
        ((0, 3), (0, 2)),
        ((0, 3), (2, 4)),
        ((3, 4), (0, 2)),
        ((3, 4), (2, 4)),
    ]


def test_replicas_of_the_source_share_the_layers_of_a_lone_destination() -> None:
    source, destination = KvLayout(4, 1, (8,), 2, 64, "float32"), KvLayout(1, 1, (8,), 2, 64, "float32")
    plan = transfer_plan(source, destination)
    assert [(p.source_rank, p.layers, p.heads) for p in plan] == [
        (0, (0, 4), (0, 1)),
        (2, (0, 4), (1, 2)),
        (1, (4, 8), (0, 1)),
        (3, (4, 8), (1, 2)),
    ]


def test_equal_layouts_move_nothing_between_different_ranks() -> None:
    layout = KvLayout.of(PRESETS["llama-3.1-8b"], tp=4, pp=2)
    assert all(piece.source_rank == piece.destination_rank for piece in transfer_plan(layout, layout))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("num_layers", KvLayout(1, 1, (5,), 4, 64, "float32")),
        ("num_kv_heads", KvLayout(1, 1, (4,), 8, 64, "float32")),
        ("head_dim", KvLayout(1, 1, (4,), 4, 128, "float32")),
        ("dtype", KvLayout(1, 1, (4,), 4, 64, "bfloat16")),
    ],
)
def test_kv_of_different_models_is_not_moved(field: str, other: KvLayout) -> None:
    with pytest.raises(ModelError, match=field):
        transfer_plan(KvLayout(1, 1, (4,), 4, 64, "float32"), other)


@pytest.mark.parametrize("bad", [(3, 1, (4,), 4), (1, 2, (4,), 4), (1, 2, (4, 0), 4), (0, 1, (4,), 4)])
def test_a_layout_that_fits_nothing_is_refused(bad: tuple[int, int, tuple[int, ...], int]) -> None:
    with pytest.raises(ModelError):
        KvLayout(*bad, 64, "float32")


def test_a_rank_outside_the_layout_is_refused() -> None:
    with pytest.raises(ModelError, match="0 to 3"):
        KvLayout(2, 2, (2, 2), 4, 64, "float32").heads_of(4)
