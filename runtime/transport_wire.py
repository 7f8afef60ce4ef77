"""What the ranks of a transfer tell each other beside the pages: one msgpack frame each, every number bounded.

    receiver                                          sender
    KvReady(id, line, pieces, tokens)      ────────▶  compares with what it was asked to send
                                           ◀────────  KvPoolAddress, once a pair (where the receiver reads for itself)
                                           ◀────────  KvSegment(line, index, layers, tokens), as they become ready
    takes it, in one way or another
    KvTaken(line, index)                   ────────▶  (where the receiver reads for itself)
                                           ◀────────  the last KvSegment says so, or KvSent(line, checksums) follows it
                                           ◀────────  or KvRefused(line, error): no segment follows
    KvGivenUp(id, line, reason)            ────────▶  answered by KvRefused, unless the last word is on its way

A `line` is a number that the receiver chooses, unique among its transfers with that sender; it is also the MPI tag of
their messages. Whatever happens, a line ends with exactly one last word (a last KvSegment, KvSent or KvRefused), and the
receiver takes every segment that was announced on it, wanted or not: so what is given up leaves nothing in MPI. A segment
whose packing failed after it was announced comes as a message of one byte.

Where segments come as messages, a sender whose pages are all written gives the first of them to MPI before it is asked:

    receiver                                          sender
                                           ◀────────  KvAhead(tag, id, pieces, tokens, layers, tokens), and the message
    takes it once it is asked to receive that id, and asks for the rest with KvReady as ever
                                           ◀────────  KvAheadDropped(id): it takes what it has not, and forgets it

Each message that was sent ahead is taken exactly once, wanted or not. Its tag is the sender's, above all lines.

Where the receiver reads for itself, a sender whose pages are all written need not wait to be asked:

    receiver                                          sender
                                           ◀────────  KvOffer(serial, id, pieces, tokens, blocks): all of it may be read
    once it is asked to receive that id: reads
    KvOfferTaken(serial, error)            ────────▶  the pages are the sender's own again
                                           ◀────────  KvWithdrawn(serial): answered by KvOfferTaken, unless it has been

The two may cross: a receiver that has asked takes the offer, and what it asked for is answered with KvSent alone.
An offer holds its pages until KvOfferTaken (or the receiver's end), and a sender has at most MAX_OFFERS with one receiver.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

_INT64: Final = (1 << 63) - 1
MAX_TRANSFER_ID: Final = _INT64
_MAX_BLOCKS: Final = 1 << 22
MAX_OFFERS: Final = 256  # of one sender to one receiver, not taken yet

_Id = Annotated[int, Meta(ge=0, le=_INT64)]
_Line = Annotated[int, Meta(ge=0, le=1 << 40)]
_Size = Annotated[int, Meta(ge=0, le=1 << 50)]
_Tokens = Annotated[int, Meta(ge=0, le=1 << 31)]
_Index = Annotated[int, Meta(ge=0, le=1 << 20)]
_Block = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Blocks = Annotated[tuple[_Block, ...], Meta(max_length=_MAX_BLOCKS)]
_Range = tuple[_Index, _Index]
_Ranges = Annotated[tuple[tuple[_Range, _Range], ...], Meta(max_length=1 << 16)]
_Text = Annotated[str, Meta(max_length=1 << 16)]


class KvReady(Struct, frozen=True, tag="ready", array_like=True):
    """Send `num_tokens` tokens of these (layers, heads), `num_bytes` bytes in all, on `line`.

    `tokens_per_block` > 0 asks for checksums over blocks of that size.
    """

    transfer_id: _Id
    line: _Line
    num_bytes: _Size
    num_tokens: _Tokens
    ranges: _Ranges
    tokens_per_block: Annotated[int, Meta(ge=0, le=1 << 30)]


class KvSegment(Struct, frozen=True, tag="segment", array_like=True):
    """These layers of these tokens are on their way, or may be read. The first that may be read names all `blocks`.

    `is_last`: nothing follows on this line.
    """

    line: _Line
    index: _Line
    layers: _Range
    tokens: tuple[_Tokens, _Tokens]
    blocks: _Blocks = ()
    is_last: bool = False


class KvAhead(Struct, frozen=True, tag="ahead", array_like=True):
    """These layers of these tokens of a transfer are in MPI: a message of `size` bytes, from `message_tag`.

    `num_bytes`, `num_tokens`, `ranges`: of the whole transfer.
    """

    message_tag: _Line
    transfer_id: _Id
    num_bytes: _Size
    num_tokens: _Tokens
    ranges: _Ranges
    layers: _Range
    tokens: tuple[_Tokens, _Tokens]
    size: _Size


class KvAheadDropped(Struct, frozen=True, tag="ahead_dropped", array_like=True):
    """What was sent ahead of that transfer is of no use any more."""

    transfer_id: _Id


class KvSent(Struct, frozen=True, tag="sent", array_like=True):
    """All segments have been announced. `checksums` as in `TransferOutcome`, where they were asked for."""

    line: _Line
    checksums: Annotated[bytes, Meta(max_length=60 << 20)] = b""


class KvRefused(Struct, frozen=True, tag="refused", array_like=True):
    """Nothing more will be sent on `line`."""

    line: _Line
    error: _Text


class KvTaken(Struct, frozen=True, tag="taken", array_like=True):
    """The receiver does not read that segment any more."""

    line: _Line
    index: _Line


class KvGivenUp(Struct, frozen=True, tag="given_up", array_like=True):
    """The data is not wanted any more."""

    transfer_id: _Id
    line: _Line
    reason: _Text


class KvOffer(Struct, frozen=True, tag="offer", array_like=True):
    """All of this transfer is written and may be read from `blocks`. `serial` is the sender's, for this receiver."""

    serial: _Id
    transfer_id: _Id
    num_bytes: _Size
    num_tokens: _Tokens
    ranges: _Ranges
    blocks: _Blocks


class KvOfferTaken(Struct, frozen=True, tag="offer_taken", array_like=True):
    """The receiver has read what was offered, or (`error`, or after KvWithdrawn) will not."""

    serial: _Id
    error: _Text = ""


class KvWithdrawn(Struct, frozen=True, tag="withdrawn", array_like=True):
    """The offer is over, if nobody reads it yet."""

    serial: _Id


class KvPoolAddress(Struct, frozen=True, tag="pool", array_like=True):
    """A sender's pages as another process of its host can open them.

    `offset` bytes from the allocation's beginning to the pool, of shape [num_blocks, layers, 2, heads, tokens_per_block,
    head_dim] and contiguous.
    """

    handle: Annotated[bytes, Meta(min_length=64, max_length=64)]
    allocation_bytes: _Size
    offset: _Size
    device: Annotated[bytes, Meta(min_length=16, max_length=16)]  # UUID
    layers: _Range
    heads: _Range
    num_blocks: _Block
    tokens_per_block: Annotated[int, Meta(ge=1, le=1 << 30)]
    head_dim: Annotated[int, Meta(ge=1, le=1 << 20)]
    dtype: Annotated[str, Meta(max_length=32)]


KvMessage = (
    KvReady
    | KvSegment
    | KvAhead
    | KvAheadDropped
    | KvSent
    | KvRefused
    | KvTaken
    | KvGivenUp
    | KvOffer
    | KvOfferTaken
    | KvWithdrawn
    | KvPoolAddress
)

encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(KvMessage).decode
