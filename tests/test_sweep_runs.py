"""Sweeps in parallel: the same folders whatever computes them, after a kill too, and one bad point costs only itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from disagg.experiments.errors import ResourceError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_point import run_points
from disagg.experiments.sweep import WORTH_A_PROCESS, workers_for
from disagg.experiments.sweep_task import point_of, task_of
from disagg.experiments.sweep_workers import WorkerDied, completed, open_pool

TEXT = """\
schema_version: 1
name: swept
seed: 7
model: {id: llama-3.1-8b}
cluster:
  profile: spec:h200
  context_servers: {num_instances: 1}
  generation_servers: {num_instances: 1}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {mean: 512, stddev: 64}, osl: {type: uniform, min: 1, max: 60}}
  max_tokens: 64
  phases: [{name: profiling, type: poisson, rate: 20, requests: 60}]
slo: {ttft_ms: 500, tpot_ms: 30}
sweep: {workload.phases.profiling.rate: [5, 10, 20], policy.router.name: [round_robin, least_tokens]}
"""
POISONED = """\
import os
from disagg.policies.routing import RoundRobin


class Deadly(RoundRobin):
    def route_context(self, request, view):
        %s
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "disagg.experiments.cli", "run", *map(str, arguments)]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environment()
    )


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def contents(folder: Path) -> dict[str, object]:
    """Every file of a sweep, byte for byte; of manifests all but the clock."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(path.read_bytes())
                assert manifest.pop("started_at")
                assert manifest.pop("wall_time_s") > 0
                found[name] = manifest
    return found


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The sweep as one process computes it."""
    folder = tmp_path_factory.mktemp("sequential")
    file = folder / "experiment.yaml"
    file.write_text(TEXT)
    done = run(file, "--output", "out", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = contents(folder / "out")
    assert sum(name.endswith("summary.json") for name in found) == 6
    return file, found


def test_two_processes_leave_the_same_bytes_as_one(sequential: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    file, expected = sequential
    done = run(file, "--output", "out", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert "[6/6]" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("rate=")]
    assert [row[0] for row in rows] == [p.name for p in load_experiment(file).points]
    summary = json.loads((tmp_path / "out" / rows[0][0] / "0" / "summary.json").read_text())
    shown = f"{1e3 * summary['mean_ttft_s']:,.1f}", f"{1e3 * summary['p99_ttft_s']:,.1f}"
    assert rows[0][1:6] == ["1", "60", "0", *shown]
    assert "6 of 6 runs in " in done.stdout


@pytest.mark.mpi
def test_ranks_of_an_mpi_world_leave_the_same_bytes_as_one_process(
    sequential: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    from disagg.runtime.launcher import find_mpiexec

    file, expected = sequential
    done = subprocess.run(
        [str(find_mpiexec()), "-n", "2", "--oversubscribe", *command(file, "--output", "out", "--executor", "mpi")],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


@pytest.mark.mpi
def test_a_wrong_file_under_mpi_ends_every_rank_and_is_told_once(tmp_path: Path) -> None:
    from disagg.runtime.launcher import find_mpiexec

    done = subprocess.run(
        [str(find_mpiexec()), "-n", "2", "--oversubscribe", *command("absent.yaml", "--executor", "mpi")],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: absent.yaml: cannot be read") == 1


def test_ranks_that_would_all_compute_the_same_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    (tmp_path / "experiment.yaml").write_text(TEXT)
    done = run("experiment.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Open MPI world of 4 ranks; allowed: --executor mpi" in done.stderr


@pytest.mark.skipif(find_spec("distributed") is None, reason="Dask is not installed")
def test_dask_leaves_the_same_bytes_as_one_process(sequential: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    file, expected = sequential
    done = run(file, "--output", "out", "--executor", "dask", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(find_spec("distributed") is not None, reason="Dask is installed")
def test_dask_that_is_not_installed_is_asked_for_by_name(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(TEXT)
    done = run("experiment.yaml", "--executor", "dask", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'disagg[dask]'" in done.stderr


def test_a_sweep_killed_in_the_middle_and_resumed_equals_an_undisturbed_one(
    sequential: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    file, expected = sequential
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(file, "--output", "out", "--workers", "2"),
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    try:
        killed_after = random.randint(1, 2)  # of 6, two at a time: a look that comes late still finds some unfinished
        while len(list(output.glob("*/0/manifest.json"))) < killed_after:
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    while any(output.glob("*/.*.partial-*")):  # its workers see that it is gone, and leave nothing half-written
        assert time.monotonic() < until
        time.sleep(0.01)
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*/0/manifest.json")}
    assert 1 <= len(finished) < 6
    done = run(file, "--output", "out", "--workers", "2", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} of 6 runs are finished already" in done.stdout
    assert contents(output) == expected
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("raise ValueError('no such road')", "policy Deadly (deadly.py:7): ValueError: no such road"),
        ("os._exit(7)", "its process died"),
    ],
)
def test_one_poisoned_point_is_told_and_the_others_finish(
    deed: str, told: str, sequential: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    _, expected = sequential
    (tmp_path / "deadly.py").write_text(POISONED % deed)
    (tmp_path / "experiment.yaml").write_text(
        TEXT.replace("[5, 10, 20]", "[5, 10]").replace("[round_robin, ", "[round_robin, 'deadly.py:Deadly', ")
    )
    done = run("experiment.yaml", "--output", "out", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    listed = lines[lines.index("error: 2 of 6 runs failed; --resume tries them again:") + 1 :]
    assert [
        line.startswith(f"error:   rate={rate},router=Deadly repeat 0: ") for rate, line in zip((10, 5), listed)
    ] == [
        True,
        True,
    ]
    assert all(told in line for line in listed)
    found = contents(tmp_path / "out")
    whole = {name for name in found if name.endswith("requests.parquet")}
    assert whole == {
        f"rate={r},router={p}/0/requests.parquet" for r in (5, 10) for p in ("round_robin", "least_tokens")
    }
    assert all(found[name] == expected[name] for name in whole)
    assert not any(".partial-" in str(path) for path in tmp_path.rglob(".*"))


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(TEXT.replace("requests: 60", "requests: 10000000"))
    process = subprocess.Popen(
        command("experiment.yaml", "--output", "out", "--workers", "2"),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    until = time.monotonic() + 60
    try:
        while len(list(tmp_path.rglob(".0.partial-*"))) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, error = process.communicate(timeout=60)
        while has_processes(process.pid):  # in a moment not one of them is left
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines() == ["interrupted"]
    assert not any(path.is_file() or ".partial-" in path.name for path in (tmp_path / "out").rglob("*/*"))


# ---- workers that die ----------------------------------------------------------------------------------------------


class Frail:
    """A pool of `lives` executors of this process, each of which is broken for good by the text "deadly", or from outside."""

    num_workers = 2
    num_in_flight = 2

    def __init__(self, lives: int, *, born_broken: bool = False) -> None:
        self.lives = lives
        self.num_started = 0
        self.born_broken = born_broken
        self._start()

    def _start(self) -> None:
        self.executor = FrailExecutor()
        self.executor.is_broken = self.born_broken
        self.num_started += 1

    def restarted(self) -> Frail | None:
        if self.num_started == self.lives:
            return None
        self._start()
        return self

    def stop(self, *, interrupted: bool = False) -> None: ...

    def close(self) -> None: ...


class FrailExecutor(Executor):
    is_broken = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.is_broken:
            raise BrokenExecutor
        future: Future[Any] = Future()
        if args[-1] == "deadly":
            self.is_broken = True
            future.set_exception(BrokenExecutor())
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def same(text: str) -> str:
    return text


def end_this_process(text: str) -> str:
    os._exit(7)


def test_every_task_is_answered_where_no_worker_can_be_restarted() -> None:
    answers = list(completed(Frail(lives=1), same, ["fine", "deadly", "a", "b", "c"]))
    assert sorted(number for number, _ in answers) == [0, 1, 2, 3, 4]
    found = dict(answers)
    assert found[0] == "fine"
    assert all(isinstance(found[number], WorkerDied) for number in (1, 2, 3, 4))
    assert "its process died" in str(found[1])
    assert "not computed" in str(found[4])


def test_only_the_deadly_task_is_blamed_where_workers_are_restarted() -> None:
    texts = ["a", "deadly", "b", "c", "deadly", "d"]
    found = dict(completed(Frail(lives=20), same, texts))
    assert [found[n] for n in (0, 2, 3, 5)] == ["a", "b", "c", "d"]
    assert all(isinstance(found[n], WorkerDied) for n in (1, 4))


def test_a_pool_that_is_broken_before_it_is_used_is_restarted_once_and_not_for_ever() -> None:
    pool = Frail(lives=1000, born_broken=True)
    assert all(isinstance(answer, WorkerDied) for _, answer in completed(pool, same, ["a", "b"]))
    assert pool.num_started == 2


def test_a_worker_that_dies_idle_costs_no_task() -> None:
    with open_pool("processes", 2) as pool:
        assert pool is not None
        with pytest.raises(BrokenExecutor):
            pool.executor.submit(end_this_process, "").result(timeout=60)
        assert dict(completed(pool, str.upper, ["a", "b", "c"])) == {0: "A", 1: "B", 2: "C"}


def test_mpi_is_not_even_loaded_outside_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # its import raises
    with pytest.raises(ResourceError, match="at least 2 ranks"), open_pool("mpi", 0):
        pass


# ---- the words in which a run is handed to a worker -----------------------------------------------------------------


def test_a_run_comes_out_of_its_text_as_it_went_in(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT + "repeats: 2\n")
    for point in run_points(load_experiment(file), tmp_path / "out", 5.0):
        found, overwrite = point_of(task_of(point, overwrite=True))
        assert overwrite
        assert found.experiment.expanded() == point.experiment.expanded()
        assert found.experiment.root == point.experiment.root
        for name in ("name", "repeat", "values", "directory", "experiment_file", "timeout_s"):
            assert getattr(found, name) == getattr(point, name)


def test_processes_are_started_for_much_work_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.experiments.sweep.num_cores", lambda: 4)
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT)
    little = run_points(load_experiment(file), tmp_path / "out")
    file.write_text(TEXT.replace("requests: 60", f"requests: {WORTH_A_PROCESS // 6 + 1}"))
    much = run_points(load_experiment(file), tmp_path / "out")
    assert workers_for(little, None) == 1
    assert workers_for(little, 2) == 2
    assert workers_for(much, None) == 4
    assert workers_for(much[:2], 8) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", "0"], "--workers 0: must be 1 to 1024, or auto"),
        (["--workers", "many"], "--workers many: must be a whole number or auto"),
        (["--executor", "ray"], "--executor ray: must be one of processes, mpi, dask"),
        (["--backend", "hardware", "--workers", "2", "--dry-run"], "runs on hardware follow each other"),
        (["--executor", "mpi"], "at least 2 ranks"),
    ],
)
def test_what_cannot_be_had_is_refused(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    disagg: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert disagg("run", "experiment.yaml", *arguments) in (2, 3)
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]
