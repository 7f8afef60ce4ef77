"""`disagg calibrate`: drive a warm cluster through small loads, and make a profile of what its steps and messages took.

Beside PROFILE.json there are PROFILE.samples/ (raw samples, Parquet) and, until it is finished, PROFILE.sessions/ (what
each load left behind), from which an interrupted calibration goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from ..core.cost import RooflineCost, roofline
from ..core.devices import Device
from ..core.event_log import EventLogError
from ..core.kv_layout import KvLayout
from ..core.model_shapes import ModelError, ModelShape
from ..core.orchestrator import AT_CONTEXT_DONE
from ..core.overheads import LinkCost, MessageLatency
from ..policies.vocabulary import PS_PER_S
from ..runtime.executor_spec import HardwareSpec, SpecError, check_spec
from ..runtime.hardware_run import HardwareRunError
from ..runtime.launcher import LaunchError, find_mpiexec
from ..runtime.machine import check_machine
from ..runtime.session_series import (
    CLUSTER,
    ClusterFacts,
    Session,
    read_facts,
    read_result,
    result_file,
    run_series,
)
from ..runtime.transport import TransportError
from ..runtime.transport_world import world_needs
from .calibration_fit import fit_engine
from .calibration_messages import prompt_token_time
from .calibration_plan import QUICK, STANDARD, Effort, plan_sessions
from .calibration_points import fit_points, points_of, usual
from .calibration_samples import (
    MessageSample,
    Samples,
    TransferSample,
    as_arrays,
    pair_kind,
    write_samples,
)
from .cluster import Placement, blocks_beside_weights, cluster_of, device_of, executor_groups, placements_of, shape_of
from .config import Experiment
from .device_names import device_name
from .errors import EXIT_TIMEOUT, ConfigError, ExperimentError, ResourceError
from .manifest import git_commit, package_versions
from .measured_profile import FORMAT_VERSION, EngineEntry, LinkEntry, MeasuredFor, Profile, Residual, shape_hash
from .profile_file import save_profile
from .run_hardware import hardware_spec

_PLAN: Final = "plan.sha256"
_ABOUT: Final = "about.json"
_REPLACES: Final = "replaces"  # there if --overwrite was given: --resume then replaces the profile, too
_DAMAGED: Final = (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, EventLogError)
_LEAST: Final = 3
EFFORTS: Final[dict[bool, Effort]] = {False: STANDARD, True: QUICK}


class About(Struct, frozen=True):
    """Where and when a calibration began: it may go on, or be fitted, on another machine and another day."""

    device_name: str
    created: str
    versions: dict[str, str]
    git_commit: str | None


class CalibrationFailedError(ExperimentError):
    """The cluster did not get through; what had ended by then is kept for --resume."""


def calibrate(
    config: Experiment,
    output: Path,
    *,
    now: datetime,
    quick: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    timeout_s: float | None = None,
    told: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Profile:
    """Measure the cluster of `config` and write its profile to `output`.

    `told(sessions done, in all, name of the last)` hears of progress. What `overwrite` replaces stays until the new
    profile is there. Raises ConfigError, ResourceError or CalibrationFailedError.
    """
    _check_is_of_one_kind(config)
    shape = shape_of(config)
    sessions = plan_sessions(config, _rough_cost(config, shape), EFFORTS[quick])
    plan, folder = _plan_hash(config, sessions), output.with_suffix(".sessions")
    if not overwrite:
        _check_folder(folder, output, plan, resume=resume)

    def finished(number: int) -> None:
        told(number + 1, len(sessions), sessions[number].name)

    try:
        spec = hardware_spec(config)
        if overwrite or not all((folder / result_file(number)).exists() for number in range(len(sessions))):
            _check_world(spec)
        _make_folder(folder, config, plan, now, overwrite=overwrite)
        run_series(spec, sessions, folder, finished=finished, timeout_s=timeout_s)
    except (SpecError, TransportError, ModelError) as error:
        raise ConfigError(str(error)) from error
    except LaunchError as error:
        raise ResourceError(str(error)) from error
    except HardwareRunError as error:
        failed = CalibrationFailedError(f"{error}; --resume goes on after the sessions that ended")
        failed.exit_code = EXIT_TIMEOUT if error.exit_code == EXIT_TIMEOUT else error.exit_code or 1
        raise failed from error
    samples, measured_s = _read(folder, sessions)
    facts, about = _read_facts(folder), _read_about(folder)
    if facts is None:
        raise CalibrationFailedError(f"{folder} holds sessions and no cluster; start again with --overwrite")
    profile = make_profile(config, samples, facts, about, num_sessions=len(sessions), measured_s=measured_s)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_samples(samples, samples_folder(output))
    save_profile(profile, output)
    shutil.rmtree(folder)
    return profile


def _check_is_of_one_kind(config: Experiment) -> None:
    """ConfigError for a cluster of two kinds of device, or of two kinds of links: a profile is of one."""
    given = sorted({keys.profile for _, keys, _ in executor_groups(config.cluster) if keys.profile is not None})
    if given:
        raise ConfigError(
            f"a calibration is of one kind of device, and executors name {', '.join(given)} beside cluster.profile;"
            " allowed: a file for each kind, without `profile`"
        )
    transceiver = config.cluster.cache_transceiver
    if transceiver is not None and transceiver.across_domains_gb_per_s is not None:
        raise ConfigError(
            "a calibration is of one kind of link, and across_domains_gb_per_s makes two; allowed: throttle_gb_per_s"
        )


def samples_folder(profile: Path) -> Path:
    """Where the raw samples of a profile lie."""
    return profile.with_suffix(".samples")


def _rough_cost(config: Experiment, shape: ModelShape) -> RooflineCost:
    placement = placements_of(config)[0]
    return roofline(shape, device_of(config), placement.tensor_parallel_size, placement.pipeline_parallel_size)


def _check_folder(folder: Path, output: Path, plan: str, *, resume: bool) -> None:
    """Raises ConfigError where a profile is, or session results that this calibration cannot go on from."""
    if output.exists() and not (resume and (folder / _REPLACES).exists()):
        raise ConfigError(f"--output {output}: exists; allowed: --overwrite, or another file")
    if not folder.exists():
        return
    if not resume:
        raise ConfigError(f"{folder} holds a calibration that did not end; allowed: --resume, or --overwrite")
    try:
        before = (folder / _PLAN).read_text()
    except (OSError, UnicodeDecodeError):
        before = ""
    if before != plan:
        raise ConfigError(f"{folder} holds a calibration of something else; allowed: --overwrite")


def _check_world(spec: HardwareSpec) -> None:
    """What starting the cluster would refuse, before anything is written: raises as `run_series` does."""
    roster = check_spec(spec)
    check_machine(roster)
    world_needs(roster, one_host=True)
    find_mpiexec()


def _make_folder(folder: Path, config: Experiment, plan: str, now: datetime, *, overwrite: bool) -> None:
    """The folder of session results, empty or with those of the same plan."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        (folder / _REPLACES).touch()
    if not (folder / _ABOUT).exists() or not any(
        folder.glob("session-*.msgpack")
    ):  # until one has ended, nothing was measured anywhere
        about = About(device_name(config.device_type), now.isoformat(), package_versions(), git_commit())
        (folder / _ABOUT).write_bytes(msgspec.json.encode(about))
    (folder / _PLAN).write_text(plan)


