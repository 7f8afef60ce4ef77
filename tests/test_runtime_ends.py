"""Hardware runs that cannot come to their end: each stops soon, says why, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from disagg.core.config import PolicySpec
from disagg.runtime.executor_spec import DeviceError, HardwareSpec, ModelSource
from disagg.runtime.hardware_run import HardwareRunError, run_cluster
from disagg.runtime.launch_start import JOINED
from disagg.runtime.launcher import EXIT_INTERRUPTED, EXIT_RESOURCES, EXIT_TIMEOUT, STATUS_DIR
from disagg.runtime.orchestrator_job import PROGRESS
from tests.runtime_programs.clusters import cluster, context, generation, mixed, submissions
from tests.tiny_models import SHAPES, prompts

SHAPE = SHAPES["llama"]
MODEL = ModelSource(SHAPE, seed=3)
PHASES = submissions(prompts(SHAPE, [5, 7]), 4)

EXPERIMENT = """
schema_version: 1
name: ends
seed: 1
model: {id: tiny-llama, dtype: float32}
backend: hardware
device: cpu
cluster:
  profile: spec:cpu-2core
  context_servers: {num_instances: 1, kv_cache: {max_tokens: 8192}}
  generation_servers: {num_instances: 1, kv_cache: {max_tokens: 8192}}
  cache_transceiver: {backend: mpi}
policy:
  router: round_robin
workload:
  dataset: {type: synthetic, isl: {mean: 64, stddev: 16}, osl: 12}
  max_tokens: 16
  phases:
    - {name: profiling, type: poisson, rate: 1, requests: 100}
"""


def children(pid: int) -> list[int]:
    """Processes that a process has started, by any of its threads, and that have not ended."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it ended meanwhile
        return []


LIMIT_S = 70.0  # of which a run uses a second or two where nothing else does; its load would take 100


