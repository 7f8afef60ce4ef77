"""What every rank of a series does: `python -m disagg.runtime.session_series_main JOB_FOLDER RESULT_FOLDER`.

Rank 0 drives one session after another and leaves each result, written whole or not at all, in RESULT_FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import structs

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .cluster_error import ClusterError
from .executor_spec import Roster, SpecError, check_spec
from .garbage import not_collected
from .launcher import LaunchError
from .mpi_world import MpiWorld, WorldError
from .orchestrator_driver import OrchestratorDriver
from .orchestrator_job import Failure
from .orchestrator_load import LoadDriver, StalledError
from .orchestrator_main import exit_code_of, warm_up
from .rank_record import ExecutorBrokenError
from .session_series import (
    CLUSTER,
    FAILURE,
    SERIES,
    ClusterFacts,
    Series,
    Session,
    SessionResult,
    Stopwatch,
    decode_series,
    decode_sessions,
    result_file,
)
from .transport import TransportError

_EXPECTED = (SpecError, TransportError, ModelError, PolicyError, LaunchError, WorldError, ClusterError, StalledError)


def run(series: Series, results: Path, failed: Callable[[BaseException], None]) -> None:
    """This process's part. Collective over the MPI world. `failed` hears of an error before the ranks are told to leave."""
    roster = check_spec(series.spec)
    world = MpiWorld()
    if world.size != roster.num_ranks:
        raise LaunchError(f"this series needs exactly {roster.num_ranks} ranks, the MPI world has {world.size}")
    if world.rank != 0:
        with not_collected():
            from .executor_rank import ExecutorRank  # with PyTorch, which rank 0 has no use for

        rank = ExecutorRank(world, roster)
        rank.serve()
        rank.close()
        return
    sessions = decode_sessions(series)
    driver = OrchestratorDriver(world, roster, LoadDriver(()))
    try:
        driver.start()
        driver.is_starting = True
        for _ in range(series.warm_up):
            warm_up(driver)
        driver.is_starting = False
        facts = ClusterFacts(world.hostname, [driver.ranks[rank] for rank in sorted(driver.ranks)], os.getpid())
        _write_whole(results / CLUSTER, msgspec.msgpack.encode(facts))
        for number in series.todo:
            result = run_session(driver, sessions[number])
            _write_whole(results / result_file(number), msgspec.msgpack.encode(result))
        driver.end()
    except BaseException as error:  # a policy's SystemExit too, which must not pass for a good end
        failed(error)
        driver.abandon()
        if isinstance(error, SystemExit):
            raise ClusterError(f"a policy raised SystemExit: {error.code}") from error
        raise


def run_session(driver: OrchestratorDriver, session: Session) -> SessionResult:
    """One load on the warm cluster, from a fresh core to the last answer."""
    watch = Stopwatch()
    driver.roster = _with_policies(driver.roster, session)
    load = LoadDriver(session.phases, keep_tokens=False)
    driver.listener, driver.on_deliver = load, load.delivered
    driver.open_session()
    load.run(driver.clock, driver.submit, None, driver.num_stalled)
    record = driver.close_session()
    rows = record.rows if session.keep_rows else []
    return SessionResult(session.name, watch.lap(), record.logs, record.step_ends, record.parts, load.rows(), rows)


def _with_policies(roster: Roster, session: Session) -> Roster:
    """The session's policies, switches and seeds, over the executors as they turned out when they were built."""
    for theirs in session.orchestrator.executors:
        own = structs.replace(roster.configs[theirs.id], seed=theirs.seed, enable_block_reuse=theirs.enable_block_reuse)
        roster = roster.with_config(own)
    orchestrator = structs.replace(session.orchestrator, executors=roster.spec.orchestrator.executors)
    return replace(roster, spec=structs.replace(roster.spec, orchestrator=orchestrator))


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def main() -> int:
    """0, or the exit code of what went wrong, which rank 0 also leaves in JOB_FOLDER."""
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])

    def failed(error: BaseException) -> None:
        if not (folder / FAILURE).exists():
            text = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
            _write_whole(folder / FAILURE, msgspec.msgpack.encode(Failure(text, exit_code_of(error))))

    try:
        run(decode_series((folder / SERIES).read_bytes()), results, failed)
    except _EXPECTED as error:
        failed(error)
        return exit_code_of(error)
    except ExecutorBrokenError as error:
        print(f"disagg: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
