"""Small models for the tests, and what runs them: an oracle, an engine alone, an executor whose ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disagg.core.commands import Chunk, Joined, RunSteps
from disagg.core.model_shapes import ModelShape, RopeScaling
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.collectives import Collectives, SingleRank
from disagg.runtime.engine import ChunkFeed, Engine, JoinedFeed, PlanFeed
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.model_place import Place
from disagg.runtime.weights import ModelWeights, random_weights

GREEDY = SamplingConfig()
BLOCK = 4
MIN_MARGIN = 5e-4  # float32 rounding moves these models' logits by about 1e-5, and MAX_ROUNDING at most
MAX_ROUNDING = 5e-5


def _tiny(name: str, architecture: str, **more: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "intermediate_size": 90,  # which 4 does not divide
        "vocab_size": 205,  # nor 2
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    return ModelShape(name, architecture, **(sizes | more))


SHAPES = {
    "llama": _tiny("llama", "LlamaForCausalLM", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
    "qwen2": _tiny("qwen2", "Qwen2ForCausalLM", attention_bias=True, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "qwen3": _tiny("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=16, rope_theta=1e6),
    "mistral": _tiny("mistral", "MistralForCausalLM", sliding_window=11),
    "few-kv-heads": _tiny("few-kv-heads", "LlamaForCausalLM", num_kv_heads=2),
}


def prompts(shape: ModelShape, lengths: Sequence[int], seed: int = 7) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(int(token) for token in torch.randint(shape.vocab_size, (length,), generator=generator))
        for length in lengths
    ]


def oracle(folder: Path, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and margins of Hugging Face transformers, after asserting that no near tie decided a token."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(output.logits).topk(2).values
    margins = [float(margin) for margin in (top[:, 0] - top[:, 1])]
    assert min(margins) > MIN_MARGIN
    return [int(token) for token in output.sequences[0, len(prompt) :]], margins


def make_engine(
    shape: ModelShape,
    weights: ModelWeights | None = None,
    *,
    num_blocks: int = 64,
    record_margins: bool = False,
    device: str = "cpu",
) -> Engine:
    """An engine of one rank."""
    place = Place.of(shape)
    pages = KvPages(place.layout, 0, num_blocks, BLOCK, device)
    weights = random_weights(place, 3, device) if weights is None else weights
    return Engine(shape, weights, place, pages, SingleRank(), device, record_margins=record_margins)


class Script:
    """Drives engines as an executor would, with block tables of its own. `engines`: all ranks of one executor.

    Every plan goes to each of them, through `each`, which runs a function for every rank at once.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        each: Callable[[Callable[[Engine], Any]], list[Any]] | None = None,
        tokens_per_block: int = BLOCK,
    ) -> None:
        self._engines = engines
        self._tokens_per_block = tokens_per_block
        self._each = each if each is not None else lambda call: [call(engine) for engine in engines]
        self._plan = 0
        self._free = list(range(10**6))[: engines[0]._pages.num_blocks][::-1]  # last block first
        self.kv: dict[int, int] = {}
        self.blocks: dict[int, tuple[int, ...]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.decoding: list[int] = []

    def reserve(self, request_id: int, num_tokens: int) -> tuple[int, ...]:
        """Take blocks, not in order, for `num_tokens` tokens."""
        count = -(-num_tokens // self._tokens_per_block)
        taken, self._free = self._free[:count:2], self._free[count:] + self._free[1:count:2]
        rest, self._free = self._free[: count - len(taken)], self._free[count - len(taken) :]
        self.blocks[request_id] = tuple(taken + rest)
        return self.blocks[request_id]

    def run(
        self,
        *,
        num_steps: int = 1,
        joined: Sequence[int] = (),
        left: Sequence[int] = (),
        chunks: Sequence[tuple[int, int, tuple[int, ...], bool]] = (),
        sampling: SamplingConfig = GREEDY,
        decodes: bool = True,
        remember: bool = False,
        ahead: int = 1,
    ) -> None:
        """One plan. `chunks`: (request, start, tokens, is_last). `remember`: the engine knows their tokens.

        `ahead`: steps launched before the first of them is waited for.
        """
        self.decoding = [r for r in self.decoding if r not in left] + list(joined)
        self._plan += 1
        plan = RunSteps(
            plan=self._plan,
            epoch=self._plan,
            first_step=1,
            last_step=num_steps,
            left=tuple(left),
            joined=tuple(Joined(r, self.kv[r], self.blocks[r]) for r in joined),
            chunks=tuple(Chunk(r, start, len(ids), last, self.blocks[r]) for r, start, ids, last in chunks),
            num_decodes=len(self.decoding),
            num_kv_tokens=sum(self.kv[r] for r in self.decoding),
            decodes=decodes,
        )
        feed = PlanFeed(
            tuple(JoinedFeed(r, None if remember else self.tokens[r][-1], sampling) for r in joined),
            tuple(ChunkFeed(r, ids, sampling) for r, _, ids, _ in chunks),
        )

        def on_rank(engine: Engine) -> list[list[tuple[int, int]]]:
            engine.begin(plan, feed)
            results: list[list[tuple[int, int]]] = []
            while len(results) < num_steps:
                pending = [engine.launch() for _ in range(min(ahead, num_steps - len(results)))]
                results += [step.result() for step in pending]
            return results

        results = self._each(on_rank)
        assert all(result == results[0] for result in results), "ranks disagree about the tokens"
        for step in results[0]:
            for request_id, token in step:
                self.tokens.setdefault(request_id, []).append(token)
        for request_id, start, ids, _ in chunks:
            self.kv[request_id] = start + len(ids)
        for request_id in self.decoding if decodes else ():
            self.kv[request_id] += num_steps

    def prefill(self, request_id: int, prompt: tuple[int, ...], chunk: int, reserve: int, **more: Any) -> None:
        """The whole prompt in chunks of `chunk`, with the decode batch going on beside it."""
        self.reserve(request_id, reserve)
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            self.run(chunks=[(request_id, start, part, start + len(part) == len(prompt))], **more)

    def generate(self, request_id: int, prompt: tuple[int, ...], num_tokens: int, chunk: int = 1 << 20) -> list[int]:
        """All tokens of one request that is alone."""
        self.prefill(request_id, prompt, chunk, len(prompt) + num_tokens)
        if num_tokens > 1:
            self.run(joined=[request_id], num_steps=num_tokens - 1)
            self.decoding.remove(request_id)
            self.run(left=[request_id], decodes=False)
        return self.tokens[request_id]


class ThreadCollectives:
    """Collectives of one rank among threads of this process, for tests: exact sums in rank order."""

    peers = None
    description = "threads"

    def __init__(self, shared: Threads, rank: int) -> None:
        self._shared = shared
        self._rank = rank

    def _exchange(self, x: Any, ranks: Sequence[int]) -> list[Any]:
        shared = self._shared
        shared.slots[self._rank] = x
        barrier = shared.barriers[tuple(ranks)]
        barrier.wait(30)
        values = [shared.slots[rank] for rank in ranks]
        barrier.wait(30)
        return values

    def _stage(self) -> range:
        first = self._rank - self._rank % self._shared.tp
        return range(first, first + self._shared.tp)

    def tp_all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.clone(), self._stage())).sum(0)

    def tp_all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x.clone(), self._stage()), dim=-1)

    def send_hidden(self, x: Tensor) -> None:
        with self._shared.arrived:
            self._shared.mail[self._rank + self._shared.tp] = x.clone()
            self._shared.arrived.notify_all()

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        with self._shared.arrived:
            assert self._shared.arrived.wait_for(lambda: self._rank in self._shared.mail, 30)
            x = self._shared.mail.pop(self._rank)
        assert x.shape == (num_tokens, hidden_size)
        assert x.dtype == dtype
        return x

    def broadcast_tokens(self, tokens: Tensor | None, num_tokens: int) -> list[int]:
        values = self._exchange(tokens, range(self._shared.num_ranks))[self._shared.num_ranks - self._shared.tp]
        assert len(values) == num_tokens
        return [int(token) for token in values]


