"""The contiguous runs of a KV copy, for copy engines, which want few large copies instead of many rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kv_places import PACKED, KvCopy, KvPlace

Runs = tuple[Any, Any, Any]  # int64 [runs] each: addresses of the source, of the destination, bytes


def runs_of(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> Runs:
    """`copy` in as few runs as there are; neighbouring block ids at both ends make one. A packed place has no blocks.

    Where blocks are of one size at both ends, they are copied whole: the rows of the first and the last that were not
    asked for are either the same at both ends already, or nothing yet.
    """
    source, destination, count = _stretches(copy)
    row = copy.row_bytes
    starts = [
        _offsets(place, tokens, blocks, row)
        for place, tokens, blocks in (
            (copy.source, source, source_blocks),
            (copy.destination, destination, destination_blocks),
        )
    ]
    sizes = count * row
    # From the inside out: a dimension whose stride is what one run holds, at both ends, makes longer runs, not more.
    for num, strides in (
        (copy.num_heads, (copy.source.head_bytes, copy.destination.head_bytes)),
        (2, (copy.source.kv_bytes, copy.destination.kv_bytes)),
        (copy.num_layers, (copy.source.layer_bytes, copy.destination.layer_bytes)),
    ):
        starts, sizes = _widened(starts, sizes, num, strides)
    starts, sizes = _joined(starts, sizes)
    return starts[0] + copy.source.address, starts[1] + copy.destination.address, sizes


def _stretches(copy: KvCopy) -> tuple[Any, Any, Any]:
    """The copy's tokens cut at both ends' block bounds: first token at the source, at the destination, tokens."""
    ends = (copy.source, copy.destination)
    first = [place.first_token for place in ends]
    sizes = [place.tokens_per_block for place in ends]
    num = copy.num_tokens
    if sizes[0] == sizes[1] != PACKED and (first[0] - first[1]) % sizes[0] == 0:
        skipped = first[0] % sizes[0]
        first = [each - skipped for each in first]
        num = -(-(num + skipped) // sizes[0]) * sizes[0]
    bounds = [np.arange(-start % size, num, size, dtype=np.int64) for start, size in zip(first, sizes, strict=True)]
    at = np.unique(np.concatenate(([0], *bounds)))
    return at + first[0], at + first[1], np.diff(np.append(at, num))


def _offsets(place: KvPlace, tokens: Any, blocks: Sequence[int], row: int) -> Any:
    within = tokens % place.tokens_per_block * row
    if place.block_bytes:
        within = within + np.asarray(blocks, dtype=np.int64)[tokens // place.tokens_per_block] * place.block_bytes
    return within


def _widened(starts: list[Any], sizes: Any, num: int, strides: tuple[int, int]) -> tuple[list[Any], Any]:
    """The same runs `num` times, `strides` apart; in one where nothing lies between them."""
    if num == 1 or bool(np.all(sizes == strides[0])) and strides[0] == strides[1]:
        return starts, sizes * num
    steps = np.arange(num, dtype=np.int64)
    return [
        (each[:, None] + (steps * stride)[None, :]).reshape(-1) for each, stride in zip(starts, strides, strict=True)
    ], np.repeat(sizes, num)


def _joined(starts: list[Any], sizes: Any) -> tuple[list[Any], Any]:
    """Runs that follow each other at both ends become one."""
    order = np.argsort(starts[0], kind="stable")
    source, destination, sizes = starts[0][order], starts[1][order], sizes[order]
    apart = (np.diff(source) != sizes[:-1]) | (np.diff(destination) != sizes[:-1])
    first = np.flatnonzero(np.concatenate(([True], apart)))
    return [source[first], destination[first]], np.add.reduceat(sizes, first)


def copy_in_host_memory(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> None:
    """Carry `copy` out where all of it is this process's own memory."""
    for source, destination, size in zip(*runs_of(copy, source_blocks, destination_blocks), strict=True):
        ctypes.memmove(int(destination), int(source), int(size))
