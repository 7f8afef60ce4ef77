"""The engine of one rank: applies plans to its decode batch and runs their steps. It decides nothing.

Every rank of an executor is given the same plans and feeds in the same order and returns the same tokens. A plan is
checked whole before anything changes, by facts that all ranks share, so a bad one is refused by all of them alike.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from ..core.commands import Chunk, RunSteps
from ..core.model_shapes import ModelShape
from ..policies.vocabulary import SamplingConfig
from .collectives import Collectives
from .kv_pages import KvPages
from .model_attention import TorchAttention
from .model_batch import ChunkFeed, DecodeBatch, JoinedFeed, PlanFeed
from .model_place import Place
from .model_sampling import SamplingError, check_sampling
from .stepper import Launched, LayersHook, PlainStepper, Stepper
from .weights import ModelWeights

__all__ = ["ChunkFeed", "Engine", "EngineError", "JoinedFeed", "PendingStep", "PlanFeed"]


class EngineError(RuntimeError):
    """A plan that does not fit this engine's state. Nothing of it was applied."""


class Engine:
    """`record_margins`: keep top-1 minus top-2 of each row sampled here, in `margins` (tests of greedy equality).

    `stepper`: what runs the steps; by default plain torch on `device`. `on_layers` may be set: see `Stepper.launch`.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: ModelWeights,
        place: Place,
        pages: KvPages,
        collectives: Collectives,
        device: str | torch.device = "cpu",
        *,
        stepper: Stepper | None = None,
        record_margins: bool = False,
    ) -> None:
        if place.shape != shape or pages.layout != place.layout or pages.rank != place.rank:
            raise ValueError(
                f"the place, the pages (of rank {pages.rank}) and the shape {shape.name} do not belong together"
            )
        self._shape = shape
        self._pages = pages
        device = torch.device(device)
        if stepper is None:
            attention = TorchAttention(shape.head_dim, shape.sliding_window)
            stepper = PlainStepper(place, weights, pages, collectives, attention, device, record_margins)
        self._stepper = stepper
        self._batch = DecodeBatch(device)
        self._pending: deque[PendingStep] = deque()
        self.on_layers: LayersHook | None = None
        self._run: RunSteps | None = None
        self._chunks: tuple[tuple[Chunk, ChunkFeed], ...] = ()
        self._steps_left = 0
        self._fresh: dict[int, int] = {}  # tokens that the last chunks of the present plan yielded
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

        Steps that were launched may still run: what the plan changes takes effect behind them. Only a request that joins
        with the token of such a step (`next_token` None) makes this wait.

        EngineError, with nothing changed, if the plan contradicts the batch, the feed or the size of the pool.
        """
        feed = PlanFeed() if feed is None else feed
        if any(fed.next_token is None for fed in feed.joined):
            self._drain()
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
        if blocks and not (min(blocks) >= 0 and max(blocks) < self._pages.num_blocks):
            raise EngineError(
                f"plan {run.plan}: request {request_id} names a block outside 0 to {self._pages.num_blocks - 1}"
            )

    def _check_tokens(self, run: RunSteps, request_id: int, token_ids: tuple[int, ...]) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._shape.vocab_size):
            raise EngineError(
                f"plan {run.plan}: request {request_id} has a token id outside 0 to {self._shape.vocab_size - 1}"
            )

    def _check_sampling(self, run: RunSteps, request_id: int, sampling: SamplingConfig) -> None:
        try:
            check_sampling(sampling)
        except SamplingError as error:
            raise EngineError(f"plan {run.plan}: request {request_id}: {error}") from None

    # ---- a step ------------------------------------------------------------------------------------------------------

    def launch(self) -> PendingStep:
        """Start the next step of the plan. The device may still be at it, or at the step before, on return.

        EngineError if the plan has no step left.
        """
        run = self._run
        if run is None or self._steps_left < 1:
            raise EngineError("no step is left of the plan" if run is not None else "no plan has begun")
        launched = self._stepper.launch(self._batch, run.decodes, self._chunks, self.on_layers)
        for decode in launched.decodes:
            decode.num_kv_tokens += 1
        self._steps_left -= 1
        while self._pending and self._pending[0].is_over:
            self._pending.popleft()
        pending = PendingStep(launched, self._collect)
        if self._stepper.keeps_tokens:
            self._pending.append(pending)
        else:
            pending.result()  # the next step's tokens are the host's to bring
        return pending

    def step(self) -> list[tuple[int, int]]:
        """Run the next step of the plan: (request id, token) of each decode, then of each last chunk."""
        return self.launch().result()

    def _collect(self, launched: Launched) -> list[tuple[int, int]]:
        tokens = launched.wait()
        for decode, token in zip(launched.decodes, tokens):
            decode.token = token
        results = list(zip(launched.request_ids, tokens, strict=True))
        self._fresh = dict(results[len(launched.decodes) :])
        self.margins += launched.margins()
        return results

    def _drain(self) -> None:
        """Wait for what was launched: the host's tokens are then those of the device."""
        while self._pending:
            self._pending.popleft().result()


class PendingStep:
    """A step that was launched. Any thread may wait for it; steps of an engine are waited for in their order."""

    def __init__(self, launched: Launched, collect: Callable[[Launched], list[tuple[int, int]]]) -> None:
        self._launched = launched
        self._collect = collect
        self._lock = threading.Lock()
        self._results: list[tuple[int, int]] | None = None

    @property
    def is_over(self) -> bool:
        return self._results is not None

    def result(self) -> list[tuple[int, int]]:
        """(request id, token) of each decode, then of each last chunk, once the device is there."""
        with self._lock:
            if self._results is None:
                self._results = self._collect(self._launched)
            return self._results
