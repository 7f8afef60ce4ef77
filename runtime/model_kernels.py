"""The small kernels of a step, in Triton: each reads and writes its tensors once.

On Hopper and later each is launched while the kernel before it still runs (programmatic dependent launch), and waits
inside for that one's results: a step is some 400 kernels, and the device would idle for a microsecond between any two.

The matrices go to cuBLAS through torch; what lies between them is bound by memory, so that every tensor that is not
materialised is time saved. All kernels also run in Triton's interpreter, on which the tests compare them with torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import overlaps, wait_for_kernel_before


@triton.jit
def _add_rms_norm(x, residual, weight, out, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(x + row * hidden + at, mask=inside, other=0.0)
    if ADD:
        value = (
            value.to(tl.float32) + tl.load(residual + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
        ).to(x.dtype.element_ty)
        tl.store(residual + row * hidden + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + at, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x / rms(x) · weight of each row of x [rows, hidden], into `out`."""
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(rows,)](
        x, x, weight, out, hidden, eps, ADD=False, BLOCK=block, num_warps=norm_warps(block), **overlaps()
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """residual += x, then `rms_norm` of the residual into `out` (which may be x); [rows, hidden] each."""
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(rows,)](
        x, residual, weight, out, hidden, eps, ADD=True, BLOCK=block, num_warps=norm_warps(block), **overlaps()
    )
    return out


