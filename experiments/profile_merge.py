"""Several calibrations of one device and one model as one profile, their samples beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from ..core.commands import ORCHESTRATOR
from .calibration_messages import fit_messages
from .calibration_samples import Samples, read_samples, write_samples
from .errors import ConfigError
from .measured_profile import EngineEntry, LinkEntry, Profile, told_of
from .profile_file import load_profile, save_profile
from .profile_refit import refitted

_LIMITS: Final = (
    "tokens_per_block",
    "max_batch_size",
    "max_num_tokens",
    "steps_per_grant",
    "pipeline_depth",
    "plan_ahead",
)


def merge_profiles(paths: Sequence[Path], output: Path, *, pool: bool = False) -> Profile:
    """Write the profile of all of them to `output`, and what samples there are; raises ConfigError as `merged` does.

    `pool`: what several of them measured is fitted to the samples of all, which each of them must have.
    """
    profiles = [load_profile(path) for path in paths]
    both = merged(profiles, output.stem, pool=pool)
    samples = Samples()
    for path, executors, sessions in zip(paths, *_offsets(profiles), strict=True):
        own = read_samples(path.with_suffix(".samples"))
        if pool and (own is None or not own.steps):
            raise ConfigError(f"{path.with_suffix('.samples')}: holds no samples of steps, so there is nothing to pool")
        _take(samples, own, executors, sessions)
    # Those of executors whose entry an earlier profile had would be taken for another's in the next merge.
    kept = {number for engine in both.engines for number in engine.executors}
    samples.steps = [step for step in samples.steps if step.executor in kept]
    if samples.messages:  # one latency for all: of all that was heard, as a refit of the samples would have it
        messages, spreads = fit_messages(samples.spaced_messages())
        both = replace(both, messages=messages, message_residuals=spreads)
    if pool:
        both = refitted(both, samples)
    save_profile(both, output)
    folder = output.with_suffix(".samples")
    shutil.rmtree(folder, ignore_errors=True)
    if samples.steps:
        write_samples(samples, folder)
    return both


def merged(profiles: Sequence[Profile], name: str, *, pool: bool = False) -> Profile:
    """The entries of all of them; what an earlier one has stays. Executors are numbered on from one to the next.

    `pool`: an entry that several have is of the executors of all of them, and to be fitted anew. Raises ConfigError
    unless all are of one device and model, and pooled executors of equal limits.
    """
    if not profiles:
        raise ConfigError("no profile is given; allowed: at least one")
    first = profiles[0]
    engines: dict[tuple[str, int, int], EngineEntry] = {}
    links: dict[tuple[Any, ...], LinkEntry] = {}
    for profile, offset in zip(profiles, _offsets(profiles)[0], strict=True):
        if profile.measured_for != first.measured_for:
            raise ConfigError(
                f"profile {profile.name} was measured for {told_of(profile.measured_for)},"
                f" profile {first.name} for {told_of(first.measured_for)}; only profiles of the same can be one"
            )
        for engine in profile.engines:
            key = engine.role, engine.tensor_parallel_size, engine.pipeline_parallel_size
            own = replace(engine, executors=tuple(i + offset for i in engine.executors))
            engines[key] = _pooled(engines[key], own, profile) if pool and key in engines else engines.get(key, own)
        for link in profile.links:
            layouts = link.source_tp, link.source_pp, link.reader_tp, link.reader_pp
            links.setdefault((link.transport, *layouts, link.throttle_gb_per_s), link)
    return replace(
        first,
        name=name,
        engines=tuple(engines.values()),
        links=tuple(links.values()),
        num_sessions=sum(profile.num_sessions for profile in profiles),
        measured_s=round(sum(profile.measured_s for profile in profiles), 3),
    )


def _pooled(entry: EngineEntry, other: EngineEntry, profile: Profile) -> EngineEntry:
    """`entry` with the executors of `other` beside its own."""
    for limit in _LIMITS:
        ours, theirs = getattr(entry, limit), getattr(other, limit)
        if ours != theirs:
            raise ConfigError(
                f"profile {profile.name}: its {other.title} executors have {limit} {theirs}, those of an earlier profile"
                f" {ours}; only executors of equal limits can be pooled"
            )
    return replace(entry, executors=entry.executors + other.executors)


def _offsets(profiles: Sequence[Profile]) -> tuple[list[int], list[int]]:
    """What to add to each profile's numbers of executors and of sessions, so that none is there twice."""
    executors, sessions = [0], [0]
    for profile in profiles[:-1]:
        most = max((number for engine in profile.engines for number in engine.executors), default=0)
        executors.append(executors[-1] + most)
        sessions.append(sessions[-1] + profile.num_sessions)
    return executors, sessions


def _take(into: Samples, samples: Samples | None, executors: int, sessions: int) -> None:
    if samples is None:
        return

    def numbered(core: int) -> int:
        return core if core == ORCHESTRATOR else core + executors

    into.steps += [replace(s, session=s.session + sessions, executor=numbered(s.executor)) for s in samples.steps]
    into.messages += [
        replace(s, session=s.session + sessions, sender=numbered(s.sender), receiver=numbered(s.receiver))
        for s in samples.messages
    ]
    into.transfers += [
        replace(s, session=s.session + sessions, source=numbered(s.source), reader=numbered(s.reader))
        for s in samples.transfers
    ]
    into.clients += [replace(s, session=s.session + sessions) for s in samples.clients]
