"""Several calibrations of one device and one model as one profile, their samples beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec.structs import astuple, replace

from ..core.commands import ORCHESTRATOR
from .calibration_messages import fit_messages
from .calibration_profile import dispatch_delay, with_measured_latencies
from .calibration_samples import Samples, read_samples, write_samples
from .errors import ConfigError
from .measured_profile import EngineEntry, LinkEntry, Profile, told_of
from .profile_file import load_profile, save_profile
from .profile_refit import link_ends, refitted

_LIMITS: Final = (
    "layers_per_stage",
    "tokens_per_block",
    "max_batch_size",
    "max_num_tokens",
    "steps_per_grant",
    "pipeline_depth",
    "plan_ahead",
)
_NO_SAMPLES: Final = Samples()


def merge_profiles(paths: Sequence[Path], output: Path, *, pool: bool = False) -> Profile:
    """Write the profile of all of them to `output`, and what samples there are; raises ConfigError as `merged` does.

    Latencies of messages and the dispatch delay are of all that was heard, and the device's own are those of the result.
    `pool`: what several of them measured is fitted to the samples of all. Each must have samples, and no two the same ones.
    """
    profiles = [load_profile(path) for path in paths]
    found = [read_samples(path.with_suffix(".samples")) or Samples() for path in paths]
    if pool:
        _check_samples(paths, found)
    offsets = _offsets(profiles, found)
    both = merged(profiles, output.stem, pool=pool, samples=found)
    samples = Samples()
    for own, executors, sessions in zip(found, *offsets, strict=True):
        _take(samples, own, executors, sessions)
    _leave_out(samples, profiles, offsets[0], both)
    if samples.messages:  # one latency for all, as a refit of the samples would have it
        messages, spreads = fit_messages(samples.spaced_messages())
        both = replace(both, messages=messages, message_residuals=spreads)
    if samples.clients:
        both = replace(both, dispatch_delay_ps=dispatch_delay(samples))
    if pool:
        both = refitted(both, samples)
    both = replace(both, device=with_measured_latencies(both.device, both.links, both.messages))
    save_profile(both, output)
    folder = output.with_suffix(".samples")
    shutil.rmtree(folder, ignore_errors=True)
    if samples.steps:
        write_samples(samples, folder)
    return both


def merged(
    profiles: Sequence[Profile], name: str, *, pool: bool = False, samples: Sequence[Samples] | None = None
) -> Profile:
    """The entries of all of them; what an earlier one has stays. Executors are numbered on from one to the next, beyond
    those that `samples`, one for each profile, name.

    `created`, and what the device says of its source, are those of the latest; `git_commit` and `versions` tell all that
    differ, one behind the other; one quick calibration makes it quick. `pool`: an entry that several have is of the
    executors of all of them, and to be fitted anew; its blocks, and the device's memory, are the first's. Raises ConfigError
    unless all are of one device and model, pooled executors of equal limits, and pooled links of blocks of one size.
    """
    if not profiles:
        raise ConfigError("no profile is given; allowed: at least one")
    first = profiles[0]
    engines: dict[tuple[str, int, int], EngineEntry] = {}
    links: dict[tuple[Any, ...], LinkEntry] = {}
    offsets, _ = _offsets(profiles, samples if samples is not None else [_NO_SAMPLES] * len(profiles))
    for profile, offset in zip(profiles, offsets, strict=True):
        if profile.measured_for != first.measured_for:
            raise ConfigError(
                f"profile {profile.name} was measured for {told_of(profile.measured_for)},"
                f" profile {first.name} for {told_of(first.measured_for)}; only profiles of the same can be one"
            )
        for engine in profile.engines:
            key = engine.role, engine.tensor_parallel_size, engine.pipeline_parallel_size
            own = replace(engine, executors=_numbered(engine.executors, offset))
            engines[key] = _pooled(engines[key], own, profile) if pool and key in engines else engines.get(key, own)
        for link in _links(profile, offset):
            there = links.get(link.kind, link)
            links[link.kind] = _joined(there, link, profile) if pool and link.kind in links else there
    latest = max(profiles, key=lambda profile: profile.created)
    versions = {package: None for profile in profiles for package in profile.versions}
    return replace(
        first,
        name=name,
        created=latest.created,
        device=replace(first.device, source=latest.device.source),
        engines=tuple(engines.values()),
        links=tuple(links.values()),
        versions={
            package: _each_once(p.versions[package] for p in profiles if package in p.versions) for package in versions
        },
        git_commit=_each_once(p.git_commit for p in profiles if p.git_commit is not None) or None,
        effort="quick" if any(profile.effort == "quick" for profile in profiles) else "standard",
        num_sessions=sum(profile.num_sessions for profile in profiles),
        measured_s=round(sum(profile.measured_s for profile in profiles), 3),
    )


def _each_once(told: Iterable[str]) -> str:
    """One behind the other; a part that was put together so itself is taken apart first."""
    return ", ".join(dict.fromkeys(one for several in told for one in several.split(", ")))


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


def _joined(link: LinkEntry, other: LinkEntry, profile: Profile) -> LinkEntry:
    """`link` with the ends of `other` beside its own. One that does not know its own samples stays as it was measured:
    fitted to the other's alone it would no longer be of its own cluster.
    """
    if link.tokens_per_block != other.tokens_per_block:
        raise ConfigError(
            f"profile {profile.name}: its link over {other.transport} has tokens_per_block {other.tokens_per_block}, that"
            f" of an earlier profile {link.tokens_per_block}; only links of equal blocks can be pooled"
        )
    if not link.sources or not other.sources:
        return link
    return replace(link, sources=link.sources + other.sources, readers=link.readers + other.readers)


def _links(profile: Profile, offset: int) -> list[LinkEntry]:
    """Those of `profile`, each with the ends that it has there: among others of equal layouts nothing else would tell."""
    ends = [link_ends(profile, link) for link in profile.links]
    return [
        replace(link, sources=_numbered(sources, offset), readers=_numbered(readers, offset))
        for link, (sources, readers) in zip(profile.links, ends, strict=True)
    ]


def _numbered(executors: Iterable[int], offset: int) -> tuple[int, ...]:
    return tuple(executor + offset for executor in executors)


def _offsets(profiles: Sequence[Profile], found: Sequence[Samples]) -> tuple[list[int], list[int]]:
    """What to add to each profile's numbers of executors and of sessions, so that none is there twice.

    Samples count too: they may be of executors whose entry was left out when profiles were merged before.
    """
    executors, sessions = [0], [0]
    for profile, samples in list(zip(profiles, found, strict=True))[:-1]:
        numbers = [number for engine in profile.engines for number in engine.executors]
        numbers += [number for link in profile.links for number in (*link.sources, *link.readers)]
        numbers += [step.executor for step in samples.steps]
        numbers += [number for message in samples.messages for number in (message.sender, message.receiver)]
        numbers += [number for transfer in samples.transfers for number in (transfer.source, transfer.reader)]
        executors.append(executors[-1] + max(numbers, default=0))
        of_samples = samples.steps, samples.messages, samples.transfers, samples.clients
        last = max((sample.session for kind in of_samples for sample in kind), default=-1)
        sessions.append(sessions[-1] + max(profile.num_sessions, last + 1))
    return executors, sessions


def _check_samples(paths: Sequence[Path], found: Sequence[Samples]) -> None:
    """Raises ConfigError for a profile without steps, or with a session that another one has, whatever its numbers there."""
    owners: dict[tuple[Any, ...], Path] = {}
    for path, samples in zip(paths, found, strict=True):
        folder = path.with_suffix(".samples")
        if not samples.steps:
            raise ConfigError(f"{folder}: holds no samples of steps, so there is nothing to pool")
        sessions: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
        for step in samples.steps:
            told = astuple(replace(step, session=0, executor=0))
            sessions.setdefault((step.session, step.executor), []).append(told)
        of_session = {tuple(steps): executor for (_, executor), steps in sessions.items()}
        for steps, executor in of_session.items():
            if steps in owners:
                raise ConfigError(
                    f"{folder}: holds steps of executor {executor} that {owners[steps]} holds too;"
                    f" only different calibrations can be pooled"
                )
        owners.update(dict.fromkeys(of_session, folder))


def _take(into: Samples, samples: Samples, executors: int, sessions: int) -> None:
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


def _leave_out(samples: Samples, profiles: Sequence[Profile], offsets: Sequence[int], both: Profile) -> None:
    """Take away steps and transfers of entries that an earlier profile had. Messages stay: their fit is of all of them."""
    kept = {number for engine in both.engines for number in engine.executors}
    samples.steps = [step for step in samples.steps if step.executor in kept]
    ends = {(link.sources, link.readers) for link in both.links}
    pairs = {(source, reader) for sources, readers in ends for source in sources for reader in readers}
    dropped = {
        (source, reader)
        for profile, offset in zip(profiles, offsets, strict=True)
        for link in _links(profile, offset)
        for source in link.sources
        for reader in link.readers
    } - pairs
    samples.transfers = [t for t in samples.transfers if (t.source, t.reader) not in dropped]
