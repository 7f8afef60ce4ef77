"""The engine of one rank: applies plans to its decode batch and runs their steps. It decides nothing.

Every rank of an executor is given the same plans and feeds in the same order and returns the same tokens. A plan is
checked whole before anything changes, by facts that all ranks share, so a bad one is refused by all of them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.commands import Chunk, RunSteps
from ..core.model_shapes import ModelShape
from ..policies.vocabulary import SamplingConfig
from .collectives import Collectives
from .kv_pages import KvPages
from .model_attention import Attention, ChunkRows, StepTokens, TorchAttention
from .model_batch import ChunkFeed, Decode, DecodeBatch, JoinedFeed, PlanFeed
from .model_layers import ModelPart
from .model_place import Place
from .model_sampling import SamplingError, check_sampling, margins, sample
from .weights import ModelWeights

__all__ = ["ChunkFeed", "Engine", "EngineError", "JoinedFeed", "PlanFeed"]


class EngineError(RuntimeError):
    """A plan that does not fit this engine's state. Nothing of it was applied."""


@dataclass(slots=True)
class _Draw:
    """One token that the step will yield, from row `row` of its tokens."""

    request_id: int
    row: int
    position: int  # index of the new token in its sequence
    sampling: SamplingConfig


class Engine:
    """`record_margins`: keep top-1 minus top-2 of each row sampled here, in `margins` (tests of greedy equality)."""

    def __init__(
        self,
        shape: ModelShape,
        weights: ModelWeights,
        place: Place,
        pages: KvPages,
        collectives: Collectives,
        device: str | torch.device = "cpu",
        *,
        attention: Attention | None = None,
        record_margins: bool = False,
    ) -> None:
        if place.shape != shape or pages.layout != place.layout or pages.rank != place.rank:
            raise ValueError(
                f"the place, the pages (of rank {pages.rank}) and the shape {shape.name} do not belong together"
            )
        self._shape = shape
        self._place = place
        self._pages = pages
        self._collectives = collectives
        self._device = torch.device(device)
        if attention is None:
            attention = TorchAttention(shape.head_dim, shape.sliding_window)
        self._model = ModelPart(place, weights, pages, collectives, attention, self._device)
        self._batch = DecodeBatch(self._device)
        self._run: RunSteps | None = None
        self._chunks: tuple[tuple[Chunk, ChunkFeed], ...] = ()
        self._steps_left = 0
        self._fresh: dict[int, int] = {}  # tokens that the last chunks of the present plan yielded
        self._record_margins = record_margins
        self.margins: list[tuple[int, float]] = []  # (request id, margin), on the rank that samples

    @property
    def num_decodes(self) -> int:
        """Requests in the decode batch."""
        return len(self._batch)

    @property
    def steps_left(self) -> int:
        """Steps of the present plan not yet run."""
        return self._steps_left

    # ---- a plan ------------------------------------------------------------------------------------------------------

    def begin(self, run: RunSteps, feed: PlanFeed | None = None) -> None:
        """Apply the delta of `run`. What is left of the plan before is dropped: its span was cut short.

        EngineError, with nothing changed, if the plan contradicts the batch, the feed or the size of the pool.
        """
        feed = PlanFeed() if feed is None else feed
        tokens = self._check_delta(run, feed)
        self._check_chunks(run, feed)
        self._check_room(run)
        for request_id in run.left:
            self._batch.leave(request_id)
        for joined, fed, token in zip(run.joined, feed.joined, tokens, strict=True):
            self._batch.join(joined, token, fed.sampling)
        for request_id in dict.fromkeys(request_id for request_id, _ in run.appended):
            self._batch.forget_unwritten(request_id, self._pages.tokens_per_block)
        for request_id, blocks in run.appended:
            self._batch.append(request_id, blocks)
        self._run = run
        self._chunks = tuple(zip(run.chunks, feed.chunks, strict=True))
        self._steps_left = run.last_step - run.first_step + 1
        self._fresh = {}

    def _check_delta(self, run: RunSteps, feed: PlanFeed) -> list[int]:
        """The next input token of each joined request."""
        leaving = set(run.left)
        if len(leaving) != len(run.left) or not all(request_id in self._batch for request_id in leaving):
            raise EngineError(f"plan {run.plan}: requests {list(run.left)} cannot all leave the decode batch")
        if [joined.request_id for joined in run.joined] != [fed.request_id for fed in feed.joined]:
            raise EngineError(f"plan {run.plan}: the feed's joined requests are not the plan's")
        tokens = []
        seen: set[int] = set()
        for joined, fed in zip(run.joined, feed.joined, strict=True):
            request_id = joined.request_id
            if request_id in seen or (request_id in self._batch and request_id not in leaving):
                raise EngineError(f"plan {run.plan}: request {request_id} joins the decode batch but is in it")
            seen.add(request_id)
            self._check_blocks(run, request_id, joined.blocks)
            if joined.num_kv_tokens < 1:
                raise EngineError(f"plan {run.plan}: request {request_id} joins with {joined.num_kv_tokens} KV tokens")
            token = self._fresh.get(request_id) if fed.next_token is None else fed.next_token
            if token is None:
                raise EngineError(
                    f"plan {run.plan}: request {request_id} joins without a token, and the plan before yielded none"
                )
            self._check_tokens(run, request_id, (token,))
            self._check_sampling(run, request_id, fed.sampling)
            tokens.append(token)
        for request_id, blocks in run.appended:
            if request_id not in seen and (request_id not in self._batch or request_id in leaving):
                raise EngineError(f"plan {run.plan}: blocks for request {request_id}, which is not in the decode batch")
            self._check_blocks(run, request_id, blocks)
        num_decodes = len(self._batch) - len(leaving) + len(seen)
        if run.decodes and run.num_decodes != num_decodes:
            raise EngineError(f"plan {run.plan} speaks of {run.num_decodes} decodes, this engine has {num_decodes}")
        return tokens

    def _check_chunks(self, run: RunSteps, feed: PlanFeed) -> None:
        if not 1 <= run.first_step <= run.last_step:
            raise EngineError(f"plan {run.plan}: steps {run.first_step} to {run.last_step} are no span")
        if run.chunks and run.first_step != run.last_step:
            raise EngineError(f"plan {run.plan}: a span of more than one step cannot hold chunks")
        if [chunk.request_id for chunk in run.chunks] != [fed.request_id for fed in feed.chunks]:
            raise EngineError(f"plan {run.plan}: the feed's chunks are not the plan's")
        decoding = {decode.request_id for decode in self._batch} - set(run.left)
        decoding |= {joined.request_id for joined in run.joined}
        for chunk, fed in zip(run.chunks, feed.chunks, strict=True):
            if chunk.request_id in decoding:
                raise EngineError(f"plan {run.plan}: request {chunk.request_id} has a chunk but decodes, or has two")
            decoding.add(chunk.request_id)
            if chunk.start < 0 or chunk.length < 1 or len(fed.token_ids) != chunk.length:
                raise EngineError(
                    f"plan {run.plan}: the chunk of request {chunk.request_id} is {chunk.length} tokens from "
                    f"{chunk.start}, and its feed has {len(fed.token_ids)}"
                )
            self._check_blocks(run, chunk.request_id, chunk.blocks)
            if chunk.start + chunk.length > len(chunk.blocks) * self._pages.tokens_per_block:
                raise EngineError(f"plan {run.plan}: the chunk of request {chunk.request_id} exceeds its blocks")
            self._check_tokens(run, chunk.request_id, fed.token_ids)
            self._check_sampling(run, chunk.request_id, fed.sampling)

    def _check_room(self, run: RunSteps) -> None:
        """Each decode must have blocks for all of the span: step i of it writes one token more."""
        if not run.decodes:
            return
        num_steps = run.last_step - run.first_step + 1
        leaving = set(run.left)
        held = [(d.request_id, d.num_kv_tokens, len(d.blocks)) for d in self._batch if d.request_id not in leaving]
        held += [(joined.request_id, joined.num_kv_tokens, len(joined.blocks)) for joined in run.joined]
        more: dict[int, int] = {}
        for request_id, blocks in run.appended:
            more[request_id] = more.get(request_id, 0) + len(blocks)
        for request_id, num_kv_tokens, num_blocks in held:
            if request_id in more:  # what was appended for steps that were not run goes first
                num_blocks = min(num_blocks, -(-num_kv_tokens // self._pages.tokens_per_block))
            room = (num_blocks + more.get(request_id, 0)) * self._pages.tokens_per_block - num_kv_tokens
            if room < num_steps:
                raise EngineError(
                    f"plan {run.plan}: request {request_id} has blocks for {room} more tokens, the span has "
                    f"{num_steps} steps"
                )

    def _check_blocks(self, run: RunSteps, request_id: int, blocks: tuple[int, ...]) -> None:
        if any(not 0 <= block < self._pages.num_blocks for block in blocks):
            raise EngineError(
                f"plan {run.plan}: request {request_id} names a block outside 0 to {self._pages.num_blocks - 1}"
            )

    def _check_tokens(self, run: RunSteps, request_id: int, token_ids: tuple[int, ...]) -> None:
        if any(not 0 <= token < self._shape.vocab_size for token in token_ids):
            raise EngineError(
                f"plan {run.plan}: request {request_id} has a token id outside 0 to {self._shape.vocab_size - 1}"
            )

    def _check_sampling(self, run: RunSteps, request_id: int, sampling: SamplingConfig) -> None:
        try:
            check_sampling(sampling)
        except SamplingError as error:
            raise EngineError(f"plan {run.plan}: request {request_id}: {error}") from None

    # ---- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Run the next step of the plan: (request id, token) of each decode, then of each last chunk.

        The batch advances only once the tokens are there. EngineError if the plan has no step left.
        """
        run = self._run
        if run is None or self._steps_left < 1:
            raise EngineError("no step is left of the plan" if run is not None else "no plan has begun")
        decodes = list(self._batch) if run.decodes else []
        tokens, token_ids = self._step_tokens(decodes)
        draws = [_Draw(d.request_id, row, d.num_kv_tokens + 1, d.sampling) for row, d in enumerate(decodes)]
        for rows, (chunk, fed) in zip(tokens.chunks, self._chunks, strict=True):
            if chunk.is_last:
                last_row = rows.first_row + rows.num_rows - 1
                draws.append(_Draw(chunk.request_id, last_row, chunk.start + chunk.length, fed.sampling))
        yielded: list[int] = []
        if token_ids:
            yielded = self._forward(token_ids, tokens, draws)
        for decode, token in zip(decodes, yielded):
            decode.num_kv_tokens += 1
            decode.token = token
        results = [(draw.request_id, token) for draw, token in zip(draws, yielded, strict=True)]
        self._fresh = dict(results[len(decodes) :])
        self._steps_left -= 1
        return results

    def _forward(self, token_ids: list[int], tokens: StepTokens, draws: list[_Draw]) -> list[int]:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        rows = torch.tensor([draw.row for draw in draws], dtype=torch.int64, device=self._device)
        logits = self._model.forward(ids, tokens, rows)
        if not draws:
            return []
        sampled = None
        if logits is not None and self._place.tp_rank == 0:
            sampled = sample(logits, [draw.sampling for draw in draws], [draw.position for draw in draws])
            if self._record_margins:
                self.margins += zip([draw.request_id for draw in draws], margins(logits), strict=True)
        return self._collectives.broadcast_tokens(sampled, len(draws))

    def _step_tokens(self, decodes: list[Decode]) -> tuple[StepTokens, list[int]]:
        """The step's tokens, one row each: decodes first, then the chunks' tokens in order."""
        size = self._pages.tokens_per_block
        token_ids = [decode.token for decode in decodes]
        positions = [decode.num_kv_tokens for decode in decodes]
        blocks = [decode.blocks[decode.num_kv_tokens // size] for decode in decodes]
        width = max(positions) // size + 1 if decodes else 0
        chunks = []
        for chunk, fed in self._chunks:
            stop = chunk.start + chunk.length
            table = torch.tensor([chunk.blocks[: -(-stop // size)]], dtype=torch.int64, device=self._device)
            chunks.append(ChunkRows(len(token_ids), chunk.length, chunk.start, table))
            token_ids += fed.token_ids
            positions += range(chunk.start, stop)
            blocks += [chunk.blocks[position // size] for position in range(chunk.start, stop)]
        where = torch.tensor([positions, blocks], dtype=torch.int64).to(self._device)
        tables = self._batch.tables()[:, :width] if decodes else where.new_empty((0, 0))
        return StepTokens(where[0], where[1], where[0] % size, len(decodes), tables, chunks), token_ids
