"""What goes into a core: messages of other cores, and what the driver of this world saw happen.

Every event is a value. Messages (`Enqueue` to `Report`) travel between processes; the rest stays in one. Instants are
not part of an event: the driver passes `now` beside it, in integer picoseconds of the receiving core's clock, so that
no deadline ever crosses a process boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ..policies.vocabulary import ContextPhaseParams, FinishReason, Request

# ---- messages to an executor ----------------------------------------------------------------------------------------


class Enqueue(Struct, frozen=True, gc=False, tag="enqueue", array_like=True):
    """Serve `request`, whose id is unique per attempt and phase.

    `announces_start`: the orchestrator wants a ContextStarted when its first chunk is planned.
    """

    request: Request
    announces_start: bool = False


class Cancel(Struct, frozen=True, gc=False, tag="cancel", array_like=True):
    """Give the request up. Unknown ids are ignored: the request may have ended while this was on the wire."""

    request_id: int


class LeaseRenewed(Struct, frozen=True, gc=False, tag="lease_renewed", array_like=True):
    """Someone still means to read the KV of these requests: their leases start anew."""

    request_ids: tuple[int, ...]


class FirstTokens(Struct, frozen=True, gc=False, tag="first_tokens", array_like=True):
    """The context phase that the generation phase `request_id` was promised is done; empty in simulation."""

    request_id: int
    tokens: tuple[int, ...] = ()


class KvWithdrawn(Struct, frozen=True, gc=False, tag="kv_withdrawn", array_like=True):
    """`reader` takes its early question for the KV of `request_id` back: it needs the blocks. Void once it is served."""

    request_id: int
    reader: int
    reader_id: int


class RoleChanged(Struct, frozen=True, gc=False, tag="role_changed", array_like=True):
    """The executor serves another role from now on; what it has it finishes.

    An operator's order to the orchestrator, and the orchestrator's message to the executor whose role it is.
    """

    executor: int
    role: str  # a value of `Role`


class MoveOut(Struct, frozen=True, gc=False, tag="move_out", array_like=True):
    """A generation phase that runs goes on elsewhere: at the next step boundary it leaves the batch, its KV is held, and it
    is answered as a context phase is. Ignored where it does not run, or has ended while this was on the wire.
    """

    request_id: int


class Shutdown(Struct, frozen=True, gc=False, tag="shutdown", array_like=True):
    """Take no more requests; `drain` finishes what is there, otherwise everything fails, held KV included."""

    drain: bool = True


# ---- messages to the orchestrator -----------------------------------------------------------------------------------


class Report(Struct, frozen=True, gc=False, tag="report", array_like=True):
    """An executor's state as of its last change of batch (so that it does not depend on how far a span has run).

    `seen_requests` and `seen_tokens` count what it was ever sent (requests; prompt tokens for a context phase, KV tokens
    for a generation phase): what the orchestrator sent beyond that is still on the wire.
    """

    executor: int
    seen_requests: int = 0
    seen_tokens: int = 0
    queued_requests: int = 0  # waiting for a first step: prompts not begun, transfers not begun, KV in flight or ready
    running_requests: int = 0  # in prefill or in the decode batch
    queued_prefill_tokens: int = 0  # less what was cached when each was queued
    inflight_prefill_tokens: int = 0  # prompt tokens of begun prefills not yet computed
    decode_kv_tokens: int = 0  # of the decode batch at its last change, and of generation phases waiting to enter it
    blocks_free: int = 0
    blocks_reserved: int = 0
    blocks_used: int = 0
    blocks_held: int = 0
    blocks_quarantined: int = 0
    num_steps: int = 0  # steps ever run, at the last change of batch
    step_time: int = 0  # picoseconds a step of the last finished epoch, 0 before any
    healthy: bool = True
    # prefix caching: the number of blocks that are cached or in use no longer, their hashes, then the hashes of blocks that
    # came, each chain from its front; net since the last report, () for none
    cache_events: tuple[int, ...] = ()
    blocks_cached: int = 0  # nobody's, and there to be reused or evicted


class ContextStarted(Struct, frozen=True, gc=False, tag="context_started", array_like=True):
    """The first chunk of a context phase whose `Enqueue` asked for this is planned: its blocks are its own."""

    request_id: int


class FirstTokenOut(Struct, frozen=True, gc=False, tag="first_token_out", array_like=True):
    """A streaming request that is served whole here has its first token, and goes on; its Response comes at its end."""

    request_id: int
    context_start: int | None = None


class Response(Struct, frozen=True, gc=False, tag="response", array_like=True):
    """The one final answer of an executor to one `Enqueue`. A context phase answers at the end of its compute."""

    request_id: int
    executor: int
    finish_reason: FinishReason | None  # None: the context phase is done, or it moves, and a generation phase is due
    num_output_tokens: int
    error: str | None = None
    recomputable: bool = False  # the error lost the KV or the executor, not the request: it may run again elsewhere
    context_phase_params: ContextPhaseParams | None = None
    context_start: int | None = None  # instants on this executor's clock, for records only
    transfer_start: int | None = None
    kv_usable: int | None = None
    last_token: int | None = None
    report: Report | None = None
    kv_overlap: int | None = None  # picoseconds of this context phase during which its KV was already being sent
    num_cached_tokens: int = 0  # of the prompt, that were not computed, or for a generation phase not transferred


# ---- what the driver of an executor saw -----------------------------------------------------------------------------


class Stopped(Struct, frozen=True, gc=False, array_like=True):
    """The world ended a sequence at `step` of the epoch (counted from 1): its token of that step is its last one."""

    request_id: int
    step: int
    reason: FinishReason = FinishReason.STOP


class StepsCommitted(Struct, frozen=True, gc=False, tag="steps_committed", array_like=True):
    """The plan's span will end after `num_steps` steps of its epoch: they are all launched, no more will be.

    The next plan may be made now; it will run behind those steps. What they touch stays theirs until the plan's StepsDone,
    which follows. Never of a plan with chunks. `stopped`: as in StepsDone, those known by now.
    """

    plan: int
    epoch: int
    num_steps: int
    stopped: tuple[Stopped, ...] = ()


class StepsDone(Struct, frozen=True, gc=False, tag="steps_done", array_like=True):
    """The plan's span ended after `num_steps` steps of its epoch (counted from the epoch's start, not the span's).

    `stopped` is in order of step, then of request id, whatever order the driver saw them in (`stops_in_order`); of a plan
    that was committed, those not told then.
    `first_tokens` holds (request id, token id) for each prompt finished in the span; empty in simulation.
    A failed step reports `error`: every request in the plan failed with it.
    `block_hashes`: of sequences that end in the span, (request id, hashes of the blocks behind those that its request
    names, as far as the world knows them): their KV may be reused. Only executors that reuse blocks want them.
    """

    plan: int
    epoch: int
    num_steps: int
    stopped: tuple[Stopped, ...] = ()
    first_tokens: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    block_hashes: tuple[tuple[int, tuple[int, ...]], ...] = ()


def stops_in_order(stops: Sequence[Stopped]) -> tuple[Stopped, ...]:
    if len(stops) < 2:
        return tuple(stops)
    return tuple(sorted(stops, key=lambda stop: (stop.step, stop.request_id)))


class KvRequested(Struct, frozen=True, gc=False, tag="kv_requested", array_like=True):
    """`reader` asks to read the KV of `request_id` into its own request `reader_id`.

    With early binding it may ask before the context phase is done, or has begun. The KV of the first `num_present` tokens is
    there already: only the rest is wanted.
    """

    request_id: int
    reader: int
    reader_id: int
    num_present: int = 0


class KvReceived(Struct, frozen=True, gc=False, tag="kv_received", array_like=True):
    """Every rank of this executor has its part of the KV of `request_id`, or the transfer is over without it."""

    request_id: int
    ok: bool
    error: str | None = None


class KvTaken(Struct, frozen=True, gc=False, tag="kv_taken", array_like=True):
    """No reader touches the KV of `request_id` any more. `ok`: it was read to its end."""

    request_id: int
    ok: bool = True


class PeerDown(Struct, frozen=True, gc=False, tag="peer_down", array_like=True):
    """The executor is gone for good, with whatever it held."""

    executor: int


class Wake(Struct, frozen=True, gc=False, tag="wake", array_like=True):
    """The time of the last `WakeAt` has come. A spurious wake is harmless."""


# ---- what the driver of the orchestrator saw ------------------------------------------------------------------------


class Arrive(Struct, frozen=True, gc=False, tag="arrive", array_like=True):
    """A user's request. Its id is the user's; executors see ids of the orchestrator's own."""

    request: Request


Message = (
    Enqueue
    | Cancel
    | LeaseRenewed
    | FirstTokens
    | KvWithdrawn
    | Shutdown
    | Response
    | Report
    | ContextStarted
    | FirstTokenOut
    | RoleChanged
    | MoveOut
)
ExecutorEvent = (
    Enqueue
    | Cancel
    | LeaseRenewed
    | FirstTokens
    | KvWithdrawn
    | Shutdown
    | StepsCommitted
    | StepsDone
    | KvRequested
    | KvReceived
    | KvTaken
    | PeerDown
    | Wake
    | RoleChanged
    | MoveOut
)
OrchestratorEvent = (
    Arrive | Response | Report | ContextStarted | FirstTokenOut | Cancel | PeerDown | RoleChanged | Shutdown | Wake
)
Event = (
    Enqueue
    | Cancel
    | LeaseRenewed
    | FirstTokens
    | KvWithdrawn
    | ContextStarted
    | FirstTokenOut
    | Shutdown
    | Response
    | Report
    | StepsCommitted
    | StepsDone
    | KvRequested
    | KvReceived
    | KvTaken
    | PeerDown
    | Wake
    | Arrive
    | RoleChanged
    | MoveOut
)
