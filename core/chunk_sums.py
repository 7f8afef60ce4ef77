"""What the chunks of one step come to: the sums that its cost is a function of."""

from __future__ import annotations

from collections.abc import Sequence


def chunk_sums(chunks: Sequence[tuple[int, int, bool]]) -> tuple[int, int, int, int, int]:
    """Tokens of the chunks, their (query, key) pairs, tokens cached before them, in all and the most before one of them,
    tokens that they yield.
    """
    tokens, pairs, cached, longest, sampled = 0, 0, 0, 0, 0
    for before, length, yields in chunks:
        tokens += length
        pairs += chunk_pairs(before, length)
        cached += before
        if before > longest:
            longest = before
        sampled += yields
    return tokens, pairs, cached, longest, sampled


def chunk_pairs(before: int, length: int) -> int:
    """(query, key) pairs that causal attention computes for a chunk of `length` tokens behind `before` others."""
    return length * before + length * (length + 1) // 2
