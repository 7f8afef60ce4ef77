"""The decode batch as the device holds it: next tokens, positions and block tables in fixed places, one slot a request.

A CUDA graph reads and writes these very tensors, so they are made once. Between two plans only what the plan changed is
written again; within a span the device advances them by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .model_batch import Decode, DecodeBatch


class DeviceBatch:
    """Slots 0 … n - 1 are the batch, without holes; the next `max_chunks` rows of `tables` are for a step's chunks.

    `tokens`, `positions`: int32 [max_batch]; a slot beyond the batch has position -1. `tables`: int32 [max_batch +
    max_chunks, width], block ids. Nothing may be in flight when `sync` or `set_chunks` is called.
    """

    def __init__(self, max_batch: int, max_chunks: int, width: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.max_batch = max_batch
        self._state = torch.zeros((2, max_batch), dtype=torch.int32, device=device)
        self._state[1] = -1
        self.tables = torch.zeros((max_batch + max_chunks, width), dtype=torch.int32, device=device)
        self._host_state = torch.zeros((2, max_batch), dtype=torch.int32, pin_memory=pinned)
        rows = 2 * (max_batch + max_chunks)  # in two halves, written by turns: a launch may do both
        self._host_tables = torch.zeros((rows, width + 1), dtype=torch.int32, pin_memory=pinned)
        self._half = 0
        self.sequences = torch.arange(max_batch, dtype=torch.int32, device=device)
        self.decodes: list[Decode] = []  # by slot
        self._slot_of: dict[int, int] = {}

    @property
    def tokens(self) -> Tensor:
        return self._state[0]

    @property
    def positions(self) -> Tensor:
        return self._state[1]

    def clear(self) -> None:
        """Forget the batch."""
        self.decodes.clear()
        self._slot_of.clear()

    def sync(self, batch: DecodeBatch) -> None:
        """Take over what has changed in `batch` since the last call."""
        left, changed = batch.take_changes()
        dirty = {self._slot_of[request_id] for request_id in changed if request_id in self._slot_of}
        for request_id in left:
            slot = self._slot_of.pop(request_id, None)
            if slot is None:
                continue
            last = self.decodes.pop()
            if last.request_id != request_id:  # the last one moves into the hole
                self.decodes[slot] = last
                self._slot_of[last.request_id] = slot
                dirty.add(slot)
            dirty.discard(len(self.decodes))
        for request_id in changed:
            if request_id not in self._slot_of and request_id in batch:
                slot = self._slot_of[request_id] = len(self.decodes)
                self.decodes.append(batch[request_id])
                dirty.add(slot)
        for slot in dirty:
            self.decodes[slot] = batch[self.decodes[slot].request_id]
        self._write_tables([(slot, self.decodes[slot].blocks) for slot in sorted(dirty)])
        tokens, positions = self._host_state.numpy()
        num = len(self.decodes)
        tokens[:num] = [decode.token for decode in self.decodes]
        positions[:num] = [decode.num_kv_tokens for decode in self.decodes]
        positions[num:] = -1
        self._state.copy_(self._host_state, non_blocking=True)

    def set_chunks(self, tables: list[tuple[int, ...]]) -> list[Tensor]:
        """Put these chunks' block tables below the batch's; the device's row of each, as long as its blocks."""
        rows = [(self.max_batch + i, blocks) for i, blocks in enumerate(tables)]
        self._write_tables(rows)
        return [self.tables[row, : len(blocks)] for row, blocks in rows]

    def _write_tables(self, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        """One copy to the device for all of them, whose first columns say where each goes, and one there."""
        if not rows:
            return
        width = max(len(blocks) for _, blocks in rows)
        self._half = 1 - self._half
        half = self._host_tables.view(2, -1)[self._half]
        packed = half[: len(rows) * (width + 1)].view(len(rows), width + 1)
        values = packed.numpy()
        for i, (row, blocks) in enumerate(rows):
            values[i, 0] = row
            values[i, 1 : len(blocks) + 1] = blocks
            values[i, len(blocks) + 1 :] = 0
        moved = packed.to(self.tables.device, non_blocking=True)
        self.tables[:, :width].index_copy_(0, moved[:, 0].long(), moved[:, 1:])
