"""Batch policies: what one step of an executor computes."""

from __future__ import annotations

from .interfaces import BatchPolicy, BatchView
from .registry import register
from .vocabulary import BatchPlan, ChunkPlan

_DECODES_ONLY = BatchPlan()


def _fill(batch: BatchView, budget: int) -> tuple[ChunkPlan, ...]:
    """Begun prefills oldest first, then waiting prompts, head of the line first, into `budget` tokens."""
    chunks: list[ChunkPlan] = []
    for prompt in batch.begun:
        if budget <= 0:
            return tuple(chunks)
        length = min(prompt.num_tokens_left, budget)
        chunks.append(ChunkPlan(prompt.request_id, length))
        budget -= length
    slots, blocks = batch.num_free_slots, batch.num_free_blocks
    if budget <= 0 or slots <= 0:
        return tuple(chunks)
    for prompt in batch.waiting:
        if prompt.num_blocks > blocks or (not batch.chunked and prompt.num_tokens_left > budget):
            break
        length = min(prompt.num_tokens_left, budget)
        chunks.append(ChunkPlan(prompt.request_id, length))
        budget -= length
        blocks -= prompt.num_blocks
        slots -= 1
        if budget <= 0 or slots <= 0:
            break
    return tuple(chunks)


@register("chunked_prefill", kind="batching", source="Sarathi-Serve; vLLM; TensorRT-LLM in-flight batching")
class ChunkedPrefill(BatchPolicy):
    """Decodes first, then begun prefills, then new prompts, in a budget of max_num_tokens.

    On a context executor there are no decodes, and this is first come first served with the head of the line blocking:
    while count < max_batch_size, tokens <= max_num_tokens, and the blocks fit (DistServe).
    """

    def plan(self, batch: BatchView) -> BatchPlan:
        chunks = _fill(batch, batch.max_num_tokens - batch.num_decodes)
        return BatchPlan(chunks) if chunks else _DECODES_ONLY


@register("prefill_first", kind="batching", source="Orca; vLLM before chunked prefill")
class PrefillFirst(BatchPolicy):
    """While prompts can run they run alone and decodes wait; otherwise a step of decodes."""

    def plan(self, batch: BatchView) -> BatchPlan:
        chunks = _fill(batch, batch.max_num_tokens)
        return BatchPlan(chunks, decodes=False) if chunks else _DECODES_ONLY
