"""From logits to tokens. Chance comes from (seed, position in the sequence) alone, never from the batch around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..policies.vocabulary import SamplingConfig

GREEDY: Final = SamplingConfig()
_MASK: Final = (1 << 64) - 1


class SamplingError(ValueError):
    """A sampling configuration that cannot be served."""


def check_sampling(config: SamplingConfig) -> SamplingConfig:
    """`config` itself; SamplingError says what is allowed."""
    if config.beam_width != 1:
        raise SamplingError(f"beam_width {config.beam_width} is not supported; allowed: 1")
    if not 0 <= config.temperature < math.inf:
        raise SamplingError(f"temperature {config.temperature} must be 0 (greedy) or a positive number")
    if config.top_k < 0:
        raise SamplingError(f"top_k {config.top_k} must be 0 (all tokens) or positive")
    if not 0 < config.top_p <= 1:
        raise SamplingError(f"top_p {config.top_p} must lie in (0, 1]")
    return config


def sample(logits: Tensor, configs: Sequence[SamplingConfig], positions: Sequence[int]) -> Tensor:
    """One token per row: int64 [rows] from float32 `logits` [rows, vocab].

    `positions`: index in its sequence of the token to be drawn. Temperature 0 is the argmax. Otherwise temperature,
    then top-k, then the smallest set of likeliest tokens that holds top-p of the rest; the draw inverts the
    distribution in order of falling probability.
    """
    tokens = logits.argmax(dim=-1)
    for row, (config, position) in enumerate(zip(configs, positions, strict=True)):
        if config.temperature > 0:
            tokens[row] = _draw(logits[row], config, _uniform(config.seed, position))
    return tokens


def margins(logits: Tensor) -> list[float]:
    """The greatest logit minus the second, per row: how far a greedy choice is from a tie."""
    top = logits.topk(2, dim=-1).values
    return [float(margin) for margin in (top[:, 0] - top[:, 1]).tolist()]


def _draw(logits: Tensor, config: SamplingConfig, u: float) -> Tensor:
    ordered, ids = logits.double().sort(descending=True, stable=True)
    if config.top_k:
        ordered, ids = ordered[: config.top_k], ids[: config.top_k]
    # The greatest is taken off first, or a tiny temperature would overflow.
    probabilities = torch.softmax((ordered - ordered[0]) / config.temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if config.top_p < 1:
        kept = int((cumulative - probabilities < config.top_p).sum())
        cumulative = cumulative[:kept]
    target = cumulative[-1:] * u
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=len(cumulative) - 1)
    return ids[index[0]]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1): two rounds of SplitMix64, whose output is fit to seed another."""
    mixed = _splitmix((_splitmix(seed & _MASK) + position) & _MASK)
    return float((mixed >> 11) * 2.0**-53)


def _splitmix(state: int) -> int:
    """SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
