"""What runs one step of an engine: the seam between an engine's bookkeeping and a device.

`PlainStepper` is torch alone, right on every device. A `Stepper` may return before its device has finished: the next
step can then be launched behind it, and the tokens are waited for elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from ..core.commands import Chunk
from ..policies.vocabulary import SamplingConfig
from .collectives import Collectives
from .kv_pages import KvPages
from .model_attention import Attention, ChunkRows, StepTokens
from .model_batch import ChunkFeed, Decode, DecodeBatch
from .model_layers import ModelPart
from .model_place import Place
from .model_sampling import margins, sample
from .weights import ModelWeights

LayersHook = Callable[[int, int, tuple[tuple[int, int], ...]], None]


@dataclass(slots=True)
class Launched:
    """A step on its way. `wait` blocks until the device has done it, and gives one token per entry of `request_ids`.

    Decodes come first, in the stepper's own order, then the step's last chunks in theirs. `margins`: of each, where asked.
    """

    decodes: list[Decode]
    request_ids: list[int]
    wait: Callable[[], list[int]]
    margins: Callable[[], list[tuple[int, float]]]


class Stepper(Protocol):
    @property
    def keeps_tokens(self) -> bool:
        """Whether the device knows the next step's tokens by itself, so that it can be launched before the host does."""

    def launch(
        self,
        batch: DecodeBatch,
        runs_decodes: bool,
        chunks: tuple[tuple[Chunk, ChunkFeed], ...],
        on_layers: LayersHook | None,
    ) -> Launched:
        """Run the batch's decodes (where asked) and these chunks. The decodes' counters are still those before the step.

        `on_layers(first, end, ((request, tokens), …))`: these local layers of the chunks are written up to so many
        tokens of each request, and visible to any stream; called on any thread.
        """


class PlainStepper:
    """Every step is finished when `launch` returns."""

    keeps_tokens: Final = False

    def __init__(
        self,
        place: Place,
        weights: ModelWeights,
        pages: KvPages,
        collectives: Collectives,
        attention: Attention,
        device: torch.device,
        record_margins: bool,
    ) -> None:
        self._place = place
        self._pages = pages
        self._collectives = collectives
        self._device = device
        self._model = ModelPart(place, weights, pages, collectives, attention, device)
        self._record_margins = record_margins

    @torch.inference_mode()
    def launch(
        self,
        batch: DecodeBatch,
        runs_decodes: bool,
        chunks: tuple[tuple[Chunk, ChunkFeed], ...],
        on_layers: LayersHook | None = None,
    ) -> Launched:
        decodes = list(batch) if runs_decodes else []
        tokens, token_ids = self._step_tokens(batch, decodes, chunks)
        request_ids = [decode.request_id for decode in decodes]
        rows = list(range(len(decodes)))
        configs: list[SamplingConfig] = [decode.sampling for decode in decodes]
        positions = [decode.num_kv_tokens + 1 for decode in decodes]
        for where, (chunk, fed) in zip(tokens.chunks, chunks, strict=True):
            if chunk.is_last:
                request_ids.append(chunk.request_id)
                rows.append(where.first_row + where.num_rows - 1)
                configs.append(fed.sampling)
                positions.append(chunk.start + chunk.length)
        yielded: list[int] = []
        seen: list[tuple[int, float]] = []
        if token_ids:
            hook = None
            if on_layers is not None and chunks:
                written = tuple((chunk.request_id, chunk.start + chunk.length) for chunk, _ in chunks)
                tell = on_layers

                def hook(layer: int) -> None:
                    self._settle()
                    tell(layer, layer + 1, written)

            ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            logits = self._model.forward(ids, tokens, torch.tensor(rows, dtype=torch.int64, device=self._device), hook)
            if rows:
                sampled = None
                if logits is not None and self._place.tp_rank == 0:
                    sampled = sample(logits, configs, positions)
                    if self._record_margins:
                        seen = list(zip(request_ids, margins(logits), strict=True))
                yielded = self._collectives.broadcast_tokens(sampled, len(rows))
        return Launched(decodes, request_ids, lambda: yielded, lambda: seen)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _step_tokens(
        self, batch: DecodeBatch, decodes: list[Decode], chunks: tuple[tuple[Chunk, ChunkFeed], ...]
    ) -> tuple[StepTokens, list[int]]:
        """The step's tokens, one row each: decodes first, then the chunks' tokens in order."""
        size = self._pages.tokens_per_block
        token_ids = [decode.token for decode in decodes]
        positions = [decode.num_kv_tokens for decode in decodes]
        blocks = [decode.blocks[decode.num_kv_tokens // size] for decode in decodes]
        width = max(positions) // size + 1 if decodes else 0
        rows = []
        for chunk, fed in chunks:
            stop = chunk.start + chunk.length
            table = torch.tensor([chunk.blocks[: -(-stop // size)]], dtype=torch.int64, device=self._device)
            rows.append(ChunkRows(len(token_ids), chunk.length, chunk.start, table))
            token_ids += fed.token_ids
            positions += range(chunk.start, stop)
            blocks += [chunk.blocks[position // size] for position in range(chunk.start, stop)]
        where = torch.tensor([positions, blocks], dtype=torch.int64).to(self._device)
        tables = batch.tables()[:, :width] if decodes else where.new_empty((0, 0))
        return StepTokens(where[0], where[1], where[0] % size, len(decodes), tables, rows), token_ids
