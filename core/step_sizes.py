"""The sizes at which the GPU engine runs its steps: what it runs, and what its cost is a function of."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

ROW_MULTIPLE: Final = (
    128  # of the rows of a step with chunks: the tile of the matrix products, which take no less for less
)


def padded_rows(rows: int, multiple: int = ROW_MULTIPLE) -> int:
    """Rows of a step with chunks as the device runs them: up to `multiple` as they are, above it a multiple."""
    return rows if rows <= multiple else -(-rows // multiple) * multiple


def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """Decode batch sizes that have a graph; a batch runs as the next larger one.

    Small steps where padding would cost most, at most an eighth of padding later.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, max_batch + 64, 64)]
    return (*(size for size in sizes if size < max_batch), max_batch)


CHUNK_SLOTS: Final = 32  # prompts that a graph of a step with chunks has room for; a power of two
# Above, a device is busy anyway. 448 is not among them: on an H200 cuBLAS takes 15.7 ms for it, and 12.8 for 512.
CHUNK_GRAPH_ROWS: Final[tuple[int, ...]] = (64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024)


def chunk_graph_decodes(max_batch: int) -> tuple[int, ...]:
    """How many decodes the graphs of steps with chunks have room for, beside those without any."""
    sizes = [8]
    while sizes[-1] < max_batch:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], max_batch)


def chunk_graph(num_decodes: int, num_chunks: int, num_tokens: int, max_batch: int) -> tuple[int, int] | None:
    """(decodes, rows in all) of the graph that runs a step of so many decodes, chunks and tokens of chunks.

    None where it runs kernel by kernel.
    """
    if num_chunks > CHUNK_SLOTS:
        return None
    room = 0
    if num_decodes:
        sizes = chunk_graph_decodes(max_batch)
        at = bisect_left(sizes, num_decodes)
        if at == len(sizes):
            return None
        room = sizes[at]
    at = bisect_left(CHUNK_GRAPH_ROWS, room + num_tokens)
    return (room, CHUNK_GRAPH_ROWS[at]) if at < len(CHUNK_GRAPH_ROWS) else None
