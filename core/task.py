"""One user request as its orchestrator sees it, from its arrival to its end."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from ..policies.vocabulary import ContextPhaseParams, FinishReason, Request, Stage
from .events import Response
from .life_cycle import Cause, State, advance
from .tables import RequestRow

_REASONS: Final[dict[FinishReason, str]] = {reason: reason.value for reason in FinishReason}


class Task:
    """All instants in picoseconds; None where it has not come to that."""

    __slots__ = (
        "admitted",
        "attempts",
        "cancelled",
        "context_executor",
        "context_id",
        "context_start",
        "dispatch_at",
        "first_token_at",
        "generation_executor",
        "generation_id",
        "held_at_change",
        "held_for",
        "kv_overlap",
        "kv_usable",
        "moves_to",
        "num_cached_tokens",
        "num_tokens",
        "order_key",
        "params",
        "prompt_executor",
        "request",
        "serial",
        "shown",
        "state",
        "told_oracle",
        "transfer_start",
    )

    def __init__(self, request: Request, serial: int, order_key: Any, now: int) -> None:
        shown = request if request.input_token_ids is None else replace(request, input_token_ids=None)
        self.told_oracle = self.shown = shown
        if request.true_output_tokens is not None:
            request = replace(request, true_output_tokens=None)
            self.shown = replace(shown, true_output_tokens=None)
        self.request = request
        self.serial = serial
        self.order_key = order_key
        self.state = State.QUEUED
        self.dispatch_at = now
        self.admitted = False
        self.attempts = 0
        self.cancelled = False
        self.held_for: Stage | None = None
        self.held_at_change = 0
        self.num_tokens = 0
        self.first_token_at: int | None = None
        self.forget_attempt()

    def forget_attempt(self) -> None:
        self.prompt_executor: int | None = None  # that computed the prompt
        self.context_executor: int | None = (
            None  # whose KV its generation phase goes on from: after a move, another one
        )
        self.context_id: int | None = None
        self.generation_executor: int | None = None
        self.generation_id: int | None = None
        self.params: ContextPhaseParams | None = None
        self.context_start: int | None = None
        self.transfer_start: int | None = None
        self.kv_usable: int | None = None
        self.kv_overlap: int | None = None
        self.moves_to: int | None = None  # where its executor was told to let it go on
        self.num_cached_tokens = 0

    def note(self, response: Response, stage: Stage) -> None:
        """The instants and counts that an executor's answer brings."""
        if response.context_start is not None:
            self.context_start = response.context_start
        if stage is not Stage.GENERATION:
            self.num_cached_tokens = response.num_cached_tokens
        elif self.prompt_executor is None:  # else it has moved before: that is part of its decode time
            self.transfer_start = response.transfer_start
            self.kv_usable = response.kv_usable

    def goes_on_from(self, response: Response) -> None:
        """It has moved out: its executor holds the KV that it has so far, as a context phase's would."""
        if self.prompt_executor is None:
            self.prompt_executor = self.context_executor
        self.context_executor, self.context_id = response.executor, response.request_id
        self.generation_executor = self.generation_id = None
        self.params = response.context_phase_params
        self.num_tokens = response.num_output_tokens
        self.state = advance(self.state, Cause.MOVE)

    def row(self, reason: FinishReason, error: str | None, now: int) -> RequestRow:
        """What is recorded of it at its end, which is `now`."""
        request = self.request
        return RequestRow(
            request.id,
            "",
            request.traffic_class,
            request.session,
            request.num_prompt_tokens,
            request.max_tokens,
            self.num_tokens,
            _REASONS[reason],
            error,
            self.attempts,
            self.prompt_executor if self.prompt_executor is not None else self.context_executor,
            self.generation_executor,
            request.arrival,
            self.dispatch_at,
            self.context_start,
            self.first_token_at,
            self.transfer_start,
            self.kv_usable,
            now,
            self.kv_overlap,
            self.num_cached_tokens,
        )
