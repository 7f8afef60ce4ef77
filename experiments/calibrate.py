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
from typing import Final

import msgspec

from ..core.cost import RooflineCost, roofline
from ..core.event_log import EventLogError
from ..core.model_shapes import ModelError, ModelShape
from ..core.orchestrator import AT_CONTEXT_DONE
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
from .calibration_plan import QUICK, STANDARD, Effort, plan_sessions
from .calibration_profile import About, make_profile
from .calibration_samples import Samples, write_samples
from .cluster import device_of, executor_groups, placements_of, shape_of
from .config import Experiment
from .device_names import device_name
from .errors import EXIT_TIMEOUT, CalibrationFailedError, ConfigError, ResourceError
from .manifest import git_commit, package_versions
from .measured_profile import Profile
from .profile_file import save_profile
from .run_hardware import hardware_spec

_PLAN: Final = "plan.sha256"
_ABOUT: Final = "about.json"
_REPLACES: Final = "replaces"  # there if --overwrite was given: --resume then replaces the profile, too
_DAMAGED: Final = (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, EventLogError)
EFFORTS: Final[dict[bool, Effort]] = {False: STANDARD, True: QUICK}


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
        left = [number for number in range(len(sessions)) if not (folder / result_file(number)).exists()]
        if overwrite or left:
            _check_world(spec)
        if not overwrite and 0 < len(left) < len(sessions):
            _check_device(folder, config.device_type)
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
    profile = make_profile(
        config,
        samples,
        facts,
        about,
        num_sessions=len(sessions),
        measured_s=measured_s,
        effort="quick" if quick else "standard",
    )
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


def _check_device(folder: Path, device_type: str) -> None:
    """ConfigError unless the sessions that are left would run on the device that those before them ran on."""
    there, here = _read_about(folder).device_name, device_name(device_type)
    if here != there:
        raise ConfigError(
            f"{folder} holds sessions of {there}, and here is {here}: a profile is of one device; allowed: --resume on"
            f" {there}, or --overwrite"
        )


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
