"""The launcher: finding mpiexec, knowing the world one is in, exit codes, and leaving nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from disagg.runtime import launcher
from disagg.runtime.launch_start import StartError, session_members
from disagg.runtime.launcher import (
    EXIT_KILLED,
    LaunchError,
    MpiEnvironment,
    check_world_size,
    find_mpiexec,
    inside_mpi,
    launch,
)
from disagg.runtime.mpi_scratch import ScratchFolder, sweep

PROGRAMS = Path(__file__).parent / "mpi_programs"


def run(name: str, *args: str, ranks: int, **options: object) -> int:
    return launch(str(PROGRAMS / name), args, ranks, **{"timeout_s": 100.0, **options})  # type: ignore[arg-type]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_pids(folder: Path, count: int) -> list[int]:
    """The ids that the ranks of `ending.py sleep` leave in `folder`, once all are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if len(files) == count:
            return [int(path.read_text()) for path in files]
        threading.Event().wait(0.02)
    raise AssertionError(f"only {list(folder.iterdir())} of {count} ranks started")


def wait_until_dead(pids: list[int], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        threading.Event().wait(0.02)


# ---- without MPI ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, MpiEnvironment("Open MPI", 2, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, MpiEnvironment("PMI", 0, 3)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, MpiEnvironment("Slurm step", 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "4"}, None),
    ],
)
def test_the_surrounding_world_is_read_from_the_environment(env: dict[str, str], world: MpiEnvironment | None) -> None:
    assert inside_mpi(env) == world


def test_more_ranks_than_the_world_has_are_refused_with_both_numbers() -> None:
    check_world_size(4, 4)
    with pytest.raises(LaunchError, match=r"needs 5 ranks .* MPI world .* only 4") as refusal:
        check_world_size(5, 4)
    assert refusal.value.exit_code == 3


def test_more_ranks_than_a_slurm_allocation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(LaunchError, match=r"needs 3 ranks .* Slurm allocation .* only 2"):
        launch("disagg", (), 3)


def test_fault_tolerance_over_ucx_is_refused() -> None:
    with pytest.raises(LaunchError, match="'ob1'"):
        launch("disagg", (), 2, pml="ucx")


def test_a_missing_mpiexec_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISAGG_MPIEXEC", raising=False)
    monkeypatch.setattr(launcher.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)

    def not_installed(name: str) -> None:
        raise launcher.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launcher.metadata, "distribution", not_installed)
    with pytest.raises(LaunchError, match=r"(?s)no mpiexec.*disagg\[runtime\].*--backend simulation") as refusal:
        find_mpiexec()
    assert str(tmp_path) in str(refusal.value)


def test_a_named_mpiexec_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_MPIEXEC", "/nowhere/mpiexec")
    with pytest.raises(LaunchError, match="DISAGG_MPIEXEC names '/nowhere/mpiexec'"):
        find_mpiexec()


def test_folders_of_killed_launchers_are_swept_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead = tmp_path / "disagg-mpi-dead"
    dead.mkdir()
    (dead / ".lock").touch()
    foreign = tmp_path / "disagg-mpi-without-lock"
    foreign.mkdir()
    with ScratchFolder(tmp_path) as living:
        assert dead.exists()  # too young to judge
        sweep(tmp_path, young_s=-1.0)
        assert sorted(tmp_path.iterdir()) == sorted([living, foreign])
    assert list(tmp_path.iterdir()) == [foreign]


def test_the_launcher_needs_neither_mpi_nor_torch() -> None:
    code = "import sys, disagg.runtime.launcher; print([m for m in ('mpi4py', 'torch', 'msgspec') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['msgspec']"


@pytest.mark.parametrize("module", ["orchestrator_main", "session_series_main", "mpi_main", "machine"])
def test_neither_rank_0_nor_who_starts_it_loads_torch(module: str) -> None:
    code = f"import sys, disagg.runtime.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- with real processes --------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize(("how", "code"), [("code", 5), ("clean-code", 4), ("code", 0)])
def test_the_exit_code_of_rank_0_is_returned(how: str, code: int) -> None:
    assert run("ending.py", how, str(code), ranks=2, stderr=subprocess.DEVNULL) == code


@pytest.mark.mpi
def test_a_killed_rank_0_is_a_failure_although_mpiexec_calls_it_success(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("ending.py", "kill-rank-0", ranks=2, linger_s=3.0) == EXIT_KILLED
    assert "rank 0 ended without an exit status" in capfd.readouterr().err


@pytest.mark.mpi
@pytest.mark.parametrize("is_told_at_once", [True, False])
def test_a_rank_that_dies_while_the_others_join_is_named(
    monkeypatch: pytest.MonkeyPatch, is_told_at_once: bool
) -> None:
    if not is_told_at_once:
        monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(StartError, match=r"^rank 1 died while the MPI world was starting$") as death:
        run("ending.py", "die-first", "1", ranks=3, stderr=subprocess.DEVNULL)
    assert death.value.ranks == (1,)


@pytest.mark.mpi
def test_groups_are_made_by_their_members_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("ending.py", "groups", ranks=4) == 0
    assert capfd.readouterr().out.count("is number") == 4


@pytest.mark.mpi
def test_a_time_out_returns_124_and_leaves_no_process(tmp_path: Path) -> None:
    pids: list[int] = []
    watcher = threading.Thread(target=lambda: pids.extend(wait_for_pids(tmp_path, 2)))
    watcher.start()
    assert run("ending.py", "sleep", str(tmp_path), ranks=2, timeout_s=8.0) == 124
    watcher.join()
    assert len(pids) == 2
    wait_until_dead(pids)


def start_launcher(folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from disagg.runtime.launcher import launch; "
        "sys.exit(launch(sys.argv[1], sys.argv[2:], 2, interrupt_grace_s=5.0))"
    )
    command = [sys.executable, "-c", code, str(PROGRAMS / "ending.py"), "sleep", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_returns_130_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    process = start_launcher(tmp_path)
    pids = wait_for_pids(tmp_path, 2)
    process.send_signal(number)
    assert process.wait(30) == 130
    wait_until_dead(pids)


@pytest.mark.mpi
@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux")
def test_a_killed_launcher_takes_its_ranks_with_it(tmp_path: Path) -> None:
    process = start_launcher(tmp_path)
    pids = wait_for_pids(tmp_path, 2)
    session = os.getsid(pids[0])
    process.kill()
    process.wait(30)
    wait_until_dead(pids)
    wait_until_dead(session_members(session))
