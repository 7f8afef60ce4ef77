"""Sums over the tensor-parallel ranks of one host, through memory that each of them has open of the others.

For the few rows of a decode step, where NCCL's latency and the kernels around it are what costs; see `peer_kernels` for how
the ranks meet and why nothing is read too early or overwritten too soon. Prompts have more bytes, and stay with NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
import triton
from torch import Tensor

from .dependent_launch import overlaps
from .model_kernels import argmax_parts, norm_warps
from .peer_kernels import argmax_of_all, embed_part, sum_and_norm

# Slots of partial sums. A step uses them in this order, again and again: no two launches that follow each other share one.
EMBEDDED: Final = 0
ATTENDED: Final = 1
GATED: Final = 2
_NUM_SLOTS: Final = 3
_SPLITS: Final = 32
_ALIGN: Final = 256
_MOST_BYTES: Final = 4 << 20  # read from peers for one sum: with more, two-step algorithms such as NCCL's move less
_MOST_ROWS: Final = 1024
LOOKS: Final = 1 << 27  # at a count before a program gives up: a minute or more


class PeerReduceError(RuntimeError):
    """A peer did not come to a sum: it died or hangs. What was computed since is of no use."""


class PeerLayout:
    """Where things lie in the memory that a rank shares. Equal on all ranks."""

    def __init__(self, tp: int, hidden_size: int, dtype: torch.dtype, max_rows: int) -> None:
        self.tp: Final = tp
        self.hidden_size: Final = hidden_size
        self.dtype: Final = dtype
        self.max_rows: Final = max_rows
        counters = max_rows * tp * 4
        self.sum_flags: Final = 0
        self.argmax_flags: Final = counters
        self.pairs: Final = 2 * counters
        self._slots = -(-(self.pairs + 2 * max_rows * tp * 8) // _ALIGN) * _ALIGN
        self._slot_bytes = -(-max_rows * hidden_size * dtype.itemsize // _ALIGN) * _ALIGN
        self.nbytes: Final = self._slots + _NUM_SLOTS * self._slot_bytes

    def slot(self, which: int) -> int:
        """Bytes before a slot, which is [max_rows, hidden_size]."""
        return self._slots + which * self._slot_bytes


def most_rows(tp: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Rows, `_MOST_ROWS` at most, of which a rank reads `_MOST_BYTES` at most from its peers."""
    return max(1, min(_MOST_ROWS, _MOST_BYTES // ((tp - 1) * hidden_size * dtype.itemsize)))


class PeerReduce:
    """One rank's end. `memory`: its own shared bytes, zeros at first; `addresses`: where each rank's are, seen from here.

    All ranks call the same methods with as many rows in the same order, on one stream. `check` tells of a peer that did not
    come. A slot is written by whoever computes the partial sum (`slot`), and then summed once.
    """

    def __init__(
        self, layout: PeerLayout, memory: Tensor, addresses: Sequence[int], rank: int, looks: int = LOOKS
    ) -> None:
        if memory.numel() < layout.nbytes or len(addresses) != layout.tp:
            raise ValueError(f"{memory.numel()} bytes and {len(addresses)} ranks for {layout.nbytes} and {layout.tp}")
        self.layout: Final = layout
        self.max_rows: Final = layout.max_rows
        self._memory = memory
        self._rank = rank
        self._limit = looks
        device = memory.device
        self._addresses = tuple(addresses)
        self._stop = torch.zeros(1, dtype=torch.int32, device=device)
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._word = self._failed.numpy()
        size = layout.max_rows * layout.hidden_size * layout.dtype.itemsize
        self._slots = [
            memory[layout.slot(i) : layout.slot(i) + size].view(layout.dtype).view(layout.max_rows, layout.hidden_size)
            for i in range(_NUM_SLOTS)
        ]

    def slot(self, which: int, rows: int) -> Tensor:
        """Where this rank's part of a sum [rows, hidden_size] is to be written."""
        return self._slots[which][:rows]

    def add_rms_norm(self, which: int, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """residual += the sum of all ranks' slot, then its norm into `out`; [rows, hidden_size] each."""
        self._sum(which, residual, weight, eps, out, add=True)

    def rms_norm(self, which: int, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """residual = the sum of all ranks' slot, then its norm into `out`; [rows, hidden_size] each."""
        self._sum(which, residual, weight, eps, out, add=False)

    def _sum(self, which: int, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, add: bool) -> None:
        rows, hidden = residual.shape
        block = triton.next_power_of_2(hidden)
        sum_and_norm[(rows,)](
            self._addresses,
            self.layout.sum_flags,
            self.layout.slot(which),
            self._stop,
            self._failed.data_ptr(),
            self._limit,
            residual,
            weight,
            out,
            hidden,
            eps,
            ADD=add,
            RANK=self._rank,
            TP=self.layout.tp,
            BLOCK=block,
            # One wide load from each rank a thread, so that all are on their way together: a second one waited for the first.
            num_warps=max(1, min(32, block // 256)),
            **overlaps(),
        )

    def embed(self, tokens: Tensor, embedding: Tensor, vocab: tuple[int, int]) -> None:
        """This rank's part of the tokens' embeddings into its slot: of those in `vocab`, whose rows `embedding` has."""
        hidden = self.layout.hidden_size
        block = triton.next_power_of_2(hidden)
        embed_part[(tokens.shape[0],)](
            tokens,
            embedding,
            self._slots[EMBEDDED],
            vocab[0],
            vocab[1],
            hidden,
            BLOCK=block,
            num_warps=norm_warps(block),
            **overlaps(),
        )

    def argmax(self, logits: Tensor, vocab: tuple[int, int]) -> Tensor:
        """int64 [rows]: the token with the greatest logit of all ranks', where `logits` begin with those of `vocab`."""
        rows = logits.shape[0]
        best, index = argmax_parts(logits, vocab[1] - vocab[0], _SPLITS)
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        argmax_of_all[(rows,)](
            best,
            index,
            out,
            self._addresses,
            self.layout.argmax_flags,
            self.layout.pairs,
            self._stop,
            self._failed.data_ptr(),
            self._limit,
            vocab[0],
            self.max_rows,
            SPLITS=_SPLITS,
            RANK=self._rank,
            TP=self.layout.tp,
            num_warps=1,
            **overlaps(),
        )
        return out

    # ---- the end -----------------------------------------------------------------------------------------------------

    @contextmanager
    def limited(self, looks: int) -> Iterator[None]:
        """What is launched inside looks so often at a count before it gives up; 0 never waits."""
        before, self._limit = self._limit, looks
        try:
            yield
        finally:
            self._limit = before

    def forgive(self) -> None:
        """Forget what was given up. No rank may be inside a sum, and all must have come to the same ones."""
        self._stop.zero_()
        self._word[0] = 0

    def check(self) -> None:
        """Raises PeerReduceError if a launch that has ended gave a peer up."""
        if self._word[0]:
            raise PeerReduceError(
                "a rank of this executor did not come to a sum that the others waited for: it died or hangs"
            )

    def stop(self) -> None:
        """Make what waits for a peer give up, within a millisecond for each launch."""
        if self._stop.device.type == "cuda":
            one = torch.ones(1, dtype=torch.int32, pin_memory=True)
            with torch.cuda.stream(torch.cuda.Stream(self._stop.device)):
                self._stop.copy_(one, non_blocking=True)  # by a copy engine: the multiprocessors may be taken
                torch.cuda.current_stream().synchronize()
        else:
            self._stop.fill_(1)
