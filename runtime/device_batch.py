"""The decode batch as the device holds it: next tokens, positions and block tables in fixed places, one slot a request.

A CUDA graph reads and writes these very tensors, so they are made once. Between two plans only what the plan changed is
written again; within a span the device advances them by itself.
"""

from __future__ import annotations

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
        self._host_tables = torch.zeros((max_batch + max_chunks, width), dtype=torch.int32, pin_memory=pinned)
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
        for slot in sorted(dirty):
            self.decodes[slot] = decode = batch[self.decodes[slot].request_id]
            self._write_table(slot, decode.blocks)
        tokens, positions = self._host_state.numpy()
        num = len(self.decodes)
        tokens[:num] = [decode.token for decode in self.decodes]
        positions[:num] = [decode.num_kv_tokens for decode in self.decodes]
        positions[num:] = -1
        self._state.copy_(self._host_state, non_blocking=True)

    def set_chunks(self, tables: list[tuple[int, ...]]) -> list[Tensor]:
        """Put these chunks' block tables below the batch's; the device's row of each, as long as its blocks."""
        rows = []
        for i, blocks in enumerate(tables):
            self._write_table(self.max_batch + i, blocks)
            rows.append(self.tables[self.max_batch + i, : len(blocks)])
        return rows

    def _write_table(self, row: int, blocks: list[int] | tuple[int, ...]) -> None:
        num = len(blocks)
        self._host_tables[row, :num] = torch.tensor(blocks, dtype=torch.int32)
        self.tables[row, :num].copy_(self._host_tables[row, :num], non_blocking=True)
