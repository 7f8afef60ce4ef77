"""The fused kernels compute what plain torch does: by themselves, and as an engine, on a GPU or in the interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from disagg.core.step_sizes import graph_sizes
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.decode_attention import DecodeAttention, SplitSizes, split_sizes
from disagg.runtime.model_kernels import argmax_rows
from disagg.runtime.model_place import Place
from disagg.runtime.weights import random_weights
from tests.fused_models import SHAPES, fused_engine
from tests.tiny_models import MIN_MARGIN, Script, make_engine, prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize(
    "sizes",
    [
        *(SplitSizes(16, least, most) for least, most in ((16, 4), (64, 4), (16, 2))),
        *(SplitSizes(16, least, most, fused=True, by_all=False) for least, most in ((16, 4), (64, 4), (16, 2))),
        *(SplitSizes(16, least, most, fused=True) for least, most in ((16, 4), (16, 2))),
        SplitSizes(16, 16, 4, fused=True, by_all=False, at_once=2),
        SplitSizes(16, 16, 4, fused=True, at_once=1),
    ],
    ids=lambda sizes: "-".join(
        str(getattr(sizes, name)) for name in ("min_split", "max_splits", "fused", "by_all", "at_once")
    ),
)
def test_decode_attention_over_scattered_pages_equals_softmax_over_the_tokens(
    window: int | None, sizes: SplitSizes
) -> None:
    torch.manual_seed(0)
    num_query, num_kv, dim, tokens, blocks = 8, 2, 16, 4, 40
    k_pages, v_pages = torch.randn(2, blocks, num_kv, tokens, dim, device=DEVICE)
    lengths = [0, 1, 7, 37, 30, 48]
    tables = torch.stack([torch.randperm(blocks)[:12] for _ in lengths]).int().to(DEVICE)
    positions = torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(len(lengths), (num_query + 2 * num_kv) * dim, device=DEVICE)
    attention = DecodeAttention(8, num_query, num_kv, dim, window, torch.device(DEVICE))
    out = torch.full((len(lengths), num_query * dim), torch.nan, device=DEVICE)
    for _ in range(2):  # the second finds the counters as the first left them
        attention.find_cut(positions, sizes)
        attention(qkv, positions, tables, k_pages, v_pages, out, sizes)
    for i, length in enumerate(lengths):
        if length == 0:
            assert bool((out[i] == 0).all())
            continue
        k, v = (p[tables[i].long()].transpose(0, 1).reshape(num_kv, -1, dim)[:, :length] for p in (k_pages, v_pages))
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        q = qkv[i, : num_query * dim].view(num_kv, -1, dim)
        expected = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(dim), -1) @ v
        torch.testing.assert_close(out[i].view(num_kv, -1, dim), expected, atol=2e-6, rtol=1e-5)


def test_the_greatest_logit_is_found_and_of_equals_the_first() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 3011, device=DEVICE)
    logits[0, [7, 2000]] = 9.0
    logits[1, 3000] = 50.0  # past the vocabulary
    logits[2, 0] = logits[2, 2999] = 8.0
    found = argmax_rows(logits, 3000)
    assert found.tolist()[0] == 7
    assert found.tolist()[2] == 0
    assert found.tolist() == logits[:, :3000].argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    ("lengths", "window", "cut"),
    [
        ([1024] * 64, None, 993),  # of one length: whole
        ([900] * 39 + [9000], None, 669),  # (39 · 900 + 9000) · 8 heads in 4 · 132 programs
        ([900] * 39 + [9000], 1000, 547),
        ([16] * 40, None, 512),
        ([512] * 1500, None, 11637),  # more than one look at the positions
        ([300] * 11 + [12_000], None, 256),  # 232 would be too short
        ([4096] * 12, None, 745),
    ],
)
def test_in_a_batch_long_sequences_are_cut_by_what_there_is_to_read_in_all(
    lengths: list[int], window: int | None, cut: int
) -> None:
    attention = DecodeAttention(40, 32, 8, 16, window, torch.device(DEVICE))
    attention._num_sms = 132
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    attention.find_cut(positions)
    assert attention._cut.item() == cut


def test_a_launch_is_cut_by_the_batch_size_alone_and_fills_the_device() -> None:
    for batch in (1, 4, 16, 32):
        sizes = split_sizes(batch, 8)
        parts = min(sizes.max_splits, max(1, 1024 // sizes.min_split))
        assert batch * 8 * parts >= 64
        assert sizes.min_split & (sizes.min_split - 1) == 0


def test_where_one_long_sequence_would_be_waited_for_it_is_cut_in_many_parts() -> None:
    """In parts of 750 tokens at most, where they were of 1,500 from eight sequences on."""
    for batch in range(1, 33):
        sizes = split_sizes(batch, 8)
        assert 12_000 / sizes.max_splits <= 750
        assert sizes.by_all is (5 <= batch <= 16)
        assert sizes.fused
    assert not split_sizes(33, 8).fused
    assert split_sizes(12, 4, group=7).at_once == 8  # as many registers for a merge as 16 parts of 4


def test_the_ladder_ends_with_the_largest_batch_and_pads_little() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    steps = graph_sizes(256)
    assert steps[-1] == 256
    assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("name", SHAPES)
def test_a_fused_engine_yields_the_tokens_of_the_plain_one(name: str) -> None:
    """Joins, leaves, chunks with KV before them, chunks beside decodes, and spans of several steps."""
    shape = SHAPES[name]
    weights = random_weights(Place.of(shape), 3, DEVICE)
    plain = make_engine(shape, weights, record_margins=True, device=DEVICE)
    fused = fused_engine(shape, weights, device=DEVICE, record_margins=True)
    tokens = []
    for engine in (plain, fused):
        script = Script([engine])
        for request, text in enumerate(prompts(shape, [9, 14], seed=8)):
            script.prefill(request, text, 5, len(text) + 40)
            script.run(joined=[request], num_steps=2)
        script.run(left=[1], num_steps=3)
        tokens.append(script.tokens)
    assert min(margin for _, margin in plain.margins) > MIN_MARGIN
    assert tokens[1] == tokens[0]
    seen = [[margin for _, margin in sorted(engine.margins)] for engine in (fused, plain)]
    assert seen[0] == pytest.approx(seen[1], abs=2e-4)


def test_steps_launched_one_behind_the_other_are_those_of_one_at_a_time() -> None:
    shape = SHAPES["llama"]
    tokens = []
    for ahead in (1, 4):
        engine = fused_engine(shape, device=DEVICE)
        script = Script([engine])
        for request, text in enumerate(prompts(shape, [9, 6], seed=2)):
            script.prefill(request, text, 16, len(text) + 30)
            script.run(joined=[request], num_steps=1)
        script.run(num_steps=4, ahead=ahead)
        tokens.append(script.tokens)
    assert tokens[0] == tokens[1]
    assert len(tokens[0][0]) == 8  # first, beside the other's chunk, and 6 steps


def test_chance_is_drawn_alike_by_both_engines() -> None:
    hot = SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, seed=5)
    shape = SHAPES["llama"]
    weights = random_weights(Place.of(shape), 3, DEVICE)
    drawn = []
    for engine in (make_engine(shape, weights, device=DEVICE), fused_engine(shape, weights, device=DEVICE)):
        script = Script([engine])
        for request, text in enumerate(prompts(shape, [9, 6], seed=4)):
            sampling = hot if request else SamplingConfig()
            script.prefill(request, text, 16, len(text) + 30, sampling=sampling)
            script.run(joined=[request], num_steps=3, sampling=sampling)
        drawn.append(script.tokens)
    assert drawn[0] == drawn[1]
