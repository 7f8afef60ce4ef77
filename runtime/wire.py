"""What travels between ranks: one msgpack frame per message, every number and length in it bounded.

A frame is an `Envelope`. Its body is a message of the core (`core.events.Message`) or one of the runtime's own control
messages below. Decoding a frame gives an envelope within its bounds or a WireError, never anything else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Final, get_args

import msgspec
from msgspec import Meta, Struct

from ..core.commands import RunSteps
from ..core.events import (
    Message,
)

MAX_FRAME_BYTES: Final = 64 << 20
PROTOCOL_VERSION: Final = 5
_MAX_ITEMS: Final = 1 << 22  # of any list: block ids, token ids, request ids
_MAX_TEXT: Final = 1 << 16
_MAX_COUNT: Final = 1 << 40
_MAX_TOKENS: Final = 1 << 31
_INT64: Final = (1 << 63) - 1  # the largest

Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
RequestId = Annotated[int, Meta(ge=0, le=_INT64)]
TokenId = Annotated[int, Meta(ge=0, lt=_MAX_TOKENS)]
Count = Annotated[int, Meta(ge=0, lt=_MAX_COUNT)]
NumTokens = Annotated[int, Meta(ge=0, le=_MAX_TOKENS)]
Instant = Annotated[int, Meta(ge=-_INT64, le=_INT64)]  # picoseconds on the sender's clock
Duration = Annotated[int, Meta(ge=0, le=_INT64)]  # picoseconds
Text = Annotated[str, Meta(max_length=_MAX_TEXT)]
Data = Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES - 4096)]
RequestIds = Annotated[tuple[RequestId, ...], Meta(max_length=_MAX_ITEMS)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=_MAX_ITEMS)]
Blocks = Annotated[tuple[Count, ...], Meta(max_length=_MAX_ITEMS)]


class WireError(ValueError):
    """A frame that is not a message within bounds, or is out of order."""


# ---- control messages -----------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, tag="hello", array_like=True):
    """Rank 0 to a rank: what it is to be. `config` is msgpack that the runtime's own decoder checks."""

    version: Count
    executor: Rank
    config: Data


class Ready(Struct, frozen=True, tag="ready", array_like=True):
    """A rank has loaded what it needs; `error` says why not. `info` is JSON for the run's manifest."""

    executor: Rank
    info: Data = b""
    error: Text | None = None


class PlanGrant(Struct, frozen=True, tag="plan_grant", array_like=True):
    """Leader to followers: run steps [first_step, last_step] of `epoch`, and no further.

    `run` comes with the first grant of a plan. `feed` is what the device needs beside the plan (prompt token ids).
    """

    plan: Count
    epoch: Count
    first_step: Count
    last_step: Count
    run: RunSteps | None = None
    feed: Data = b""


class StepResults(Struct, frozen=True, tag="step_results", array_like=True):
    """What steps up to `last_step` gave: `token_ids` are those of `request_ids`, step by step. `error`: they failed."""

    plan: Count
    epoch: Count
    first_step: Count
    last_step: Count
    request_ids: RequestIds = ()
    token_ids: TokenIds = ()
    duration: Duration = 0
    error: Text | None = None


class KvAsk(Struct, frozen=True, tag="kv_ask", array_like=True):
    """Leader of the reading executor to the source's: `reader` wants the KV of `request_id` for its `reader_id`.

    It has that of the first `num_present` tokens.
    """

    request_id: RequestId
    reader: Rank
    reader_id: RequestId
    num_present: NumTokens = 0


class KvAnswer(Struct, frozen=True, tag="kv_answer", array_like=True):
    """The source's answer to KvAsk. `error` says why the KV cannot be read any more."""

    reader_id: RequestId
    ok: bool
    error: Text | None = None


class KvOver(Struct, frozen=True, tag="kv_over", array_like=True):
    """Leader of the reading executor to the source's: no rank of ours reads the KV of `request_id` any more."""

    request_id: RequestId
    reader_id: RequestId
    ok: bool


class ServeKvOrder(Struct, frozen=True, tag="serve_kv_order", array_like=True):
    """Leader to the ranks of its executor: send your parts of these blocks to executor `reader`.

    `is_early`: the context phase still runs; send what this rank's engine says is written, when it does.
    """

    request_id: RequestId
    reader: Rank
    reader_id: RequestId
    num_tokens: NumTokens
    blocks: Blocks
    is_early: bool = False


