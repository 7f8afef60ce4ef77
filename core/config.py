"""What a core is made from: plain values, checked by `experiments/`, written at the head of each event log.

All durations are integer picoseconds.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from ..policies.vocabulary import PS_PER_MS, PS_PER_S, Role
from .prediction import PredictionConfig


class PolicySpec(Struct, frozen=True):
    """A policy by name (registered, entry point, or `path/to/file.py:Class`) and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


class SchedulerConfig(Struct, frozen=True):
    """How one executor forms its batches."""

    queue_order: PolicySpec = PolicySpec("fcfs")
    batching: PolicySpec = PolicySpec("chunked_prefill")
    capacity: str = "guaranteed_no_evict"  # or max_utilization
    max_batch_size: int = 64  # requests in one step
    max_num_tokens: int = 8192  # tokens in one step: a decode counts one
    chunked_context: bool = True  # off: a prompt over max_num_tokens is refused at enqueue


class ExecutorConfig(Struct, frozen=True):
    """One executor: `id` is its rank in messages (from 1)."""

    id: int
    role: Role
    num_blocks: int
    tokens_per_block: int = 32
    scheduler: SchedulerConfig = SchedulerConfig()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    device_weight: float = 1.0
    domain: str = ""
    lease: int = 60 * PS_PER_S  # held KV is freed this long after it was last renewed, unless a reader has pinned it
    transfer_timeout_base: int = 30 * PS_PER_S  # a transfer may take base + per_token * tokens
    transfer_timeout_per_token: int = 0
    pull_timeout: int = 300 * PS_PER_S  # a generation phase may wait this long for blocks to receive its KV into
    quarantine_max_blocks: int | None = None  # more than this in quarantine: the executor reports itself unhealthy
    pull_reserve_blocks: int = 0  # blocks that admitting a transfer leaves free
    layerwise: bool = True  # KV that was asked for early is sent as it is computed; off: once all of it is
    # Steps run while KV comes or is read; off: none begins then, and KV is asked for between steps.
    overlap: bool = True
    report_interval: int = 10 * PS_PER_MS
    report_on_batch_change: bool = True
    max_span_steps: int = 1 << 20
    seed: int = 0
    enable_block_reuse: bool = False  # blocks of a prompt's prefix outlive it, and are shared


class RetryConfig(Struct, frozen=True):
    on_failure: str = "recompute"  # or fail
    max_attempts: int = 3


class OrchestratorConfig(Struct, frozen=True):
    """The orchestrator and its policies. A missing router means that no executor of that role exists."""

    executors: tuple[ExecutorConfig, ...]
    context_router: PolicySpec | None = None
    generation_router: PolicySpec | None = None
    mixed_router: PolicySpec | None = None
    router: PolicySpec | None = None  # one policy object for every stage, instead of the three above
    admission: PolicySpec = PolicySpec("accept_all")
    queue_order: PolicySpec = PolicySpec("fcfs")  # of requests that are held
    generation_binding: str = "at_context_done"  # or at_context_start, at_arrival: early binding
    retry: RetryConfig = RetryConfig()
    skip_context_phase: bool = False  # canned first token: benchmarks the generation phase alone
    prediction: PredictionConfig | None = None  # what policies that predict are told; None: reported step times
    seed: int = 0
    policy_root: str = "."  # where relative paths of user policies start
    roles: PolicySpec | None = None  # changes executors' roles; None: only an operator does
    migration: PolicySpec | None = None  # moves running requests between executors; None: nobody does
