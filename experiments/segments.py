"""Prompts made of named parts: what they share with each other, as hashes of blocks and as token ids.

A part has an id and a number of tokens; equal ids are equal tokens. Two prompts share a prefix exactly as far as their
parts agree, whatever the block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Segment(NamedTuple):
    id: int  # of 63 bits
    num_tokens: int


def segment_id(*names: str | int) -> int:
    """63 bits that name a part."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def segment_hashes(segments: Sequence[Segment], num_prompt_tokens: int, tokens_per_block: int) -> tuple[int, ...]:
    """Hashes of the prompt's full blocks, each naming the whole prefix up to its end; a partial last block has none."""
    num_blocks = min(num_prompt_tokens, sum(part.num_tokens for part in segments)) // tokens_per_block
    if num_blocks == 0:
        return ()
    chain, at = 0, 0
    chains: list[int] = []  # names of all parts up to each
    bounds: list[int] = []  # tokens up to the end of each
    for part in segments:
        chain = segment_id(chain, part.id, at)
        at += part.num_tokens
        chains.append(chain)
        bounds.append(at)
    ends = np.arange(1, num_blocks + 1, dtype=np.int64) * tokens_per_block
    parts = np.searchsorted(np.asarray(bounds), ends, side="left")  # that hold the last token of each block
    return mixed_hashes(np.asarray(chains, dtype=np.uint64)[parts] + ends.astype(np.uint64))


def mixed_hashes(values: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    """Well mixed hashes of 63 bits: splitmix64's finaliser, a bijection."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return tuple((mixed >> np.uint64(1)).tolist())