class KvWrittenOrder(Struct, frozen=True, tag="kv_written_order", array_like=True):
    """Leader to the ranks of its executor: the last token of `request_id`'s prompt is out, so all its KV is written."""

    request_id: RequestId


class ReceiveKvOrder(Struct, frozen=True, tag="receive_kv_order", array_like=True):
    """Leader to the ranks of its executor: take your parts of request `source_id` of `source` into these blocks."""

    request_id: RequestId
    source: Rank
    source_id: RequestId
    num_tokens: NumTokens
    blocks: Blocks


class AbortKvOrder(Struct, frozen=True, tag="abort_kv_order", array_like=True):
    """Leader to the ranks of its executor: give up the transfer of `request_id` (sent or received)."""

    request_id: RequestId
    reason: Text


class KvPart(Struct, frozen=True, tag="kv_part", array_like=True):
    """A rank to its leader: its part of a transfer is over. `is_sender` tells which end of it this rank was."""

    request_id: RequestId
    is_sender: bool
    ok: bool
    num_bytes: Count = 0
    duration: Duration = 0
    num_checked: Count = 0  # checksums compared, each of one (layer, KV head, block)
    error: Text | None = None


class TokenChunk(Struct, frozen=True, tag="token_chunk", array_like=True):
    """Output tokens of one request, from index `first_index` on."""

    request_id: RequestId
    first_index: Count
    token_ids: TokenIds


class TokenChunks(Struct, frozen=True, tag="token_chunks", array_like=True):
    """What one step yielded, of several requests: a frame each would keep both ends busier than the tokens do."""

    chunks: Annotated[tuple[TokenChunk, ...], Meta(max_length=_MAX_ITEMS)]


class RecordsChunk(Struct, frozen=True, tag="records_chunk", array_like=True):
    """Encoded rows of a table, or a piece of an event log, for rank 0 to write."""

    kind: Text
    data: Data


class HiddenStop(Struct, frozen=True, tag="hidden_stop", array_like=True):
    """To the driver of an executor, never its core: the world will end this request after so many output tokens."""

    request_id: RequestId
    output_length: NumTokens


class HealthPing(Struct, frozen=True, tag="health_ping", array_like=True):
    """`number` counts the pings of this sender."""

    number: Count


class Fault(Struct, frozen=True, tag="fault", array_like=True):
    """A rank to its leader or to rank 0: it cannot go on."""

    error: Text


class Goodbye(Struct, frozen=True, tag="goodbye", array_like=True):
    """Rank 0 to all: end. A rank to rank 0: everything it had to say has been said."""

    reason: Text = ""


Control = (
    Hello
    | Ready
    | PlanGrant
    | StepResults
    | KvAsk
    | KvAnswer
    | KvOver
    | ServeKvOrder
    | KvWrittenOrder
    | ReceiveKvOrder
    | AbortKvOrder
    | KvPart
    | TokenChunk
    | TokenChunks
    | RecordsChunk
    | HiddenStop
    | HealthPing
    | Fault
    | Goodbye
)
Body = Message | Control


class Envelope(Struct, frozen=True, array_like=True):
    """`sequence` counts the frames of the ordered pair (sender, receiver) from 0. `sent_at` is informational."""

    sender: Rank
    sequence: Count
    sent_at: Instant
    body: Body

    @property
    def kind(self) -> str:
        """The tag of the body, such as "enqueue"."""
        return str(self.body.__struct_config__.tag)


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """One frame. Raises WireError for an integer over 64 bits or a frame over MAX_FRAME_BYTES."""
    try:
        frame = _encoder.encode(envelope)
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a {envelope.kind} message cannot be encoded: {error}") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"a {envelope.kind} frame has {len(frame)} bytes; allowed: at most {MAX_FRAME_BYTES}")
    return frame


def decode(frame: bytes | bytearray | memoryview) -> Envelope:
    """The envelope in `frame`. Raises WireError, and nothing else, for any bytes that are not one within bounds."""
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"a frame has {len(frame)} bytes; allowed: at most {MAX_FRAME_BYTES}")
    try:
        envelope = _decoder.decode(frame)
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise WireError(f"a frame of {len(frame)} bytes is no message: {error}") from error
    body = envelope.body
    if isinstance(body, _CORE_TYPES):
        _check_bounds(body, envelope.kind)
    elif isinstance(body, PlanGrant) and body.run is not None:
        _check_bounds(body.run, envelope.kind)
    return envelope


