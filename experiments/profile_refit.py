"""A measured profile fitted again from its samples: what a change of the fit makes of the same measurement."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from .calibration_fit import fit_engine
from .calibration_messages import fit_messages
from .calibration_profile import fit_link
from .calibration_samples import Samples, read_samples, write_samples
from .errors import ConfigError
from .measured_profile import EngineEntry, LinkEntry, Profile
from .profile_file import load_profile, save_profile


def refit_profile(path: Path, output: Path) -> Profile:
    """Write the profile at `path`, fitted anew, to `output`, its samples beside it. Raises ConfigError where there are none.

    What the samples do not tell stays as it was: executors and links without any, links that may not be the only ones whose
    transfers are there, a launch floor that no step showed. So do the dispatch delay and the device, which no fit gives.
    """
    profile = load_profile(path)
    samples = read_samples(path.with_suffix(".samples"))
    if samples is None or not samples.steps:
        raise ConfigError(f"{path.with_suffix('.samples')}: holds no samples of steps, so there is nothing to fit")
    again = refitted(profile, samples)
    save_profile(again, output)
    write_samples(samples, output.with_suffix(".samples"))
    return again


def refitted(profile: Profile, samples: Samples) -> Profile:
    """`profile` with all that `samples` tell, by the fit of today."""
    messages, spreads = profile.messages, profile.message_residuals
    if samples.messages:
        messages, spreads = fit_messages(samples.spaced_messages())
    return replace(
        profile,
        engines=tuple(_engine(profile, entry, samples) for entry in profile.engines),
        links=tuple(_link(profile, link, samples) for link in profile.links),
        messages=messages,
        message_residuals=spreads,
    )


def _engine(profile: Profile, entry: EngineEntry, samples: Samples) -> EngineEntry:
    own = [step for step in samples.steps if step.executor in entry.executors]
    if not own:
        return entry
    graphs = entry.chunks is not None and entry.chunks.graphs
    fit = fit_engine(own, profile.measured_for.device_type, entry.max_batch_size, chunk_graphs=graphs)
    chunks = fit.chunks
    if chunks is not None and entry.chunks is not None and not chunks.launch_floor_ns:
        chunks = replace(chunks, launch_floor_ns=entry.chunks.launch_floor_ns)
    return replace(
        entry,
        decode=fit.decode,
        chunks=chunks,
        gaps=fit.gaps,
        measured=fit.measured,
        residuals=fit.residuals,
        transfer_slowdown=fit.transfer_slowdown,
    )


def link_ends(profile: Profile, link: LinkEntry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The executors from which, and to which, the transfers went that `link` is fitted to; empty where nothing tells.

    A profile of a time in which links did not say is of one cluster, or merged of several: there the layouts of executors
    tell, unless several links have them.
    """
    if link.sources and link.readers:
        return link.sources, link.readers
    if sum(_layouts(other) == _layouts(link) for other in profile.links) > 1:
        return (), ()
    source, reader = (
        tuple(
            executor
            for entry in profile.engines
            if (entry.tensor_parallel_size, entry.pipeline_parallel_size) == layout
            for executor in entry.executors
        )
        for layout in _layouts(link)
    )
    return source, reader


def _layouts(link: LinkEntry) -> tuple[tuple[int, int], tuple[int, int]]:
    return (link.source_tp, link.source_pp), (link.reader_tp, link.reader_pp)


def _link(profile: Profile, link: LinkEntry, samples: Samples) -> LinkEntry:
    sources, readers = map(frozenset, link_ends(profile, link))
    own = [t for t in samples.transfers if t.source in sources and t.reader in readers]
    if len({t.num_tokens for t in own}) < 2:
        return link
    cost, residuals = fit_link(own, profile.kv_bytes_per_token, link.cost.bytes_per_s)
    return replace(link, cost=cost, residuals=residuals)
