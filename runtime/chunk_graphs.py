"""CUDA graphs of steps with short prompts, with decodes beside them or without.

A step of some hundred rows keeps the device for 5 to 20 ms, and a host that launches its kernels one by one for 10 to 15:
such a step waits for the host, longer on one machine than on the next. A graph has fixed places: what a step is made of
is written there first - tokens, positions, where each prompt begins - and what it does not fill is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..core.step_sizes import CHUNK_GRAPH_ROWS, CHUNK_SLOTS, chunk_graph
from .device_batch import DeviceBatch, Staging
from .model_fused import FusedModel
from .model_kernels import advance
from .prefill_attention import PagedChunks, PrefillBatch

Greedy = Callable[[Tensor | None, int], Tensor]
Key = tuple[int, int]  # decodes, rows in all
_MOST_ROWS: Final = CHUNK_GRAPH_ROWS[-1]
_ASCENDING: Final = np.arange(_MOST_ROWS, dtype=np.int32)


class ChunkGraphs:
    """Graphs for each number of decodes in `decodes` (0: none beside). To be used on the stream that runs the steps.

    `greedy(logits, rows)` gives tokens.
    """

    def __init__(
        self, model: FusedModel, batch: DeviceBatch, decodes: Sequence[int], greedy: Greedy, device: torch.device
    ) -> None:
        self._model = model
        self._batch = batch
        self._decodes = tuple(decodes)
        self._greedy = greedy
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._results: dict[Key, tuple[Tensor | None, Tensor]] = {}
        size = 3 * _MOST_ROWS + 2 * CHUNK_SLOTS + 1
        self._staging = Staging((size,), device)
        self._device = device
        # int32: tokens, positions and rows of the tables of the chunks' rows; where each prompt begins among them, and
        # the end; the rows that yield tokens.
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        self._rows = self._inputs[: 3 * _MOST_ROWS].view(3, _MOST_ROWS)
        self._bounds = self._inputs[3 * _MOST_ROWS : 3 * _MOST_ROWS + CHUNK_SLOTS + 1]
        self._picked = self._inputs[3 * _MOST_ROWS + CHUNK_SLOTS + 1 :]

    def keys(self, max_rows: int) -> list[Key]:
        """Of all graphs, the largest first: the others fit into its memory."""
        keys = [(room, rows) for room in self._decodes for rows in CHUNK_GRAPH_ROWS if room < rows <= max_rows]
        return sorted(keys, key=lambda key: (key[1], key[0]), reverse=True)

    def capture(self, key: Key, stream: Any, pool: Any) -> Any:
        """Record the graph of `key`; the memory pool that it used."""
        self._place([(0, (0,) * (key[1] - key[0]), True)])
        self._run(key)  # cuBLAS and Triton make up their minds outside the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._results[key] = self._run(key)
        self._graphs[key] = graph
        graph.replay()  # the first one uploads it
        return graph.pool() if pool is None else pool

    def _run(self, key: Key) -> tuple[Tensor | None, Tensor]:
        """The step on what is in the places: logits and tokens of the decodes, padded, then of each slot."""
        room, rows = key
        own, num = self._batch, rows - room
        both = self._rows[:, :num]
        picked = self._picked
        if room:
            decodes = torch.stack((own.tokens[:room], own.positions[:room], own.sequences[:room]))
            both = torch.cat((decodes, both), 1)
            picked = torch.cat((own.sequences[:room], picked + room))
        token_ids, positions, sequences = both
        paged = PagedChunks(positions[room:], self._bounds, own.tables[own.max_batch :])
        prefill = PrefillBatch((room, rows), [], [], self._bounds, self._bounds, num, num, num, paged)
        sizes = self._model.decode_attention.sizes(room) if room else None
        logits = self._model.forward(token_ids, positions, sequences, own.tables, room, prefill, picked, sizes=sizes)
        sampled = self._greedy(logits, room + CHUNK_SLOTS)
        if room:
            advance(own.tokens, own.positions, sampled[:room])
        return logits, sampled

    def key_of(self, num_decodes: int, lengths: Sequence[int]) -> Key | None:
        """The graph for a step with chunks of these lengths, if there is one."""
        key = chunk_graph(num_decodes, len(lengths), sum(lengths), self._batch.max_batch)
        return key if key in self._graphs else None

    def step(
        self,
        key: Key,
        num_decodes: int,
        chunks: Sequence[tuple[int, tuple[int, ...], bool]],
    ) -> tuple[Tensor | None, Tensor]:
        """Run a step whose chunks are (tokens before it, token ids, whether it yields a token), their tables set already.

        Logits and tokens of the `num_decodes` decodes, then of the chunks that yield one. They hold until the next step.
        """
        self._place(chunks)
        self._replay(key)
        return self._compacted(key, num_decodes, sum(is_last for _, _, is_last in chunks))

    def _replay(self, key: Key) -> None:
        self._graphs[key].replay()

    def _place(self, chunks: Sequence[tuple[int, tuple[int, ...], bool]]) -> None:
        """Write a step's chunks into the places."""
        staged = self._staging.take()
        values = staged.numpy()
        rows = values[: 3 * _MOST_ROWS].reshape(3, _MOST_ROWS)
        rows[1] = -1  # padding, which is written nowhere
        rows[2] = 0
        bounds = values[3 * _MOST_ROWS : 3 * _MOST_ROWS + CHUNK_SLOTS + 1]
        picked = values[3 * _MOST_ROWS + CHUNK_SLOTS + 1 :]
        picked[:] = 0
        bounds[0] = end = num_picked = 0
        for i, (before, token_ids, is_last) in enumerate(chunks):
            start, end = end, end + len(token_ids)
            rows[0, start:end] = token_ids
            rows[1, start:end] = _ASCENDING[: len(token_ids)] + before
            rows[2, start:end] = self._batch.max_batch + i
            bounds[i + 1] = end
            if is_last:
                picked[num_picked] = end - 1
                num_picked += 1
        bounds[len(chunks) + 1 :] = end
        self._inputs.copy_(self._staging.send(staged, self._device))

    def _compacted(self, key: Key, num_decodes: int, num_sampled: int) -> tuple[Tensor | None, Tensor]:
        """Without the padding between the decodes and the chunks."""
        logits, sampled = self._results[key]
        room = key[0]
        if num_decodes == room:
            num = room + num_sampled
            return (None if logits is None else logits[:num]), sampled[:num]

        def together(x: Tensor) -> Tensor:
            return torch.cat((x[:num_decodes], x[room : room + num_sampled]))

        return (None if logits is None else together(logits)), together(sampled)
