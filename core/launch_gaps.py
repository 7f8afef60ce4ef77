"""What lies between two plans, of what was measured: what the first step of the second takes longer."""

from __future__ import annotations

from .overheads import LaunchGaps


def gap_of(
    gaps: LaunchGaps,
    before: str,
    has_chunks: bool,
    num_joined: int,
    num_left: int,
    num_decodes: int,
    by_kernels: bool = False,
) -> int:
    """Picoseconds. `before`: idle, decode or chunk, what ran before the step, which has `num_decodes` decodes, of which
    `num_joined` are new; `num_left` are gone since. `by_kernels`: the step has chunks, and no graph runs it.
    """
    if has_chunks:
        if before == "decode":
            return gaps.chunk_after_decode
        gap = gaps.kernels if by_kernels else 0
        if before == "idle":
            return gap + gaps.chunk_after_idle
        return gap + gaps.chunk_after_chunk + (gaps.decodes_after_chunk if num_decodes else 0)
    gap = gaps.joined * num_joined + gaps.left * num_left
    if before == "decode":
        return gap + gaps.decode_after_decode
    if before == "chunk":
        return gap + gaps.decode_after_chunk + gaps.sequence_after_chunk * num_decodes
    return gap + gaps.decode_after_idle
