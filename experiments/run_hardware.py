"""A run on real executors: the experiment's cluster as MPI processes, its load, and its rows into a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ..core.model_shapes import ModelError
from ..core.tables import RequestRow
from ..policies.interfaces import PolicyError
from ..runtime.clock_offsets import ClockOffset
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
from ..runtime.hosts import Placing
from ..runtime.launcher import LaunchError
from ..runtime.transport import TransportError
from .cluster import Placement as ClusterPlacement
from .cluster import cluster_of, placements_of, profile_of, shape_of, world_size
from .config import Experiment
from .device_names import check_device_name
from .errors import EXIT_RESOURCES, EXIT_RUN_FAILED, EXIT_TIMEOUT, ConfigError, ResourceError
from .event_files import STEP_ENDS, encode_step_ends, log_name
from .planned import request_of, true_length
from .policy_failure import policy_failure
from .run_directory import RunDirectory
from .run_point import Progress, RunOutcome, RunPoint, none_served
from .workload import PlannedRequest, Workload

_STEP_ENDS_NAME: Final = STEP_ENDS.removeprefix("events.")


@dataclass(frozen=True)
class HardwareOptions:
    """What a run on hardware may be told beside its experiment.

    `placing`: hosts other than this one. `warm_up`: requests over every pair of executors before the run. `on_placed`
    hears who runs where.
    """

    placing: Placing | None = None
    warm_up: int = 1
    on_placed: Callable[[str], None] | None = None


def hardware_spec(config: Experiment, placing: Placing | None = None) -> HardwareSpec:
    """The real cluster of an experiment. Raises ConfigError, ResourceError or ModelError.

    Devices that the file does not name are counted on each host of `placing` by itself.
    """
    transceiver = config.cluster.cache_transceiver
    shape = shape_of(config)
    if config.model.weights == "random":
        model = ModelSource(shape=shape, dtype=shape.dtype, seed=config.model.seed)
    else:
        model = ModelSource(folder=str((config.root / config.model.weights).resolve()), dtype=config.model.dtype)
    places: list[tuple[str, int | None]] = []
    if placing is not None:
        try:
            places = placing.rank_hosts(world_size(config))
        except LaunchError as error:
            raise ResourceError(str(error)) from error
    return HardwareSpec(
        orchestrator=cluster_of(config),
        model=model,
        placements=tuple(
            Placement(
                executor=placement.id,
                participant_ids=placement.participant_ids,
                device_ids=_device_ids(placement, places) if config.device_type == "cuda" else (),
                layers_per_stage=placement.layers_per_stage,
                steps_per_grant=placement.steps_per_grant,
                pipeline_depth=placement.pipeline_depth,
                plan_ahead=placement.plan_ahead,
                free_gpu_memory_fraction=_fraction(placement) if config.device_type == "cuda" else None,
            )
            for placement in placements_of(config)
        ),
        transport=None if transceiver is None else transceiver.backend,
        device=config.device_type,
        throttle_gb_per_s=None if transceiver is None else transceiver.throttle_gb_per_s,
        across_domains_gb_per_s=None if transceiver is None else transceiver.across_domains_gb_per_s,
        workload_names_blocks=True,
    )


def _fraction(placement: ClusterPlacement) -> float | None:
    """Of a GPU's free memory for the KV; None where the file fixes the KV's size."""
    cache = placement.keys.kv_cache
    return None if cache.max_tokens is not None else cache.free_gpu_memory_fraction or 0.9


def _device_ids(placement: ClusterPlacement, places: list[tuple[str, int | None]]) -> tuple[int, ...]:
    if not places or getattr(placement.keys, "device_ids", None) is not None:
        return placement.device_ids
    return tuple(places[rank][1] or 0 for rank in placement.participant_ids)


class HardwareLoad:
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


def run_hardware(
    config: Experiment,
    point: RunPoint,
    writer: RunDirectory,
    progress: Progress,
    options: HardwareOptions = HardwareOptions(),
) -> RunOutcome:
    """Run one point of an experiment on real executors to its end; in an existing MPI world this is rank 0's part."""
    if options.placing is None:
        check_device_name(profile_of(config))
    load = HardwareLoad(config)
    try:
        result = run_cluster(
            hardware_spec(config, options.placing),
            load.phases,
            warm_up=options.warm_up,
            progress=progress.update,
            on_placed=options.on_placed,
            timeout_s=point.timeout_s,
            placing=options.placing,
            scratch=None if options.placing is None else writer.path,  # on a cluster usually on a shared file system
        )
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
    return write_result(config, result, load, writer)


def serve_hardware(config: Experiment) -> None:
    """The part of a rank other than 0 of an existing MPI world in one run: it serves its executor, and writes nothing."""
    run_cluster(hardware_spec(config), ())


def write_result(config: Experiment, result: HardwareResult, load: HardwareLoad, writer: RunDirectory) -> RunOutcome:
    """Leave what a cluster said in the run's folder."""
    bursts = {row.request_id for row in result.sends if row.in_burst}
    num_failed = num_requests = 0
    first_error: str | None = None
    for row in result.rows:
        if isinstance(row, RequestRow):
            planned = load.planned[row.request_id]
            num_requests += 1
            num_failed += row.error is not None or row.finish_reason == "rejected"
            first_error = first_error or row.error
            writer.write(row, phase=planned.phase, excluded=planned.excluded or row.request_id in bursts)
        else:
            writer.write(row)
    for core, log in result.logs.items():
        writer.add_events(log_name(core), log)
    step_ends: dict[tuple[int, int], list[int]] = {}
    for executor, epoch, at in _step_ends(result):
        step_ends.setdefault((executor, epoch), []).append(at)
    writer.add_events(_STEP_ENDS_NAME, encode_step_ends(step_ends))
    is_useless = num_requests > 0 and num_failed == num_requests
    hosts = sorted({result.orchestrator_host, *(rank.hostname for rank in result.ranks)})
    roles = {placement.id: placement.role.value for placement in placements_of(config)}
    return RunOutcome(
        num_requests,
        num_failed,
        load.num_cut,
        exit_code=EXIT_RESOURCES if is_useless else 0,
        message=none_served(first_error) if is_useless else None,
        device=", ".join(sorted({rank.device for rank in result.ranks})),
        manifest={
            "num_hosts": len(hosts),
            "ranks": [_orchestrator(result), *(_rank(rank, roles) for rank in result.ranks)],
            "clock_offsets": [_clock(offset) for offset in result.clock_offsets],
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


def _orchestrator(result: HardwareResult) -> dict[str, Any]:
    """Rank 0 for the manifest; it holds no device."""
    where = {"host": result.orchestrator_host, "role": "orchestrator", "rank": 0, "executor": None}
    return {**where, "pid": result.orchestrator_pid, "device": None}


def _rank(rank: Any, roles: dict[int, str]) -> dict[str, Any]:
    """A rank for the manifest: where it ran, as what, and what it held."""
    values: dict[str, Any] = msgspec.to_builtins(rank)
    return {"host": values.pop("hostname"), "role": roles[rank.executor], **values}


def _clock(offset: ClockOffset) -> dict[str, Any]:
    """A rank's clock beside rank 0's for the manifest. `applied`: stamps of the tables were moved by the drift."""
    values: dict[str, Any] = msgspec.to_builtins(offset)
    return {**values, "drift_ppm": offset.drift_ppm, "applied": offset.is_applied}
