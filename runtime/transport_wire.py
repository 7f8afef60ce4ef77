"""What the ranks of a transfer tell each other beside the pages: one msgpack frame each, every number bounded.

    receiver                                          sender
    KvReady(id, line, pieces, tokens)      ────────▶  compares with what it was asked to send
                                           ◀────────  KvPoolAddress, once a pair (where the receiver reads for itself)
                                           ◀────────  KvSegment(line, index, layers, tokens), as they become ready
    takes it, in one way or another
    KvTaken(line, index)                   ────────▶  (where the receiver reads for itself)
                                           ◀────────  KvSent(line, checksums), after the last segment
                                           ◀────────  or KvRefused(line, error): no segment follows
    KvGivenUp(id, line, reason)            ────────▶  answered by KvRefused, unless KvSent is on its way

A `line` is a number that the receiver chooses, unique among its transfers with that sender; it is also the MPI tag of
their messages. Whatever happens, a line ends with exactly one KvSent or KvRefused, and the receiver takes every segment
that was announced on it, wanted or not: so what is given up leaves nothing in MPI.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

_INT64: Final = (1 << 63) - 1
MAX_TRANSFER_ID: Final = _INT64
_MAX_BLOCKS: Final = 1 << 22

_Id = Annotated[int, Meta(ge=0, le=_INT64)]
_Line = Annotated[int, Meta(ge=0, le=1 << 40)]
_Size = Annotated[int, Meta(ge=0, le=1 << 50)]
_Tokens = Annotated[int, Meta(ge=0, le=1 << 31)]
_Index = Annotated[int, Meta(ge=0, le=1 << 20)]
_Block = Annotated[int, Meta(ge=0, lt=1 << 31)]
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
    """These layers of these tokens are on their way, or may be read. The first that may be read names all `blocks`."""

    line: _Line
    index: _Line
    layers: _Range
    tokens: tuple[_Tokens, _Tokens]
    blocks: Annotated[tuple[_Block, ...], Meta(max_length=_MAX_BLOCKS)] = ()


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


class KvPoolAddress(Struct, frozen=True, tag="pool", array_like=True):
    """A sender's pages as another process of its host can open them.

    `offset` bytes from the allocation's beginning to the pool, of shape [layers, 2, num_blocks, heads, tokens_per_block,
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


KvMessage = KvReady | KvSegment | KvSent | KvRefused | KvTaken | KvGivenUp | KvPoolAddress

encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(KvMessage).decode
