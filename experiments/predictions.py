"""What policies that predict are told in advance: the cost model of the experiment's profile, sampled into tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..core.config import ExecutorConfig
from ..core.cost import CostModel
from ..core.prediction import PredictionConfig, StepTimes, step_times
from ..policies.vocabulary import PS_PER_S, Role
from .config import Experiment


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
    if config.cluster.cache_transceiver is not None and sources and readers:
        link = link_costs(config, {e.id: e for e in executors})(sources[0], readers[-1])
        latency = link.fixed
        per_token = kv_bytes_per_token / link.bytes_per_s * PS_PER_S + link.page / executors[0].tokens_per_block
    return PredictionConfig(tuple(tables), tuple(of_executor), latency, per_token)


@lru_cache(maxsize=256)
def _sampled(cost: CostModel, max_num_tokens: int, max_batch_size: int) -> StepTimes:
    return step_times(cost, max_num_tokens, max_batch_size)
