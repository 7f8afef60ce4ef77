"""What every rank of a run does: `python -m disagg.runtime.orchestrator_main FOLDER`, started by the launcher.

FOLDER holds `job`; rank 0 leaves `result` in it, written whole or not at all, and says in `progress` how far it is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from ..policies.vocabulary import PS_PER_S, ContextPhaseParams, FinishReason, Request, RequestType, Role
from .clock_offsets import merged_rows
from .cluster_error import ClusterError
from .executor_inbox import Submitted
from .executor_spec import EXIT_CONFIGURATION, Roster, SpecError, check_spec
from .garbage import not_collected
from .job_broadcast import FROM_RANK0, broadcast_job
from .launcher import EXIT_INTERRUPTED, LaunchError
from .mpi_world import MpiWorld, WorldError
from .orchestrator_driver import FIRST_DIRECT_ID, OrchestratorDriver
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
    decode_job,
    encode,
)
from .orchestrator_load import LoadDriver, StalledError
from .placement_text import placement_text
from .rank_record import ExecutorBrokenError
from .transport import TransportError

_EXPECTED = (SpecError, TransportError, ModelError, PolicyError, LaunchError, WorldError, ClusterError, StalledError)
_WARM_UP_S = 120.0
_WARM_UP_TOKENS = 4
_PROGRESS_S = 0.25


def exit_code_of(error: BaseException) -> int:
    """2 for what the configuration can put right, 3 for what is missing here, 130 for an interrupt, else 1."""
    if isinstance(error, (SpecError, TransportError, ModelError, PolicyError)):
        return EXIT_CONFIGURATION
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return error.exit_code if isinstance(error, (LaunchError, WorldError, ClusterError)) else 1


def run_job(
    job: Job,
    progress: Callable[[int, int], None] | None = None,
    failed: Callable[[BaseException], None] | None = None,
    on_placed: Callable[[str], None] | None = None,
    world: MpiWorld | None = None,
) -> HardwareResult | None:
    """This process's part of a run: the result on rank 0, None elsewhere. Collective over the MPI world.

    `on_placed` hears on rank 0 who runs where, once every rank is up, and `failed` of an error there before the ranks are
    told to leave. Raises SpecError, TransportError, ModelError, PolicyError, ClusterError, LaunchError or WorldError.
    """
    roster = check_spec(job.spec)
    world = MpiWorld() if world is None else world
    if world.size != roster.num_ranks:
        raise LaunchError(
            f"this run needs exactly {roster.num_ranks} ranks (the orchestrator and tensor_parallel_size · "
            f"pipeline_parallel_size for each instance), but the MPI world it was started in has {world.size}"
        )
    if world.rank != 0:
        with not_collected():
            from .executor_rank import ExecutorRank  # with PyTorch, which rank 0 has no use for

        rank = ExecutorRank(world, roster)
        rank.serve()
        rank.close()
        return None
    load = LoadDriver(job.phases)
    driver = OrchestratorDriver(world, roster, load)
    try:
        return _orchestrate(job, driver, load, progress, on_placed, world.hostname)
    except SystemExit as ending:  # only a policy's: it must not end the process as if the run had wanted it
        error = ClusterError(f"a policy raised SystemExit: {ending.code}")
        if failed is not None:
            failed(error)
        driver.abandon()
        raise error from ending
    except BaseException as error:
        if failed is not None:
            failed(error)
        driver.abandon()
        raise


def _orchestrate(
    job: Job,
    driver: OrchestratorDriver,
    load: LoadDriver,
    progress: Callable[[int, int], None] | None,
    on_placed: Callable[[str], None] | None,
    hostname: str,
) -> HardwareResult:
    driver.start()
    if on_placed is not None:
        on_placed(placement_text(hostname, driver.roster, driver.ranks.values()))
    driver.is_starting = True
    for _ in range(job.warm_up):
        warm_up(driver)
    driver.listener, driver.on_deliver = load, load.delivered
    driver.open_session()
    driver.is_starting = False
    timers = [threading.Timer(fault.after / PS_PER_S, _kill, (driver, fault)) for fault in job.faults]
    for timer in timers:
        timer.daemon = True
        timer.start()
    load.run(driver.clock, driver.submit, progress, driver.num_stalled)
    for timer in timers:
        timer.cancel()
    record = driver.close_session(job.drain)
    rank_records = driver.end()
    offsets = {offset.rank: offset for offset in driver.clocks.offsets}
    leaders = {executor: driver.roster.leader_of(executor) for executor in driver.roster.configs}
    by_executor = {executor: offsets[rank] for executor, rank in leaders.items() if rank in offsets}
    return HardwareResult(
        merged_rows(record.rows, by_executor, driver.clock.origin_ns),
        record.logs,
        record.step_ends,
        record.parts,
        load.rows(),
        [driver.ranks[rank] for rank in sorted(driver.ranks)],
        [rank_records[rank] for rank in sorted(rank_records)],
        driver.clocks.offsets,
        hostname,
        os.getpid(),
    )


def _kill(driver: OrchestratorDriver, fault: Fault) -> None:
    rank = driver.roster.placements[fault.executor].participant_ids[fault.participant]
    os.kill(driver.ranks[rank].pid, signal.SIGKILL)


class WarmUp:
    """A Listener that sends one request at a time past the core, and waits for it."""

    def __init__(self, driver: OrchestratorDriver) -> None:
        self._driver = driver
        self._next_id = FIRST_DIRECT_ID
        self._ended = threading.Event()
        self._params: ContextPhaseParams | None = None
        self._error: str | None = None
        self._is_broken = False

    def tokens(self, request_id: int, first_index: int, token_ids: tuple[int, ...]) -> None:
        pass

    def ended(
        self, request_id: int, reason: FinishReason | None, error: str | None, params: ContextPhaseParams | None
    ) -> None:
        self._params, self._error = params, error
        self._ended.set()

    def broken(self, error: str) -> None:
        self._error, self._is_broken = error, True
        self._ended.set()

    def ask(self, executor: int, request: Request) -> ContextPhaseParams | None:
        """What its context phase left, if it had one. Raises ClusterError if no answer comes, or an error."""
        self._next_id += 1
        self._ended.clear()
        self._params = None
        self._driver.submit(Submitted(msgspec.structs.replace(request, id=self._next_id), executor=executor))
        if not self._ended.wait(_WARM_UP_S):
            raise ClusterError(f"warm-up of executor {executor} failed: no answer in {_WARM_UP_S:g} s")
        if self._is_broken:
            raise self._driver.failure or ClusterError(f"warm-up of executor {executor} failed: {self._error}")
        if self._error is not None:
            raise ClusterError(f"warm-up of executor {executor} failed: {self._error}")
        return self._params


def warm_up(driver: OrchestratorDriver) -> None:
    """One small request over every context × generation pair and on every mixed executor, in a session of its own; where
    roles may change or requests move, over every pair and on everyone.

    The first transfer between a pair pays for their connection, and the first step for the engine's.
    """
    roster: Roster = driver.roster
    by_role = {role: [c.id for c in roster.configs.values() if c.role is role] for role in Role}
    orchestrator = roster.spec.orchestrator
    if orchestrator.roles is not None or orchestrator.migration is not None:  # anybody may read from anybody
        by_role = {key: list(roster.configs) for key in Role}
    warmer = WarmUp(driver)
    driver.listener = warmer
    driver.open_session(record=False)
    size = min(_WARM_UP_TOKENS, *(c.num_blocks * c.tokens_per_block - 1 for c in roster.configs.values()))
    prompt = tuple(token % roster.shape.vocab_size for token in range(max(1, size)))
    request = Request(0, len(prompt), 2, input_token_ids=prompt)
    context_only = msgspec.structs.replace(request, request_type=RequestType.CONTEXT_ONLY)
    for executor in by_role[Role.MIXED]:
        warmer.ask(executor, request)
    for context in by_role[Role.CONTEXT]:
        for generation in by_role[Role.GENERATION]:
            if generation == context:
                continue
            params = warmer.ask(context, context_only)
            if params is not None:
                kind = RequestType.GENERATION_ONLY
                warmer.ask(generation, msgspec.structs.replace(request, request_type=kind, context_phase_params=params))
    driver.close_session()


class ProgressFile:
    """Says how far the run is, a few times a second, in a file that is always whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0

    def __call__(self, completed: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_S:
            return
        self._last = now
        _write_whole(self._path, f"{completed} {total}".encode())


def _write_whole(path: Path, data: bytes) -> None:
    # Its own name per process: a world of a wrong size is refused by all its ranks, each of which writes the result.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def main() -> int:
    """0, or the exit code of what went wrong, which is also in `result` and, unless QUIET is given, on stderr."""
    is_quiet = QUIET in sys.argv[2:]
    folder = Path(sys.argv[1])

    def failed(error: BaseException) -> None:
        if folder.is_dir() and not (folder / RESULT).exists():  # on another host there may be no such folder
            text = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                text = "interrupted"
            _write_whole(folder / RESULT, encode(Failure(text, exit_code_of(error))))

    def placed(text: str) -> None:
        _write_whole(folder / PLACEMENT, text.encode())

    try:
        world = MpiWorld() if os.environ.get(FROM_RANK0) == "1" else None
        data = (folder / JOB).read_bytes() if world is None else broadcast_job(world, folder / JOB)
        result = run_job(decode_job(data), ProgressFile(folder / PROGRESS), failed, placed, world)
    except _EXPECTED as error:
        if not is_quiet:
            print(f"disagg: {error}", file=sys.stderr, flush=True)
        failed(error)
        return exit_code_of(error)
    except ExecutorBrokenError as error:  # the end of one executor, which the others may survive
        print(f"disagg: {error}", file=sys.stderr, flush=True)
        return 1
    if result is not None:
        _write_whole(folder / RESULT, encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
