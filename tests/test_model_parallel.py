"""Executors of several ranks give the tokens of one rank, which test_model_engine.py holds equal to transformers'.

`main` is what a rank of the MPI tests below does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.core.kv_layout import transfer_plan
from disagg.runtime.collectives import MpiCollectives
from disagg.runtime.engine import Engine
from disagg.runtime.kv_pages import KvPages, needed_bytes
from disagg.runtime.model_place import Place
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.weights import load_weights, needed_weight_bytes, write_random_checkpoint
from tests.tiny_models import BLOCK, MIN_MARGIN, SHAPES, Script, Threads, make_engine, prompts
from tests.warm_world import warm_world

NUM_TOKENS = 12
ONE = (1, 1, None)
LAYOUTS: dict[str, tuple[int, int, tuple[int, ...] | None]] = {
    "tp2": (2, 1, None),
    "tp4": (4, 1, None),
    "tp8": (8, 1, None),  # twice the KV heads
    "pp2": (1, 2, None),
    "pp2-uneven": (1, 2, (3, 1)),
    "tp2-pp2": (2, 2, (1, 3)),
    "tp4-pp3": (4, 3, (1, 2, 1)),
}


def alone(name: str) -> list[list[int]]:
    shape = SHAPES[name]
    answers = []
    for text in texts_of(name):
        engine = make_engine(shape, record_margins=True)
        answers.append(Script([engine]).generate(0, text, NUM_TOKENS))
        assert min(margin for _, margin in engine.margins) > MIN_MARGIN
    return answers


def texts_of(name: str) -> list[tuple[int, ...]]:
    return prompts(SHAPES[name], [9, 14], seed=8)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    return {name: alone(name) for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_tokens_of_one_rank(name: str, layout: str, answers: dict[str, list[list[int]]]) -> None:
    executor = Threads(SHAPES[name], *LAYOUTS[layout])
    script = Script(executor.engines, executor.each)
    for request, text in enumerate(texts_of(name)):
        script.prefill(request, text, 5, len(text) + NUM_TOKENS)
        script.run(joined=[request])
    script.run(num_steps=NUM_TOKENS - 2)
    for request, expected in enumerate(answers[name]):
        assert script.tokens[request][:NUM_TOKENS] == expected


PAIRS = [
    ("one", "tp2"),
    ("tp2", "one"),
    ("one", "pp2"),
    ("pp2", "one"),
    ("pp2-uneven", "pp2"),
    ("tp2-pp2", "tp4"),
    ("tp2", "pp2-uneven"),
    ("tp8", "tp2"),
    ("tp2-pp2", "tp8"),
    ("tp4-pp3", "tp2-pp2"),
]


@pytest.mark.parametrize("name", ["llama", "few-kv-heads"])
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_kv_moved_between_layouts_gives_the_tokens_of_one_rank(
    name: str, source: str, destination: str, answers: dict[str, list[list[int]]]
) -> None:
    shape = SHAPES[name]
    context = Threads(shape, *({"one": ONE} | LAYOUTS)[source])
    generation = Threads(shape, *({"one": ONE} | LAYOUTS)[destination])
    before, after = Script(context.engines, context.each), Script(generation.engines, generation.each)
    after.reserve(99, 3)  # so that block ids differ
    for request, text in enumerate(texts_of(name)):
        before.prefill(request, text, 6, len(text))
        held = before.blocks[request]
        into = after.reserve(request, len(text) + NUM_TOKENS)
        for piece in transfer_plan(context.pages[0].layout, generation.pages[0].layout):
            sender, receiver = context.pages[piece.source_rank], generation.pages[piece.destination_rank]
            where = (into[: len(held)], len(text), piece.layers, piece.heads)
            receiver.unpack(sender.pack(held, len(text), piece.layers, piece.heads), *where)
            sent = sender.checksums(held, len(text), piece.layers, piece.heads)
            assert torch.equal(sent, receiver.checksums(*where))
        after.tokens[request], after.kv[request] = list(before.tokens[request]), len(text)
    after.run(joined=[0, 1], num_steps=NUM_TOKENS - 1)
    assert [after.tokens[request] for request in range(2)] == answers[name]


# ---- the same over MPI ----------------------------------------------------------------------------------------------

# name -> (shape, tp, pp, layers per stage, first world rank): those of the same wave run side by side
WAVES: list[dict[str, tuple[str, int, int, tuple[int, ...] | None, int]]] = [
    {"tp2": ("qwen2", 2, 1, None, 0), "pp2-uneven": ("qwen3", 1, 2, (3, 1), 2)},
    {"tp2-pp2": ("mistral", 2, 2, (1, 3), 0)},
    {"tp-over-kv-heads": ("few-kv-heads", 4, 1, None, 0)},
    {"bfloat16": ("llama", 2, 2, None, 0)},
]


@pytest.fixture(scope="module")
def mpi_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each executor wrote, by executor, in rank order."""
    folder = tmp_path_factory.mktemp("mpi")
    for name in SHAPES:
        write_random_checkpoint(folder / name, SHAPES[name], seed=3)
    warm_world().run(__name__, [str(folder)], 4)
    results: dict[str, list[dict[str, Any]]] = {}
    for wave in WAVES:
        for executor, (_, tp, pp, _, _) in wave.items():
            results[executor] = [json.loads((folder / f"{executor}.{r}.json").read_text()) for r in range(tp * pp)]
    return results