def _plan_hash(config: Experiment, sessions: Sequence[Session]) -> str:
    """Equal for equal calibrations, wherever their files lie."""
    spec = hardware_spec(config)
    spec = msgspec.structs.replace(spec, orchestrator=msgspec.structs.replace(spec.orchestrator, policy_root=""))
    loads = [(s.name, s.orchestrator.skip_context_phase, _shares(s), s.phases) for s in sessions]
    return sha256(msgspec.msgpack.encode((spec, loads))).hexdigest()


def _shares(session: Session) -> bool:
    return any(executor.enable_block_reuse for executor in session.orchestrator.executors)


def _read_about(folder: Path) -> About:
    try:
        return msgspec.json.decode((folder / _ABOUT).read_bytes(), type=About)
    except _DAMAGED as error:
        raise CalibrationFailedError(f"{folder / _ABOUT}: {error}; start again with --overwrite") from error


def _read_facts(folder: Path) -> ClusterFacts | None:
    try:
        return read_facts(folder)
    except _DAMAGED as error:
        raise CalibrationFailedError(f"{folder / CLUSTER}: {error}; start again with --overwrite") from error


def _read(folder: Path, sessions: Sequence[Session]) -> tuple[Samples, float]:
    """The samples of all sessions, and their seconds. A session in which requests failed measured something else."""
    samples, seconds = Samples(), 0.0
    for number, session in enumerate(sessions):
        path = folder / result_file(number)
        try:
            result = read_result(folder, number)
            errors = [] if result is None else [row.error for row in result.sends if row.error is not None]
            if result is not None and not errors:
                early = session.orchestrator.generation_binding != AT_CONTEXT_DONE
                samples.add(number, result, is_open_loop=_is_spaced(session), sends_early=early)
                seconds += result.wall_s
        except _DAMAGED as error:
            raise CalibrationFailedError(
                f"{path} is damaged: {error}; without it --resume runs session '{session.name}' again"
            ) from error
        if result is not None and errors:
            path.unlink()
            raise CalibrationFailedError(
                f"{len(errors)} of {len(result.sends)} requests of session '{session.name}' failed: {errors[0]};"
                " --resume runs it again"
            )
    return samples, seconds


