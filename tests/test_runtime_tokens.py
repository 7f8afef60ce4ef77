"""Greedy tokens of real clusters: disaggregated, aggregated and transformers say the same, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg.core.event_log import read_log, replay
from disagg.core.model_shapes import ModelShape
from disagg.core.tables import StepRow, TransferRow
from disagg.runtime.executor_spec import HardwareSpec, ModelSource, check_spec
from disagg.runtime.hardware_run import HardwareResult
from disagg.runtime.weights import write_random_checkpoint
from tests.runtime_programs.clusters import BLOCK, NUM_BLOCKS, Layout, cluster, context, generation, mixed, submissions
from tests.tiny_models import MIN_MARGIN, SHAPES, oracle, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
NUM_TOKENS = 14

LAYOUTS: dict[str, tuple[str, list[Layout]]] = {
    "1:1": ("llama", [context(), generation()]),
    "2:1": ("qwen3", [context(), context(), generation()]),
    "1:2": ("mistral", [context(), generation(), generation()]),
    "tp 1 to 2": ("qwen2", [context(), generation(tp=2)]),
    "tp 2 to 1": ("llama", [context(tp=2), generation()]),
    "pp 1 to 2": ("llama", [context(), generation(pp=2)]),
    "pp 2 to 1": ("qwen3", [context(pp=2), generation()]),
    "uneven pp": ("llama", [context(pp=2, layers=(1, 3)), generation(pp=2, layers=(3, 1))]),
    "tp x pp to pp x tp": ("llama", [context(tp=2, pp=2), generation(tp=1, pp=2)]),
    "tp over the KV heads": ("few-kv-heads", [context(tp=4), generation(tp=2)]),
    "to tp over the KV heads": ("few-kv-heads", [context(), generation(tp=4)]),
    "aggregated": ("llama", [mixed()]),
    "aggregated tp 2": ("llama", [mixed(tp=2)]),
}


class Known:
    """A model on disk, prompts, and what transformers makes of them."""

    def __init__(self, shape: ModelShape, folder: Path) -> None:
        self.folder = write_random_checkpoint(folder / shape.name, shape, seed=3)
        self.model = ModelSource(folder=str(self.folder), dtype="float32")
        self.prompts = prompts(shape, [5, 19, 12, 7, 23, 9], seed=7 if shape.qk_norm else 5)  # no near tie in either
        self.answers = [tuple(oracle(self.folder, prompt, NUM_TOKENS)[0]) for prompt in self.prompts]


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Known] = {}
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Known:
        if name not in made:
            made[name] = Known(SHAPES[name], folder)
        return made[name]

    return get


def check_transfers(spec: HardwareSpec, result: HardwareResult, num_requests: int) -> None:
    """Every (layer, KV head, block) of every request arrived once on each rank that holds it, equal at both ends."""
    roster = check_spec(spec)
    sent: dict[tuple[int, ...], int] = {}
    received: dict[tuple[int, ...], int] = {}
    arrived: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for record in result.rank_records:
        for row in record.checksums:
            pair = (row.peer_rank, row.rank) if not row.is_sender else (row.rank, row.peer_rank)
            sums = [row.checksums[i : i + 8] for i in range(0, len(row.checksums), 8)]
            cells = [(la, h) for (l0, l1), (h0, h1) in row.pieces for la in range(l0, l1) for h in range(h0, h1)]
            num_blocks = len(sums) // len(cells)
            assert num_blocks * len(cells) == len(sums) > 0
            for i, cell in enumerate(cells):
                for block in range(num_blocks):
                    key = (row.transfer_id, *pair, *cell, block)
                    side = sent if row.is_sender else received
                    assert key not in side
                    side[key] = int.from_bytes(sums[i * num_blocks + block], "little")
                if not row.is_sender:
                    held = arrived.setdefault((row.transfer_id, row.rank), set())
                    assert cell not in held
                    held.add(cell)
    assert sent == received
    transfers = [row for row in result.rows if isinstance(row, TransferRow)]
    assert len(transfers) == num_requests
    assert all(row.ok for row in transfers)
    for transfer in transfers:
        layout = roster.layouts[transfer.reader]
        for i, rank in enumerate(roster.placements[transfer.reader].participant_ids):
            layers, heads = layout.layers_of(i), layout.heads_of(i)
            wanted = {(layer, head) for layer in range(*layers) for head in range(*heads)}
            assert arrived[transfer.executor_request_id, rank] == wanted


def check_memory(spec: HardwareSpec, result: HardwareResult) -> None:
    """Each rank allocated the KV of its own layers and heads, and nothing of anybody else's."""
    roster = check_spec(spec)
    assert {info.rank for info in result.ranks} == set(roster.executor_of)
    for info in result.ranks:
        layout = roster.layouts[info.executor]
        index = roster.placements[info.executor].participant_ids.index(info.rank)
        assert info.kv_bytes == layout.kv_bytes_per_token(index, roster.shape.dtype_bytes) * NUM_BLOCKS * BLOCK


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_tokens_equal_transformers_in_this_layout(known: Any, name: str) -> None:
    model, layouts = LAYOUTS[name]
    case = known(model)
    spec = cluster(case.model, layouts)
    result = run_cluster(spec, submissions(case.prompts, NUM_TOKENS), timeout_s=120)
    assert result is not None
    assert [row.token_ids for row in result.sends] == case.answers
    assert all(row.error is None for row in result.sends)
    margins = [margin for record in result.rank_records for _, margin in record.margins]
    assert len(margins) >= NUM_TOKENS * len(case.prompts)
    assert min(margins) > MIN_MARGIN
    check_memory(spec, result)
    if not name.startswith("aggregated"):
        check_transfers(spec, result, len(case.prompts))
    assert any(row.num_steps > 1 for row in result.rows if isinstance(row, StepRow))
    for log in result.logs.values():
        assert replay(log) == len(logged := list(read_log(log)[1]))
        assert sum(len(frame.events) for frame in logged) > len(
            case.prompts
        )  # in few instants, where much comes at once
