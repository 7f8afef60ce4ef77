"""The same engine with another device string."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.model_place import Place
from disagg.runtime.weights import load_weights, write_random_checkpoint
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