def _is_spaced(session: Session) -> bool:
    """Whether its requests are sent one by one, each at an instant of its own."""
    offsets = [submission.offset for phase in session.phases for submission in phase.submissions]
    return None not in offsets and len(set(offsets)) == len(offsets)


# ---- the profile ----------------------------------------------------------------------------------------------------


def make_profile(
    config: Experiment,
    samples: Samples,
    facts: ClusterFacts,
    about: About,
    *,
    num_sessions: int = 0,
    measured_s: float = 0.0,
) -> Profile:
    """Fit everything that `samples` tell of the cluster of `config`."""
    shape = shape_of(config)
    placements = {placement.id: placement for placement in placements_of(config)}
    device = device_of(config)
    engines = tuple(_engines(config, samples, facts, placements))
    links = tuple(_links(config, samples, placements, shape.kv_bytes_per_token, device))
    messages, spreads = fit_messages(samples.spaced_messages())
    first = engines[0]
    keys = next(p.keys for p in placements.values() if p.role.value == first.role)
    name = about.device_name
    device = msgspec.structs.replace(
        device,
        name=name,
        memory_bytes=_memory_of(device, keys, shape, first.num_blocks),
        link_bandwidth=links[0].cost.bytes_per_s if links else device.link_bandwidth,
        link_efficiency=1.0 if links else device.link_efficiency,
        link_latency_s=links[0].cost.fixed / PS_PER_S if links else device.link_latency_s,
        message_latency_s=messages.into_executor / PS_PER_S,
        source=f"measured {about.created}",
    )
    return Profile(
        format_version=FORMAT_VERSION,
        name=config.name,
        created=about.created,
        measured_for=MeasuredFor(name, config.device_type, shape.name, shape_hash(shape), shape.dtype),
        device=device,
        engines=engines,
        links=links,
        messages=messages,
        message_residuals=spreads,
        dispatch_delay_ps=_dispatch_delay(samples),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        versions=about.versions,
        git_commit=about.git_commit,
        num_sessions=num_sessions,
        measured_s=round(measured_s, 3),
    )


