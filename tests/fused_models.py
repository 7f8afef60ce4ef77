"""Engines with the fused kernels: on a GPU as they are, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from disagg.core.model_shapes import ModelShape, RopeScaling
from disagg.runtime.collectives import Collectives, SingleRank
from disagg.runtime.engine import Engine
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.model_place import Place
from disagg.runtime.weights import ModelWeights, random_weights

pytest.importorskip("triton", reason="triton is not installed")

BLOCK = 4


def _small(name: str, architecture: str, **more: object) -> ModelShape:
    sizes: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 38,
        "vocab_size": 101,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    return ModelShape(name, architecture, **(sizes | more))  # type: ignore[arg-type]


SHAPES = {
    "llama": _small("llama", "LlamaForCausalLM", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    "qwen2": _small("qwen2", "Qwen2ForCausalLM", attention_bias=True, tie_word_embeddings=True),
    "qwen3": _small("qwen3", "Qwen3ForCausalLM", qk_norm=True, num_attention_heads=6, num_kv_heads=2),
    "mistral": _small("mistral", "MistralForCausalLM", sliding_window=9, num_kv_heads=1),
}


def fused_engine(
    shape: ModelShape,
    weights: ModelWeights | None = None,
    *,
    place: Place | None = None,
    collectives: Collectives | None = None,
    num_blocks: int = 64,
    tokens_per_block: int = BLOCK,
    max_batch: int = 8,
    max_num_tokens: int = 64,
    record_margins: bool = False,
    device: str = "cpu",
    warm: bool | None = None,
    chunk_decodes: tuple[int, ...] = (),
) -> Engine:
    """An engine of one rank whose stepper is the fused one. `warm`: run each kernel first; by default on a GPU."""
    from disagg.runtime.fused_stepper import FusedStepper

    place = Place.of(shape) if place is None else place
    pages = KvPages(place.layout, place.rank, num_blocks, tokens_per_block, device)
    weights = random_weights(place, 3, device) if weights is None else weights
    collectives = SingleRank() if collectives is None else collectives
    stepper = FusedStepper(
        place,
        weights,
        pages,
        collectives,
        torch.device(device),
        max_batch,
        max_num_tokens,
        record_margins=record_margins,
        chunk_decodes=chunk_decodes,
    )
    if device != "cpu" if warm is None else warm:
        stepper.warm_up()
    return Engine(shape, weights, place, pages, collectives, device, stepper=stepper, record_margins=record_margins)
