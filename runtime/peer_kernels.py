"""Kernels in which the GPUs of one host meet and read each other's memory: sums over tensor-parallel ranks for few rows.

A message of a decode step is some hundred kilobytes: what it takes is not the link's rate but the ways across it, and
the kernels around it. Here one kernel tells the peers that the row is there, waits for theirs, adds all up, and goes on
with what a step does next.

**Who may read what, when.** Each rank has memory that its peers have open: slots for partial sums, and counters, one for
each row and rank. A program stands for a row. It advances its own counter, writes the count into its counters at the peers
(release: whoever sees it sees what earlier kernels of this stream wrote, the partial sum in the slot among it), waits
until its peers have written as much here (acquire), and reads. The counts lie on the device and go on with every launch,
so a CUDA graph replays them as it is.

**Why nobody waits at the end.** A slot may be overwritten only when no peer reads it any more. Let a rank's kernel k use a
slot, and let the next kernel of this file in its stream, k + 1, use another (`PeerReduce` has three that alternate so). What
writes the slot again comes after k + 1 in the stream, and a program of k + 1 ended only when every peer had told of
that row in its own k + 1: its own k had then ended whole, with all its reading, for kernels of a stream run one after
the other. Any one row is enough for that, so launches may differ in their number of rows, as long as the ranks agree.
All-reduces of other kinds in between only add such points.

**Why nobody waits for ever.** A program tells before it waits, and programs start in the order of their rows. Take the
lowest row that some rank has not told of: all programs before it can end, since they were told of by all, so there is
room for it. (Launches as small as these are resident as a whole anyway.) A peer that died or hangs would be waited for
without end: after `limit` looks a program gives up, says so in `failed`, which is host memory, and stops all later launches.

`memory` is a tuple of where each rank's shared memory begins here, as numbers: Triton refuses tensors whose device it cannot
query, such as a peer's memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent_launch import wait_for_kernel_before

_FIXED = ["flags", "slot", "pairs", "failed", "limit", "first", "stop_at"]


@triton.jit
def _meet(  # type: ignore[no-untyped-def]
    memory, flags, row, stop, failed, limit, RANK: tl.constexpr, TP: tl.constexpr
):
    """Tell the peers of `row`, and come back when they have told of it too."""
    own = (memory[RANK] + flags).to(tl.pointer_type(tl.int32)) + row * TP
    count = tl.load(own + RANK) + 1
    for step in tl.static_range(1, TP):
        theirs = (memory[(RANK + step) % TP] + flags).to(tl.pointer_type(tl.int32)) + row * TP
        tl.atomic_xchg(theirs + RANK, count, sem="release", scope="sys")
    for step in tl.static_range(1, TP):
        theirs = own + (RANK + step) % TP
        # An atomic, not a load: one thread looks and all hear of it, so that all threads leave the loop together.
        seen = tl.atomic_add(theirs, 0, sem="acquire", scope="sys")
        looks = 0
        while (seen - count < 0) & (looks < limit):  # the difference: counts may wrap around
            seen = tl.atomic_add(theirs, 0, sem="acquire", scope="sys")
            looks += 1
            if looks % 1024 == 0:
                if tl.atomic_add(stop, 0, sem="relaxed", scope="gpu") != 0:
                    looks = limit
        if seen - count < 0:
            tl.atomic_xchg(stop, 1, sem="relaxed", scope="gpu")
            tl.store(failed.to(tl.pointer_type(tl.int32)), 1)
    tl.debug_barrier()  # what the thread that looked may see now, all threads may
    tl.store(own + RANK, count)


@triton.jit(do_not_specialize=_FIXED)
def sum_and_norm(  # type: ignore[no-untyped-def]
    memory,
    flags: tl.int64,
    slot: tl.int64,
    stop,
    failed: tl.int64,
    limit: tl.int32,
    residual,
    weight,
    out,
    hidden,
    eps,
    ADD: tl.constexpr,
    RANK: tl.constexpr,
    TP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one row: residual = (residual if ADD) + the sum of all ranks' `slot`; out = its norm · weight.

    The sum is taken in float32 in the order of the ranks and rounded once: all ranks get the same, bit by bit.
    """
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    kind = residual.dtype.element_ty
    scales = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = tl.load(residual + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    _meet(memory, flags, row, stop, failed, limit, RANK, TP)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(TP):
        part = tl.multiple_of((memory[peer] + slot).to(tl.pointer_type(kind)), 16) + row * hidden + at
        # Past the first-level cache: it may hold what lay there a layer before.
        total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    value = total.to(kind)
    if ADD:
        value = (value.to(tl.float32) + before).to(kind)
    tl.store(residual + row * hidden + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    normed = (wide * scale).to(kind).to(tl.float32)
    tl.store(out + row * hidden + at, (normed * scales).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_FIXED)
def embed_part(  # type: ignore[no-untyped-def]
    tokens, embedding, out, first: tl.int32, stop_at: tl.int32, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Of one row: its token's embedding if it is one of [first, stop_at), which `embedding` holds, else zeros."""
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    values = tl.zeros([BLOCK], out.dtype.element_ty)
    if (token >= first) & (token < stop_at):
        values = tl.load(embedding + (token - first).to(tl.int64) * hidden + at, mask=at < hidden, other=0.0)
    tl.store(out + row * hidden + at, values, mask=at < hidden)


@triton.jit(do_not_specialize=_FIXED)
def argmax_of_all(  # type: ignore[no-untyped-def]
    best,
    index,
    out,
    memory,
    flags: tl.int64,
    pairs: tl.int64,
    stop,
    failed: tl.int64,
    limit: tl.int32,
    first: tl.int32,
    max_rows,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    TP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one row: where all ranks' logits are greatest, the first of equals, from the best of each of this rank's splits.

    Each rank writes its best logit and that token's id to all, its own `first` added, and each picks the winner for
    itself. What is written alternates between two places, as the count is even or odd, for the same reason as the slots do.
    """
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    values = tl.load(best + row * SPLITS + split)
    places = tl.load(index + row * SPLITS + split)
    top = tl.max(values, 0)
    lowest = tl.min(tl.where(values == top, places, 2147483647), 0) + first
    count = tl.load((memory[RANK] + flags).to(tl.pointer_type(tl.int32)) + row * TP + RANK) + 1
    place = pairs + (((count & 1) * max_rows + row) * TP + RANK) * 8
    for peer in tl.static_range(TP):
        there = memory[peer] + place
        tl.store(there.to(tl.pointer_type(tl.float32)), top)
        tl.store((there + 4).to(tl.pointer_type(tl.int32)), lowest)
    tl.debug_barrier()  # whichever threads wrote, they have before one tells
    _meet(memory, flags, row, stop, failed, limit, RANK, TP)
    own = memory[RANK] + pairs + ((count & 1) * max_rows + row) * TP * 8
    winner = -float("inf")
    token = first
    for peer in tl.static_range(TP):
        value = tl.load((own + peer * 8).to(tl.pointer_type(tl.float32)), cache_modifier=".cg")
        where = tl.load((own + peer * 8 + 4).to(tl.pointer_type(tl.int32)), cache_modifier=".cg")
        is_better = (value > winner) | (peer == 0)
        token = tl.where(is_better, where, token)
        winner = tl.where(is_better, value, winner)
    tl.store(out + row, token.to(tl.int64))
