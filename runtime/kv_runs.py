"""The contiguous runs of a KV copy, for copy engines, which want few large copies instead of many rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kv_places import KvCopy, KvPlace

Runs = tuple[Any, Any, Any]  # int64 [runs] each: addresses of the source, of the destination, bytes


def runs_of(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> Runs:
    """`copy` in as few runs as there are; neighbouring block ids at both ends make one. A packed place has no blocks."""
    row = copy.row_bytes
    source = _rows(copy.source, copy, source_blocks)
    destination = _rows(copy.destination, copy, destination_blocks)
    order = np.argsort(source, kind="stable")
    source, destination = source[order], destination[order]
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(source) != row) | (np.diff(destination) != row))))
    sizes = np.diff(np.append(starts, len(source))) * row
    offsets = [_planes(place, copy) for place in (copy.source, copy.destination)]
    addresses = [
        (plane[:, None] + rows[starts][None, :]).reshape(-1)
        for plane, rows in zip(offsets, (source, destination), strict=True)
    ]
    return addresses[0], addresses[1], np.tile(sizes, len(offsets[0]))


def _rows(place: KvPlace, copy: KvCopy, blocks: Sequence[int]) -> Any:
    """Offsets of the rows [heads, tokens], flat, in one plane of one layer and K or V."""
    token = np.arange(copy.num_tokens, dtype=np.int64) + place.first_token
    within = token % place.tokens_per_block * copy.row_bytes
    if place.block_bytes:
        within += np.asarray(blocks, dtype=np.int64)[token // place.tokens_per_block] * place.block_bytes
    head = np.arange(copy.num_heads, dtype=np.int64) * place.head_bytes
    return (head[:, None] + within[None, :]).reshape(-1)


def _planes(place: KvPlace, copy: KvCopy) -> Any:
    layer = np.arange(copy.num_layers, dtype=np.int64) * place.layer_bytes
    kv = np.arange(2, dtype=np.int64) * place.kv_bytes
    return (place.address + layer[:, None] + kv[None, :]).reshape(-1)


def copy_in_host_memory(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> None:
    """Carry `copy` out where all of it is this process's own memory."""
    for source, destination, size in zip(*runs_of(copy, source_blocks, destination_blocks), strict=True):
        ctypes.memmove(int(destination), int(source), int(size))