class Run:
    """`disagg run`, from outside."""

    def __init__(self, folder: Path, router: str = "round_robin") -> None:
        (folder / "e.yaml").write_text(EXPERIMENT.replace("round_robin", router))
        disagg = Path(sys.executable).parent / "disagg"
        self.output = folder / "out"
        self.process = subprocess.Popen(
            [str(disagg), "run", str(folder / "e.yaml"), "--output", str(self.output)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run now."""
        found = {}
        for mpiexec in children(self.process.pid):
            for pid in children(mpiexec):
                try:
                    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                for entry in environ:
                    if entry.startswith(b"OMPI_COMM_WORLD_RANK="):
                        found.setdefault(int(entry.partition(b"=")[2]), pid)
        return found

    def await_ranks(self, num: int) -> dict[int, int]:
        deadline = time.monotonic() + 60
        while len(ranks := self.ranks()) < num:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return ranks

    def end(self) -> str:
        """What it has said by its end, which comes long before that of its load."""
        try:
            return self.process.communicate(timeout=LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


def no_longer(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_mpi(pid: int) -> bool:
    """Whether the process has loaded MPI, which it does to join the others."""
    return "libmpi.so" in Path(f"/proc/{pid}/maps").read_text()


def status_folder(pid: int) -> Path:
    """Where a rank's launcher looks for marks of its ranks."""
    entries = dict(entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return Path(entries[STATUS_DIR.encode()].decode())


def job_folder(pid: int) -> Path:
    """Where a rank finds the job, and rank 0 leaves what came of it."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[words.index("disagg.runtime.orchestrator_main") + 1])


KILLER = """
import os, signal
from pathlib import Path
from disagg.policies import SelectingPolicy


class Kills(SelectingPolicy):
    '''Made by the orchestrator for its first session, the warm-up: kills rank 1 of its world then.'''

    def __init__(self, *, rng):
        super().__init__(rng=rng)
        if os.environ.get("OMPI_COMM_WORLD_RANK") == "0":
            for child in Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split():
                if b"OMPI_COMM_WORLD_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\\0"):
                    os.kill(int(child), signal.SIGKILL)

    def select(self, request, pool):
        return 0
"""


@pytest.mark.mpi
@pytest.mark.parametrize("when", ["it appears", "the ranks join", "it loads", "it warms up"])
def test_a_rank_killed_while_the_cluster_starts_ends_the_run_by_name(tmp_path: Path, when: str) -> None:
    """How long each of this takes, the machine decides: a rank that was stopped is what the others wait for."""
    (tmp_path / "killer.py").write_text(KILLER)
    run = Run(tmp_path, router=f"{tmp_path / 'killer.py'}:Kills" if when == "it warms up" else "round_robin")
    ranks = run.await_ranks(3)
    if when == "the ranks join":
        os.kill(ranks[2], signal.SIGSTOP)
        wait_for(lambda: has_mpi(ranks[1]))
    elif when == "it loads":
        wait_for((status_folder(ranks[0]) / JOINED).exists)
        os.kill(ranks[2], signal.SIGSTOP)
    if when != "it warms up":
        os.kill(ranks[1], signal.SIGKILL)
    said = run.end()
    assert run.process.returncode == 1
    assert "rank 1 of executor 1 died while the cluster was starting" in said
    assert no_longer(list(ranks.values()))
    assert not run.output.exists()


@pytest.mark.mpi
@pytest.mark.parametrize(("when", "said"), [("joins", "died while the cluster was starting"), ("runs", "was killed")])
def test_a_killed_orchestrator_ends_the_run_by_name(tmp_path: Path, when: str, said: str) -> None:
    run = Run(tmp_path)
    ranks = run.await_ranks(3)
    if when == "joins":
        os.kill(ranks[2], signal.SIGSTOP)
        wait_for(lambda: has_mpi(ranks[0]))
    else:
        wait_for((job_folder(ranks[0]) / PROGRESS).exists)
    os.kill(ranks[0], signal.SIGKILL)
    assert f"the orchestrator (rank 0) {said}" in run.end()
    assert run.process.returncode == 1
    assert no_longer(list(ranks.values()))
    assert not run.output.exists()


@pytest.mark.mpi
@pytest.mark.parametrize("when", ["it starts", "it runs"])
def test_an_interrupted_run_ends_long_before_its_load_with_130(tmp_path: Path, when: str) -> None:
    run = Run(tmp_path)
    ranks = run.await_ranks(3)
    if when == "it starts":
        wait_for((status_folder(ranks[0]) / JOINED).exists)
    else:
        wait_for((job_folder(ranks[0]) / PROGRESS).exists)
    run.process.send_signal(signal.SIGINT)
    said = run.end()
    assert run.process.returncode == EXIT_INTERRUPTED
    assert "interrupted" in said
    assert "nothing was kept" not in said
    assert no_longer(list(ranks.values()))


def routed_by(folder: Path, body: str) -> HardwareSpec:
    """A cluster of one mixed executor; `body` is the body of its router's `select`."""
    (folder / "router.py").write_text(
        "from disagg.policies.interfaces import SelectingPolicy\n"
        "from disagg.policies.vocabulary import Hold, RouteMixed\n"
        "class Router(SelectingPolicy):\n"
        "    def route_context(self, request, fleet):\n"
        f"        {body}\n"
        "    def select(self, request, pool):\n"
        "        return 1\n"
    )
    spec = cluster(MODEL, [mixed()])
    router = PolicySpec(f"{folder / 'router.py'}:Router")
    return replace(spec, orchestrator=replace(spec.orchestrator, mixed_router=router))


@pytest.mark.mpi
def test_a_policy_that_holds_for_ever_ends_the_run_by_the_number_of_its_requests(tmp_path: Path) -> None:
    spec = routed_by(tmp_path, "return Hold()")
    with pytest.raises(HardwareRunError, match=r"^2 requests are held by a policy that never lets them go$") as why:
        run_cluster(spec, PHASES, timeout_s=60)
    assert why.value.exit_code == 1


@pytest.mark.mpi
def test_requests_held_until_an_instant_are_no_stall(tmp_path: Path) -> None:
    body = "return RouteMixed(1) if request.arrival < fleet.now - 3 * 10**12 else Hold(until=fleet.now + 4 * 10**12)"
    result = run_cluster(routed_by(tmp_path, body), PHASES, timeout_s=60)
    assert result is not None
    assert [send.error for send in result.sends] == [None, None]


@pytest.mark.mpi
def test_a_run_that_takes_too_long_is_ended_with_124(tmp_path: Path) -> None:
    spec = routed_by(tmp_path, "return Hold(until=fleet.now + 10**12)")
    with pytest.raises(HardwareRunError, match=r"^the run did not end within 7 s$") as why:
        run_cluster(spec, PHASES, timeout_s=7)
    assert why.value.exit_code == EXIT_TIMEOUT


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return RouteMixed(7)", r"^a policy broke its contract: .* names executor 7"),
        ("raise SystemExit(0)", r"^a policy raised SystemExit: 0$"),
    ],
)
def test_a_router_that_breaks_its_contract_fails_the_run_and_is_told_once(
    tmp_path: Path, body: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HardwareRunError, match=why) as error:
        run_cluster(routed_by(tmp_path, body), PHASES, timeout_s=60)
    assert error.value.exit_code == 1
    assert "disagg:" not in capfd.readouterr().err  # the caller tells it


def test_a_kv_cache_larger_than_the_memory_is_refused_before_anything_starts() -> None:
    spec = cluster(MODEL, [context(), generation(num_blocks=10**12)])
    with pytest.raises(DeviceError, match=r"executor 2's, \d+ bytes for kv_cache.max_tokens 4000000000000") as why:
        run_cluster(spec, ())
    assert why.value.exit_code == EXIT_RESOURCES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_is_refused_before_anything_starts_where_there_is_none() -> None:
    with pytest.raises(DeviceError, match=r"device: cuda cannot be had: .*device: cpu") as why:
        run_cluster(replace(cluster(MODEL, [mixed()]), device="cuda"), ())
    assert why.value.exit_code == EXIT_RESOURCES
