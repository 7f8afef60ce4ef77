"""A run in the simulator: the experiment's cluster on virtual time, its load, and its rows into a run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from msgspec.structs import replace

from ..core.commands import Deliver
from ..core.config import ExecutorConfig
from ..core.cost import CostModel, roofline
from ..core.overheads import LaunchGaps, LinkCost, MessageLatency
from ..core.tables import RequestRow
from ..policies.interfaces import PolicyError
from ..policies.vocabulary import PS_PER_S
from ..simulator.cluster import SimulatedCluster
from ..simulator.timing import ModelTiming
from .cluster import cluster_of, device_of, kinds_of, link_of, placements_of, profile_of, shape_of
from .config import Experiment
from .errors import EXIT_RESOURCES, EXIT_RUN_FAILED, EXIT_TIMEOUT
from .event_files import log_name
from .load_source import LoadSource
from .measured_profile import find_engine
from .policy_failure import policy_failure
from .profile_cost import measured_cost
from .run_directory import RunDirectory
from .run_point import Progress, RunOutcome, RunPoint, none_served
from .simulated_load import SimulatedLoad, TimeIsUpError, is_open_loop
from .workload import Workload

EVENT_LOG_UP_TO: Final = 5_000  # requests; longer simulations keep an event log only when asked to


def costs_of(config: Experiment) -> dict[int, CostModel]:
    """The cost model of each executor, by id."""
    shape, kinds = shape_of(config), kinds_of(config)
    costs: dict[int, CostModel] = {}
    # executors alike share one model, which stays in a processor's caches
    shared: dict[tuple[object, ...], CostModel] = {}
    for placement in placements_of(config):
        tp, pp = placement.tensor_parallel_size, placement.pipeline_parallel_size
        most = placement.keys.scheduler.max_batch_size
        kind = (placement.keys.profile, placement.role, tp, pp, most)
        device, profile = kinds[placement.keys.profile]
        if kind not in shared and profile is None:
            shared[kind] = roofline(shape, device, tp, pp)
        elif kind not in shared and profile is not None:
            cost = measured_cost(profile, find_engine(profile, placement.role.value, tp, pp), most)
            # A step that tells of its layers runs kernel by kernel, whatever the executor's role.
            shared[kind] = dataclasses.replace(cost, chunk_graphs=cost.chunk_graphs and not _sends_layers(config))
        costs[placement.id] = shared[kind]
    return costs


def _sends_layers(config: Experiment) -> bool:
    """Whether KV may be asked for while it is computed."""
    transceiver = config.cluster.cache_transceiver
    return transceiver is not None and transceiver.layerwise and transceiver.generation_binding != "at_context_done"


def gaps_of(config: Experiment) -> dict[int, LaunchGaps]:
    """What lies between two plans of each executor, by id; nothing under a specification."""
    kinds = kinds_of(config)
    return {
        p.id: find_engine(profile, p.role.value, p.tensor_parallel_size, p.pipeline_parallel_size).gaps
        for p in placements_of(config)
        if (profile := kinds[p.keys.profile][1]) is not None
    }


def message_latency(config: Experiment) -> MessageLatency:
    profile = profile_of(config)
    if profile is not None:
        return profile.messages
    return MessageLatency.same(round(device_of(config).message_latency_s * PS_PER_S))


def link_costs(config: Experiment, executors: dict[int, ExecutorConfig]) -> Callable[[int, int], LinkCost]:
    """From one executor to another: as measured; else their ranks' links side by side; a throttle that is slower.

    Between devices of two kinds: the worse of what each has among its like.
    """
    keys = {placement.id: placement.keys for placement in placements_of(config)}
    kinds = kinds_of(config)
    transceiver = config.cluster.cache_transceiver
    throttle = None if transceiver is None else transceiver.throttle_gb_per_s
    across = None if transceiver is None else transceiver.across_domains_gb_per_s

    def among(kind: str | None, ends: tuple[ExecutorConfig, ExecutorConfig]) -> LinkCost:
        device, profile = kinds[kind]
        if profile is not None:
            layouts = [n for e in ends for n in (e.tensor_parallel_size, e.pipeline_parallel_size)]
            return link_of(profile, config, layouts).cost
        ranks = min(e.tensor_parallel_size * e.pipeline_parallel_size for e in ends)
        rate = device.link_bandwidth * device.link_efficiency * ranks
        return LinkCost(rate, round(device.link_latency_s * PS_PER_S))

    def cost(source: int, reader: int) -> LinkCost:
        ends = executors[source], executors[reader]
        found = among(keys[source].profile, ends)
        if keys[reader].profile != keys[source].profile:
            other = among(keys[reader].profile, ends)
            found = LinkCost(
                min(found.bytes_per_s, other.bytes_per_s), max(found.fixed, other.fixed), max(found.page, other.page)
            )
        caps = [throttle, across if ends[0].domain != ends[1].domain else None]
        return replace(found, bytes_per_s=min([found.bytes_per_s, *(cap * 1e9 for cap in caps if cap is not None)]))

    return cost


def noise_seed(config: Experiment) -> int:
    """What the noise of step times is drawn by."""
    return config.seed if config.cluster.noise_seed is None else config.cluster.noise_seed


def build_cluster(
    config: Experiment,
    *,
    records: Callable[[Any], None],
    delivered: Callable[[Deliver], None],
    log_sink: Callable[[int], Callable[[bytes], object] | None] | None = None,
) -> SimulatedCluster:
    """The experiment's cluster on virtual time, without its load; the callbacks are those of SimulatedCluster."""
    cluster = cluster_of(config)
    return SimulatedCluster(
        cluster,
        ModelTiming(
            costs_of(config),
            message_latency(config),
            config.cluster.step_jitter,
            noise_seed(config),
            gaps=gaps_of(config),
            error=config.cluster.step_error,
        ),
        kv_bytes_per_token=shape_of(config).kv_bytes_per_token,
        link_cost=link_costs(config, {e.id: e for e in cluster.executors}),
        launch={p.id: (p.steps_per_grant, p.pipeline_depth, p.plan_ahead) for p in placements_of(config)},
        records=records,
        delivered=delivered,
        log_sink=log_sink,
        users_act=not is_open_loop(config),
    )


