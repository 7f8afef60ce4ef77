"""One row times a matrix, in Triton, with what comes before and after it: for a decode step of a single request.

Such a step reads every weight once and computes next to nothing, so it is bound by memory and by the number of kernels:
the norm before a product, and the residual or the gate after it, cost nothing inside it and a launch outside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import overlaps, wait_for_kernel_before


@triton.jit
def _scale_of(x, length, eps, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, PADDED)
    wide = tl.load(x + at, mask=at < length, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide) / length + eps)


@triton.jit
def _part_of(x, weight, at, length, scale, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[at] as float32, normed and rounded as the norm's own kernel would."""
    inside = at < length
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        kind = x.dtype.element_ty
        value = (value * scale).to(kind).to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(kind).to(tl.float32)
    return value


@triton.jit
def _gemv(  # type: ignore[no-untyped-def]
    x,
    matrix,
    bias,
    norm,
    out,
    rows,
    length,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < rows
    scale = 1.0
    if NORM:
        scale = _scale_of(x, length, eps, PADDED)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = _part_of(x, norm, at, length, scale, NORM)
        tile = tl.load(
            matrix + row[:, None].to(tl.int64) * length + at[None, :],
            mask=own[:, None] & (at < length)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += tile.to(tl.float32) * value[None, :]
    result = tl.sum(acc, 1)
    kind = out.dtype.element_ty
    if BIAS:
        result += tl.load(bias + row, mask=own, other=0.0).to(tl.float32)
    if ADD:
        result = result.to(kind).to(tl.float32) + tl.load(out + row, mask=own, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(kind), mask=own)


@triton.jit
def _gated_gemv(  # type: ignore[no-untyped-def]
    x,
    matrix,
    norm,
    out,
    rows,
    length,
    eps,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < rows
    scale = _scale_of(x, length, eps, PADDED)
    gate = tl.zeros([ROWS, BLOCK], tl.float32)
    up = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = own[:, None] & (at < length)[None, :]
        value = _part_of(x, norm, at, length, scale, True)
        place = matrix + row[:, None].to(tl.int64) * length + at[None, :]
        a = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        b = tl.load(place + rows.to(tl.int64) * length, mask=inside, other=0.0, eviction_policy="evict_first")
        gate += a.to(tl.float32) * value[None, :]
        up += b.to(tl.float32) * value[None, :]
    kind = out.dtype.element_ty
    g = tl.sum(gate, 1).to(kind).to(tl.float32)
    u = tl.sum(up, 1).to(kind).to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    tl.store(out + row, (g * u).to(kind), mask=own)


def _sizes(rows: int, length: int) -> tuple[int, int]:
    """Rows of a program and elements of its loop step; tuned on an H200 (docs/log.md)."""
    if length > 8192:
        return 8, 2048
    return (4, 512) if rows <= 4096 else (2, 1024)


def gemv(
    x: Tensor,
    matrix: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    rows_each: int | None = None,
    block: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """matrix [rows, length] times x [length] into out [rows]; `norm`: of the rms norm that x first goes through.

    `add`: to what is in `out`. The rounding is that of separate kernels.
    """
    rows, length = matrix.shape
    own_rows, own_block = _sizes(rows, length)
    rows_each = own_rows if rows_each is None else rows_each
    block = own_block if block is None else block
    _gemv[(triton.cdiv(rows, rows_each),)](
        x,
        matrix,
        matrix if bias is None else bias,
        matrix if norm is None else norm,
        out,
        rows,
        length,
        eps,
        NORM=norm is not None,
        BIAS=bias is not None,
        ADD=add,
        PADDED=triton.next_power_of_2(length),
        ROWS=rows_each,
        BLOCK=block,
        num_warps=num_warps,
        **overlaps(),
    )
    return out


def gated_gemv(
    x: Tensor,
    matrix: Tensor,
    norm: Tensor,
    eps: float,
    out: Tensor,
    *,
    rows_each: int = 1,
    block: int = 512,
    num_warps: int = 4,
) -> Tensor:
    """silu(gate) · up of the normed x [length]; matrix [2 · rows, length] has gate above up; out [rows]."""
    rows, length = out.shape[-1], matrix.shape[1]
    _gated_gemv[(triton.cdiv(rows, rows_each),)](
        x,
        matrix,
        norm,
        out,
        rows,
        length,
        eps,
        PADDED=triton.next_power_of_2(length),
        ROWS=rows_each,
        BLOCK=block,
        num_warps=num_warps,
        **overlaps(),
    )
    return out
