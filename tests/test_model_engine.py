from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from disagg.core.commands import Chunk, Joined, RunSteps
from disagg.core.model_shapes import ModelShape
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.collectives import SingleRank
from disagg.runtime.engine import ChunkFeed, Engine, EngineError, JoinedFeed, PlanFeed
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.model_place import Place
from disagg.runtime.weights import load_weights, random_weights, write_random_checkpoint
from tests.tiny_models import BLOCK, MAX_ROUNDING, SHAPES, Script, make_engine, oracle, prompts

NUM_TOKENS = 20


@pytest.fixture(scope="module", params=[name for name in SHAPES if name != "few-kv-heads"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shape, its checkpoint, prompts, and what transformers makes of each: tokens and margins."""
    shape = SHAPES[request.param]
    folder = write_random_checkpoint(tmp_path_factory.mktemp("model") / shape.name, shape, seed=3)
    texts = prompts(shape, [5, 19, 12], seed=5)
    return shape, folder, texts, [oracle(folder, text, NUM_TOKENS) for text in texts]


def loaded(shape: ModelShape, folder: Path) -> Engine:
    return make_engine(shape, load_weights(folder, Place.of(shape)), record_margins=True)


def test_the_oracles_tokens_vary_so_that_equality_means_something(known: Any) -> None:
    assert all(len(set(tokens)) >= 5 for tokens, _ in known[3])


@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
def test_greedy_tokens_and_margins_equal_transformers_whatever_the_chunk_size(known: Any, chunk: int) -> None:
    shape, folder, texts, answers = known
    for text, (tokens, margins) in zip(texts, answers, strict=True):
        engine = loaded(shape, folder)
        assert Script([engine]).generate(0, text, NUM_TOKENS, chunk) == tokens
        assert [margin for _, margin in engine.margins] == pytest.approx(margins, abs=MAX_ROUNDING)


def test_a_batch_that_requests_join_and_leave_gives_each_its_own_tokens(known: Any) -> None:
    shape, folder, texts, answers = known
    script = Script([loaded(shape, folder)])
    script.prefill(0, texts[0], 3, len(texts[0]) + NUM_TOKENS)
    script.run(joined=[0], num_steps=4)
    script.prefill(1, texts[1], 7, len(texts[1]) + NUM_TOKENS)  # 0 decodes beside the chunks of 1
    script.run(joined=[1], num_steps=3)
    script.prefill(2, texts[2], 5, len(texts[2]) + NUM_TOKENS, decodes=False)  # both stand still meanwhile
    script.run(joined=[2], num_steps=2)
    script.run(left=[0], num_steps=5)
    script.run(joined=[0], left=[1], num_steps=6)
    for request, (tokens, _) in enumerate(answers):
        given = script.tokens[request]
        assert len(given) > 10
        assert given[:NUM_TOKENS] == tokens[: len(given)]


def test_two_prompts_of_one_step_give_each_its_own_token(known: Any) -> None:
    shape, folder, texts, answers = known
    script = Script([loaded(shape, folder)])
    for request, text in enumerate(texts):
        script.reserve(request, len(text))
    script.run(chunks=[(request, 0, text[:4], False) for request, text in enumerate(texts)])
    assert script.tokens == {}
    script.run(chunks=[(request, 4, text[4:], True) for request, text in enumerate(texts)])
    assert script.tokens == {request: answer[0][:1] for request, answer in enumerate(answers)}


def test_a_request_moved_to_another_engine_goes_on_with_the_same_tokens(known: Any) -> None:
    shape, folder, texts, answers = known
    context, generation = loaded(shape, folder), loaded(shape, folder)
    before, after = Script([context]), Script([generation])
    after.reserve(99, 9)  # so that block ids differ
    for request, (text, (tokens, _)) in enumerate(zip(texts, answers, strict=True)):
        before.prefill(request, text, 8, len(text))
        into = after.reserve(request, len(text) + NUM_TOKENS)
        layers, heads = context._pages.layers, context._pages.heads
        packed = context._pages.pack(before.blocks[request], len(text), layers, heads)
        generation._pages.unpack(packed, into[: len(before.blocks[request])], len(text), layers, heads)
        after.tokens[request], after.kv[request] = list(before.tokens[request]), len(text)
        after.run(joined=[request], num_steps=NUM_TOKENS - 1)
        after.run(left=[request])
        assert after.tokens[request] == tokens


def test_a_recomputed_request_goes_on_with_the_same_tokens(known: Any) -> None:
    shape, folder, texts, answers = known
    script = Script([loaded(shape, folder)])
    tokens = answers[0][0]
    script.prefill(0, texts[0] + tuple(tokens[:6]), 4, len(texts[0]) + NUM_TOKENS)  # prompt + generated so far
    script.run(joined=[0], num_steps=NUM_TOKENS - 7)
    assert script.tokens[0] == tokens[6:]


def test_the_engine_remembers_a_fresh_token_for_the_very_next_plan() -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 6)
    script = Script([make_engine(shape)])
    script.prefill(0, text, 16, 20)
    script.run(joined=[0], num_steps=5, remember=True)
    assert script.tokens[0] == expected
    script.prefill(1, text, 16, 20)
    script.run(num_steps=1)
    with pytest.raises(EngineError, match="joins without a token"):
        script.run(joined=[1], remember=True)


def test_blocks_appended_in_mid_life_are_used() -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 10)
    engine = make_engine(shape)
    script = Script([engine])
    script.prefill(0, text, 16, 9)  # 3 blocks: room for 3 more tokens
    engine.begin(
        RunSteps(2, 2, 1, 3, joined=(Joined(0, 9, script.blocks[0]),), num_decodes=1),
        PlanFeed((JoinedFeed(0, script.tokens[0][0]),)),
    )
    tokens = script.tokens[0] + [token for _ in range(3) for _, token in engine.step()]
    engine.begin(RunSteps(3, 2, 4, 9, appended=((0, (40, 20)),), num_decodes=1))
    tokens += [token for _ in range(6) for _, token in engine.step()]
    assert tokens == expected


def test_a_span_cut_short_and_continued_loses_and_repeats_no_token() -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 8)
    engine = make_engine(shape)
    script = Script([engine])
    script.prefill(0, text, 16, 24)
    engine.begin(
        RunSteps(2, 2, 1, 12, joined=(Joined(0, 9, script.blocks[0]),), num_decodes=1),
        PlanFeed((JoinedFeed(0, script.tokens[0][0]),)),
    )
    tokens = script.tokens[0] + [token for _ in range(3) for _, token in engine.step()]
    assert engine.steps_left == 9
    engine.begin(RunSteps(3, 2, 4, 12, num_decodes=1))
    tokens += [token for _ in range(4) for _, token in engine.step()]
    assert tokens == expected


def test_garbage_in_unused_rows_of_the_pool_reaches_nobody() -> None:
    shape = SHAPES["mistral"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 6)
    engine = make_engine(shape)
    engine._pages.pool.fill_(torch.nan)
    assert Script([engine]).generate(0, text, 6) == expected


def test_sampled_tokens_depend_on_the_seed_and_not_on_batch_chunks_or_preemption() -> None:
    shape = SHAPES["llama"]
    text, other = prompts(shape, [9, 14])
    hot = SamplingConfig(temperature=1.2, top_k=40, top_p=0.95, seed=11)

    def sampled(config: SamplingConfig, crowded: bool = False, chunk: int = 4) -> list[int]:
        script = Script([make_engine(shape)])
        if crowded:
            script.prefill(5, other, 6, 60)
            script.run(joined=[5])
        script.prefill(0, text, chunk, 30, sampling=config)
        script.run(joined=[0], num_steps=12, sampling=config)
        return script.tokens[0]

    alone = sampled(hot)
    assert alone == sampled(hot, crowded=True)
    assert alone == sampled(hot, chunk=7)
    recomputed = Script([make_engine(shape)])
    recomputed.prefill(0, text + tuple(alone[:5]), 16, 40, sampling=hot)
    recomputed.run(joined=[0], num_steps=7, sampling=hot)
    assert recomputed.tokens[0] == alone[5:]
    assert alone != sampled(msgspec.structs.replace(hot, seed=12))
    assert alone != Script([make_engine(shape)]).generate(0, text, 13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_kv_in_half_precision_and_follows_float32_closely(dtype: str) -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    exact = make_engine(shape, record_margins=True)
    half = make_engine(msgspec.structs.replace(shape, dtype=dtype), record_margins=True)
    assert half._pages.nbytes * 2 == exact._pages.nbytes
    for engine in (exact, half):
        Script([engine]).generate(0, text, 1)
    assert half.margins[0][1] == pytest.approx(exact.margins[0][1], abs=0.2)
    assert Script([half]).generate(1, text, 8) == Script([half]).generate(2, text, 8)


BAD_PLANS: list[tuple[str, dict[str, Any], PlanFeed]] = [
    ("cannot all leave", {"left": (7,)}, PlanFeed()),
    ("cannot all leave", {"left": (0, 0)}, PlanFeed()),
    ("but is in it", {"joined": (Joined(0, 4, (9,)),)}, PlanFeed((JoinedFeed(0, 1),))),
    ("feed's joined", {"joined": (Joined(1, 4, (9, 10)),)}, PlanFeed()),
    ("joins without a token", {"joined": (Joined(1, 4, (9, 10)),)}, PlanFeed((JoinedFeed(1, None),))),
    ("joins with 0 KV", {"joined": (Joined(1, 0, (9, 10)),)}, PlanFeed((JoinedFeed(1, 3),))),
    ("token id outside", {"joined": (Joined(1, 4, (9, 10)),)}, PlanFeed((JoinedFeed(1, 205),))),
    ("block outside", {"joined": (Joined(1, 4, (9, 64)),)}, PlanFeed((JoinedFeed(1, 3),))),
    ("speaks of 5 decodes", {"num_decodes": 5}, PlanFeed()),
    ("blocks for 0 more tokens", {"joined": (Joined(1, 4, (9,)),), "num_decodes": 2}, PlanFeed((JoinedFeed(1, 3),))),
    ("span has 30 steps", {"last_step": 30}, PlanFeed()),
    ("no span", {"last_step": 0}, PlanFeed()),
    ("not in the decode batch", {"appended": ((1, (5,)),)}, PlanFeed()),
    ("block outside", {"appended": ((0, (-1,)),)}, PlanFeed()),
    ("feed's chunks", {"chunks": (Chunk(1, 0, 2, True, (9,)),)}, PlanFeed()),
    (
        "more than one step",
        {"chunks": (Chunk(1, 0, 1, True, (9,)),), "last_step": 2},
        PlanFeed((), (ChunkFeed(1, (3,)),)),
    ),
    ("but decodes", {"chunks": (Chunk(0, 0, 1, True, (9,)),)}, PlanFeed((), (ChunkFeed(0, (3,)),))),
    ("its feed has 1", {"chunks": (Chunk(1, 0, 2, True, (9,)),)}, PlanFeed((), (ChunkFeed(1, (3,)),))),
    ("exceeds its blocks", {"chunks": (Chunk(1, 3, 2, True, (9,)),)}, PlanFeed((), (ChunkFeed(1, (3, 4)),))),
    ("token id outside", {"chunks": (Chunk(1, 0, 1, True, (9,)),)}, PlanFeed((), (ChunkFeed(1, (-1,)),))),
    (
        "beam_width 4 is not supported; allowed: 1",
        {"chunks": (Chunk(1, 0, 1, True, (9,)),)},
        PlanFeed((), (ChunkFeed(1, (3,), SamplingConfig(beam_width=4)),)),
    ),
]


@pytest.mark.parametrize(("why", "change", "feed"), BAD_PLANS)
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(
    why: str, change: dict[str, Any], feed: PlanFeed
) -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 6)
    engine = make_engine(shape)
    script = Script([engine])
    script.prefill(0, text, 16, 24)
    script.run(joined=[0], num_steps=2)
    plan: dict[str, Any] = {"plan": 9, "epoch": 9, "first_step": 1, "last_step": 1, "num_decodes": 1} | change
    with pytest.raises(EngineError, match=why):
        engine.begin(RunSteps(**plan), feed)
    assert engine.num_decodes == 1
    script.run(num_steps=3)
    assert script.tokens[0] == expected


def test_a_step_without_a_plan_is_refused() -> None:
    engine = make_engine(SHAPES["llama"])
    with pytest.raises(EngineError, match="no plan"):
        engine.step()
    Script([engine]).generate(0, (1, 2, 3), 2)
    with pytest.raises(EngineError, match="no step is left"):
        engine.step()


def test_pages_of_another_rank_are_refused() -> None:
    shape = SHAPES["llama"]
    place, other = Place.of(shape, 2, 1, 0), Place.of(shape, 2, 1, 1)
    pages = KvPages(other.layout, other.rank, 4, BLOCK)
    with pytest.raises(ValueError, match="do not belong together"):
        Engine(shape, random_weights(place, 3), place, pages, SingleRank())


def test_a_feed_survives_the_wire() -> None:
    feed = PlanFeed((JoinedFeed(3, None), JoinedFeed(4, 7)), (ChunkFeed(5, (1, 2), SamplingConfig(0.7, 3, 0.9, 1)),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(feed), type=PlanFeed) == feed


def test_blocks_appended_for_steps_that_a_cut_span_did_not_run_are_given_up() -> None:
    shape = SHAPES["llama"]
    (text,) = prompts(shape, [9])
    expected = Script([make_engine(shape)]).generate(0, text, 9)
    engine = make_engine(shape)
    script = Script([engine])
    script.prefill(0, text, 16, len(text))
    size = engine._pages.tokens_per_block
    ahead = tuple(range(2, 2 + 3 * size))  # far more than is needed, in ids that the script has not handed out
    elsewhere = tuple(range(40, 44))
    tokens = list(script.tokens[0])
    run = RunSteps(
        10, 10, 1, 40, joined=(Joined(0, len(text), script.blocks[0]),), appended=((0, ahead),), num_decodes=1
    )
    engine.begin(run, PlanFeed((JoinedFeed(0, tokens[-1]),)))
    tokens += [token for _ in range(3) for _, token in engine.step()]
    # the span ends here; the core has taken `ahead` back but for what was written to, and appends other blocks
    engine.begin(RunSteps(11, 11, 1, 5, appended=((0, elsewhere),), num_decodes=1, num_kv_tokens=len(text) + 3))
    written = -(-(len(text) + 3) // size)
    assert engine._batch[0].blocks[written:] == list(elsewhere)
    tokens += [token for _ in range(5) for _, token in engine.step()]
    assert tokens == expected
