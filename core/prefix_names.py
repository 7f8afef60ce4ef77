"""Names of KV blocks, from the tokens in them: whoever knows tokens can say which blocks are equal."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np

# A name of a block, or its number, that is passed on and looked up, not computed with. It is an int; said to be any object, a
# compiled caller passes the very object on, where it would unbox it and make another, which a dictionary finds more slowly.
Name: TypeAlias = Any


def token_hashes(token_ids: Sequence[int], tokens_per_block: int, before: int = 0) -> tuple[int, ...]:
    """Hashes of 63 bits of the full blocks of `token_ids`, each chained to the one before it.

    `before`: the hash of the block that ends where these tokens begin; 0 where a prompt begins.
    """
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    size = 4 * tokens_per_block
    found = []
    for end in range(size, len(data) + 1, size):
        digest = blake2b(before.to_bytes(8) + data[end - size : end], digest_size=8).digest()
        before = int.from_bytes(digest) >> 1
        found.append(before)
    return tuple(found)
