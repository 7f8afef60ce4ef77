"""Which requests an executor can never serve, and why: asked once, when they come."""

from __future__ import annotations

from ..policies.vocabulary import Request, RequestType
from .config import ExecutorConfig
from .visit import total_kv_tokens


def refusal(request: Request, config: ExecutorConfig) -> str | None:
    """Why an executor of this configuration can never serve the request, in words, or None."""
    scheduler, kind = config.scheduler, request.request_type
    params, num_prompt_tokens, max_tokens = request.context_phase_params, request.num_prompt_tokens, request.max_tokens
    if params is not None and params.executor == config.id and params.is_promised:
        return "the KV will be this executor's own; only a context phase elsewhere can be bound early"
    if num_prompt_tokens < 1 or max_tokens < 1:
        return f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens}: both must be at least 1"
    if request.sampling is not None and request.sampling.beam_width != 1:
        return f"beam width {request.sampling.beam_width} is not supported: only 1 is"
    if kind is RequestType.GENERATION_ONLY and params is None:
        return "a generation-only request needs context_phase_params"
    if kind is RequestType.GENERATION_ONLY and max_tokens == 1:
        return "max_tokens 1 was reached by the context phase: there is no generation phase"
    if config.enable_block_reuse and len(request.block_hashes) * config.tokens_per_block > num_prompt_tokens:
        return (
            f"{len(request.block_hashes)} block hashes: a prompt of {num_prompt_tokens} tokens has"
            f" {num_prompt_tokens // config.tokens_per_block} full blocks of {config.tokens_per_block}"
        )
    generates = kind is not RequestType.CONTEXT_ONLY
    num_tokens = total_kv_tokens(request) if generates else num_prompt_tokens
    capacity = config.num_blocks * config.tokens_per_block
    if num_tokens > capacity:
        return f"the request needs KV for {num_tokens} tokens, this executor can hold {capacity} in all"
    if scheduler.chunked_context:
        return None
    prefills = kind is not RequestType.GENERATION_ONLY
    if prefills and num_prompt_tokens > scheduler.max_num_tokens:
        return (
            f"a prompt of {num_prompt_tokens} tokens is over max_num_tokens {scheduler.max_num_tokens}"
            " and chunked context is off"
        )
    if generates and scheduler.capacity == "max_utilization" and num_tokens > scheduler.max_num_tokens:
        return (
            f"the request may be preempted and then needs {num_tokens} tokens recomputed at once: max_num_tokens is"
            f" {scheduler.max_num_tokens} and chunked context is off"
        )
    return None
