"""Prompts made of named parts: what they share with each other, as hashes of blocks and as token ids.

A part has an id and a number of tokens; equal ids are equal tokens. Two prompts share a prefix exactly as far as their
parts agree, whatever the block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

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
    chain, at = 0, 0  # the name of all parts so far, and their tokens
    begun = 0  # blocks whose last token lies in a part before
    values = np.arange(tokens_per_block, (num_blocks + 1) * tokens_per_block, tokens_per_block, dtype=np.uint64)
    for part in segments:
        chain = segment_id(chain, part.id, at)
        at += part.num_tokens
        over = at // tokens_per_block
        values[begun:over] += np.uint64(chain)
        begun = over
    return mixed_hashes(values)


_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(1))
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mixed_hashes(values: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    """Well mixed hashes of 63 bits: splitmix64's finaliser, a bijection."""
    mixed = values ^ (values >> _SHIFTS[0])
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    mixed >>= _SHIFTS[3]
    return tuple(mixed.tolist())
