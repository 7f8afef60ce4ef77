"""The columns of a run directory, the same in both worlds: one struct per table, one field per column.

Rows carry instants in integer picoseconds since the run's start (fields ending in `_ps`); writers turn them into
float seconds under the same name with `_s`. None is a missing value.
"""

from __future__ import annotations

from msgspec import Struct


class RequestRow(Struct, frozen=True, gc=False, tag="request", array_like=True):
    """requests.parquet: one row per user request, written when it ends."""

    request_id: int
    phase: str  # workload phase, filled in by the writer
    traffic_class: str
    session: str | None
    num_prompt_tokens: int
    max_tokens: int
    num_output_tokens: int
    finish_reason: str
    error: str | None
    num_attempts: int
    context_executor: int | None  # the executor that produced the first token (a mixed one too)
    generation_executor: int | None  # the executor that produced the rest
    arrival_ps: int  # intended send
    dispatch_ps: int  # actual send: the instant at which the orchestrator was given the request
    context_start_ps: int | None  # first step that computes its prompt begins
    first_token_ps: int | None  # first token reached rank 0
    transfer_start_ps: int | None  # generation executor asked for the KV; with early binding long before it was sent
    kv_usable_ps: int | None  # every rank has it, and the executor has the first token
    end_ps: int  # last token, or the error, reached rank 0
    # how long before the end of its context phase the KV began to be sent; None where no KV was sent early
    kv_transfer_overlap_ps: int | None = None
    num_cached_tokens: int = 0  # of the prompt, whose KV was there already where the prompt was computed


class StayRow(Struct, frozen=True, gc=False, tag="stay", array_like=True):
    """stays.parquet: one row per visit of a request to an executor; token times follow from it and from the steps.

    In the executor's running count of steps the visit's first token came at the end of `first_step`, its last at the end
    of `last_step`, and one more at the end of each step between in which decodes ran (`num_decodes` > 0), unless the
    request was preempted on the way (`num_preemptions` > 0).
    """

    executor: int
    executor_request_id: int
    stage: str
    num_tokens: int  # tokens generated in this visit
    first_step: int | None
    last_step: int | None
    num_preemptions: int
    enqueued_ps: int
    started_ps: int | None
    ended_ps: int
    request_id: int | None  # the user's, where an orchestrator knows it


class StepRow(Struct, frozen=True, gc=False, tag="step", array_like=True):
    """steps.parquet: one row per epoch (a batch at constant membership), not per step."""

    executor: int
    epoch: int
    first_step: int  # running count of this executor's steps, from 1
    num_steps: int
    num_decodes: int  # 0 also where the decode batch stood still for a prefill-only step
    num_kv_tokens: int  # of the decode batch at the epoch's first step
    num_chunks: int
    num_chunk_tokens: int
    num_cached_tokens: int  # KV tokens before the chunks, which their attention reads
    start_ps: int
    end_ps: int
    blocks_free: int
    blocks_reserved: int
    blocks_used: int
    blocks_held: int
    blocks_quarantined: int
    blocks_cached: int = 0
    num_shared_kv: int = 0  # of `num_kv_tokens`, those read again from blocks that requests share


class TransferRow(Struct, frozen=True, gc=False, tag="transfer", array_like=True):
    """transfers.parquet: one row per KV transfer, written by its reader."""

    executor_request_id: int
    source: int
    reader: int
    num_tokens: int
    num_blocks: int
    start_ps: int
    end_ps: int
    ok: bool
    error: str | None
    request_id: int | None  # the user's, where an orchestrator knows it
    overlap_ps: int = (
        0  # of start to end, what lies before the reader knew the context phase to be done (early binding)
    )


class DecisionRow(Struct, frozen=True, gc=False, tag="decision", array_like=True):
    """decisions.parquet: one row per answer of a routing or admission policy, per move and per change of a role."""

    request_id: int  # -1 for a role
    stage: str  # admission, context, generation, migration, role
    answer: (
        str  # route, mixed, hold, reject; of a role: the new one, refused, or drained: nothing of the old one is left
    )
    executor: int | None
    generation_executor: int | None  # bound early
    reason: str | None
    at_ps: int
    view_versions: tuple[int, ...]  # reports received so far from each candidate, in candidate order (up to 16)
    max_age_ps: int | None  # age of the oldest report among the candidates