def _engines(
    config: Experiment, samples: Samples, facts: ClusterFacts, placements: dict[int, Placement]
) -> list[EngineEntry]:
    """One entry for each role and parallelism."""
    executors = {executor.id: executor for executor in cluster_of(config).executors}
    found_blocks = {rank.executor: rank.num_blocks for rank in facts.ranks if rank.num_blocks}
    groups: dict[tuple[str, int, int], list[Placement]] = {}
    for placement in placements.values():
        key = (placement.role.value, placement.tensor_parallel_size, placement.pipeline_parallel_size)
        groups.setdefault(key, []).append(placement)
    entries = []
    for (role, tp, pp), group in groups.items():
        ids = {placement.id for placement in group}
        batch = max(executors[i].scheduler.max_batch_size for i in ids)
        graphs = config.device_type == "cuda" and role != "generation" and shape_of(config).dtype != "float32"
        own = [s for s in samples.steps if s.executor in ids]
        fit = fit_engine(own, config.device_type, batch, chunk_graphs=graphs)
        if fit.decode is None and fit.chunks is None:
            raise CalibrationFailedError(f"no steps of {role} executors were seen")
        first = group[0]
        entries.append(
            EngineEntry(
                role=role,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                layers_per_stage=first.layers_per_stage,
                tokens_per_block=executors[first.id].tokens_per_block,
                num_blocks=min(found_blocks.get(i, executors[i].num_blocks) for i in ids),
                max_batch_size=batch,
                max_num_tokens=max(executors[i].scheduler.max_num_tokens for i in ids),
                steps_per_grant=first.steps_per_grant,
                pipeline_depth=first.pipeline_depth,
                plan_ahead=first.plan_ahead,
                decode=fit.decode,
                chunks=fit.chunks,
                gaps=fit.gaps,
                measured=fit.measured,
                residuals=fit.residuals,
                executors=tuple(sorted(ids)),
                transfer_slowdown=fit.transfer_slowdown,
            )
        )
    return entries


def _links(
    config: Experiment, samples: Samples, placements: dict[int, Placement], kv_bytes: int, device: Device
) -> list[LinkEntry]:
    """One entry for each pair of layouts."""
    transceiver = config.cluster.cache_transceiver
    groups: dict[tuple[int, int, int, int], list[TransferSample]] = {}
    for sample in samples.transfers:
        ends = placements[sample.source], placements[sample.reader]
        layouts = tuple(n for p in ends for n in (p.tensor_parallel_size, p.pipeline_parallel_size))
        groups.setdefault(layouts, []).append(sample)  # type: ignore[arg-type]
    return [
        LinkEntry(
            transport=(transceiver.backend if transceiver else None) or "auto",
            source_tp=layouts[0],
            source_pp=layouts[1],
            reader_tp=layouts[2],
            reader_pp=layouts[3],
            tokens_per_block=placements[group[0].reader].keys.kv_cache.tokens_per_block,
            cost=cost,
            residuals=residuals,
            throttle_gb_per_s=None if transceiver is None else transceiver.throttle_gb_per_s,
        )
        for layouts, group in groups.items()
        if len(group) >= _LEAST
        for cost, residuals in [fit_link(group, kv_bytes, device.link_bandwidth * device.link_efficiency)]
    ]


