"""Attention of one new token per sequence over its pages: split-KV flash decoding (Dao et al., 2023), in Triton.

A sequence's KV is cut into at most `max_splits` parts, so that one long sequence does not wait for one program. A part has at
least `min_split` tokens in the smallest batches and in the larger of the small ones; between them, and in large ones, as many
as make some waves of programs of all KV there is, which one program finds out once a step. The parts are merged by their
log-sum-exp, in a small batch by the program that ends last, in a large one, where that costs the many programs registers, by
a kernel of its own. All sizes of the launch are fixed by the batch size alone, so that a CUDA graph can hold it while lengths
grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import overlaps, wait_for_kernel_before


@triton.jit
def _even_part(  # type: ignore[no-untyped-def]
    span, cut, SPLITS: tl.constexpr, BLOCK: tl.constexpr, NOT_LONGER: tl.constexpr
):
    """Tokens of each of the parts, about as long as `cut`, or at most so long, that a sequence is cut into."""
    parts = tl.cdiv(span, cut) if NOT_LONGER else (span + cut // 2) // cut
    parts = tl.minimum(tl.maximum(parts, 1), SPLITS)
    return tl.cdiv(tl.cdiv(span, parts), BLOCK) * BLOCK


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    positions,
    tables,
    table_width,
    k_pages,
    v_pages,
    block_stride,
    partial,
    sums,
    arrived,
    cut,
    out,
    scale,
    num_kv,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    FUSED: tl.constexpr,
    BY_ALL: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    # In this order what has nothing to do comes last: first, it kept 64 × 1,024 tokens waiting for 27 of 93 µs.
    split = tl.program_id(2)
    length = tl.load(positions + sequence) + 1
    oldest = tl.maximum(length - window, 0) // BLOCK * BLOCK
    span = length - oldest
    if BY_ALL:
        per_split = _even_part(span, tl.load(cut), SPLITS, BLOCK, FUSED)
    else:
        per_split = tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(span, SPLITS), BLOCK) * BLOCK)
    start = oldest + split * per_split
    stop = tl.minimum(start + per_split, length)
    row = tl.arange(0, ROWS)
    at = tl.arange(0, DIM)
    in_group = row < GROUP
    if (start < stop) | (split == 0):
        query = tl.load(
            q + sequence * q_stride + (head * GROUP + row)[:, None] * DIM + at[None, :],
            mask=in_group[:, None],
            other=0.0,
        )
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        table = tables + sequence * table_width
        for first in range(start, stop, BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < stop
            block = tl.load(table + token // TOKENS, mask=inside, other=0).to(tl.int64)
            page = block * block_stride + (head * TOKENS + token % TOKENS) * DIM
            k = tl.load(k_pages + page[:, None] + at[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(v_pages + page[:, None] + at[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where((inside & (token >= length - window))[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A block that the window hides whole leaves -inf - -inf, which must count as nothing.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(weights, 1)
            acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        if span <= per_split:  # the only part
            safe = tl.where(total > 0, total, 1.0)
            tl.store(
                out + ((sequence * num_kv + head) * GROUP + row)[:, None] * DIM + at[None, :],
                (acc / safe[:, None]).to(out.dtype.element_ty),
                mask=in_group[:, None],
            )
        else:
            slot = ((sequence * num_kv + head) * SPLITS + split) * GROUP + row
            tl.store(partial + slot[:, None] * DIM + at[None, :], acc, mask=in_group[:, None])
            tl.store(sums + slot * 2, top, mask=in_group)
            tl.store(sums + slot * 2 + 1, total, mask=in_group)
            if FUSED:
                tl.debug_barrier()  # all of this program's stores come before its arrival
                pair = sequence * num_kv + head
                parts = tl.cdiv(span, per_split)
                if tl.atomic_add(arrived + pair, 1) == parts - 1:
                    tl.store(arrived + pair, 0)
                    _merge_parts(partial, sums, out, pair, parts, GROUP, DIM, SPLITS, AT_ONCE, GROUP_PADDED)


@triton.jit
def _merge_parts(  # type: ignore[no-untyped-def]
    partial,
    sums,
    out,
    pair,
    parts,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
):
    member = tl.arange(0, GROUP_PADDED)
    at = tl.arange(0, DIM)
    highest = tl.full([GROUP_PADDED], -float("inf"), tl.float32)
    whole = tl.zeros([GROUP_PADDED], tl.float32)
    merged = tl.zeros([GROUP_PADDED, DIM], tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        there = (part < parts)[:, None] & (member < GROUP)[None, :]
        slots = (pair * SPLITS + part[:, None]) * GROUP + member[None, :]
        # Past the first-level cache: it may hold what a layer before left there.
        tops = tl.load(sums + slots * 2, mask=there, other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(sums + slots * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial + slots[:, :, None] * DIM + at[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(tops, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.where(there, tl.exp2(tops - shift[None, :]), 0.0)
        fade = tl.exp2(highest - shift)
        merged = merged * fade[:, None] + tl.sum(values * share[:, :, None], 0)
        whole = whole * fade + tl.sum(totals * share, 0)
        highest = higher
    whole = tl.where(whole > 0, whole, 1.0)
    tl.store(
        out + (pair * GROUP + member)[:, None] * DIM + at[None, :],
        (merged / whole[:, None]).to(out.dtype.element_ty),
        mask=(member < GROUP)[:, None],
    )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    positions,
    partial,
    sums,
    cut,
    out,
    num_kv,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(positions + sequence) + 1
    oldest = tl.maximum(length - window, 0) // BLOCK * BLOCK
    span = length - oldest
    per_split = _even_part(span, tl.load(cut), SPLITS, BLOCK, False)
    if span > per_split:
        pair = sequence * num_kv + tl.program_id(0)
        _merge_parts(partial, sums, out, pair, tl.cdiv(span, per_split), GROUP, DIM, SPLITS, AT_ONCE, GROUP_PADDED)


@triton.jit(do_not_specialize=["batch"])
def _find_cut(  # type: ignore[no-untyped-def]
    positions,
    batch,
    num_kv,
    window,
    programs,
    cut,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_kernel_before(PDL)
    total = 0
    for first in range(0, batch, WIDTH):
        place = first + tl.arange(0, WIDTH)
        length = tl.load(positions + place, mask=place < batch, other=-1) + 1
        total += tl.sum(tl.minimum(length, window), 0)
    tl.store(cut, tl.maximum(LEAST, tl.cdiv(total * num_kv, programs)))


_LEAST_CUT = 512  # tokens: shorter parts cost more in partial results than they balance (33 × 300: 28 µs, whole 18)
_WAVES = (
    4  # programs a multiprocessor, in all: sequences of one length make whole parts up to 1,024 tokens and 64 of them
)


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """How a launch is cut: tokens per loop step, least tokens of a part, most parts, and the launch's own knobs.

    `fused`: the merge is done by the last part, `at_once` parts at a time. `by_all`: a part's tokens are found on the
    device, by all KV of the batch, and `min_split` are the least; else a part has so many, or a sequence's over `max_splits`.
    """

    block: int = 64
    min_split: int = 512
    max_splits: int = 16
    num_warps: int = 4
    num_stages: int = 3
    fused: bool = False
    by_all: bool = True
    at_once: int = 32


def split_sizes(batch: int, num_kv: int, num_sms: int = 132, group: int = 4) -> SplitSizes:
    """Parts such that a context of about 1,000 tokens makes one or two waves of programs, and 32 times that still does.

    Tuned on an H200 over pages of 32 tokens, 8 KV heads of 128, 4 query heads each (docs/log.md): few programs want few
    warps each. A merge of n parts at once takes registers in proportion to n, and 2 µs for each round where it is not all.
    """
    wanted = max(1, (4 * num_sms) // max(1, batch * num_kv))  # parts per sequence
    min_split = max(64, min(2048, triton.next_power_of_2(1024 // wanted)))
    if batch * num_kv >= 2 * num_sms:
        return SplitSizes(64, _LEAST_CUT, 8, num_warps=8, num_stages=2)
    room = 2 * num_sms  # of one sequence's parts: Triton's interpreter runs one program after the other
    if wanted >= 16:
        most = min(32, room, triton.next_power_of_2(wanted))
        return SplitSizes(64, min_split, most, 4, num_stages=2, fused=True, by_all=False)
    if wanted >= 4:  # one long sequence among few: 12,000 tokens and 11 × 300 in 35 µs, 55 in eight parts each
        at_once = max(1, 64 // max(4, triton.next_power_of_2(group)))
        return SplitSizes(64, min_split, min(16, room), 4, num_stages=3, fused=True, at_once=at_once)
    return SplitSizes(64, min_split, min(32, room), 4, num_stages=2, fused=True, by_all=False, at_once=8)


class DecodeAttention:
    """Workspace and launch for up to `max_batch` sequences of one rank's heads. Not for two streams at once."""

    def __init__(
        self, max_batch: int, num_query: int, num_kv: int, dim: int, window: int | None, device: torch.device
    ) -> None:
        self._group = num_query // num_kv
        self._num_kv = num_kv
        self._dim = dim
        self._window = window if window is not None else 1 << 30
        self._scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp
        self._num_sms = 132 if device.type == "cuda" else 4
        slots = max(b * self.sizes(b).max_splits for b in range(1, max_batch + 1)) * num_query
        self._partial = torch.empty(slots * dim, dtype=torch.float32, device=device)
        self._sums = torch.empty(slots * 2, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_batch * num_kv, dtype=torch.int32, device=device)
        self._cut = torch.full((1,), _LEAST_CUT, dtype=torch.int32, device=device)

    def sizes(self, batch: int) -> SplitSizes:
        """How a launch for `batch` sequences is cut."""
        return split_sizes(batch, self._num_kv, self._num_sms, self._group)

    def find_cut(self, positions: Tensor, sizes: SplitSizes | None = None) -> None:
        """Once a step, before its layers: how long parts are to be, by all KV of the batch.

        Sequences of unlike lengths would wait for the longest if each were one part; of one length they are one part each.
        """
        batch = positions.shape[0]
        sizes = self.sizes(batch) if sizes is None else sizes
        if sizes.by_all:
            programs, width = _WAVES * self._num_sms, min(1024, triton.next_power_of_2(batch))
            more = {"LEAST": sizes.min_split, "WIDTH": width, "num_warps": 1, **overlaps()}
            _find_cut[(1,)](positions, batch, self._num_kv, self._window, programs, self._cut, **more)

    def __call__(
        self,
        q: Tensor,
        positions: Tensor,
        tables: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        out: Tensor,
        sizes: SplitSizes | None = None,
    ) -> None:
        """out[i] = attention of q[i] over tokens 0 … positions[i] of tables[i]; a row of position -1 gives zeros.

        q [sequences, ≥ query heads · head_dim] with rows of any stride; positions int32 [sequences]; tables int32
        [sequences, width]; k_pages, v_pages [blocks, KV heads, tokens, head_dim], each block
        contiguous; out [sequences, query heads · head_dim], contiguous. `find_cut` comes before.
        """
        batch = positions.shape[0]
        sizes = self.sizes(batch) if sizes is None else sizes
        shared = {"GROUP": self._group, "DIM": self._dim, "BLOCK": sizes.block}
        shared["SPLITS"] = sizes.max_splits
        shared["AT_ONCE"] = min(sizes.at_once, triton.next_power_of_2(sizes.max_splits))
        shared["GROUP_PADDED"] = triton.next_power_of_2(self._group)
        _split[(self._num_kv, batch, sizes.max_splits)](
            q,
            q.stride(0),
            positions,
            tables,
            tables.stride(0),
            k_pages,
            v_pages,
            k_pages.stride(0),
            self._partial,
            self._sums,
            self._arrived,
            self._cut,
            out,
            self._scale,
            self._num_kv,
            self._window,
            ROWS=max(16, triton.next_power_of_2(self._group)),
            TOKENS=k_pages.shape[2],
            MIN_SPLIT=sizes.min_split,
            FUSED=sizes.fused,
            BY_ALL=sizes.by_all,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=sizes.num_warps,
            **overlaps(),
            num_stages=sizes.num_stages,
            **shared,
        )
        if not sizes.fused:
            _merge[(self._num_kv, batch)](
                positions,
                self._partial,
                self._sums,
                self._cut,
                out,
                self._num_kv,
                self._window,
                num_warps=4,
                **overlaps(),
                **shared,
            )
