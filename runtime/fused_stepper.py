"""Steps on a GPU: decodes, and steps with short prompts, as CUDA graphs; other steps with chunks kernel by kernel.

Everything that a decode step needs next lies on the device, so a step can be launched behind the one before it; the
host reads the tokens later, from pinned memory. On a device without graphs the same steps run eagerly.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..core.commands import Chunk
from ..core.step_sizes import graph_sizes, padded_rows
from .chunk_graphs import ChunkGraphs
from .collectives import Collectives
from .device_batch import DeviceBatch
from .kv_pages import KvPages
from .model_attention import ChunkRows
from .model_batch import ChunkFeed, Decode, DecodeBatch
from .model_fused import FusedModel
from .model_kernels import advance, argmax_rows
from .model_place import Place
from .model_sampling import margins, sample
from .peer_reduce import PeerReduce
from .prefill_attention import CUDNN_MULTIPLE, PrefillBatch, prefill_batch
from .stepper import Launched, LayersHook
from .weights import ModelWeights

_LAYERS_AT_ONCE: Final = 4  # layers told of together while a prompt is computed
_LONG_STARTS: Final = (2048, 8128)  # tokens before a chunk, in the warm-up
_RING: Final = 64  # results that may wait for the host


class DeviceCollectives(Collectives, Protocol):
    """Collectives that can be part of a graph."""

    def broadcast_device_tokens(self, tokens: Tensor) -> Tensor:
        """The int64 tokens of the last stage's first rank, in place, on every rank of the executor."""


