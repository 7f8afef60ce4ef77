"""What comes out of a core: orders to the driver of its world. Values; whoever reads them may keep them.

The driver obeys in order. It never needs to look into a core: what it must know stands in the command.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from ..policies.vocabulary import FinishReason, Request
from .events import Message
from .tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow

ORCHESTRATOR: Final = 0  # its rank in messages; executors are numbered from 1


class Joined(Struct, frozen=True, gc=False, array_like=True):
    """A request enters the decode batch with `num_kv_tokens` tokens of KV written and all its block ids so far."""

    request_id: int
    num_kv_tokens: int
    blocks: tuple[int, ...]


class Chunk(Struct, frozen=True, gc=False, array_like=True):
    """Compute tokens [start, start + length) of prompt + generated tokens. `is_last` yields the next token.

    `blocks` is the request's whole block table so far, not an increment.
    """

    request_id: int
    start: int
    length: int
    is_last: bool
    blocks: tuple[int, ...]


class RunSteps(Struct, frozen=True, gc=False, tag="run_steps", array_like=True):
    """Run steps [first_step, last_step] of `epoch`, counted from 1 within the epoch.

    The batch is a delta: `left` leaves the decode batch before `joined` enters it; `appended` gives more block ids to
    requests that are in it, after the last block that each has written to: blocks appended for steps of a span that was
    cut short are no longer its own. `first_step` > 1 continues the epoch: same batch, same time origin, no chunks.
    `num_decodes` and `num_kv_tokens` describe the decode batch at the first step of the epoch, of which `num_shared_kv`
    are read again, from blocks that requests share; with `decodes` False the decode batch stands still for this (single)
    step.
    """

    plan: int
    epoch: int
    first_step: int
    last_step: int
    left: tuple[int, ...] = ()
    joined: tuple[Joined, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    appended: tuple[tuple[int, tuple[int, ...]], ...] = ()
    num_decodes: int = 0
    num_kv_tokens: int = 0
    decodes: bool = True
    num_shared_kv: int = 0


class StopAfterStep(Struct, frozen=True, gc=False, tag="stop_after_step", array_like=True):
    """End the running span at the first step boundary at or after now that launched steps allow."""

    epoch: int


class ReceiveKv(Struct, frozen=True, gc=False, tag="receive_kv", array_like=True):
    """Ask executor `source` for the KV of its request `source_id` and write it into `blocks`, in token order.

    The first `num_present` tokens, whole blocks, are here already: `num_tokens` and `blocks` are those behind them.
    """

    request_id: int
    source: int
    source_id: int
    num_tokens: int
    blocks: tuple[int, ...]
    num_present: int = 0


class PrepareReceive(Struct, frozen=True, gc=False, tag="prepare_receive", array_like=True):
    """As ReceiveKv, for a context phase that is not done yet: the source answers when it has blocks to send from."""

    request_id: int
    source: int
    source_id: int
    num_tokens: int
    blocks: tuple[int, ...]


class ServeKv(Struct, frozen=True, gc=False, tag="serve_kv", array_like=True):
    """Answer a reader. `ok` pins the blocks until KvTaken or PeerDown; otherwise `error` tells the reader why not.

    `num_written`: the context phase still runs, and so many of the tokens are written; the driver sends the others, layer
    by layer, as the steps that follow write them. None: all are written.
    """

    request_id: int
    reader: int
    reader_id: int
    num_tokens: int
    blocks: tuple[int, ...]
    ok: bool
    error: str | None = None
    num_written: int | None = None

    @property
    def is_early(self) -> bool:
        return self.num_written is not None


class AbortKv(Struct, frozen=True, gc=False, tag="abort_kv", array_like=True):
    """End the early sending of `request_id`: the rest of its KV will never be written. KvTaken says when it is over."""

    request_id: int
    reason: str


class Send(Struct, frozen=True, gc=False, tag="send", array_like=True):
    """Send `message` to the core of rank `to` (0 the orchestrator). Order per pair of ranks is kept."""

    to: int
    message: Message


class WakeAt(Struct, frozen=True, gc=False, tag="wake_at", array_like=True):
    """Give a Wake at the instant `at` of this core's clock, and at `report_at` if that is earlier; None: none is wanted.

    Replaces the last WakeAt. At `report_at` nothing is due but a report.
    """

    at: int | None
    report_at: int | None = None

    @property
    def first(self) -> int | None:
        """The earlier of the two."""
        if self.at is None or self.report_at is None:
            return self.report_at if self.at is None else self.at
        return min(self.at, self.report_at)


class Deliver(Struct, frozen=True, gc=False, tag="deliver", array_like=True):
    """To the user of `request_id`: the first token is there (`finish_reason` None), or the request has ended.

    `executor_request_id` is the id under which the serving executor knows the request.
    """

    request_id: int
    finish_reason: FinishReason | None
    num_output_tokens: int
    executor: int | None = None
    executor_request_id: int | None = None
    error: str | None = None


class Dispatched(Struct, frozen=True, gc=False, tag="dispatched", array_like=True):
    """The orchestrator sent a phase of the user's request `request_id` to `executor` as `executor_request`.

    Tells the world which hidden facts (true output length) belong to the executor's id, before the message is sent.
    """

    request_id: int
    executor: int
    executor_request: Request


class Drained(Struct, frozen=True, gc=False, tag="drained", array_like=True):
    """After a Shutdown: nothing is left here, the driver may stop."""


class Record(Struct, frozen=True, gc=False, tag="record", array_like=True):
    """A finished row for the run directory."""

    row: RequestRow | StayRow | StepRow | TransferRow | DecisionRow


ExecutorCommand = (
    RunSteps | StopAfterStep | ReceiveKv | PrepareReceive | ServeKv | AbortKv | Send | WakeAt | Drained | Record
)
OrchestratorCommand = Send | Deliver | Dispatched | WakeAt | Drained | Record
Command = (
    RunSteps
    | StopAfterStep
    | ReceiveKv
    | PrepareReceive
    | ServeKv
    | AbortKv
    | Send
    | WakeAt
    | Deliver
    | Dispatched
    | Drained
    | Record
)
