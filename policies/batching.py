"""Batch policies: what one step of an executor computes."""

from __future__ import annotations

from random import Random

from .interfaces import BatchPolicy, BatchView
from .parameters import whole
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


@register("context_fcfs", kind="batching", source="DistServe; TensorRT-LLM context servers")
class ContextFcfs(BatchPolicy):
    """Whole prompts in queue order while count < max_batch_size, tokens <= `max_tokens`, and their blocks fit.

    The head of the line blocks. Blocks whose KV waits for its reader, or is on its way, are not free: that is the back-pressure
    upon an executor whose readers are slow. `max_tokens` is DistServe's length that saturates the device, by default
    max_num_tokens; a longer prompt runs alone, in chunks if those are on. Decodes, on an executor that has any, run along.
    """

    def __init__(self, *, rng: Random, max_tokens: int | None = None) -> None:
        super().__init__(rng=rng)
        self.max_tokens = None if max_tokens is None else whole("context_fcfs", "max_tokens", max_tokens)

    def plan(self, batch: BatchView) -> BatchPlan:
        room = batch.max_num_tokens - batch.num_decodes
        if batch.begun:  # the rest of a long prompt, by itself
            oldest = batch.begun[0]
            length = min(oldest.num_tokens_left, room)
            return BatchPlan((ChunkPlan(oldest.request_id, length),)) if length > 0 else _DECODES_ONLY
        limit = room if self.max_tokens is None else min(self.max_tokens, room)
        chunks: list[ChunkPlan] = []
        slots, blocks, total = batch.num_free_slots, batch.num_free_blocks, 0
        if slots <= 0 or room <= 0:
            return _DECODES_ONLY
        for prompt in batch.waiting:
            tokens = prompt.num_tokens_left
            is_alone = not chunks and tokens > limit
            if prompt.num_blocks > blocks or (is_alone and tokens > room and not batch.chunked):
                break
            if is_alone:
                return BatchPlan((ChunkPlan(prompt.request_id, min(tokens, room)),))
            if total + tokens > limit:
                break
            chunks.append(ChunkPlan(prompt.request_id, tokens))
            total, blocks, slots = total + tokens, blocks - prompt.num_blocks, slots - 1
            if slots <= 0:
                break
        return BatchPlan(tuple(chunks)) if chunks else _DECODES_ONLY


@register("generation_pull", kind="batching", source="DistServe decoding instances; vLLM's watermark")
class GenerationPull(ChunkedPrefill):
    """Ask for KV when its blocks fit and `reserve_blocks` stay free; then as chunked_prefill.

    The reserve keeps requests that are decoding from running out of blocks as soon as they grow (max_utilization). An executor
    that holds nothing reserves nothing: a large request must fit at last.
    """

    def __init__(self, *, rng: Random, reserve_blocks: int = 8) -> None:
        super().__init__(rng=rng)
        self.pull_reserve_blocks = whole("generation_pull", "reserve_blocks", reserve_blocks, 0)
