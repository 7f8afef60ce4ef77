"""Real clusters on GPUs: tokens equal those of transformers in every layout and over every transport, and so do checksums."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from disagg.core.model_shapes import ModelShape
from disagg.core.tables import RequestRow
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import HardwareResult, run_cluster
from disagg.runtime.model_place import Place
from disagg.runtime.weights import load_weights, write_random_checkpoint
from tests.fused_models import SHAPES, fused_engine
from tests.runtime_programs.clusters import BLOCK, Layout, cluster, context, generation, mixed, named_twice, submissions
from tests.tiny_models import MIN_MARGIN, Script, oracle, prompts

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TWO = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
SHAPE = SHAPES["llama"]
NUM_TOKENS = 24
REUSING: dict[str, Any] = {"enable_block_reuse": True, "num_blocks": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, ...]], list[list[int]]]:
    """A checkpoint, prompts, and what transformers makes of them without a close call."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("model"), SHAPE, seed=3)
    chosen, answers = [], []
    for prompt in prompts(SHAPE, [5, 19, 12, 7, 23, 9, 14, 6, 31, 17], seed=5):
        tokens, margins = oracle(folder, prompt, NUM_TOKENS)
        if min(margins) > MIN_MARGIN:
            chosen.append(prompt)
            answers.append(tokens)
    assert len(chosen) >= 4
    return folder, chosen, answers


def served(folder: Path, layouts: Sequence[Layout], asked: Sequence[tuple[int, ...]], **spec: Any) -> HardwareResult:
    made = cluster(ModelSource(folder=str(folder)), layouts, device="cuda", num_devices=NUM_GPUS, **spec)
    result = run_cluster(made, submissions(asked, NUM_TOKENS), timeout_s=150)
    assert isinstance(result, HardwareResult)
    return result


def check_checksums(result: HardwareResult) -> int:
    """Every checksum that a sender made, its reader made too; how many there are."""
    ends: dict[tuple[Any, ...], dict[bool, bytes]] = {}
    for record in result.rank_records:
        for row in record.checksums:
            pair = (row.rank, row.peer_rank) if row.is_sender else (row.peer_rank, row.rank)
            ends.setdefault((row.transfer_id, pair, row.pieces), {})[row.is_sender] = row.checksums
    assert all(set(both) == {True, False} and both[True] == both[False] for both in ends.values())
    return sum(len(both[True]) // 8 for both in ends.values())


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(mixed(), id="tp1"),
        pytest.param(mixed(tp=2), id="tp2", marks=TWO),
        pytest.param(mixed(pp=2), id="pp2", marks=TWO),
    ],
)
def test_an_aggregated_cluster_says_what_transformers_says(layout: Layout, model: Any) -> None:
    folder, asked, answers = model
    result = served(folder, [layout], asked, pipeline_depth=2, plan_ahead=True)
    assert [list(row.token_ids) for row in result.sends] == answers


@TWO
@pytest.mark.parametrize("switch", ["0", "1"])
def test_ranks_that_sum_through_peer_memory_say_the_same_as_through_nccl(
    switch: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked, answers = model
    monkeypatch.setenv("DISAGG_PEER_REDUCE", switch)
    result = served(folder, [mixed(tp=2)], asked, pipeline_depth=2, plan_ahead=True)
    assert [list(row.token_ids) for row in result.sends] == answers
    ways = [info.collectives or "" for info in result.ranks]
    assert all(way.startswith("peer memory" if switch == "1" else "NCCL") for way in ways), ways


@TWO
def test_sums_through_peer_memory_are_those_of_nccl_bit_by_bit_and_the_same_on_all_ranks() -> None:
    program = Path(__file__).parent / "gpu_programs" / "peer_sums.py"
    done = subprocess.run([sys.executable, str(program), "check"], capture_output=True, text=True, timeout=150)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 unlike NCCL, 0 unlike other ranks") == 2
    assert done.stdout.count(": 0 norms wrong, ") == 2
    assert done.stdout.count(": 0 greatest logits unlike torch's") == 2
    assert "given up after" in done.stdout


@pytest.mark.parametrize("transport", ["cuda_ipc", "host", "mpi"])
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param((context(), generation()), id="tp1-tp1"),
        pytest.param((context(tp=2), generation(pp=2)), id="tp2-pp2", marks=TWO),
        pytest.param((context(pp=2), generation(tp=2)), id="pp2-tp2", marks=TWO),
    ],
)
def test_a_disaggregated_cluster_says_the_same_over_every_transport(
    layouts: tuple[Layout, ...], transport: str, model: Any
) -> None:
    folder, asked, answers = model
    result = served(folder, layouts, asked, pipeline_depth=2, plan_ahead=True, transport=transport)
    assert [list(row.token_ids) for row in result.sends] == answers
    assert check_checksums(result) > 0


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param((mixed(**REUSING),), id="aggregated"),
        pytest.param((context(**REUSING), generation(**REUSING)), id="disaggregated"),
    ],
)
def test_prompts_that_are_found_again_say_the_same(layouts: tuple[Layout, ...], model: Any) -> None:
    folder, asked, answers = model
    spec = cluster(
        ModelSource(folder=str(folder)), layouts, device="cuda", num_devices=NUM_GPUS, pipeline_depth=2, plan_ahead=True
    )
    result = run_cluster(spec, named_twice(asked, NUM_TOKENS), timeout_s=150)
    assert isinstance(result, HardwareResult)
    assert [list(row.token_ids) for row in result.sends] == answers * 2
    cached = [row.num_cached_tokens for row in result.rows if isinstance(row, RequestRow)]
    assert sum(cached) >= sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in asked)


BIG_HEADS = replace(
    SHAPES["llama"],
    name="bf16",
    num_layers=4,
    hidden_size=512,
    num_attention_heads=8,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=1024,
    vocab_size=1000,
    max_position_embeddings=4096,
    dtype="bfloat16",
)


@pytest.mark.parametrize("length", [40, 700, 2048])
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(length: int, tmp_path: Path) -> None:
    """Relative to float32, ours may be off by at most 1.2 times what transformers' own bfloat16 is, plus 0.2 %."""
    from transformers import AutoModelForCausalLM

    shape: ModelShape = BIG_HEADS
    folder = write_random_checkpoint(tmp_path, shape, seed=4)
    prompt = prompts(shape, [length], seed=1)[0]
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda").eval()
        with torch.inference_mode():
            logits[dtype] = theirs(torch.tensor([prompt], device="cuda")).logits[0, -1].float()
    weights = load_weights(folder, Place.of(shape), "cuda")
    engine = fused_engine(shape, weights, num_blocks=256, tokens_per_block=16, max_num_tokens=2048, device="cuda")
    seen: list[torch.Tensor] = []
    stepper: Any = engine._stepper
    forward = stepper.model.forward

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(forward(*args, **more))
        return seen[-1]

    stepper.model.forward = watched
    script = Script([engine], tokens_per_block=16)
    script.prefill(0, prompt, 1 << 20, length + 8)
    exact, usual, ours = logits[torch.float32], logits[torch.bfloat16], seen[-1][0, : shape.vocab_size].float()
    error = {name: float((x - exact).norm() / exact.norm()) for name, x in (("usual", usual), ("ours", ours))}
    assert error["ours"] <= 1.2 * error["usual"] + 2e-3, error
