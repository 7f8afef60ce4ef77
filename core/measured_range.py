"""How far the measurements behind a profile went."""

from __future__ import annotations

from msgspec import Struct


class Measured(Struct, frozen=True):
    """The largest of each feature, of decode steps and of steps with chunks."""

    decodes: int = 0
    kv_tokens: int = 0
    rows: int = 0  # of steps with chunks, padded
    chunks: int = 0
    pairs: int = 0
    cached_tokens: int = 0
    mixed_decodes: int = 0
    mixed_kv_tokens: int = 0
