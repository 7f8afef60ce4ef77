"""What a user would otherwise take: transformers' `generate` on the same shape, as a reference and not as a goal."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from ..core.model_shapes import PRESETS, ModelError, hf_config
from .bench_rows import BenchRow

BATCH: Final = 64
PROMPT_TOKENS: Final = 1024
NEW_TOKENS: Final = 32


class ReferenceMissing(RuntimeError):
    """Why there is nothing to compare with here."""


def run_reference_bench(
    model: str,
    device: str = "cuda",
    *,
    batch: int = BATCH,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 1,
) -> list[BenchRow]:
    """Rows of prefill, decode step and output rate of `batch` prompts at once, random weights.

    Raises ModelError for an unknown model, ReferenceMissing without transformers or without a GPU's memory for it.
    """
    if model not in PRESETS:
        raise ModelError(f"model {model!r} is unknown; allowed: {', '.join(PRESETS)}")
    if new_tokens < 2:
        raise ValueError(f"new_tokens {new_tokens}: allowed: 2 or more, so that there is a step after the first token")
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ReferenceMissing(f"transformers cannot be imported: {error}") from error
    models: Any = AutoModelForCausalLM
    shape = PRESETS[model]
    place = torch.device(device if device != "cuda" else "cuda:0")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(shape.dtype, torch.float32)
    with tempfile.TemporaryDirectory(prefix="disagg-reference-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(shape)))
        config: Any = AutoConfig.from_pretrained(folder)
    try:
        with place:
            network = models.from_config(config, dtype=dtype, attn_implementation="sdpa")
        network.train(False)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, shape.vocab_size, (batch, prompt_tokens), generator=generator).to(place)
        _generate(network, prompts[:, :16], 2)  # kernels are chosen
        first = statistics.median(_generate(network, prompts, 1) for _ in range(repeats))
        whole = statistics.median(_generate(network, prompts, new_tokens) for _ in range(repeats))
    except torch.cuda.OutOfMemoryError as error:
        raise ReferenceMissing(f"no memory for it on {place}: {str(error).partition('.')[0]}") from error
    step = (whole - first) / (new_tokens - 1)
    what = f"batch {batch}, prompt {prompt_tokens}"
    name = f"transformers {transformers.__version__} generate"
    return [
        BenchRow(f"{name}: prefill, {what}", first * 1e3, unit="ms", note="a reference, not a goal"),
        BenchRow(
            f"{name}: decode step, {what}, {new_tokens} new tokens", step * 1e3, unit="ms", note=f"whole {whole:.2f} s"
        ),
        BenchRow(f"{name}: output rate, {what}, {new_tokens} new tokens", batch * new_tokens / whole, unit="tokens/s"),
    ]


def _generate(network: Any, prompts: torch.Tensor, new_tokens: int) -> float:
    """Seconds of greedy generation of exactly so many tokens."""
    _settle(prompts.device)
    start = time.perf_counter()
    with torch.inference_mode():
        network.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    _settle(prompts.device)
    return time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
