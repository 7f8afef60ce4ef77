"""The decode batch as the device holds it: next tokens, positions and block tables in fixed places, one slot a request.

A CUDA graph reads and writes these very tensors, so they are made once. Between two plans only what the plan changed is
written again; within a span the device advances them by itself. Everything is in the order of the stream: a plan may be
taken over while steps before it still run, whose tokens the host does not know yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .model_batch import Decode, DecodeBatch

_TURNS: Final = 4  # a launch may use two, and the launch before it may still be waiting


class Staging:
    """Host memory for copies to the device, used by turns: written again only when the copy out of it is through."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        turns = _TURNS if self._is_cuda else 1
        self._buffers = [torch.zeros(shape, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(turns)]
        self._sent: list[Any] = [None] * turns
        self._turn = 0

    def take(self) -> Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        return self._buffers[self._turn]

    def send(self, part: Tensor, device: torch.device) -> Tensor:
        """`part` of what was taken last, on the device once the stream gets there."""
        moved = part.to(device, non_blocking=True) if self._is_cuda else part.clone()
        if self._is_cuda:
            self._sent[self._turn] = torch.cuda.Event(blocking=True)
            self._sent[self._turn].record()
        return moved


class DeviceBatch:
    """Slots 0 … n - 1 are the batch, without holes; the next `max_chunks` rows of `tables` are for a step's chunks.

    `tokens`, `positions`: int32 [max_batch]; a slot beyond the batch has position -1. `tables`: int32 [max_batch +
    max_chunks, width], block ids. To be called on the stream that runs the steps.
    """

    def __init__(self, max_batch: int, max_chunks: int, width: int, device: torch.device) -> None:
        self.max_batch = max_batch
        self._device = device
        self._state = torch.zeros((2, max_batch), dtype=torch.int32, device=device)
        self._state[1] = -1
        self.tables = torch.zeros((max_batch + max_chunks, width), dtype=torch.int32, device=device)
        self._staged_state = Staging((3, max_batch), device)
        self._staged_tables = Staging(((max_batch + max_chunks) * (width + 1),), device)
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
        """Take over what has changed in `batch` since the last call. Who stays keeps the token that the device has."""
        left, changed = batch.take_changes()
        dirty = {self._slot_of[request_id] for request_id in changed if request_id in self._slot_of}
        sources = list(range(len(self.decodes)))  # by slot: the slot before this call; one that is new has another
        for request_id in left:
            slot = self._slot_of.pop(request_id, None)
            if slot is None:
                continue
            last, source = self.decodes.pop(), sources.pop()
            if last.request_id != request_id:  # the last one moves into the hole
                self.decodes[slot], sources[slot] = last, source
                self._slot_of[last.request_id] = slot
                dirty.add(slot)
            dirty.discard(len(self.decodes))
        for request_id in changed:
            if request_id not in self._slot_of and request_id in batch:
                slot = self._slot_of[request_id] = len(self.decodes)
                self.decodes.append(batch[request_id])
                sources.append(self.max_batch + slot)  # its token comes from the host
                dirty.add(slot)
        self._write_tables([(slot, self.decodes[slot].blocks) for slot in sorted(dirty)])
        self._write_state(sources)

    def _write_state(self, sources: list[int]) -> None:
        staged = self._staged_state.take()
        tokens, positions, source = staged.numpy()
        num = len(self.decodes)
        tokens[:num] = [decode.token for decode in self.decodes]
        positions[:num] = [decode.num_kv_tokens for decode in self.decodes]
        positions[num:] = -1
        source[:num] = sources
        source[num:] = 0
        moved = self._staged_state.send(staged, self._device)
        known = torch.cat((self._state[0], moved[0]))
        torch.index_select(known, 0, moved[2], out=self._state[0])
        self._state[1].copy_(moved[1])

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
        packed = self._staged_tables.take()[: len(rows) * (width + 1)].view(len(rows), width + 1)
        values = packed.numpy()
        for i, (row, blocks) in enumerate(rows):
            values[i, 0] = row
            values[i, 1 : len(blocks) + 1] = blocks
            values[i, len(blocks) + 1 :] = 0
        moved = self._staged_tables.send(packed, self._device)
        self.tables[:, :width].index_copy_(0, moved[:, 0].long(), moved[:, 1:])
