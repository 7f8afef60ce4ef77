"""Several loads, one after another, on one cluster that stays warm: it starts, loads and warms up once.

Each session has a core, a clock and a record of its own, and its result is on disk when the next one begins, so that a
series that is cut short goes on from there. On the hosts of one machine only.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from ..core.config import ExecutorConfig, OrchestratorConfig
from .executor_spec import HardwareSpec, SpecError, check_spec
from .hardware_run import HardwareRunError, start_failure
from .launch_start import StartError
from .launcher import EXIT_INTERRUPTED, EXIT_KILLED, EXIT_TIMEOUT, launch
from .machine import check_machine
from .orchestrator_job import Failure
from .orchestrator_load import LoadPhase, SendRow
from .rank_record import RankInfo
from .session_record import Row
from .transport_world import world_needs
from .wire import KvPart

SERIES: Final = "series"
FAILURE: Final = "failure"
CLUSTER: Final = "cluster"
_START_LIMIT_S: Final = 180.0
_INTERRUPT_GRACE_S: Final = 2.0
_LOOK_S: Final = 0.2
_MAX_SESSIONS: Final = 10_000


class Session(Struct, frozen=True):
    """One load. `orchestrator` stands in for the spec's own: same executors but for seeds and whether they reuse blocks,
    other policies or switches.

    `keep_rows`: its result has the rows of a run directory too.
    """

    name: str
    orchestrator: OrchestratorConfig
    phases: tuple[LoadPhase, ...]
    keep_rows: bool = False


class Series(Struct, frozen=True):
    """`sessions`: encoded, since rank 0 alone has use for them, and their prompts are some hundred megabytes decoded.
    `todo`: which of them, by number, are still to run.
    """

    spec: HardwareSpec
    sessions: msgspec.Raw
    todo: tuple[int, ...]
    warm_up: int = 1


class SessionResult(Struct, frozen=True):
    """What a session leaves, as in `HardwareResult`: logs by core, step ends, parts of transfers, what was sent when."""

    name: str
    wall_s: float
    logs: dict[int, bytes]
    step_ends: dict[int, list[tuple[int, int, int]]]
    parts: dict[int, list[tuple[int, KvPart]]]
    sends: list[SendRow]
    rows: list[Row] = []


class ClusterFacts(Struct, frozen=True):
    """Of the cluster, once it is up."""

    hostname: str
    ranks: list[RankInfo]
    pid: int = 0  # of rank 0


_series_decoder: Final = msgspec.msgpack.Decoder(Series)
_sessions_decoder: Final = msgspec.msgpack.Decoder(tuple[Session, ...])
_result_decoder: Final = msgspec.msgpack.Decoder(SessionResult)
_facts_decoder: Final = msgspec.msgpack.Decoder(ClusterFacts)


def decode_series(data: bytes) -> Series:
    """Raises msgspec.ValidationError for anything else."""
    return _series_decoder.decode(data)


def decode_sessions(series: Series) -> tuple[Session, ...]:
    """Raises msgspec.ValidationError for anything else."""
    return _sessions_decoder.decode(series.sessions)


def result_file(number: int) -> str:
    """The name of a session's result in the series' folder."""
    return f"session-{number:04d}.msgpack"


def read_result(folder: Path, number: int) -> SessionResult | None:
    """None if the session has not run. Raises msgspec.DecodeError for a file that is none of ours."""
    try:
        return _result_decoder.decode((folder / result_file(number)).read_bytes())
    except FileNotFoundError:
        return None


def read_facts(folder: Path) -> ClusterFacts | None:
    """None if the cluster has never been up."""
    try:
        return _facts_decoder.decode((folder / CLUSTER).read_bytes())
    except FileNotFoundError:
        return None


def run_series(
    spec: HardwareSpec,
    sessions: Sequence[Session],
    folder: Path,
    *,
    warm_up: int = 1,
    finished: Callable[[int], None] | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run the sessions whose results are not in `folder` yet; their results are there afterwards.

    `finished(number)` hears of each that ends, on a thread of its own. Raises SpecError, TransportError, ModelError,
    LaunchError, HardwareRunError (exit_code 124 after `timeout_s`) or KeyboardInterrupt; what had ended by then stays.
    """
    roster = check_spec(spec)
    if spec.leader_mode:
        raise SpecError("a series needs an orchestrator: leader_mode serves each executor's own process only")
    if len(sessions) > _MAX_SESSIONS:
        raise SpecError(f"{len(sessions)} sessions; allowed: at most {_MAX_SESSIONS}")
    for session in sessions:
        if unseeded(session.orchestrator.executors) != unseeded(spec.orchestrator.executors):
            raise SpecError(f"session {session.name} has other executors than the series")
    todo = tuple(number for number in range(len(sessions)) if not (folder / result_file(number)).exists())
    if not todo:
        return
    check_machine(roster)
    needs = world_needs(roster, one_host=True)
    with tempfile.TemporaryDirectory(prefix="disagg-series-") as name:
        job = Path(name) / SERIES
        encoded = msgspec.Raw(msgspec.msgpack.encode(tuple(sessions)))
        job.write_bytes(msgspec.msgpack.encode(Series(spec, encoded, todo, warm_up)))
        with _Watcher(folder, todo, finished):
            try:
                code = launch(
                    f"{__package__}.session_series_main",
                    [name, str(folder.resolve())],
                    roster.num_ranks,
                    env=needs.env,
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
        if code == EXIT_KILLED:
            raise HardwareRunError("the orchestrator (rank 0) was killed")
        if code == EXIT_TIMEOUT:
            raise HardwareRunError(f"the series did not end within {timeout_s:g} s", EXIT_TIMEOUT)
        failure = Path(name) / FAILURE
        if failure.exists():
            told = msgspec.msgpack.decode(failure.read_bytes(), type=Failure)
            raise HardwareRunError(told.message, told.exit_code)
    missing = [sessions[number].name for number in todo if not (folder / result_file(number)).exists()]
    if code != 0 or missing:
        raise HardwareRunError(
            f"the series ended with exit code {code}; missing are {', '.join(missing[:4])}", code or 1
        )


def unseeded(executors: Sequence[ExecutorConfig]) -> tuple[ExecutorConfig, ...]:
    """What of them a cluster is built for: chance, and what is left in blocks, begin anew in each session."""
    return tuple(msgspec.structs.replace(executor, seed=0, enable_block_reuse=False) for executor in executors)


class _Watcher:
    """Tells of sessions as their results appear."""

    def __init__(self, folder: Path, todo: Sequence[int], finished: Callable[[int], None] | None) -> None:
        self._folder = folder
        self._waiting = list(todo)
        self._finished = finished
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="series", daemon=True)

    def __enter__(self) -> None:
        if self._finished is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        while self._finished is not None and self._waiting and (self._folder / result_file(self._waiting[0])).exists():
            self._finished(self._waiting.pop(0))


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def lap(self) -> float:
        before, self._at = self._at, time.monotonic()
        return self._at - before
