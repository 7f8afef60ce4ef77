"""The words in which policies decide: requests, what a context phase leaves behind, and what a policy may answer.

Knows nothing of devices, clocks or the network. Instants are integer picoseconds on the clock of the core that calls.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from operator import index
from typing import Any, Final

from msgspec import Struct

PS_PER_S: Final = 10**12
PS_PER_MS: Final = 10**9
PS_PER_US: Final = 10**6


class PolicyError(ValueError):
    """A policy that does not exist, cannot be made, or answered something it may not."""


class RequestType(IntEnum):
    """Which phases of a request an executor is asked for."""

    CONTEXT_AND_GENERATION = 0
    CONTEXT_ONLY = 1
    GENERATION_ONLY = 2


class Role(StrEnum):
    """What an executor serves at present. A role is state that may change, never a class of executor.

    A parked executor is sent nothing; it finishes what it has.
    """

    CONTEXT = "context"
    GENERATION = "generation"
    MIXED = "mixed"
    PARKED = "parked"

    def serves(self, stage: Stage) -> bool:
        """Whether a phase of this stage may be sent to an executor of this role."""
        return self is Role.MIXED or self.value == stage.value


class Stage(StrEnum):
    """The part of a request that one executor serves in one attempt."""

    CONTEXT = "context"
    GENERATION = "generation"
    MIXED = "mixed"


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, the end id, or a scripted stop
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    ERROR = "error"


class SamplingConfig(Struct, frozen=True, gc=False, array_like=True):
    """How tokens are chosen. `temperature` 0 is greedy; `beam_width` other than 1 is refused (see executor semantics)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beam_width: int = 1


class ContextPhaseParams(Struct, frozen=True, gc=False, array_like=True):
    """What a finished context phase hands to the generation phase.

    `first_gen_tokens` is empty in simulation, where no token ids exist. `state` is opaque to everyone but the two
    executors: who holds the KV (`executor`, `req_id`) and how many tokens of it there are. `is_promised`: the context
    phase is not done yet (early binding); its first token follows by itself. `num_generated`: of a request that moves from
    one generation phase to another, the tokens that it has so far, all of them in `first_gen_tokens`.
    """

    req_id: int
    executor: int
    num_kv_tokens: int
    first_gen_tokens: tuple[int, ...] = ()
    state: bytes = b""
    is_promised: bool = False
    num_generated: int = 1


class Request(Struct, frozen=True, gc=False, array_like=True):
    """One request as its user states it; the same type travels to executors under an id of its own per attempt and phase.

    `max_tokens` is the declared bound. `true_output_tokens` is None except for a routing policy that declares itself an
    oracle: neither an executor nor any other policy is told.
    `input_token_ids` is None in simulation, and None in every request that a policy is shown.
    `arrival` is the intended send time in picoseconds on the orchestrator's clock. Objectives are in picoseconds.
    `block_hashes` are hashes of the full prompt blocks, for prefix reuse.
    """

    id: int
    num_prompt_tokens: int
    max_tokens: int
    request_type: RequestType = RequestType.CONTEXT_AND_GENERATION
    arrival: int = 0
    priority: float = 0.5
    input_token_ids: tuple[int, ...] | None = None
    context_phase_params: ContextPhaseParams | None = None
    sampling: SamplingConfig | None = None
    end_id: int | None = None
    pad_id: int | None = None
    client_id: int | None = None
    streaming: bool = True
    allotted_time: int | None = None
    ttft_objective: int | None = None
    tpot_objective: int | None = None
    session: str | None = None
    traffic_class: str = ""
    block_hashes: tuple[int, ...] = ()
    true_output_tokens: int | None = None

    @property
    def total_kv_tokens(self) -> int:
        """KV tokens at the end: the last generated token is never written, so prompt + max_tokens - 1."""
        return self.num_prompt_tokens + self.max_tokens - 1


# ---- what a routing policy may answer -------------------------------------------------------------------------------


class Route(Struct, frozen=True, gc=False, tag=True):
    """Run the context phase on `context`; the generation phase on `generation`, or None to be asked when it is due.

    At the generation stage `context` is ignored.
    """

    context: int | None = None
    generation: int | None = None


class RouteMixed(Struct, frozen=True, gc=False, tag=True):
    """Run both phases on one executor, with no KV transfer."""

    executor: int


class Hold(Struct, frozen=True, gc=False, tag=True):
    """Ask again when the fleet changes, and at `until` (picoseconds) at the latest if it is given."""

    until: int | None = None


class Reject(Struct, frozen=True, gc=False, tag=True):
    reason: str


Routing = Route | RouteMixed | Hold | Reject


def plain_integer(number: Any, answer: Any) -> int:
    """`number`, which is a part of a policy's `answer`, as Python's own integer; PolicyError if it is no whole number."""
    try:
        return index(number)
    except TypeError:
        raise PolicyError(f"{answer!r}: {number!r} is no whole number") from None


class Admit(Struct, frozen=True, gc=False, tag=True):
    """Let the request into the cluster."""


Admission = Admit | Hold | Reject


# ---- what a role policy may answer ----------------------------------------------------------------------------------


class ChangeRole(Struct, frozen=True, gc=False, array_like=True):
    """From now on `executor` serves `role`. What it has of an earlier role it finishes."""

    executor: int
    role: Role


# ---- what a migration policy may answer -----------------------------------------------------------------------------


class MoveRequest(Struct, frozen=True, gc=False, array_like=True):
    """The generation phase of `request_id` goes on at `executor`, from the KV and the tokens that it has by then."""

    request_id: int
    executor: int


# ---- what a batch policy may answer ---------------------------------------------------------------------------------


class ChunkPlan(Struct, frozen=True, gc=False, array_like=True):
    """Compute `num_tokens` more prompt tokens of one request in the next step."""

    request_id: int
    num_tokens: int


class BatchPlan(Struct, frozen=True, gc=False):
    """What the next step runs. `decodes` False leaves the whole decode batch out of it (a prefill-only step).

    `ask_again_at`: for a policy whose answer depends on time alone, the instant at which to ask again.
    """

    chunks: tuple[ChunkPlan, ...] = ()
    decodes: bool = True
    ask_again_at: int | None = None