def fit_link(
    samples: Sequence[TransferSample], kv_bytes_per_token: int, likely_rate: float
) -> tuple[LinkCost, tuple[Residual, ...]]:
    """A fixed time and bytes over a rate, from transfers that had the link to themselves when they began.

    Pages are in proportion to bytes in any one cluster, so their cost is in the rate. `likely_rate` (bytes/s) is taken
    where size made no difference.
    """
    columns = as_arrays(samples)
    ns = columns["duration_ps"] / 1000.0
    num_bytes = columns["num_tokens"].astype(float) * kv_bytes_per_token
    alone = columns["num_in_flight"] == 1
    alone = alone if alone.sum() >= _LEAST else np.ones(len(ns), dtype=bool)
    features = np.stack((np.ones(len(ns)), num_bytes), axis=1)
    points = points_of((columns["num_blocks"][alone],), features[alone], ns[alone])
    fitted = fit_points(points, ns[alone], features[alone], "transfers alone")
    fixed_ns, ns_per_byte = (float(x) for x in fitted.coefficients)
    rate = 1e9 / ns_per_byte if ns_per_byte > 1e-9 / likely_rate else likely_rate
    residuals = [fitted.residual]
    if (~alone).sum() >= _LEAST:
        several = columns["num_in_flight"][~alone]
        guess = fixed_ns + several * num_bytes[~alone] / rate * 1e9  # all of them alike, all at once
        relative = guess / ns[~alone] - 1
        residuals.append(
            Residual(
                "transfers with others in flight",
                num_points=len(guess),
                num_samples=len(guess),
                num_outliers=0,
                mean=round(float(np.abs(relative).mean()), 6),
                p90=round(float(np.quantile(np.abs(relative), 0.9)), 6),
                max=round(float(np.abs(relative).max()), 6),
                bias=round(float(guess.sum() / ns[~alone].sum() - 1), 6),
                jitter=round(float(np.std(ns[~alone] / guess)), 6),
            )
        )
    return LinkCost(bytes_per_s=round(rate), fixed=round(fixed_ns * 1000)), tuple(residuals)


def fit_messages(samples: Sequence[MessageSample]) -> tuple[MessageLatency, dict[str, float]]:
    """The mean latency of each kind of pair, less the longest hundredth, and its standard deviation in picoseconds.

    Reports are left out: nobody waits for them. A kind of pair that no message went over is like the others. Of messages to an
    executor the time for the tokens that they carry is taken off first, where samples tell it: the mean is of what is left,
    of messages with a prompt and without, each counted once. So it errs least over all of them should the two differ.
    """
    into, out, between = pair_kind(0, 1), pair_kind(1, 0), pair_kind(1, 2)
    token = prompt_token_time([sample for sample in samples if sample.pair == into])
    by_pair: dict[str, list[float]] = {}
    for sample in samples:
        if sample.kind == "Report" or (token and sample.pair == into and sample.num_tokens < 0):
            continue
        carried = token * sample.num_tokens if token and sample.pair == into else 0
        by_pair.setdefault(sample.pair, []).append(sample.latency_ps - carried)
    means: dict[str, int] = {}
    spreads: dict[str, float] = {}
    for pair, values in by_pair.items():
        kept = usual(values)
        means[pair], spreads[pair] = max(0, round(float(kept.mean()))), round(float(kept.std()))
    if not means:
        raise CalibrationFailedError("no message between two cores was seen")
    any_pair = round(sum(means.values()) / len(means))
    latency = MessageLatency(means.get(into, any_pair), means.get(out, any_pair), means.get(between, any_pair), token)
    return latency, spreads


def _dispatch_delay(samples: Samples) -> int:
    chosen = [s.delay_ps for s in samples.clients if s.is_open_loop] or [s.delay_ps for s in samples.clients]
    return max(0, round(float(usual(chosen).mean()))) if chosen else 0


def _memory_of(device: Device, keys: Any, shape: ModelShape, num_blocks: int) -> int:
    """Bytes of memory from which the usual arithmetic of KV blocks gives the blocks that were found."""
    if keys.kv_cache.max_tokens is not None:
        return device.memory_bytes
    fraction = keys.kv_cache.free_gpu_memory_fraction or 0.9
    layout = KvLayout.of(shape, keys.tensor_parallel_size, keys.pipeline_parallel_size, keys.layers_per_stage)
    block_bytes = layout.kv_bytes_per_token(0, shape.dtype_bytes) * keys.kv_cache.tokens_per_block
    missing = num_blocks - blocks_beside_weights(keys, shape, device, fraction)
    return max(1, device.memory_bytes + int((missing + 0.5) * block_bytes / fraction))
