"""Clusters that cannot be: each is refused with its cause and what is allowed, and nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.config import OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.model_shapes import ModelError
from disagg.runtime.executor_spec import ModelSource, SpecError, check_spec
from disagg.runtime.hardware_run import HardwareRunError, run_cluster
from disagg.runtime.launcher import EXIT_RESOURCES, find_mpiexec, launch
from disagg.runtime.orchestrator_job import JOB, Job, encode
from disagg.runtime.transport import TransportError
from disagg.runtime.weights import write_random_checkpoint
from tests.runtime_programs.clusters import cluster, context, generation, mixed, submissions
from tests.tiny_models import SHAPES, prompts

SHAPE = SHAPES["llama"]
MODEL = ModelSource(SHAPE, seed=3)
PAIR = cluster(MODEL, [context(), generation()])


def test_without_a_transport_disaggregated_serving_is_not_enabled() -> None:
    with pytest.raises(TransportError, match=r"^Disaggregated serving is not enabled, please check the configuration$"):
        run_cluster(replace(PAIR, transport=None), ())
    check_spec(replace(cluster(MODEL, [mixed()]), transport=None))  # an aggregated cluster hands nothing over


def test_an_unknown_transport_is_refused_with_what_there_is() -> None:
    with pytest.raises(TransportError, match="'tcp' is unknown; allowed: mpi"):
        check_spec(replace(PAIR, transport="tcp"))


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        (((1,), (1,)), "participant_ids intersect: rank 1 belongs to executors 1 and 2"),
        (((0,), (1,)), "rank 0 belongs to the orchestrator"),
        (((1,), (3,)), r"leave ranks without an executor; allowed: all of 1 to 2"),
        (((1,), (2, 3)), r"executor 2 has 2 participant_ids; allowed: exactly tensor_parallel_size 1"),
    ],
)
def test_participants_that_do_not_add_up_are_refused(ranks: Any, why: str) -> None:
    placements = tuple(replace(p, participant_ids=ids) for p, ids in zip(PAIR.placements, ranks))
    with pytest.raises(SpecError, match=why):
        check_spec(replace(PAIR, placements=placements))


def test_parallelism_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="3"):
        check_spec(cluster(MODEL, [context(tp=3), generation()]))
    with pytest.raises(ModelError, match="layers"):
        check_spec(cluster(MODEL, [context(pp=2, layers=(1, 1)), generation()]))


def test_executors_and_placements_must_be_the_same_and_depths_positive() -> None:
    with pytest.raises(SpecError, match="each needs exactly one"):
        check_spec(replace(PAIR, placements=PAIR.placements[:1]))
    with pytest.raises(SpecError, match="at least 1"):
        check_spec(cluster(MODEL, [mixed()], pipeline_depth=0))
    with pytest.raises(SpecError, match="a folder, or a shape"):
        check_spec(replace(PAIR, model=ModelSource()))
    with pytest.raises(SpecError, match="at least one"):
        check_spec(replace(PAIR, orchestrator=OrchestratorConfig(())))


@pytest.mark.mpi
def test_a_checkpoint_with_wrong_shapes_ends_the_run_with_the_tensors_name(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", SHAPE, seed=3)
    other = write_random_checkpoint(tmp_path / "other", replace(SHAPE, intermediate_size=88), seed=3)
    (other / "model.safetensors").replace(folder / "model.safetensors")
    spec = cluster(ModelSource(folder=str(folder)), [context(), generation(tp=2)])
    began = time.monotonic()
    with pytest.raises(
        HardwareRunError, match=r"rank \d of executor \d cannot start: .*mlp.*has shape.*expected"
    ) as why:
        run_cluster(spec, (), timeout_s=60)
    assert why.value.exit_code == 2
    assert time.monotonic() - began < 25


@pytest.mark.mpi
def test_a_policy_that_breaks_its_contract_ends_the_run_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from disagg.policies.interfaces import BatchPolicy, SelectingPolicy\n"
        "from disagg.policies.vocabulary import BatchPlan, ChunkPlan\n"
        "class Greedy(BatchPolicy):\n"
        "    def plan(self, view):\n"
        "        return BatchPlan((ChunkPlan(next(iter(view.waiting)).request_id, 10**6),))\n"
        "class Nobody(SelectingPolicy):\n"
        "    def select(self, request, pool):\n"
        "        raise ValueError('no idea')\n"
    )
    phases = submissions(prompts(SHAPE, [5]), 4)
    scheduler = SchedulerConfig(batching=PolicySpec(f"{tmp_path / 'bad.py'}:Greedy"))
    began = time.monotonic()
    with pytest.raises(HardwareRunError, match=r"^a policy broke its contract: executor 1: Greedy planned") as why:
        run_cluster(cluster(MODEL, [mixed(scheduler=scheduler)]), phases, warm_up=False, timeout_s=60)
    assert why.value.exit_code == 1
    spec = cluster(MODEL, [mixed()])
    router = PolicySpec(f"{tmp_path / 'bad.py'}:Nobody")
    spec = replace(spec, orchestrator=replace(spec.orchestrator, mixed_router=router))
    with pytest.raises(HardwareRunError, match="ValueError: no idea"):
        run_cluster(spec, phases, timeout_s=60)
    assert time.monotonic() - began < 50


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_world_of_another_size_is_refused_by_all_its_ranks(tmp_path: Path, num_ranks: int) -> None:
    (tmp_path / JOB).write_bytes(encode(Job(PAIR, ())))
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        code = launch("disagg.runtime.orchestrator_main", [str(tmp_path)], num_ranks, timeout_s=60, stderr=stderr)
    assert code == EXIT_RESOURCES
    assert "needs exactly 3 ranks" in errors.read_text(errors="replace")


@pytest.mark.mpi
def test_leader_mode_and_its_example_run() -> None:
    example = Path(__file__).parent.parent / "examples" / "disaggregated.py"
    find_mpiexec()
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    first, tokens = lines["context"].strip(), lines["generation"].strip()
    assert len(tokens.split(",")) == 12
    assert tokens.startswith(first[:-1])
