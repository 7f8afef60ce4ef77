"""Running a cluster on real executors: starts the MPI world, or joins the one that this process is in."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from .devices import check_machine
from .executor_spec import HardwareSpec, ModelSource, Placement, SpecError, check_spec
from .launcher import EXIT_INTERRUPTED, EXIT_TIMEOUT, StartError, check_world_size, inside_mpi, launch
from .orchestrator_job import (
    JOB,
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
    warm_up: bool = True,
    drain: bool = True,
    faults: Iterable[Fault] = (),
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float | None = None,
) -> HardwareResult | None:
    """Build the cluster of `spec`, send it the load of `phases`, and return what it left behind.

    Inside an MPI world every rank calls this: rank 0 gets the result, the others None. Elsewhere a world is started for
    the run. `progress(requests ended, requests in all)`. Raises SpecError, TransportError or ModelError for a cluster
    that cannot be, LaunchError for a world that cannot, HardwareRunError for a run that failed (`timeout_s`, for a world
    started here: exit_code 124), KeyboardInterrupt for one that was interrupted.
    """
    roster = check_spec(spec)
    if spec.leader_mode:
        raise SpecError("a load needs an orchestrator: leader_mode serves each executor's own process only")
    job = Job(spec, tuple(phases), warm_up, drain, tuple(faults))
    world = inside_mpi()
    if world is not None:
        check_world_size(roster.num_ranks, world.size)
        from .orchestrator_main import run_job

        return run_job(job, progress)
    check_machine(roster)
    with tempfile.TemporaryDirectory(prefix="disagg-run-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(encode(job))
        with _Watcher(folder / PROGRESS, progress):
            try:
                code = launch(
                    f"{__package__}.orchestrator_main",
                    [name, QUIET],
                    roster.num_ranks,
                    timeout_s=timeout_s,
                    interrupt_grace_s=_INTERRUPT_GRACE_S,
                    start_limit_s=_START_LIMIT_S,
                )
            except StartError as error:
                if error.rank is None:
                    raise HardwareRunError(str(error)) from None
                who = "the orchestrator" if error.rank == 0 else f"executor {roster.core_of(error.rank)}"
                text = f"rank {error.rank} of {who} died while the cluster was starting"
                raise HardwareRunError(text) from None
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if code == EXIT_TIMEOUT:
            raise HardwareRunError(f"the run did not end within {timeout_s:g} s", EXIT_TIMEOUT)
        try:
            outcome = decode_outcome((folder / RESULT).read_bytes())
        except OSError:
            raise HardwareRunError(f"the run left no result; its exit code was {code}", code or 1) from None
        except msgspec.MsgspecError as error:
            raise HardwareRunError(f"the run's result cannot be read: {error}", code or 1) from error
    if isinstance(outcome, Failure):
        raise HardwareRunError(outcome.message, outcome.exit_code)
    return outcome


class _Watcher:
    """Reads the run's progress file while the run goes on."""

    def __init__(self, path: Path, progress: Callable[[int, int], None] | None) -> None:
        self._path = path
        self._progress = progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        if self._progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_PROGRESS_S):
            try:
                completed, total = self._path.read_text().split()
            except (OSError, ValueError):
                continue
            if self._progress is not None:
                self._progress(int(completed), int(total))