class Threads:
    """An executor of `layout` ranks in this process: `engines`, and `each` to call something on all at once."""

    def __init__(
        self, shape: ModelShape, tp: int, pp: int, layers_per_stage: Sequence[int] | None = None, num_blocks: int = 64
    ) -> None:
        self.tp = tp
        self.num_ranks = tp * pp
        self.slots: dict[int, Any] = {}
        self.mail: dict[int, Tensor] = {}
        self.arrived = threading.Condition()
        groups = [tuple(range(stage * tp, (stage + 1) * tp)) for stage in range(pp)] + [tuple(range(self.num_ranks))]
        self.barriers = {ranks: threading.Barrier(len(ranks)) for ranks in groups}
        self.engines: list[Engine] = []
        self.pages: list[KvPages] = []
        for rank in range(self.num_ranks):
            place = Place.of(shape, tp, pp, rank, layers_per_stage)
            collectives: Collectives = ThreadCollectives(self, rank)
            self.pages.append(KvPages(place.layout, rank, num_blocks, BLOCK))
            self.engines.append(Engine(shape, random_weights(place, 3), place, self.pages[rank], collectives))

    def each(self, call: Callable[[Engine], Any]) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = call(self.engines[rank])
            except BaseException as error:
                errors.append(error)
                for barrier in self.barriers.values():
                    barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return results
