"""A run on real executors: the experiment's cluster as MPI processes, its load, and its rows into a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ..core.model_shapes import ModelError
from ..core.tables import RequestRow
from ..policies.interfaces import PolicyError
from ..runtime.hardware_run import (
    HardwareResult,
    HardwareRunError,
    HardwareSpec,
    LoadPhase,
    ModelSource,
    Placement,
    PlannedSubmission,
    SpecError,
    run_cluster,
)
from ..runtime.launcher import LaunchError
from ..runtime.transport import TransportError
from .cluster import cluster_of, placements_of, shape_of
from .config import Experiment
from .errors import EXIT_RESOURCES, EXIT_RUN_FAILED, EXIT_TIMEOUT, ConfigError, ResourceError
from .event_files import STEP_ENDS, encode_step_ends, log_name
from .planned import request_of, true_length
from .policy_failure import policy_failure
from .run_directory import RunDirectory
from .run_point import Progress, RunOutcome, RunPoint
from .workload import PlannedRequest, Workload

_STEP_ENDS_NAME: Final = STEP_ENDS.removeprefix("events.")


def hardware_spec(config: Experiment) -> HardwareSpec:
    """The real cluster of an experiment. Raises ConfigError, ResourceError or ModelError."""
    transceiver = config.cluster.cache_transceiver
    shape = shape_of(config)
    if config.model.weights == "random":
        model = ModelSource(shape=shape, dtype=shape.dtype, seed=config.model.seed)
    else:
        model = ModelSource(folder=str((config.root / config.model.weights).resolve()), dtype=config.model.dtype)
    return HardwareSpec(
        orchestrator=cluster_of(config),
        model=model,
        placements=tuple(
            Placement(
                executor=placement.id,
                participant_ids=placement.participant_ids,
                device_ids=placement.device_ids if config.device_type == "cuda" else (),
                layers_per_stage=placement.layers_per_stage,
                steps_per_grant=placement.steps_per_grant,
                pipeline_depth=placement.pipeline_depth,
            )
            for placement in placements_of(config)
        ),
        transport=None if transceiver is None else transceiver.backend,
        device=config.device_type,
    )


class _Load:
    """The planned phases as the runtime sends them, and what was planned by request id."""

    def __init__(self, config: Experiment) -> None:
        self.planned: dict[int, PlannedRequest] = {}
        self.num_cut = 0
        self._config = config
        workload = Workload(config, vocab_size=shape_of(config).vocab_size)
        self.phases = tuple(
            LoadPhase(tuple(map(self._submission, phase.requests)), phase.concurrency, phase.name)
            for phase in workload.phases()
        )

    def _submission(self, planned: PlannedRequest) -> PlannedSubmission:
        # the runtime needs the tokens, and nobody else does from here on
        self.planned[planned.id] = msgspec.structs.replace(planned, input_token_ids=None)
        self.num_cut += planned.output_cut
        return PlannedSubmission(request_of(planned, self._config), planned.offset, true_length(planned))


def run_hardware(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
    """Run one point of an experiment on real executors to its end; in an existing MPI world this is rank 0's part."""
    load = _Load(config)
    try:
        result = run_cluster(hardware_spec(config), load.phases, progress=progress.update, timeout_s=point.timeout_s)
    except (SpecError, TransportError, ModelError) as error:
        raise ConfigError(str(error)) from error
    except LaunchError as error:
        raise ResourceError(str(error)) from error
    except HardwareRunError as error:
        timed_out = error.exit_code == EXIT_TIMEOUT and point.timeout_s is not None
        message = f"timed out after {point.timeout_s:g} s" if timed_out else str(error)
        return RunOutcome(0, exit_code=error.exit_code, message=message)
    except (Exception, SystemExit) as error:  # in an existing MPI world the policies run in this process
        failure = None if isinstance(error, PolicyError) else policy_failure(error)
        if failure is None:
            raise
        return RunOutcome(0, exit_code=EXIT_RUN_FAILED, message=failure)
    if result is None:
        raise RuntimeError("only rank 0 of an MPI world writes a run; the others serve_hardware")
    return _written(result, load, writer)


def serve_hardware(config: Experiment) -> None:
    """The part of a rank other than 0 of an existing MPI world in one run: it serves its executor, and writes nothing."""
    run_cluster(hardware_spec(config), ())


def _written(result: HardwareResult, load: _Load, writer: RunDirectory) -> RunOutcome:
    bursts = {row.request_id for row in result.sends if row.in_burst}
    num_failed = num_requests = 0
    for row in result.rows:
        if isinstance(row, RequestRow):
            planned = load.planned[row.request_id]
            num_requests += 1
            num_failed += row.error is not None or row.finish_reason == "rejected"
            writer.write(row, phase=planned.phase, excluded=planned.excluded or row.request_id in bursts)
        else:
            writer.write(row)
    for core, log in result.logs.items():
        writer.add_events(log_name(core), log)
    step_ends: dict[tuple[int, int], list[int]] = {}
    for executor, epoch, at in _step_ends(result):
        step_ends.setdefault((executor, epoch), []).append(at)
    writer.add_events(_STEP_ENDS_NAME, encode_step_ends(step_ends))
    none_served = num_requests > 0 and num_failed == num_requests
    hosts = sorted({rank.hostname for rank in result.ranks})
    return RunOutcome(
        num_requests,
        num_failed,
        load.num_cut,
        exit_code=EXIT_RESOURCES if none_served else 0,
        message="no request could be served" if none_served else None,
        device=", ".join(sorted({rank.device for rank in result.ranks})),
        manifest={
            "num_hosts": len(hosts),
            "ranks": [_rank(rank) for rank in result.ranks],
            "transferred_bytes": sum(
                part.num_bytes for parts in result.parts.values() for _, part in parts if part.is_sender
            ),
        },
    )


def _step_ends(result: HardwareResult) -> Iterator[tuple[int, int, int]]:
    """(executor, epoch, instant) of each step, in order."""
    for executor, ends in result.step_ends.items():
        for epoch, _, at in sorted(ends):
            yield executor, epoch, at


def _rank(rank: Any) -> dict[str, Any]:
    """A rank for the manifest, without what names this machine."""
    values: dict[str, Any] = msgspec.to_builtins(rank)
    return {key: value for key, value in values.items() if key not in ("hostname", "pid")}
