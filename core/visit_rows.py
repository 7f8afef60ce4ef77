"""The rows that a visit leaves behind."""

from __future__ import annotations

from typing import Final

from ..policies.vocabulary import RequestType
from .tables import StayRow, TransferRow
from .visit import Visit

_STAGES: Final[dict[RequestType, str]] = {
    RequestType.CONTEXT_AND_GENERATION: "mixed",
    RequestType.CONTEXT_ONLY: "context",
    RequestType.GENERATION_ONLY: "generation",
}


def stay_row(executor: int, visit: Visit, now: int, last_step: int) -> StayRow:
    """Its stay, which ends now; `last_step`: with which step of the executor its last token came."""
    request_type, params = visit.request.request_type, visit.request.context_phase_params
    brought = params.num_generated if request_type is RequestType.GENERATION_ONLY and params is not None else 0
    return StayRow(
        executor,
        visit.id,
        _STAGES[request_type],
        visit.num_generated - brought,
        visit.first_step,
        last_step if visit.first_step is not None else None,
        visit.num_preemptions,
        visit.enqueued_at,
        visit.started_at if visit.started_at is not None else visit.kv_usable_at,
        now,
        visit.request.client_id,
    )


def transfer_row(executor: int, visit: Visit, num_blocks: int, now: int, ok: bool, error: str | None) -> TransferRow:
    """The transfer of its KV to this executor, which is over now."""
    params = visit.request.context_phase_params
    start = visit.transfer_start_at or 0
    known = now if visit.awaits_token else visit.first_token_at
    return TransferRow(
        visit.id,
        params.executor if params is not None else 0,
        executor,
        (visit.request.num_prompt_tokens if params is None else params.num_kv_tokens) - visit.num_cached_tokens,
        num_blocks,
        start,
        now,
        ok,
        error,
        visit.request.client_id,
        0 if known is None else max(0, known - start),
    )