def batches_outside(cluster: SimulatedCluster) -> tuple[int, int]:
    """How many batches began outside what the profile was measured for, and how many there were."""
    timing = cluster.timing
    return (timing.num_outside, timing.num_epochs) if isinstance(timing, ModelTiming) else (0, 0)


def outside_text(outside: int, batches: int) -> str:
    """How many batches were unlike any that was measured."""
    return f"{outside} of {batches} batches lie outside the measured range of the profile"


def _outside(cluster: SimulatedCluster) -> str | None:
    """A warning, where there were such."""
    outside, batches = batches_outside(cluster)
    return f"warning: {outside_text(outside, batches)}" if outside else None


def run_simulation(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
    """Simulate one point of an experiment to its end."""
    device, profile = device_of(config), profile_of(config)
    workload = Workload(config)
    source = LoadSource(workload)
    load = SimulatedLoad(source, config, progress, point.timeout_s)

    write_of = writer.write_of

    def record(row: Any) -> None:
        kind = type(row)
        if kind is RequestRow:
            planned = load.planned.pop(row.request_id)
            writer.write(row, phase=planned.phase, excluded=planned.excluded)
        else:
            write_of[kind](row)

    with ExitStack() as files:

        def log_sink(core: int) -> Any:
            if workload.num_requests > EVENT_LOG_UP_TO:
                return None
            return files.enter_context(writer.events_path(log_name(core)).open("wb")).write

        cluster = build_cluster(config, records=record, delivered=load.delivered, log_sink=log_sink)
        try:
            load.start(cluster)
            cluster.run()
        except TimeIsUpError:
            message = (
                f"timed out after {point.timeout_s:g} s, {source.num_ended} of {source.num_requests} requests ended"
            )
            return RunOutcome(source.num_sent, exit_code=EXIT_TIMEOUT, message=message)
        except PolicyError as error:
            return RunOutcome(
                source.num_sent, exit_code=EXIT_RUN_FAILED, message=f"a policy broke its contract: {error}"
            )
        except (Exception, SystemExit) as error:
            failure = policy_failure(error)
            if failure is None:
                raise
            return RunOutcome(source.num_sent, exit_code=EXIT_RUN_FAILED, message=failure)
    if not source.finished:
        missing = source.num_sent - source.num_ended
        return RunOutcome(
            source.num_sent,
            load.num_failed,
            exit_code=EXIT_RUN_FAILED,
            message=f"the simulation came to rest with {missing} requests unanswered: a policy holds them for ever",
        )
    is_useless = load.num_failed == source.num_sent
    return RunOutcome(
        source.num_sent,
        load.num_failed,
        source.num_cut,
        exit_code=EXIT_RESOURCES if is_useless else 0,
        message=none_served(load.first_error) if is_useless else _outside(cluster),
        device=f"{device.name} ({'specification' if profile is None else 'measured'})",
        manifest={
            "simulated_s": cluster.now_s,
            "simulator_events": cluster.count_events(),
            "profile_measured": None if profile is None else profile.created,
            "epochs_outside_measured_range": batches_outside(cluster)[0],
        },
    )
