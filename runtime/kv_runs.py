"""The contiguous runs of a KV copy, for copy engines, which want few large copies instead of many rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .kv_places import PACKED, KvCopy

Run = tuple[int, int, int]  # address of the source, of the destination, bytes


def runs_of(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> Iterator[Run]:
    """`copy` in as few runs as there are; neighbouring block ids at both ends make one. A packed place has no blocks.

    Where blocks are of one size at both ends, they are copied whole: the rows of the first and the last that were not
    asked for are either the same at both ends already, or nothing yet. Worked out as they are taken, so that the first
    can be on its way before the last is known.
    """
    if (size := _block_run(copy)) is not None:
        return _runs_of_blocks(copy, source_blocks, destination_blocks, size)
    return _runs_of_rows(copy, source_blocks, destination_blocks)


def _runs_of_rows(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> Iterator[Run]:
    starts, sizes = _starts(copy, source_blocks, destination_blocks)
    # From the inside out: a dimension whose stride is what one run holds, at both ends, makes longer runs, not more.
    for num, strides in _dimensions(copy):
        starts, sizes = _widened(starts, sizes, num, strides)
    starts, sizes = _joined(starts, sizes)
    found = (starts[0] + copy.source.address, starts[1] + copy.destination.address, sizes)
    return zip(*(each.tolist() for each in found), strict=True)


def run_bytes(copy: KvCopy) -> int:
    """Bytes of one run of `runs_of` inside a block, where nothing is known of which blocks they are."""
    source, destination = copy.source, copy.destination
    size = min(source.tokens_per_block, destination.tokens_per_block, copy.num_tokens) * copy.row_bytes
    if _are_alike(copy) and source.tokens_per_block != PACKED:
        size = source.tokens_per_block * copy.row_bytes
    for num, strides in _dimensions(copy):
        if num > 1 and strides != (size, size):
            break
        size *= num
    return size


def _block_run(copy: KvCopy) -> int | None:
    """Bytes of the one run that `copy` has in each block; None where it has several, or cuts blocks."""
    if not _are_alike(copy) or copy.source.tokens_per_block == PACKED:
        return None
    size = copy.source.tokens_per_block * copy.row_bytes
    for num, strides in _dimensions(copy):
        if num > 1 and strides != (size, size):
            return None
        size *= num
    return size


def _runs_of_blocks(
    copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int], size: int
) -> Iterator[Run]:
    """The same without arrays, whose machinery a transfer would find in cold caches."""
    source, destination = copy.source, copy.destination
    tokens = source.tokens_per_block
    num = -(-(copy.num_tokens + source.first_token % tokens) // tokens)
    first, into = source.first_token // tokens, destination.first_token // tokens
    step, stride = source.block_bytes, destination.block_bytes
    start = goal = length = 0
    for one, other in zip(source_blocks[first : first + num], destination_blocks[into : into + num], strict=True):
        at, to = source.address + one * step, destination.address + other * stride
        if length:  # neighbours at both ends, in either direction: fresh blocks are given out last one first
            if at == start + length and to == goal + length:
                length += size
                continue
            if at == start - size and to == goal - size:
                start, goal, length = at, to, length + size
                continue
            yield start, goal, length
        start, goal, length = at, to, size
    if length:
        yield start, goal, length


def _dimensions(copy: KvCopy) -> tuple[tuple[int, tuple[int, int]], ...]:
    """(how many, how far apart at the source and at the destination), from the inside out."""
    source, destination = copy.source, copy.destination
    return (
        (copy.num_heads, (source.head_bytes, destination.head_bytes)),
        (2, (source.kv_bytes, destination.kv_bytes)),
        (copy.num_layers, (source.layer_bytes, destination.layer_bytes)),
    )


def _are_alike(copy: KvCopy) -> bool:
    """Whether token t lies at the same place in its block at both ends."""
    source, destination = copy.source, copy.destination
    size = source.tokens_per_block
    return size == destination.tokens_per_block and (source.first_token - destination.first_token) % size == 0


def _starts(copy: KvCopy, source_blocks: Sequence[int], destination_blocks: Sequence[int]) -> tuple[list[Any], Any]:
    """Where the rows of the first head of the first K begin, cut at both ends' block bounds, and the bytes of each cut."""
    places, row = (copy.source, copy.destination), copy.row_bytes
    tables = [np.asarray(blocks, dtype=np.int64) for blocks in (source_blocks, destination_blocks)]
    size = copy.source.tokens_per_block
    if _are_alike(copy) and size != PACKED:
        num = -(-(copy.num_tokens + copy.source.first_token % size) // size)
        first = [place.first_token // size for place in places]
        starts = [table[at : at + num] * p.block_bytes for table, at, p in zip(tables, first, places, strict=True)]
        return starts, np.full(num, size * row, dtype=np.int64)
    bounds = [np.arange(-p.first_token % p.tokens_per_block, copy.num_tokens, p.tokens_per_block) for p in places]
    at = np.unique(np.concatenate(([0], *bounds))).astype(np.int64)
    starts = []
    for place, table in zip(places, tables, strict=True):
        token = at + place.first_token
        within = token % place.tokens_per_block * row
        starts.append(within + table[token // place.tokens_per_block] * place.block_bytes if len(table) else within)
    return starts, np.diff(np.append(at, copy.num_tokens)) * row


def _widened(starts: list[Any], sizes: Any, num: int, strides: tuple[int, int]) -> tuple[list[Any], Any]:
    """The same runs `num` times, `strides` apart; in one where nothing lies between them."""
    if num == 1 or (bool(np.all(sizes == strides[0])) and strides[0] == strides[1]):
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
    for source, destination, size in runs_of(copy, source_blocks, destination_blocks):
        ctypes.memmove(destination, source, size)
