"""One request's visit to one executor: what the executor remembers of it. The only mutable object that moves about."""

from __future__ import annotations

from typing import Any

from ..policies.vocabulary import Request
from .life_cycle import Cause, State, advance


class Visit:
    """`num_kv_tokens` and `num_generated` are true outside the decode batch and as of the join inside it."""

    __slots__ = (
        "doom",
        "enqueued_at",
        "first_step",
        "id",
        "joined_step",
        "kv_usable_at",
        "lease_until",
        "num_blocks",
        "num_generated",
        "num_kv_tokens",
        "num_preemptions",
        "num_to_compute",
        "order_key",
        "pinned_by",
        "request",
        "serial",
        "started_at",
        "state",
        "transfer_start_at",
    )

    def __init__(self, request: Request, serial: int, order_key: Any, now: int, state: State) -> None:
        self.request = request
        self.id = request.id
        self.serial = serial  # order of arrival; ties of any order are decided by it
        self.order_key = order_key
        self.state = state
        self.enqueued_at = now
        self.started_at: int | None = None
        self.transfer_start_at: int | None = None
        self.kv_usable_at: int | None = None
        self.num_kv_tokens = 0  # written
        self.num_generated = 0
        self.num_to_compute = (
            request.num_prompt_tokens
        )  # tokens to run through prefill, generated ones after preemption
        self.joined_step = -1
        self.first_step: int | None = None
        self.num_preemptions = 0
        self.pinned_by: tuple[int, int] | None = None  # (executor, its request id)
        self.lease_until = 0
        self.num_blocks = 0  # what admitting it would take; 0 once it has begun
        self.doom: str | None = None  # given up while something still touches its blocks: cancelled, or the error

    def advance(self, cause: Cause) -> None:
        self.state = advance(self.state, cause)

    # what batch policies see of a prompt

    @property
    def request_id(self) -> int:
        return self.id

    @property
    def num_tokens_left(self) -> int:
        return self.num_to_compute - self.num_kv_tokens