# ---- bounds of the core's own structs, which state none --------------------------------------------------------------

_CORE_TYPES: Final = get_args(Message)
_ANY_64_BIT: Final = frozenset({"seed", "block_hashes", "cache_events", "client_id"})
_OR_MINUS_ONE: Final = frozenset({"end_id", "pad_id"})  # "none" in the words of some checkpoints
_SIGNED: Final = frozenset(
    {"arrival", "context_start", "transfer_start", "kv_usable", "last_token"}  # instants: clocks may start anywhere
)
_UPPER: Final = {
    "num_prompt_tokens": _MAX_TOKENS,
    "max_tokens": _MAX_TOKENS,
    "num_output_tokens": _MAX_TOKENS,
    "num_kv_tokens": _MAX_TOKENS,
    "num_cached_tokens": _MAX_TOKENS,
    "input_token_ids": _MAX_TOKENS,
    "first_gen_tokens": _MAX_TOKENS,
    "tokens": _MAX_TOKENS,
    "executor": 1 << 20,
    "reader": 1 << 20,
    "blocks": _MAX_COUNT,
    "beam_width": 1 << 16,
}


def _int_range(name: str) -> tuple[int, int]:
    if name in _ANY_64_BIT:
        return -_INT64 - 1, 2 * _INT64 + 1
    if name in _SIGNED:
        return -_INT64, _INT64
    if name in _OR_MINUS_ONE:
        return -1, _MAX_TOKENS
    return 0, _UPPER.get(name, _INT64)


def _check_bounds(value: Any, name: str) -> None:
    """Raise WireError if an int, float, length or text inside `value` is out of bounds. Types were checked before."""
    if value is None or isinstance(value, (bool, Enum)):
        return
    if isinstance(value, int):
        low, high = _int_range(name)
        if not low <= value <= high:
            raise WireError(f"{name} is {value}; allowed: {low} to {high}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise WireError(f"{name} is {value}; allowed: finite numbers")
    elif isinstance(value, (str, bytes)):
        if len(value) > _MAX_TEXT:
            raise WireError(f"{name} has length {len(value)}; allowed: at most {_MAX_TEXT}")
    elif isinstance(value, tuple):
        if len(value) > _MAX_ITEMS:
            raise WireError(f"{name} has {len(value)} items; allowed: at most {_MAX_ITEMS}")
        if name == "cache_events" and value and not 0 <= value[0] < len(value):
            raise WireError(f"{name} begins with {value[0]}; allowed: a count of the {len(value) - 1} hashes behind it")
        if value and type(value[0]) is int and name != "appended":  # long lists of ids: the extremes tell
            if all(type(item) is int for item in value):
                _check_bounds(min(value), name)
                _check_bounds(max(value), name)
                return
        for item in value:
            _check_bounds(item, name)
    elif isinstance(value, Struct):
        for field in value.__struct_fields__:
            _check_bounds(getattr(value, field), field)


# ---- order ----------------------------------------------------------------------------------------------------------


class WireEnd:
    """One rank's end of all its pairs: numbers what goes out, checks what comes in. Not thread-safe by itself."""

    def __init__(self, rank: int, clock: Callable[[], int]) -> None:
        """`clock` gives picoseconds."""
        self.rank = rank
        self._clock = clock
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def seal(self, to: int, body: Body) -> bytes:
        """The frame that takes `body` to rank `to`, to be sent in the order of these calls. Raises WireError."""
        frame = encode(Envelope(self.rank, self._sent[to], self._clock(), body))
        self._sent[to] += 1
        return frame

    def open(self, sender: int, frame: bytes | bytearray | memoryview) -> Envelope:
        """The envelope that came from rank `sender`. Raises WireError for a bad, lost or repeated one."""
        envelope = decode(frame)
        expected = self._received[sender]
        if envelope.sender != sender:
            raise WireError(f"a {envelope.kind} frame from rank {sender} claims to come from rank {envelope.sender}")
        if envelope.sequence != expected:
            raise WireError(
                f"a {envelope.kind} frame from rank {sender} is number {envelope.sequence}, expected {expected}: "
                "a frame was lost, repeated or overtaken"
            )
        self._received[sender] += 1
        return envelope
