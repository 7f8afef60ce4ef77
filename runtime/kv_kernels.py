"""One Triton kernel that copies KV between two places, each of them paged or packed, this device's or a peer's.

A row is one token of one (layer, K or V, head): head_dim elements, contiguous everywhere. Rows are found by address
arithmetic in 64 bits, so that block sizes, head ranges, layer ranges and first tokens may differ at the two ends. Both
places are given by raw addresses: Triton refuses tensors whose device it cannot query, such as a peer's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

from .direct_launch import DirectLaunch
from .kv_places import KvCopy, KvPlace, KvPool, packed_place

if TYPE_CHECKING:
    from .kv_pages import KvPages

# Few programs with much on the way each leave most multiprocessors to the steps that run beside: 24 read 358 GB/s from a
# peer H200, and a decode step then takes 1.3 times as long; 528 read 363, and it takes 2.8 times as long.
FEW_PROGRAMS: Final = 24
FEW_TILE: Final = 256  # tokens
FEW_WARPS: Final = 32
MANY_PROGRAMS: Final = 528  # for copies too short to keep the few busy
_NUMBERS: Final = [
    "src", "src_table", "src_layer", "src_kv", "src_block", "src_head", "src_token", "src_size",
    "dst", "dst_table", "dst_layer", "dst_kv", "dst_block", "dst_head", "dst_token", "dst_size",
    "num_heads", "num_tokens", "num_tiles",
]  # fmt: skip


@triton.jit
def _row_addresses(base, table, block_bytes, token_bytes, token, size, mask, PAGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses of the rows of these tokens, from that of token 0 of block 0 of their (layer, K or V, head)."""
    if PAGED:
        block = tl.load(table.to(tl.pointer_type(tl.int32)) + token // size, mask=mask, other=0).to(tl.int64)
        return base + block * block_bytes + (token % size).to(tl.int64) * token_bytes
    else:
        return base + token.to(tl.int64) * token_bytes


# By device, warps and constants: launched without Triton's own way to the driver, which costs more than some of the copies.
_compiled: dict[tuple[Any, ...], DirectLaunch | None] = {}  # None: Triton must
_by_driver = True  # until a launch has been seen to go wrong
# What a Triton or a driver of another time may answer: without it launches are slower, not wrong.
_UNFIT: Final = (AttributeError, TypeError, ValueError, RuntimeError)
_SIZES: Final = (*(8, 8, 8, 8, 8, 8, 4, 4) * 2, 4, 4, 4)  # of _NUMBERS, in bytes


# Not specialised on any number: a compilation in the middle of serving costs more than it could save. All are typed, or
# a small number would make another kernel than a large one.
@triton.jit(do_not_specialize=_NUMBERS)
def _copy_rows(  # type: ignore[no-untyped-def]
    src: tl.int64, src_table: tl.int64, src_layer: tl.int64, src_kv: tl.int64, src_block: tl.int64, src_head: tl.int64,
    src_token: tl.int32, src_size: tl.int32,
    dst: tl.int64, dst_table: tl.int64, dst_layer: tl.int64, dst_kv: tl.int64, dst_block: tl.int64, dst_head: tl.int64,
    dst_token: tl.int32, dst_size: tl.int32,
    num_heads: tl.int32, num_tokens: tl.int32, num_tiles: tl.int32,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr, WORD_BYTES: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    SRC_PAGED: tl.constexpr, DST_PAGED: tl.constexpr,
):  # fmt: skip
    tiles_per_head = (num_tokens + TILE - 1) // TILE
    row_bytes = WORDS * WORD_BYTES
    word = tl.pointer_type(tl.int32) if WORD_BYTES == 4 else tl.pointer_type(tl.int16)
    column = tl.arange(0, COLUMNS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rest = tile // tiles_per_head
        token = (tile % tiles_per_head) * TILE + tl.arange(0, TILE)
        inside = token < num_tokens
        head = (rest % num_heads).to(tl.int64)
        kv = ((rest // num_heads) % 2).to(tl.int64)
        layer = (rest // num_heads // 2).to(tl.int64)
        start = src + layer * src_layer + kv * src_kv + head * src_head
        rows = _row_addresses(start, src_table, src_block, row_bytes, token + src_token, src_size, inside, SRC_PAGED)
        into = dst + layer * dst_layer + kv * dst_kv + head * dst_head
        goals = _row_addresses(into, dst_table, dst_block, row_bytes, token + dst_token, dst_size, inside, DST_PAGED)
        mask = inside[:, None] & (column < WORDS)[None, :]
        source = tl.multiple_of(rows.to(word), ALIGN)[:, None] + column[None, :]
        target = tl.multiple_of(goals.to(word), ALIGN)[:, None] + column[None, :]
        tl.store(target, tl.load(source, mask=mask), mask=mask)


def copy_rows(
    copy: KvCopy, *, tile: int = 64, num_warps: int = 8, max_programs: int = MANY_PROGRAMS, stream: int | None = None
) -> None:
    """Launch `copy` on the current device, in the order of `stream` (None: of the current one, which it must be if not).

    `tile`: tokens a step of a program; `max_programs`: at most so many run, to leave the device to others. Whatever is
    copied between such places, it is one compiled kernel: the first small transfer warms all.
    """
    word = 4 if copy.row_bytes % 4 == 0 else 2
    if copy.row_bytes % word:
        raise ValueError(f"rows of {copy.row_bytes} bytes; allowed: an even number")
    source, destination = copy.source, copy.destination
    words = copy.row_bytes // word
    num_tiles = copy.num_layers * 2 * copy.num_heads * -(-copy.num_tokens // tile)
    # 128-bit loads where every row begins on 16 bytes; the strides are multiples of a row
    align = 16 if (copy.row_bytes | source.address | destination.address) % 16 == 0 else word
    numbers = (*_numbers(source), *_numbers(destination), copy.num_heads, copy.num_tokens, num_tiles)
    kinds = (words, triton.next_power_of_2(words), word, align, tile, source.table != 0, destination.table != 0)
    num_programs = min(num_tiles, max_programs)
    is_cuda = torch.cuda.is_initialized()
    key = (torch.cuda.current_device() if is_cuda else -1, num_warps, kinds)
    launch = _compiled.get(key)
    if launch is not None:
        launch(num_programs, int(torch.cuda.current_stream().cuda_stream) if stream is None else stream, numbers)
        return
    made = _copy_rows[num_programs, 1, 1](*numbers, *kinds, num_warps=num_warps)
    if is_cuda and key not in _compiled:
        _compiled[key] = _direct(made)


def _direct(compiled: Any) -> DirectLaunch | None:
    try:
        return DirectLaunch(compiled, _SIZES) if _by_driver else None
    except _UNFIT:
        return None


def read_rows(copy: KvCopy, stream: int | None = None) -> None:
    """`copy_rows` from a peer's memory, where what is long must not keep this device's steps from their multiprocessors."""
    if copy.num_tokens >= FEW_TILE:
        copy_rows(copy, tile=FEW_TILE, num_warps=FEW_WARPS, max_programs=FEW_PROGRAMS, stream=stream)
    else:
        copy_rows(copy, stream=stream)


def warm_copy(pages: KvPages) -> None:
    """Compile all kernels that copy KV of these pages, before a transfer needs one. Their contents stay as they are."""
    if pages.device.type == "cpu":
        _copy_there_and_back(pages)
        return
    with torch.cuda.device(pages.device):
        _copy_there_and_back(pages)
        torch.cuda.synchronize()


def _copy_there_and_back(pages: KvPages) -> None:
    pool = KvPool.of(pages)
    layers, heads = (pool.layers[0], pool.layers[0] + 1), (pool.heads[0], pool.heads[0] + 1)
    table = torch.zeros(1, dtype=torch.int32, device=pages.device)
    buffer = torch.empty(2 * pool.row_bytes, dtype=torch.uint8, device=pages.device)
    paged = pool.place(layers, heads, 0, table.data_ptr())
    packed = packed_place(buffer.data_ptr(), 1, 1, pool.row_bytes)
    for source, destination in ((paged, packed), (packed, paged), (paged, paged)):
        copy_rows(KvCopy(source, destination, 1, 1, 1, pool.row_bytes))
        copy_rows(KvCopy(source, destination, 1, 1, 1, pool.row_bytes), tile=FEW_TILE, num_warps=FEW_WARPS)
    _check_launches(KvCopy(paged, packed, 1, 1, 1, pool.row_bytes), buffer)


def _check_launches(copy: KvCopy, buffer: torch.Tensor) -> None:
    """See that launches without Triton do what one by Triton did, or do without them: `buffer` holds what `copy` brings."""
    global _by_driver
    expected = buffer.clone()
    try:
        for options in ({}, {"tile": FEW_TILE, "num_warps": FEW_WARPS}):
            buffer.bitwise_not_()
            copy_rows(copy, **options)
            _by_driver = _by_driver and bool(torch.equal(buffer, expected))
    except RuntimeError:
        _by_driver = False
    if not _by_driver:
        _compiled.clear()


def _numbers(place: KvPlace) -> tuple[int, ...]:
    return (
        place.address,
        place.table,
        place.layer_bytes,
        place.kv_bytes,
        place.block_bytes,
        place.head_bytes,
        place.first_token,
        place.tokens_per_block,
    )