class FusedStepper:
    """One rank's steps. Used from one thread, whose CUDA stream it makes; `wait` of what it launches from any.

    A step has `max_batch` decodes, as many chunks and `max_num_tokens` tokens of chunks at most. `warm_up` before the
    first step. `chunk_decodes`: with how many decodes beside them (0: none) steps with short prompts have graphs; in
    float32, which has no flash kernel, there are none.
    """

    keeps_tokens: Final = True

    def __init__(
        self,
        place: Place,
        weights: ModelWeights,
        pages: KvPages,
        collectives: Collectives,
        device: torch.device,
        max_batch: int,
        max_num_tokens: int,
        *,
        record_margins: bool = False,
        graphs: bool = True,
        chunk_decodes: Sequence[int] = (),
    ) -> None:
        max_rows = padded_rows(max_num_tokens + max_batch)
        self.model = FusedModel(place, weights, pages, collectives, device, max_batch, max_rows)
        width = -(-self.model.max_positions // pages.tokens_per_block)
        self._place = place
        self._pages = pages
        self._collectives = collectives
        self._device = device
        self._max_batch = max_batch
        self._max_num_tokens = max_num_tokens
        self._record_margins = record_margins
        self._is_cuda = device.type == "cuda"
        self._batch = DeviceBatch(max_batch, max_batch, width, device)
        self._synced: Any = None
        self._ladder = graph_sizes(max_batch)
        self._uses_graphs = graphs and self._is_cuda
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor | None] = {}
        self._graph_pool: Any = None
        self._chunk_graphs: ChunkGraphs | None = None
        if self._uses_graphs and chunk_decodes and place.shape.dtype != "float32":
            self._chunk_graphs = ChunkGraphs(self.model, self._batch, chunk_decodes, self._greedy, device)
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if self._is_cuda else None
        self._ring = [
            torch.empty(2 * max_batch, dtype=torch.int64, pin_memory=self._is_cuda)
            for _ in range(_RING if self._is_cuda else 1)
        ]
        self._unread: deque[Launched] = deque()
        self._next = 0
        self._layers = _LayerTeller() if self._is_cuda else None

    # ---- warm-up -----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run every kernel once, a chunk of the largest size too, and record every graph. KV block 0 is written."""
        with self._on_stream():
            self._eager_decode(min(2, self._max_batch))
            block, max_num_tokens = self._pages.tokens_per_block, self._max_num_tokens
            once = {1, min(63, max_num_tokens), min(1024, max_num_tokens), max_num_tokens}
            for num_tokens in sorted({*once, *range(CUDNN_MULTIPLE, max_num_tokens + 1, CUDNN_MULTIPLE)}):
                self._dummy_chunk(num_tokens, 0)
            for num_tokens in {1, min(63, max_num_tokens), min(1024, max_num_tokens)}:
                self._dummy_chunk(num_tokens, block)  # with KV before it
            self._dummy_chunk(1, 0, 1)  # behind a decode
            if self._is_cuda:  # where there is something to compile and to load
                self._warm_rare_steps()
            if self._uses_graphs:
                for size in reversed(self._ladder):  # the largest first: the others fit into its memory
                    self._capture(size)
                if self._chunk_graphs is not None:
                    for key in self._chunk_graphs.keys(self._max_num_tokens + self._max_batch):
                        self._graph_pool = self._chunk_graphs.capture(key, self._stream, self._graph_pool)
        self._settle()

    def _warm_rare_steps(self) -> None:
        few = {1, min(63, self._max_num_tokens)}
        for start in _LONG_STARTS:  # few rows behind much KV are another kernel, whose loading takes half a second
            for num_tokens in few:
                self._dummy_chunk(num_tokens, start)
        for num in {min(2, self._max_batch), self._max_batch}:
            self._dummy_chunk(max(few), 0, num)

    def _dummy_chunk(self, num_tokens: int, start: int, num_decodes: int = 0) -> None:
        """A chunk after `start` tokens, behind decodes that are padding."""
        size, total = self._pages.tokens_per_block, num_tokens + start
        num_blocks = min(-(-total // size), self._pages.num_blocks)
        total = min(total, num_blocks * size, self.model.max_positions)
        if total - start < 1:
            return
        blocks = tuple(range(num_blocks))
        chunk = Chunk(-1, start, total - start, True, blocks)
        self._forward_chunks(num_decodes, ((chunk, ChunkFeed(-1, (0,) * (total - start))),), None)

    def _capture(self, size: int) -> None:
        self._eager_decode(size)  # cuBLAS and Triton make up their minds outside the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool, stream=self._stream, capture_error_mode="thread_local"):
            self._logits[size] = self._eager_decode(size)
        if self._graph_pool is None:
            self._graph_pool = graph.pool()
        self._graphs[size] = graph
        graph.replay()  # the first one uploads it

    # ---- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(
        self,
        batch: DecodeBatch,
        runs_decodes: bool,
        chunks: tuple[tuple[Chunk, ChunkFeed], ...],
        on_layers: LayersHook | None = None,
    ) -> Launched:
        with self._on_stream():
            if batch.has_changes or self._synced is not batch:
                self._take(batch)
            decodes = self._batch.decodes if runs_decodes else []
            num = len(decodes)
            request_ids = [decode.request_id for decode in decodes]
            lasts = [(chunk, fed) for chunk, fed in chunks if chunk.is_last]
            request_ids += [chunk.request_id for chunk, _ in lasts]
            if chunks:
                logits, sampled = self._forward_chunks(num, chunks, on_layers)
            elif num:
                logits, sampled = self._decode(num)
            else:
                return Launched([], [], list, list)
            configs = [decode.sampling for decode in decodes] + [fed.sampling for _, fed in lasts]
            if any(config.temperature > 0 for config in configs):
                positions = [decode.num_kv_tokens + 1 for decode in decodes]
                positions += [chunk.start + chunk.length for chunk, _ in lasts]
                sampled = self._sampled(logits, configs, positions)
                self._batch.tokens[:num] = sampled[:num].to(torch.int32)
            seen: list[tuple[int, float]] = []
            if self._record_margins and request_ids and self._place.is_last_stage:
                whole = self._whole_logits(logits)
                if self._place.tp_rank == 0:
                    seen = list(zip(request_ids, margins(whole), strict=True))
            return self._deliver(list(decodes), request_ids, sampled, seen)

    def _take(self, batch: DecodeBatch) -> None:
        if self._synced is not batch:  # an engine of a new session
            self._batch.clear()
            self._synced = batch
        self._batch.sync(batch)

    def _decode(self, num: int) -> tuple[Tensor | None, Tensor]:
        """One decode step of the whole batch; its logits, padded, and its tokens."""
        size = self._rung(num)
        if size in self._graphs:
            self._graphs[size].replay()
            logits = self._logits[size]
        else:
            logits = self._eager_decode(size)
        return (None if logits is None else logits[:num]), self._batch.tokens[:num]

    def _rung(self, num: int) -> int:
        """The size to which a batch of `num` decodes is padded."""
        return next(size for size in self._ladder if size >= num)

    def _eager_decode(self, size: int) -> Tensor | None:
        own = self._batch
        logits = self.model.forward(
            own.tokens[:size], own.positions[:size], own.sequences[:size], own.tables, size, None, None
        )
        advance(own.tokens, own.positions, self._greedy(logits, size))
        return logits

    def _forward_chunks(
        self, num: int, chunks: tuple[tuple[Chunk, ChunkFeed], ...], on_layers: LayersHook | None
    ) -> tuple[Tensor | None, Tensor]:
        """A step with chunks behind `num` decodes: logits and tokens of the decodes and of the last chunks."""
        size, own = self._pages.tokens_per_block, self._batch
        graphs = self._chunk_graphs if on_layers is None else None
        key: tuple[int, int] | None = None
        if graphs is not None:
            key = graphs.key_of(num, [chunk.length for chunk, _ in chunks])
        tables = own.set_chunks([chunk.blocks[: -(-(chunk.start + chunk.length) // size)] for chunk, _ in chunks])
        if graphs is not None and key is not None:
            return graphs.step(key, num, [(chunk.start, fed.token_ids, chunk.is_last) for chunk, fed in chunks])
        rows: list[ChunkRows] = []
        ids: list[int] = []
        where: list[Tensor] = []
        sampled_rows = list(range(num))
        for i, ((chunk, fed), table) in enumerate(zip(chunks, tables, strict=True)):
            rows.append(ChunkRows(num + len(ids), chunk.length, chunk.start, table[None]))
            ids += fed.token_ids
            span = torch.arange(chunk.start, chunk.start + chunk.length, dtype=torch.int32)
            where.append(torch.stack((span, torch.full_like(span, self._max_batch + i))))
            if chunk.is_last:
                sampled_rows.append(num + len(ids) - 1)
        # Padding to a common size costs the products nothing, and spares cuBLAS a search for each new size.
        padding = padded_rows(num + len(ids)) - num - len(ids)
        where.append(torch.tensor([[-1], [0]], dtype=torch.int32).expand(2, padding))
        ids += [0] * padding
        new = torch.cat((torch.tensor([ids], dtype=torch.int32), torch.cat(where, dim=1)))
        both = torch.cat(
            (torch.stack((own.tokens[:num], own.positions[:num], own.sequences[:num])), self._to_device(new)), 1
        )
        token_ids, positions, sequences = both
        prefill: PrefillBatch = prefill_batch(rows, self._device)
        hook = self._layer_hook(chunks, on_layers)
        picked = self._to_device(torch.tensor(sampled_rows, dtype=torch.int64))
        # Cut as for the graph of that size: any other cut would be another kernel, to be compiled in the middle of serving.
        sizes = self.model.decode_attention.sizes(self._rung(num)) if num else None
        logits = self.model.forward(
            token_ids, positions, sequences, own.tables, num, prefill, picked, sizes=sizes, on_layer=hook
        )
        sampled = self._greedy(logits, len(sampled_rows))
        if num:
            advance(own.tokens, own.positions, sampled[:num])
        return logits, sampled

    def _layer_hook(self, chunks: tuple[tuple[Chunk, ChunkFeed], ...], on_layers: LayersHook | None) -> Any:
        if on_layers is None:
            return None
        written = tuple((chunk.request_id, chunk.start + chunk.length) for chunk, _ in chunks)
        last = self._place.layers[1] - self._place.layers[0] - 1
        told = 0

        def hook(layer: int) -> None:
            nonlocal told
            if layer + 1 - told < _LAYERS_AT_ONCE and layer != last:
                return
            first, told = told, layer + 1
            if self._layers is None:
                on_layers(first, told, written)
            else:
                event = _event()
                event.record()
                self._layers.tell(event, on_layers, first, told, written)

        return hook

    # ---- from logits to tokens ---------------------------------------------------------------------------------------

    def _greedy(self, logits: Tensor | None, num: int) -> Tensor:
        """int64 [num], the same on every rank of the executor."""
        if num == 0:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        if logits is None:
            return self._broadcast(torch.empty(num, dtype=torch.int64, device=self._device))
        start, stop = self._place.vocab
        if self._place.tp == 1:
            return self._broadcast(argmax_rows(logits, stop - start))
        peers = self._collectives.peers
        if peers is not None and num <= peers.max_rows:
            return peers.argmax(logits, (start, stop))
        best, index = logits[:, : stop - start].max(dim=-1)
        both = torch.stack((best.float(), (index + start).float()), dim=-1)  # ids are far below 2²⁴
        everyone = self._collectives.tp_all_gather(both).view(num, self._place.tp, 2)
        winner = everyone[:, :, 0].argmax(dim=1, keepdim=True)
        return self._broadcast(everyone[:, :, 1].gather(1, winner)[:, 0].to(torch.int64))

    def _whole_logits(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise RuntimeError("logits live on the last stage alone")
        return self._collectives.tp_all_gather(logits)[:, : self._place.shape.vocab_size].float()

    def _sampled(self, logits: Tensor | None, configs: list[Any], positions: list[int]) -> Tensor:
        """As `_greedy`, where some row wants chance: every rank of the last stage draws the same."""
        if self._place.is_last_stage:
            return self._broadcast(sample(self._whole_logits(logits), configs, positions))
        return self._broadcast(torch.empty(len(configs), dtype=torch.int64, device=self._device))

    def _broadcast(self, tokens: Tensor) -> Tensor:
        if self._place.is_first_stage and self._place.is_last_stage:
            return tokens
        collectives: Any = self._collectives
        return collectives.broadcast_device_tokens(tokens.contiguous())  # type: ignore[no-any-return]

    # ---- delivery ----------------------------------------------------------------------------------------------------

    def _deliver(
        self, decodes: list[Decode], request_ids: list[int], sampled: Tensor, seen: list[tuple[int, float]]
    ) -> Launched:
        num = len(request_ids)
        if not self._is_cuda:
            tokens = sampled.tolist()
            return Launched(decodes, request_ids, lambda: tokens, lambda: seen)
        while len(self._unread) >= _RING:
            self._unread.popleft().wait()
        slot = self._ring[self._next % _RING][:num]
        self._next += 1
        slot.copy_(sampled, non_blocking=True)
        event = _event()
        event.record()
        launched = Launched(decodes, request_ids, _Reading(event, slot, self._collectives.peers), lambda: seen)
        self._unread.append(launched)
        return launched

    def _to_device(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self._device, non_blocking=True) if self._is_cuda else x

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)  # with None it does nothing

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _event() -> Any:
    """One whose wait sleeps, instead of spinning on a core that the threads which plan and talk need."""
    return torch.cuda.Event(blocking=True)


class _Reading:
    """Waits for an event, then reads what was copied before it; keeps what it read. Raises PeerReduceError."""

    def __init__(self, event: Any, slot: Tensor, peers: PeerReduce | None) -> None:
        self._event = event
        self._slot = slot
        self._peers = peers
        self._lock = threading.Lock()
        self._tokens: list[int] | None = None

    def __call__(self) -> list[int]:
        with self._lock:
            if self._tokens is None:
                self._event.synchronize()
                if self._peers is not None:
                    self._peers.check()
                self._tokens = self._slot.tolist()
            return self._tokens


class _LayerTeller:
    """A thread that tells of layers once the device has written them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="layers", daemon=True).start()

    def tell(self, event: Any, hook: LayersHook, *args: Any) -> None:
        self._queue.put((event, hook, args))

    def _run(self) -> None:
        while True:
            event, hook, args = self._queue.get()
            event.synchronize()
            hook(*args)
