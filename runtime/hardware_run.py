"""Running a cluster on real executors: starts the MPI world, or joins the one that this process is in."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from .executor_spec import HardwareSpec, ModelSource, Placement, Roster, SpecError, check_spec
from .hosts import Placing, is_local
from .job_broadcast import FROM_RANK0
from .launch_start import StartError
from .launcher import EXIT_INTERRUPTED, EXIT_KILLED, EXIT_TIMEOUT, check_world_size, inside_mpi, launch
from .machine import check_machine
from .orchestrator_job import (
    JOB,
    PLACEMENT,
    PROGRESS,
    QUIET,
    RESULT,
    Failure,
    Fault,
    HardwareResult,
    Job,
    decode_outcome,
    encode,
)
from .orchestrator_load import LoadPhase, PlannedSubmission, SendRow
from .transport_world import world_needs

__all__ = [
    "Fault",
    "HardwareResult",
    "HardwareRunError",
    "HardwareSpec",
    "LoadPhase",
    "ModelSource",
    "Placement",
    "PlannedSubmission",
    "SendRow",
    "SpecError",
    "run_cluster",
]

_PROGRESS_S: Final = 0.5
_START_LIMIT_S: Final = 180.0
_INTERRUPT_GRACE_S: Final = 2.0


class HardwareRunError(RuntimeError):
    """A run that left no result; `exit_code` as in the list of exit codes."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_cluster(
    spec: HardwareSpec,
    phases: Iterable[LoadPhase],
    *,
    warm_up: int = 1,
    drain: bool = True,
    faults: Iterable[Fault] = (),
    progress: Callable[[int, int], None] | None = None,
    on_placed: Callable[[str], None] | None = None,
    timeout_s: float | None = None,
    placing: Placing | None = None,
    scratch: Path | None = None,
) -> HardwareResult | None:
    """Build the cluster of `spec`, send it the load of `phases`, and return what it left behind.

    Inside an MPI world every rank calls this: rank 0 gets the result, the others None. Elsewhere a world is started for
    the run, on the hosts of `placing` if it is given; ranks of other hosts get the job from rank 0, and rank 0 leaves the
    result in `scratch`, which must be on a file system of both where rank 0 is not on this machine. `warm_up`: how often
    every pair of executors is warmed. `progress(requests ended, requests in all)`; `on_placed(text)` once, when every
    rank is up: who runs where. Raises SpecError, TransportError or ModelError for a cluster
    that cannot be, LaunchError for a world that cannot, HardwareRunError for a run that failed (`timeout_s`, for a world
    started here: exit_code 124), KeyboardInterrupt for one that was interrupted.
    """
    roster = check_spec(spec)
    if spec.leader_mode:
        raise SpecError("a load needs an orchestrator: leader_mode serves each executor's own process only")
    job = Job(spec, tuple(phases), int(warm_up), drain, tuple(faults))
    world = inside_mpi()
    if world is not None:
        check_world_size(roster.num_ranks, world.size)
        from .orchestrator_main import run_job

        return run_job(job, progress, on_placed=on_placed)
    if placing is None:
        check_machine(roster)
    else:
        placing.rank_hosts(roster.num_ranks)
    needs = world_needs(roster, one_host=placing is None)
    with tempfile.TemporaryDirectory(prefix="disagg-run-", dir=scratch) as name:
        folder = Path(name)
        (folder / JOB).write_bytes(encode(job))
        with _Watcher(folder, progress, on_placed):
            try:
                code = launch(
                    f"{__package__}.orchestrator_main",
                    [name, QUIET],
                    roster.num_ranks,
                    hosts=None if placing is None else placing.arguments,
                    launch_agent=None if placing is None else placing.agent,
                    env=needs.env if placing is None else {**needs.env, FROM_RANK0: "1"},
                    pml=needs.pml,
                    fault_tolerant=needs.fault_tolerant,
                    timeout_s=timeout_s,
                    interrupt_grace_s=_INTERRUPT_GRACE_S,
                    start_limit_s=_START_LIMIT_S,
                )
            except StartError as error:
                raise HardwareRunError(start_failure(error, roster)) from None
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if code == EXIT_TIMEOUT:
            raise HardwareRunError(f"the run did not end within {timeout_s:g} s", EXIT_TIMEOUT)
        try:
            outcome = decode_outcome((folder / RESULT).read_bytes())
        except OSError:
            raise HardwareRunError(_no_result(placing, code), 1 if code == EXIT_KILLED else code or 1) from None
        except msgspec.MsgspecError as error:
            raise HardwareRunError(f"the run's result cannot be read: {error}", code or 1) from error
    if isinstance(outcome, Failure):
        raise HardwareRunError(outcome.message, outcome.exit_code)
    return outcome


def _no_result(placing: Placing | None, code: int) -> str:
    why = "the orchestrator (rank 0) was killed" if code == EXIT_KILLED else f"its exit code was {code}"
    text = f"the run left no result; {why}"
    if placing is None:
        return text
    hosts = ", ".join(host.name for host in placing.hosts)
    if not is_local(placing.hosts[0].name):
        text += f"; rank 0 was on {placing.hosts[0].name}, which must share the output folder's file system"
    return f"{text} (hosts {hosts}: what their ranks printed is above)"


def start_failure(error: StartError, roster: Roster) -> str:
    """What kept a cluster from starting, by the executors whose ranks died."""
    if not error.ranks:
        return str(error)
    who = (f"rank {r} of executor {roster.core_of(r)}" if r else "the orchestrator (rank 0)" for r in error.ranks)
    return f"{' and '.join(who)} died while the cluster was starting"


class _Watcher:
    """Reads the run's progress while the run goes on, and once who runs where."""

    def __init__(
        self, folder: Path, progress: Callable[[int, int], None] | None, on_placed: Callable[[str], None] | None
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._on_placed = on_placed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        if self._progress is not None or self._on_placed is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._tell_placement()  # of a run that was over at once

    def _watch(self) -> None:
        while not self._ended.wait(_PROGRESS_S):
            self._tell_placement()
            try:
                completed, total = (self._folder / PROGRESS).read_text().split()
            except (OSError, ValueError):
                continue
            if self._progress is not None:
                self._progress(int(completed), int(total))

    def _tell_placement(self) -> None:
        if self._on_placed is None:
            return
        try:
            text = (self._folder / PLACEMENT).read_text()
        except OSError:
            return
        tell, self._on_placed = self._on_placed, None
        tell(text)
