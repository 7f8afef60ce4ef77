"""The profile that a calibration makes: an entry for each kind of executor and of link, fitted to the samples of all of them.

It knows the cluster of the experiment file and what ran on it, and neither how it was run nor where files lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from ..core.devices import Device
from ..core.kv_layout import KvLayout
from ..core.model_shapes import ModelShape
from ..core.overheads import LinkCost, MessageLatency
from ..policies.vocabulary import PS_PER_S
from .calibration_fit import fit_engine
from .calibration_messages import fit_messages
from .calibration_points import fit_points, points_of, usual
from .calibration_samples import Samples, TransferSample, as_arrays
from .cluster import Placement, blocks_beside_weights, cluster_of, device_of, placements_of, shape_of
from .config import Experiment
from .errors import CalibrationFailedError
from .measured_profile import FORMAT_VERSION, EngineEntry, LinkEntry, MeasuredFor, Profile, Residual, shape_hash

if TYPE_CHECKING:
    from ..runtime.session_series import ClusterFacts

_LEAST: Final = 3


class About(Struct, frozen=True):
    """Where and when a calibration began: it may go on, or be fitted, on another machine and another day."""

    device_name: str
    created: str
    versions: dict[str, str]
    git_commit: str | None


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
        source=f"measured {about.created}",
    )
    return Profile(
        format_version=FORMAT_VERSION,
        name=config.name,
        created=about.created,
        measured_for=MeasuredFor(name, config.device_type, shape.name, shape_hash(shape), shape.dtype),
        device=with_measured_latencies(device, links, messages),
        engines=engines,
        links=links,
        messages=messages,
        message_residuals=spreads,
        dispatch_delay_ps=dispatch_delay(samples),
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
            sources=tuple(sorted({sample.source for sample in group})),
            readers=tuple(sorted({sample.reader for sample in group})),
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


def with_measured_latencies(device: Device, links: Sequence[LinkEntry], messages: MessageLatency) -> Device:
    """`device`, its link that of the first of `links`, where there is one, and its messages those into executors."""
    if links:
        cost = links[0].cost
        device = msgspec.structs.replace(
            device, link_bandwidth=cost.bytes_per_s, link_efficiency=1.0, link_latency_s=cost.fixed / PS_PER_S
        )
    return msgspec.structs.replace(device, message_latency_s=messages.into_executor / PS_PER_S)


def dispatch_delay(samples: Samples) -> int:
    """Picoseconds from a request's intended send to the orchestrator's being given it; of open loops, where there are any."""
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
