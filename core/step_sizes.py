"""The sizes at which the GPU engine runs its steps: what it runs, and what its cost is a function of."""

from __future__ import annotations

from typing import Final

ROW_MULTIPLE: Final = 64  # of the rows of a step with chunks


def padded_rows(rows: int, multiple: int = ROW_MULTIPLE) -> int:
    """Rows of a step with chunks as the device runs them: up to `multiple` as they are, above it a multiple."""
    return rows if rows <= multiple else -(-rows // multiple) * multiple


def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """Decode batch sizes that have a graph; a batch runs as the next larger one.

    Small steps where padding would cost most, at most an eighth of padding later.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, max_batch + 64, 64)]
    return (*(size for size in sizes if size < max_batch), max_batch)
