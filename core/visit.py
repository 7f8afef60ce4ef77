"""One request's visit to one executor: what the executor remembers of it. The only mutable object that moves about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..policies.vocabulary import ContextPhaseParams, Request
from .commands import ORCHESTRATOR
from .errors import LifeCycleError
from .life_cycle import Cause, State, advance

if TYPE_CHECKING:
    from .tails import Stop


class Visit:
    """`num_kv_tokens` and `num_generated` are true outside the decode batch and as of the join inside it."""

    __slots__ = (
        "announces_start",
        "awaits_token",
        "doom",
        "enqueued_at",
        "first_step",
        "first_token_at",
        "id",
        "is_moving",
        "is_read",
        "is_withdrawn",
        "joined_step",
        "kv_usable_at",
        "lease_until",
        "left_at",
        "num_blocks",
        "num_cached_tokens",
        "num_found_tokens",
        "num_generated",
        "num_kv_tokens",
        "num_preemptions",
        "num_present",
        "num_to_compute",
        "order_key",
        "output_hashes",
        "pinned_by",
        "reader",
        "request",
        "serial",
        "served_at",
        "started_at",
        "state",
        "stop",
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
        self.num_cached_tokens = 0  # of the prompt, that were there when it began, or when its KV was asked for
        self.num_found_tokens = 0  # of a prompt that waits: what was cached when it was queued
        self.joined_step = -1
        self.first_step: int | None = None
        self.num_preemptions = 0
        self.stop: Stop | None = None  # the world has ended it; it may still be in the batch
        self.left_at: int | None = None  # executor's step with which it left the batch, while that one still ran
        self.pinned_by: tuple[int, int] | None = None  # (executor, its request id)
        # a context phase that is bound early
        self.announces_start = False  # the orchestrator wants to hear of its first chunk
        self.reader: tuple[int, int] | None = None  # has asked, and is served once there is something to send
        self.num_present = 0  # leading tokens that the reader has already
        self.served_at: int | None = None  # its KV has been on its way since then, before all of it was computed
        self.is_read = False  # all of it was taken before the phase itself ended
        # a generation phase that is bound early
        self.awaits_token = False  # its context phase is not known to be done
        self.first_token_at: int | None = None
        self.is_withdrawn = False  # has asked the source to forget its question
        self.is_moving = False  # to another executor, as soon as no plan names it
        self.lease_until = 0
        self.num_blocks = 0  # what admitting it would take; 0 once it has begun
        self.output_hashes: tuple[int, ...] = ()  # of its blocks behind those of the prompt, when it has ended
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


def serial_of(visit: Visit) -> int:
    """To sort by order of arrival."""
    return visit.serial


def params_of(request: Request) -> ContextPhaseParams:
    """The parameters of a generation-only request; one without was refused when it came."""
    if request.context_phase_params is None:
        raise LifeCycleError(f"request {request.id} has no context_phase_params")
    return request.context_phase_params


def total_kv_tokens(request: Request) -> int:
    """KV tokens of the request at its end: `Request.total_kv_tokens`, as a function, which compiled code calls directly."""
    return request.num_prompt_tokens + request.max_tokens - 1


def is_canned(request: Request) -> bool:
    """Whether its context phase was skipped: it goes on from KV of nothing, which must not become anybody else's."""
    params = request.context_phase_params
    return params is not None and params.executor == ORCHESTRATOR
