"""What graphs of steps with short prompts find in their places, and what is taken out: without a device, run at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagg.core.step_sizes import CHUNK_GRAPH_ROWS, CHUNK_SLOTS, chunk_graph, chunk_graph_decodes
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.model_place import Place
from disagg.runtime.weights import random_weights
from tests.fused_models import SHAPES, fused_engine
from tests.tiny_models import MIN_MARGIN, Script, make_engine, prompts

from disagg.runtime import chunk_graphs  # isort: skip  (after Triton was asked for)
from disagg.runtime.chunk_graphs import ChunkGraphs, Key  # isort: skip  (after Triton was asked for)

MAX_BATCH = 8


class AtOnce(ChunkGraphs):
    """Runs a step on what lies in the places where a graph would be replayed."""

    def __init__(self, stepper: Any) -> None:
        decodes = (0, *chunk_graph_decodes(MAX_BATCH))
        super().__init__(stepper.model, stepper._batch, decodes, stepper._greedy, torch.device("cpu"))
        self._graphs = dict.fromkeys(self.keys(128))  # type: ignore[assignment]
        self.used: list[Key] = []

    def _replay(self, key: Key) -> None:
        self.used.append(key)
        self._results[key] = self._run(key)


def graphed_engine(shape: Any, weights: Any) -> tuple[Any, AtOnce]:
    engine = fused_engine(shape, weights, record_margins=True, max_batch=MAX_BATCH, max_num_tokens=120, warm=False)
    stepper: Any = engine._stepper
    graphs = AtOnce(stepper)
    stepper._chunk_graphs = graphs
    return engine, graphs


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_engine_whose_short_prompts_run_as_graphs_yields_the_tokens_of_the_plain_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several at once, beside decodes and without, more than one chunk, with KV before, and sampled by chance."""
    monkeypatch.setattr(chunk_graphs, "CHUNK_SLOTS", 4)  # a program each, one after the other
    shape = SHAPES[name]
    weights = random_weights(Place.of(shape), 3, "cpu")
    plain = make_engine(shape, weights, record_margins=True)
    engine, graphs = graphed_engine(shape, weights)
    asked = prompts(shape, [5, 9, 13, 7, 20, 6], seed=8)
    tokens = []
    for each in (plain, engine):
        script = Script([each])
        for request, prompt in enumerate(asked):
            script.reserve(request, len(prompt) + 12)
        script.run(chunks=[(i, 0, asked[i], True) for i in (0, 1, 2)])
        script.run(joined=[0, 1, 2], chunks=[(3, 0, asked[3], True)])
        script.run(num_steps=2)
        script.run(joined=[3], chunks=[(4, 0, asked[4][:12], False)])
        script.run(chunks=[(4, 12, asked[4][12:], True)])
        script.run(joined=[4], left=[1], chunks=[(5, 0, asked[5], True)], decodes=False)
        hot = SamplingConfig(temperature=1.5, top_k=50, top_p=0.95, seed=3)
        script.run(num_steps=3, sampling=hot)
        tokens.append(script.tokens)
    assert graphs.used == [(0, 64), (8, 64), (8, 64), (8, 64), (0, 64)]
    assert min(margin for _, margin in plain.margins) > MIN_MARGIN
    assert tokens[1] == tokens[0]


def test_the_smallest_graph_with_room_for_a_step_is_chosen() -> None:
    assert chunk_graph(0, 1, 1, 128) == (0, 64)
    assert chunk_graph(0, 3, 65, 128) == (0, 128)
    assert chunk_graph(0, CHUNK_SLOTS, 1024, 128) == (0, CHUNK_GRAPH_ROWS[-1])
    assert chunk_graph(5, 1, 56, 128) == (8, 64)
    assert chunk_graph(5, 1, 57, 128) == (8, 128)
    assert chunk_graph(65, 1, 10, 100) == (100, 128)


def test_what_no_graph_holds_runs_kernel_by_kernel() -> None:
    assert chunk_graph(0, 1, 1025, 128) is None
    assert chunk_graph(0, CHUNK_SLOTS + 1, 20, 128) is None
    assert chunk_graph(129, 1, 20, 128) is None
    assert chunk_graph(100, 1, 900, 128) is None
