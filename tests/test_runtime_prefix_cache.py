"""Prefix caching on real executors: pages found again give the tokens of transformers, and only what is missing travels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest

from disagg.core.config import SchedulerConfig
from disagg.core.event_log import read_log, replay_frames
from disagg.core.events import StepsDone
from disagg.core.executor import ExecutorCore
from disagg.core.prefix_names import token_hashes
from disagg.core.tables import RequestRow, TransferRow
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import HardwareResult
from disagg.runtime.weights import write_random_checkpoint
from disagg.simulator.recorded import Recording, conform
from tests.runtime_programs.clusters import (
    BLOCK,
    Layout,
    cluster,
    context,
    generation,
    mixed,
    named_twice,
    num_instants,
)
from tests.test_runtime_conformance import step_ends
from tests.tiny_models import SHAPES, oracle, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
SHAPE = SHAPES["llama"]
NUM_TOKENS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / SHAPE.name, SHAPE, seed=3)


@functools.cache
def answer(folder: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(oracle(folder, prompt, NUM_TOKENS)[0])


def run(
    folder: Path, layouts: Sequence[Layout], texts: Sequence[Sequence[int]], depth: int = 1, plan_ahead: bool = False
) -> HardwareResult:
    """The prompts one after the other, then all of them again side by side."""
    model = ModelSource(folder=str(folder), dtype="float32")
    spec = cluster(model, layouts, pipeline_depth=depth, plan_ahead=plan_ahead)
    result = run_cluster(spec, named_twice(texts, NUM_TOKENS), timeout_s=120)
    assert isinstance(result, HardwareResult)
    launch = {placement.executor: (1, depth, plan_ahead) for placement in spec.placements}
    assert conform(Recording(result.logs, step_ends(result)), launch) == num_instants(result.logs)
    return result


def cached_tokens(result: HardwareResult) -> list[int]:
    """Of each request, in order of ids."""
    rows = [row for row in result.rows if isinstance(row, RequestRow)]
    return [row.num_cached_tokens for row in sorted(rows, key=lambda row: row.request_id)]


def check_blocks(result: HardwareResult, num_executors: int) -> None:
    """Cores that live through the logs say the same, and end with every block free or cached."""
    for executor in range(1, num_executors + 1):
        header, logged = read_log(result.logs[executor])
        assert header.executor is not None
        core = ExecutorCore(header.executor)
        assert replay_frames(core, list(logged)) > 0
        core.check()
        free, _, _, _, _, cached = core.scheduler.block_counts()
        assert free + cached == header.executor.num_blocks
        assert cached > 0


def test_disaggregated_tokens_with_shared_prefixes_are_those_of_transformers(folder: Path) -> None:
    """Blocks of 4: the second prompt has 16 tokens in common with the first, the third 8 with both, the last is the first."""
    first, tail, other = prompts(SHAPE, [19, 7, 9], seed=5)
    texts = [first, first[:16] + tail, first[:11] + other, first]
    answers = [answer(folder, text) for text in texts]
    result = run(folder, [context(enable_block_reuse=True), generation(enable_block_reuse=True)], texts)
    assert [row.token_ids for row in result.sends] == answers * 2
    assert cached_tokens(result)[:4] == [0, 16, 8, 16]
    transfers = sorted((row for row in result.rows if isinstance(row, TransferRow)), key=lambda row: row.start_ps)
    assert [row.num_tokens for row in transfers][:4] == [19, 7, 12, 3]
    assert all(row.ok for row in transfers)
    check_blocks(result, 2)
    sums: dict[bool, list[tuple[int, bytes]]] = {True: [], False: []}  # of the blocks that travelled, at both ends
    for record in result.rank_records:
        for row in record.checksums:
            sums[row.is_sender].append((row.transfer_id, row.checksums))
    assert sorted(sums[True]) == sorted(sums[False])
    assert len(sums[True]) == 8


def test_an_aggregated_executor_of_two_ranks_finds_prompts_and_answers_again(folder: Path) -> None:
    """A conversation: the second prompt holds the first one and its answer, whose last token's KV was never written.

    Its 11 blocks are all there are: side by side, one of the two is preempted, or blocks are evicted.
    """
    first, tail = prompts(SHAPE, [10, 5], seed=5)
    second = first + answer(folder, first) + tail
    texts = [first, second]
    tight = SchedulerConfig(max_batch_size=8, max_num_tokens=16, capacity="max_utilization")
    layout = mixed(tp=2, enable_block_reuse=True, num_blocks=11, scheduler=tight)
    result = run(folder, [layout], texts, depth=2, plan_ahead=True)
    assert [row.token_ids for row in result.sends] == [answer(folder, text) for text in texts] * 2
    assert cached_tokens(result)[:2] == [0, 20]  # of 10 + 13 that were written, five blocks were full
    named = [e for f in read_log(result.logs[1])[1] for e in f.events if isinstance(e, StepsDone) and e.block_hashes]
    assert named[0].block_hashes == ((1, token_hashes(second[:23], BLOCK)[2:]),)
    check_blocks(result, 1)
