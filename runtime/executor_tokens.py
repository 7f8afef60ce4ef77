"""The token ids of the requests on one executor: what the core is never told, and its world must know.

Knows when a sequence ends: at its end id, or at a scripted length. Progress follows what the engine yields.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..core.commands import Chunk, Joined, RunSteps
from ..core.prefix_names import token_hashes
from ..policies.vocabulary import Request, RequestType, SamplingConfig
from .model_batch import ChunkFeed, JoinedFeed, PlanFeed

_GREEDY: Final = SamplingConfig()


class TokenError(ValueError):
    """A request whose tokens are missing or no tokens of this model."""


def check_tokens(request: Request, vocab_size: int) -> None:
    """Raise TokenError unless every token id that the request brings is one of the model's, and its sampling is sound."""
    ids = request.input_token_ids
    if ids is None or len(ids) != request.num_prompt_tokens:
        raise TokenError(
            f"request {request.id} has {'no' if ids is None else len(ids)} input_token_ids for "
            f"{request.num_prompt_tokens} prompt tokens; executors compute tokens, so they need each id"
        )
    params = request.context_phase_params
    given = ids + (params.first_gen_tokens if params is not None else ())
    if given and not 0 <= min(given) <= max(given) < vocab_size:
        raise TokenError(f"request {request.id} has a token id outside 0 to {vocab_size - 1}")
    if request.request_type is RequestType.GENERATION_ONLY and params is not None:
        num_first = 0 if params.is_promised else params.num_generated
        num_kv = request.num_prompt_tokens + params.num_generated - 1
        if len(params.first_gen_tokens) != num_first or params.num_kv_tokens != num_kv or params.num_generated < 1:
            raise TokenError(
                f"request {request.id}: context_phase_params with {len(params.first_gen_tokens)} tokens and KV of "
                f"{params.num_kv_tokens}; allowed: {num_first} token, and KV of the whole prompt and all tokens but the last"
                f" ({num_kv})"
            )
    if request.sampling is not None:
        from .model_sampling import SamplingError, check_sampling

        if request.sampling.beam_width == 1:  # another one is the core's to refuse
            try:
                check_sampling(request.sampling)
            except SamplingError as error:
                raise TokenError(f"request {request.id}: {error}") from None


class Sequence:
    """Prompt and generated tokens of one visit."""

    __slots__ = ("ended", "generated", "num_sent", "output_length", "request", "sampling")

    def __init__(self, request: Request, output_length: int | None) -> None:
        self.request = request
        self.sampling = request.sampling if request.sampling is not None else _GREEDY
        self.output_length = output_length
        self.generated: list[int] = []
        self.num_sent = 0  # tokens that have left for the user
        self.ended = False
        params = request.context_phase_params
        if request.request_type is RequestType.GENERATION_ONLY and params is not None:
            self.generated += params.first_gen_tokens
            self.num_sent = max(0, len(self.generated) - 1)  # of one that has moved, all but the last

    def part(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens [start, stop) of prompt + generated."""
        prompt = self.request.input_token_ids or ()
        return (*prompt[start:stop], *self.generated[max(0, start - len(prompt)) : max(0, stop - len(prompt))])

    def add(self, token: int) -> bool:
        """Take the next token; whether the world ends the sequence with it."""
        self.generated.append(token)
        reached = self.output_length is not None and len(self.generated) >= self.output_length
        self.ended = reached or token == self.request.end_id
        return self.ended


class Sequences:
    """All visits of one executor, from their Enqueue to their Response.

    `tokens_per_block`: blocks of what is generated are named, since they may be found again; None: they have no names.
    """

    def __init__(self, tokens_per_block: int | None = None) -> None:
        self._tokens_per_block = tokens_per_block
        self._sequences: dict[int, Sequence] = {}
        self._lengths: dict[int, int] = {}  # scripted, of requests that are still to come

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def script(self, request_id: int, output_length: int) -> None:
        """The world will end this request after so many output tokens. Before `enter`."""
        self._lengths[request_id] = output_length

    def enter(self, request: Request) -> None:
        self._sequences[request.id] = Sequence(request, self._lengths.pop(request.id, None))

    def first(self, request_id: int, tokens: tuple[int, ...]) -> None:
        """The first token of one that was promised; once."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and not sequence.generated:
            sequence.generated += tokens

    def get(self, request_id: int) -> Sequence | None:
        return self._sequences.get(request_id)

    def forget(self, request_id: int) -> Sequence | None:
        return self._sequences.pop(request_id, None)

    def feed(self, run: RunSteps) -> PlanFeed:
        """The token ids that go with a plan."""
        return PlanFeed(
            tuple(self._joined_feed(joined) for joined in run.joined),
            tuple(self._chunk_feed(chunk) for chunk in run.chunks),
        )

    def _joined_feed(self, joined: Joined) -> JoinedFeed:
        sequence = self._sequences[joined.request_id]
        (token,) = sequence.part(joined.num_kv_tokens, joined.num_kv_tokens + 1)
        return JoinedFeed(joined.request_id, token, sequence.sampling)

    def _chunk_feed(self, chunk: Chunk) -> ChunkFeed:
        sequence = self._sequences[chunk.request_id]
        return ChunkFeed(chunk.request_id, sequence.part(chunk.start, chunk.start + chunk.length), sequence.sampling)

    def names(self, request_ids: Iterable[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Of those that have ended: the hashes of the blocks behind those of their prompts, as `StepsDone` has them."""
        size = self._tokens_per_block
        if size is None:
            return []
        named = []
        for request_id in request_ids:
            sequence = self._sequences[request_id]
            request = sequence.request
            if sequence.ended or len(sequence.generated) >= request.max_tokens:
                before = request.block_hashes
                # the last token's KV is never written
                tokens = sequence.part(len(before) * size, request.num_prompt_tokens + len(sequence.generated) - 1)
                hashes = token_hashes(tokens, size, before[-1] if before else 0)
                if hashes:
                    named.append((request_id, hashes))
        return named

    def add(self, tokens: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Take one step's (request id, token): the requests that got one, and those of them that end with it.

        A token of a sequence that has ended, or was answered meanwhile, is dropped: its step was launched before.
        """
        got, ended = [], []
        for request_id, token in tokens:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.ended:
                continue
            got.append(request_id)
            if sequence.add(token):
                ended.append(request_id)
        return got, ended