@pytest.mark.mpi
@pytest.mark.parametrize("executor", ["tp2", "pp2-uneven", "tp2-pp2", "tp-over-kv-heads"])
def test_real_processes_give_the_tokens_of_one_rank(
    executor: str, mpi_results: dict[str, list[dict[str, Any]]], answers: dict[str, list[list[int]]]
) -> None:
    name = next(wave[executor][0] for wave in WAVES if executor in wave)
    for rank in mpi_results[executor]:
        assert rank["tokens"] == answers[name]


@pytest.mark.mpi
def test_bfloat16_crosses_mpi_and_every_rank_agrees(mpi_results: dict[str, list[dict[str, Any]]]) -> None:
    tokens = [rank["tokens"] for rank in mpi_results["bfloat16"]]
    assert len(tokens) == 4
    assert all(each == tokens[0] for each in tokens)
    assert [len(each) for each in tokens[0]] == [NUM_TOKENS] * 2


@pytest.mark.mpi
def test_no_process_allocates_the_kv_or_weights_of_another(mpi_results: dict[str, list[dict[str, Any]]]) -> None:
    for wave in WAVES:
        for executor, (name, tp, pp, layers, _) in wave.items():
            if executor == "bfloat16":
                continue
            for rank, result in enumerate(mpi_results[executor]):
                place = Place.of(SHAPES[name], tp, pp, rank, layers)
                assert result["kv_bytes"] == needed_bytes(place.layout, rank, 64, BLOCK)
                assert result["weight_bytes"] == needed_weight_bytes(place)


def main(world: MpiWorld, args: Sequence[str]) -> None:
    """What each rank does. Argument: the folder of the checkpoints, and of what is found."""
    folder = Path(args[0])
    for wave in WAVES:
        for executor, (name, tp, pp, layers, first) in wave.items():
            members = range(first, first + tp * pp)
            if world.rank not in members:
                continue
            comm = world.group(members)
            shape = SHAPES[name]
            if executor == "bfloat16":
                from msgspec.structs import replace

                shape = replace(shape, dtype="bfloat16")
            place = Place.of(shape, tp, pp, comm.Get_rank(), layers)
            weights = load_weights(folder / name, place)
            pages = KvPages(place.layout, place.rank, 64, BLOCK)
            collectives = MpiCollectives(comm, tp)
            script = Script([Engine(shape, weights, place, pages, collectives)])
            # As in an executor: steps run on a thread that is not the main one.
            thread = threading.Thread(target=_generate, args=(script, texts_of(name)))
            thread.start()
            thread.join()
            tokens = [script.tokens[request][:NUM_TOKENS] for request in range(2)]
            result = {"tokens": tokens, "kv_bytes": pages.nbytes, "weight_bytes": weights.nbytes}
            (folder / f"{executor}.{place.rank}.json").write_text(json.dumps(result))
            collectives.free()
            comm.Free()
        world.control.Barrier()


def _generate(script: Script, texts: list[tuple[int, ...]]) -> None:
    for request, text in enumerate(texts):
        script.prefill(request, text, 5, len(text) + NUM_TOKENS)
        script.run(joined=[request])
    script.run(num_steps=NUM_TOKENS - 2)
