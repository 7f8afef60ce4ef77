"""What policies that predict are told in advance: the cost model of the experiment's profile, sampled into tables."""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import Any

from msgspec.structs import replace

from ..core.config import ExecutorConfig
from ..core.cost import CostModel
from ..core.prediction import LinkTimes, PredictionConfig, StepTimes, step_times
from ..policies.vocabulary import PS_PER_S, Role
from .config import Experiment
from .errors import ConfigError


def prediction_of(
    config: Experiment, executors: tuple[ExecutorConfig, ...], kv_bytes_per_token: int
) -> PredictionConfig:
    """The same for both worlds: a real run's policies predict from the profile that its file names."""
    from .run_simulation import costs_of, link_costs  # which builds clusters, and so imports who calls this

    costs = costs_of(config)
    tables: dict[StepTimes, int] = {}
    of_executor = []
    for executor in executors:
        scheduler = executor.scheduler
        cost: Any = costs[executor.id]
        times = _sampled(cost, scheduler.max_num_tokens, scheduler.max_batch_size)
        of_executor.append(tables.setdefault(times, len(tables)))
    sources = [e.id for e in executors if e.role is not Role.GENERATION]
    readers = [e.id for e in executors if e.role is not Role.CONTEXT]
    latency, per_token = 0, 0.0
    links: tuple[LinkTimes | None, ...] = ()
    kind_of: tuple[int, ...] = ()
    if config.cluster.cache_transceiver is not None and sources and readers:
        link = link_costs(config, {e.id: e for e in executors})(sources[0], readers[-1])
        links, kind_of = _links(config, executors)
        latency = link.fixed
        per_token = kv_bytes_per_token / link.bytes_per_s * PS_PER_S + link.page / executors[0].tokens_per_block
    return PredictionConfig(tuple(tables), tuple(of_executor), latency, per_token, links, kind_of, kv_bytes_per_token)


def _links(
    config: Experiment, executors: tuple[ExecutorConfig, ...]
) -> tuple[tuple[LinkTimes | None, ...], tuple[int, ...]]:
    """As `PredictionConfig.links` and `link_kind_of` say: a kind is a device, tp and pp."""
    from .cluster import placements_of
    from .run_simulation import link_costs

    kinds: dict[tuple[str | None, int, int], tuple[int, ExecutorConfig]] = {}
    kind_of = []
    for placement, executor in zip(placements_of(config), executors, strict=True):
        kind = (placement.keys.profile, executor.tensor_parallel_size, executor.pipeline_parallel_size)
        kind_of.append(kinds.setdefault(kind, (len(kinds), executor))[0])
    first = [executor for _, executor in kinds.values()]
    within = link_costs(config, {executor.id: replace(executor, domain="") for executor in first})
    transceiver = config.cluster.cache_transceiver
    cap = None if transceiver is None else transceiver.across_domains_gb_per_s

    def times(source: ExecutorConfig, reader: ExecutorConfig, most: float) -> LinkTimes | None:
        try:
            cost = within(source.id, reader.id)
        except ConfigError:  # a profile that has none between these: no KV travels there
            return None
        return LinkTimes(min(cost.bytes_per_s, most), cost.fixed, cost.page / reader.tokens_per_block)

    rates = (inf, inf if cap is None else cap * 1e9)
    return tuple(times(source, reader, most) for most in rates for source in first for reader in first), tuple(kind_of)


@lru_cache(maxsize=256)
def _sampled(cost: CostModel, max_num_tokens: int, max_batch_size: int) -> StepTimes:
    return step_times(cost, max_num_tokens, max_batch_size)
