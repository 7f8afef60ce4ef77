"""The same engine with another device string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.core.model_shapes import ModelShape
from disagg.core.step_sizes import chunk_graph_decodes
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.chunk_graphs import ChunkGraphs
from disagg.runtime.model_place import Place
from disagg.runtime.weights import load_weights, write_random_checkpoint
from tests.fused_models import fused_engine
from tests.tiny_models import MIN_MARGIN, SHAPES, Script, make_engine, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_and_margins_on_cuda_equal_those_on_the_cpu(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = write_random_checkpoint(tmp_path, shape, seed=3)
    tokens, margins = [], []
    for device in ("cpu", "cuda"):
        weights = load_weights(folder, Place.of(shape), device)
        engine = make_engine(shape, weights, record_margins=True, device=device)
        script = Script([engine])
        for request, text in enumerate(prompts(shape, [9, 14], seed=8)):
            script.prefill(request, text, 5, len(text) + 24)
            script.run(joined=[request], num_steps=4)
        script.run(num_steps=6)
        tokens.append(script.tokens)
        margins.append([margin for _, margin in engine.margins])
    assert min(margins[0]) > MIN_MARGIN
    assert tokens[1] == tokens[0]
    assert margins[1] == pytest.approx(margins[0], abs=2e-4)


def test_sampling_and_half_precision_run_on_cuda() -> None:
    hot = SamplingConfig(temperature=1.2, top_k=40, top_p=0.95, seed=11)
    script = Script([make_engine(SHAPES["llama"], device="cuda")])
    script.prefill(0, (1, 2, 3, 4, 5), 2, 30, sampling=hot)
    script.run(joined=[0], num_steps=10, sampling=hot)
    assert len(script.tokens[0]) == 11


def test_pages_travel_between_devices_with_their_checksums() -> None:
    shape = SHAPES["llama"]
    text = prompts(shape, [9])[0]
    context, generation = make_engine(shape, device="cuda"), make_engine(shape)
    script = Script([context])
    script.prefill(0, text, 16, len(text))
    source, target = context._pages, generation._pages
    target.unpack(
        source.pack(script.blocks[0], 9, source.layers, source.heads), [3, 1, 2], 9, source.layers, source.heads
    )
    sent = source.checksums(script.blocks[0], 9, source.layers, source.heads)
    assert torch.equal(sent, target.checksums([3, 1, 2], 9, source.layers, source.heads))


HALF = ModelShape(
    "half",
    "LlamaForCausalLM",
    num_layers=3,
    hidden_size=512,
    num_attention_heads=8,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    vocab_size=1000,
    max_position_embeddings=2048,
    dtype="bfloat16",
)


def test_steps_with_short_prompts_write_and_say_in_graphs_what_they_do_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[tuple[int, int]] = []
    step = ChunkGraphs.step

    def counted(self: ChunkGraphs, key: tuple[int, int], *args: Any) -> Any:
        used.append(key)
        return step(self, key, *args)

    monkeypatch.setattr(ChunkGraphs, "step", counted)
    asked = prompts(HALF, [5, 60, 90, 33, 400, 7], seed=2)
    pools, said, margins = [], [], []
    for decodes in ((), (0, *chunk_graph_decodes(16))):
        engine = fused_engine(
            HALF,
            num_blocks=128,
            tokens_per_block=16,
            max_batch=16,
            max_num_tokens=512,
            record_margins=True,
            device="cuda",
            chunk_decodes=decodes,
        )
        engine._pages.pool.zero_()  # the warm-up has written block 0
        script = Script([engine], tokens_per_block=16)
        for request, prompt in enumerate(asked):
            script.reserve(request, len(prompt) + 8)
        script.run(chunks=[(i, 0, asked[i], True) for i in (0, 1, 2)])  # several at once
        script.run(joined=[0, 1, 2], chunks=[(3, 0, asked[3], True)])  # beside three decodes
        script.run(joined=[3], chunks=[(4, 0, asked[4][:300], False)])  # one that yields nothing yet
        script.run(chunks=[(4, 300, asked[4][300:], True)])  # behind KV
        script.run(joined=[4], chunks=[(5, 0, asked[5], True)])
        pools.append(engine._pages.pool.clone())
        said.append(script.tokens)
        margins.append(engine.margins)
    assert used == [(0, 192), (8, 64), (8, 320), (8, 128), (8, 64)]
    torch.testing.assert_close(pools[1], pools[0], atol=0.06, rtol=0.06)
    for request in said[0]:
        lists = [[margin for who, margin in found if who == request] for found in margins]
        for a, b, *least in zip(said[0][request], said[1][request], *lists, strict=True):
            assert a == b or min(least) < 0.1, f"request {request}: {a} or {b} with margins {least}"
            if a != b:
                break  # what follows is another text
