"""Runs on real executors that follow each other on one warm cluster: it starts, loads its weights and warms up once.

Runs share a cluster where their executors, their model and their transport are equal; policies and loads may differ. Each
has a core, a clock and a record of its own, so that nothing of one is seen in the next.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from ..core.model_shapes import ModelError
from ..runtime.hardware_run import HardwareResult, HardwareRunError, HardwareSpec, SpecError
from ..runtime.launcher import LaunchError
from ..runtime.session_series import ClusterFacts, Session, SessionResult, read_facts, read_result, run_series, unseeded
from ..runtime.transport import TransportError
from .cluster import profile_of
from .device_names import check_device_name
from .errors import EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_RESOURCES, ExperimentError
from .run_directory import RunDirectory
from .run_hardware import HardwareLoad, hardware_spec, write_result
from .run_point import NoProgress, Progress, RunOutcome, RunPoint
from .sweep_task import RunResult, try_one
from .sweep_workers import num_cores

SPARE_CORES: Final = 2  # beside one a rank: a run is written while the next one goes on, and must not be felt there

Told = Callable[[RunPoint, RunResult], None]


def warm_groups(points: Sequence[RunPoint]) -> list[list[RunPoint]]:
    """`points` in order, cut where the cluster changes. A run with a limit of time, or with faults, stays by itself."""
    groups: list[list[RunPoint]] = []
    last: HardwareSpec | None = None
    for point in points:
        kept = None if point.timeout_s is not None or point.experiment.faults else _cluster_alone(point)
        if groups and kept is not None and kept == last:
            groups[-1].append(point)
        else:
            groups.append([point])
        last = kept
    return groups


def by_cluster(points: Sequence[RunPoint]) -> list[RunPoint]:
    """`points` with those of equal clusters next to each other, in order of first appearance."""
    found: list[tuple[HardwareSpec | None, list[RunPoint]]] = []
    for point in points:
        cluster = _cluster_alone(point)
        same = next((group for other, group in found if other is not None and other == cluster), None)
        if same is None:
            found.append((cluster, [point]))
        else:
            same.append(point)
    return [point for _, group in found for point in group]


def _cluster_alone(point: RunPoint) -> HardwareSpec | None:
    """What must be equal for two runs to share a cluster; None for an experiment that cannot be built."""
    try:
        spec = hardware_spec(point.experiment)
    except (ExperimentError, ModelError):
        return None
    executors = unseeded(spec.orchestrator.executors)
    empty = type(spec.orchestrator)(executors=executors)
    return msgspec.structs.replace(spec, orchestrator=empty)


def run_warm(group: Sequence[RunPoint], told: Told, progress: Progress, *, overwrite: bool = False) -> bool:
    """Run all of `group`, which `warm_groups` made, and tell of each as it is written. False: interrupted.

    One that fails is told and does not stop the others, which go on with a new cluster.
    """
    left = list(group)
    with tempfile.TemporaryDirectory(prefix="disagg-warm-") as name:
        for attempt in range(len(group)):
            folder = Path(name) / str(attempt)
            folder.mkdir()
            ended, failure = _run(left, folder, told, progress, len(group) - len(left), overwrite=overwrite)
            left = left[ended:]
            if failure is None or failure.exit_code == EXIT_INTERRUPTED:
                return failure is None
            told(left.pop(0), failure)
            if not left:
                break
    return True


def _run(
    points: Sequence[RunPoint], folder: Path, told: Told, progress: Progress, before: int, *, overwrite: bool
) -> tuple[int, RunResult | None]:
    """(how many of `points` ended and were told, why the next one did not)."""
    writer = _Writer(points, folder, told, progress, before, overwrite=overwrite)
    failure = None
    try:
        check_device_name(profile_of(points[0].experiment))
        spec = hardware_spec(points[0].experiment)
        sessions = [
            Session(str(number), hardware_spec(point.experiment).orchestrator, load.phases, keep_rows=True)
            for number, (point, load) in enumerate(zip(points, writer.loads, strict=True))
        ]
        writes_beside = num_cores() >= len(spec.placements) + 1 + SPARE_CORES
        run_series(spec, sessions, folder, finished=writer.write if writes_beside else None)
    except KeyboardInterrupt:
        failure = RunResult(EXIT_INTERRUPTED)
    except (SpecError, TransportError, ModelError) as error:
        failure = RunResult(EXIT_CONFIGURATION, message=str(error))
    except LaunchError as error:
        failure = RunResult(EXIT_RESOURCES, message=str(error))
    except HardwareRunError as error:
        failure = RunResult(error.exit_code or 1, message=str(error))
    except ExperimentError as error:
        failure = RunResult(error.exit_code, message="; ".join(error.problems))
    for number in range(writer.num_written, len(points)):
        if read_result(folder, number) is None:
            break
        writer.write(number)
    return writer.num_written, failure


class _Writer:
    """Turns the sessions' results into run directories, in order, each once."""

    def __init__(
        self,
        points: Sequence[RunPoint],
        folder: Path,
        told: Told,
        progress: Progress,
        before: int,
        *,
        overwrite: bool,
    ) -> None:
        self.loads = [HardwareLoad(point.experiment) for point in points]
        self.num_written = 0
        self._points = points
        self._folder = folder
        self._told = told
        self._progress = progress
        self._before = before
        self._overwrite = overwrite

    def write(self, number: int) -> None:
        if number != self.num_written:
            return
        result, facts = read_result(self._folder, number), read_facts(self._folder)
        if result is None or facts is None:
            return
        self.num_written += 1
        point, load = self._points[number], self.loads[number]
        ended = datetime.now(UTC)

        def runner(_: object, point: RunPoint, writer: RunDirectory, __: Progress) -> RunOutcome:
            writer.started = ended - timedelta(seconds=result.wall_s)
            return write_result(point.experiment, _as_run(result, facts), load, writer)

        self._told(point, try_one(runner, point, NoProgress(), overwrite=self._overwrite))
        self._progress.update(self._before + self.num_written, None)


def _as_run(result: SessionResult, facts: ClusterFacts) -> HardwareResult:
    return HardwareResult(
        result.rows,
        result.logs,
        result.step_ends,
        result.parts,
        result.sends,
        facts.ranks,
        [],
        orchestrator_host=facts.hostname,
        orchestrator_pid=facts.pid,
    )
