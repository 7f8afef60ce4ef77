"""Named streams of chance: the same seed and name give the same draws, whatever else a run draws."""

from __future__ import annotations

from hashlib import sha256

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for (`seed`, names). Streams of different names are independent of each other.

    Policies compared under one seed therefore see common random numbers, and a longer warm-up shifts no other phase.
    """
    text = "/".join(str(name) for name in names)
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([seed, int.from_bytes(sha256(text.encode()).digest()[:16])]))
    )


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of repeat `repeat` (from 0): repeat 0 keeps the experiment's own."""
    return (seed + repeat) % (1 << 63)