def norm_warps(block: int) -> int:
    """Warps of a program that norms a row of `block` elements."""
    return max(1, min(16, block // 512))


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    gated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + at, (gated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """silu(gate) · up of gate_up [rows, 2 · inner] into out [rows, inner]."""
    rows, inner = out.shape
    _silu_mul[(rows, triton.cdiv(inner, 1024))](gate_up, out, inner, BLOCK=1024, num_warps=4, **overlaps())
    return out


@triton.jit
def _normed_halves(first, second, weight, half, at, inside, eps, dim, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of some heads as float32, divided by their rms and scaled where the model norms its heads."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / dim + eps)[:, None]
        kind = weight.dtype.element_ty
        first = (first * scale).to(kind).to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        second = (second * scale).to(kind).to(tl.float32) * tl.load(weight + half + at, mask=inside, other=0.0).to(
            tl.float32
        )
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    return first, second


@triton.jit
def _rope_write(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    sequences,
    tables,
    table_width,
    cos,
    sin,
    q_norm,
    k_norm,
    k_pages,
    v_pages,
    block_stride,
    eps,
    num_query,
    num_kv,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    if position >= 0:
        half: tl.constexpr = DIM // 2
        sequence = tl.load(sequences + row).to(tl.int64)
        block = tl.load(tables + sequence * table_width + position // TOKENS).to(tl.int64)
        offset = position % TOKENS
        at = tl.arange(0, HALF)[None, :]
        inside = at < half
        c = tl.load(cos + position.to(tl.int64) * half + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + position.to(tl.int64) * half + at, mask=inside, other=0.0).to(tl.float32)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        own = qkv + row * (num_query + 2 * num_kv) * DIM
        # queries and keys turn in place
        turned = (head < num_query + num_kv) & inside
        first = tl.load(own + head * DIM + at, mask=turned, other=0.0)
        second = tl.load(own + head * DIM + half + at, mask=turned, other=0.0)
        if NORM:
            qa, qb = _normed_halves(first, second, q_norm, half, at, inside, eps, DIM, NORM)
            ka, kb = _normed_halves(first, second, k_norm, half, at, inside, eps, DIM, NORM)
            a, b = tl.where(head < num_query, qa, ka), tl.where(head < num_query, qb, kb)
        else:
            a, b = first.to(tl.float32), second.to(tl.float32)
        kind = qkv.dtype.element_ty
        left, right = (a * c - b * s).to(kind), (b * c + a * s).to(kind)
        tl.store(own + head * DIM + at, left, mask=turned)
        tl.store(own + head * DIM + half + at, right, mask=turned)
        is_key = turned & (head >= num_query)
        page = block * block_stride + ((head - num_query) * TOKENS + offset) * DIM
        tl.store(k_pages + page + at, left, mask=is_key)
        tl.store(k_pages + page + half + at, right, mask=is_key)
        is_value = (head >= num_query + num_kv) & (head < num_query + 2 * num_kv) & inside
        page = block * block_stride + ((head - num_query - num_kv) * TOKENS + offset) * DIM
        tl.store(v_pages + page + at, tl.load(own + head * DIM + at, mask=is_value), mask=is_value)
        tl.store(v_pages + page + half + at, tl.load(own + head * DIM + half + at, mask=is_value), mask=is_value)


def rope_write(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    tables: Tensor,
    rotation: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    k_pages: Tensor,
    v_pages: Tensor,
    num_query: int,
    eps: float,
) -> None:
    """Norm (where `norms` has the weights of q and k) and rotate q and k of qkv in place; write k and v to their pages.

    qkv [rows, (query + 2 · KV heads) · head_dim]; positions int32 [rows], negative for a row that is padding;
    sequences int32 [rows], the row of `tables` (int32 [sequences, width], block ids) that the token belongs to;
    rotation: cos and sin [positions, head_dim / 2]; k_pages, v_pages [blocks, KV heads, tokens, head_dim], of the same
    strides, each block contiguous.
    """
    _, num_kv, tokens, dim = k_pages.shape
    rows = qkv.shape[0]
    heads = 16
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    grid = (rows, triton.cdiv(num_query + 2 * num_kv, heads))
    _rope_write[grid](
        qkv,
        positions,
        sequences,
        tables,
        tables.stride(0),
        rotation[0],
        rotation[1],
        q_norm,
        k_norm,
        k_pages,
        v_pages,
        k_pages.stride(0),
        eps,
        num_query,
        num_kv,
        TOKENS=tokens,
        DIM=dim,
        HALF=triton.next_power_of_2(dim // 2),
        HEADS=heads,
        NORM=norms is not None,
        num_warps=2,
        **overlaps(),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_pages(  # type: ignore[no-untyped-def]
    pages,
    table,
    out,
    num_tokens,
    num_kv,
    block_stride,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    inside = token < num_tokens
    block = tl.load(table + token // TOKENS, mask=inside, other=0).to(tl.int64)
    source = block * block_stride + (head * TOKENS + token % TOKENS) * DIM
    target = (token.to(tl.int64) * num_kv + head) * DIM
    at = tl.arange(0, DIM)
    values = tl.load(pages + source[:, None] + at[None, :], mask=inside[:, None], other=0.0)
    tl.store(out + target[:, None] + at[None, :], values, mask=inside[:, None])


def gather_pages(pages: Tensor, table: Tensor, out: Tensor) -> None:
    """Copy one sequence's pages [blocks, KV heads, tokens, head_dim] along `table` into out [tokens, KV heads, head_dim].

    Each block of the pages is contiguous.
    """
    num_tokens, num_kv, dim = out.shape
    grid = (triton.cdiv(num_tokens, 32), num_kv)
    _gather_pages[grid](
        pages,
        table,
        out,
        num_tokens,
        num_kv,
        pages.stride(0),
        TOKENS=pages.shape[2],
        DIM=dim,
        BLOCK=32,
        num_warps=4,
        **overlaps(),
    )


@triton.jit(do_not_specialize=["num"])
def _advance(tokens, positions, sampled, COUNT: tl.constexpr, num, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_kernel_before(PDL)
    at = tl.arange(0, COUNT)
    inside = at < num
    position = tl.load(positions + at, mask=inside, other=-1)
    tl.store(tokens + at, tl.load(sampled + at, mask=inside, other=0).to(tl.int32), mask=inside & (position >= 0))
    tl.store(positions + at, position + 1, mask=inside & (position >= 0))


def advance(tokens: Tensor, positions: Tensor, sampled: Tensor) -> None:
    """tokens = sampled and positions += 1 for every row that is no padding; [rows], int32, int32 and int64."""
    num = sampled.shape[0]
    _advance[(1,)](tokens, positions, sampled, COUNT=triton.next_power_of_2(num), num=num, **overlaps())


@triton.jit
def _argmax_part(logits, stride, num, best, index, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    per_split = tl.cdiv(num, SPLITS)
    start = split * per_split
    stop = tl.minimum(start + per_split, num)
    top = -float("inf")
    where = start
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + at, mask=at < stop, other=-float("inf")).to(tl.float32)
        highest = tl.max(values, 0)
        place = first + tl.argmax(values, 0, tie_break_left=True)
        where = tl.where(highest > top, place, where)
        top = tl.maximum(highest, top)
    tl.store(best + row * SPLITS + split, top)
    tl.store(index + row * SPLITS + split, where)


@triton.jit
def _argmax_merge(best, index, out, SPLITS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    values = tl.load(best + row * SPLITS + split)
    places = tl.load(index + row * SPLITS + split)
    lowest = tl.min(tl.where(values == tl.max(values, 0), places, 2147483647), 0)
    tl.store(out + row, lowest.to(tl.int64))


def argmax_parts(logits: Tensor, num: int, splits: int) -> tuple[Tensor, Tensor]:
    """The greatest of each row's first `num` logits in each of `splits` parts of them, and where: float32 and int32."""
    rows = logits.shape[0]
    best = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    _argmax_part[(rows, splits)](
        logits, logits.stride(0), num, best, index, SPLITS=splits, BLOCK=1024, num_warps=4, **overlaps()
    )
    return best, index


def argmax_rows(logits: Tensor, num: int) -> Tensor:
    """int64 [rows]: where each row's first `num` logits are greatest, the first of equals. torch's takes 4 times as long."""
    rows, splits = logits.shape[0], 32
    best, index = argmax_parts(logits, num, splits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _argmax_merge[(rows,)](best, index, out, SPLITS=splits, num_warps=1, **overlaps())
    return out
