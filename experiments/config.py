"""The experiment file: its keys, their types, units and defaults.

One model per mapping of the file; those of the workload are in `config_workload.py`. What a single key may hold is said
there and here; how keys must fit together (ranks, heads, memory, policies, traces) is checked in `config_checks.py`. Units
are in the keys' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from .config_keys import Count, Keys, Milliseconds, Name, Policy, PolicyChoice, Rate, Seed
from .config_workload import Workload

# MLPerf inference, p99 objectives in milliseconds: (ttft, tpot).
SLO_PRESETS: Final[dict[str, tuple[float, float]]] = {
    "llama2-70b": (2000.0, 200.0),
    "llama2-70b-interactive": (450.0, 40.0),
    "llama3.1-8b": (2000.0, 100.0),
    "llama3.1-8b-interactive": (500.0, 30.0),
    "llama3.1-405b": (6000.0, 175.0),
    "deepseek-r1": (2000.0, 80.0),
    "gpt-oss-120b": (3000.0, 80.0),
}


class Model(Keys):
    id: str = Field(min_length=1, description="a preset, a Hugging Face folder, or a config.json")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="default: the model's own")
    weights: str = Field("random", min_length=1, description="`random`, or a folder with safetensors")
    seed: Seed = Field(0, description="of random weights")


class Scheduler(Keys):
    queue_order: Policy = PolicyChoice(name="fcfs")
    batching: Policy = PolicyChoice(name="chunked_prefill")
    capacity: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    max_batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = Field(64, description="requests in one step")
    max_num_tokens: Count = Field(8192, description="tokens in one step; a decode counts one")
    chunked_context: bool = Field(True, description="off: a prompt over max_num_tokens is refused at enqueue")


class KvCache(Keys):
    tokens_per_block: Annotated[int, Field(ge=1, le=8192)] = 32
    max_tokens: Count | None = Field(None, description="KV tokens an executor holds; fixes the KV size")
    free_gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of the device memory left by the weights; 0.9 when max_tokens is not given"
    )
    enable_block_reuse: bool = Field(
        False, description="prefix caching: KV blocks outlive their request, and are shared"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("max_tokens") is None and data.get("free_gpu_memory_fraction") is None:
            data["free_gpu_memory_fraction"] = 0.9
        return data


class ExecutorKeys(Keys):
    """What the executors of a group, or one instance, may say."""

    tensor_parallel_size: Annotated[int, Field(ge=1, le=1024)] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=1024)] = 1
    layers_per_stage: list[Count] | None = Field(None, description="layers of each pipeline stage; default: even")
    scheduler: Scheduler = Field(default_factory=lambda: Scheduler.model_validate({}))
    kv_cache: KvCache = Field(default_factory=lambda: KvCache.model_validate({}))
    pipeline_depth: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="grants that may be outstanding; default: pipeline_parallel_size, at least 1, on a GPU 2"
    )
    steps_per_grant: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        1, description="decode steps that a leader may grant its ranks at once"
    )
    plan_ahead: bool | None = Field(
        None, description="make the next plan while granted steps of this one still run; default: on a GPU"
    )
    profile: str | None = Field(
        None,
        min_length=1,
        description="of these executors, where their devices are of another kind than cluster.profile's",
    )
    device_weight: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="relative speed, shown to policies")
    domain: str = Field("", max_length=200, description="topology domain, shown to policies")


class ServerGroup(ExecutorKeys):
    num_instances: Annotated[int, Field(ge=0, le=1 << 16)] = 1


def _role(value: Any) -> Any:
    return {"prefill": "context", "decode": "generation"}.get(value, value) if isinstance(value, str) else value


class Instance(ExecutorKeys):
    """One executor by itself. Ranks are those of the MPI world; rank 0 is the orchestrator's."""

    role: Annotated[Literal["context", "generation", "mixed"], BeforeValidator(_role)]
    participant_ids: list[Annotated[int, Field(ge=0, le=1 << 20)]] | None = Field(None, description="tp x pp MPI ranks")
    device_ids: list[Annotated[int, Field(ge=0, le=1 << 20)]] | None = Field(None, description="one per rank")


class CacheTransceiver(Keys):
    backend: Literal["mpi", "cuda_ipc", "host", "auto"] | None = None
    kv_transfer_timeout_ms: Milliseconds | None = Field(None, description="default: 30 s + 4 x bytes / link rate")
    pull_timeout_ms: Milliseconds = Field(
        300_000.0, description="wait of a generation phase for blocks to receive into"
    )
    on_failure: Literal["recompute", "fail"] = "recompute"
    generation_binding: Literal["at_arrival", "at_context_start", "at_context_done"] = "at_context_done"
    layerwise: bool = Field(True, description="with early binding: send KV while the context phase computes it")
    overlap: bool = Field(
        True, description="steps run while KV comes or is read; off: an executor begins none during its transfers"
    )
    lease_ms: Milliseconds = 60_000.0
    quarantine_max_blocks: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    throttle_gb_per_s: Rate | None = Field(
        None, description="cap on the rate between two executors, 1e9 bytes a second"
    )
    across_domains_gb_per_s: Rate | None = Field(
        None, description="the same between executors whose `domain` differs, where it is lower"
    )


class Cluster(Keys):
    profile: str = Field(
        "spec:h200", min_length=1, description="spec:… is a device specification; else a measured profile, or its file"
    )
    step_jitter: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="simulation only: noise of step times, as a share; `disagg profile show` says what was seen"
    )
    step_error: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0,
        description="simulation only: what step times are off all through a run, as a share; drawn once for each"
        " executor, of steps with chunks and of others",
    )
    noise_seed: Seed | None = Field(None, description="of step_jitter and step_error; default: the experiment's seed")
    context_servers: ServerGroup | None = None
    generation_servers: ServerGroup | None = None
    mixed_servers: ServerGroup | None = None
    instances: Annotated[list[Instance], Field(min_length=1, max_length=1 << 16)] | None = None
    report_interval_ms: Milliseconds = 10.0
    report_on_batch_change: bool = True
    cache_transceiver: CacheTransceiver | None = None
    skip_context_phase: bool = Field(False, description="canned first token: measures the generation phase alone")


class Policies(Keys):
    context_router: Policy | None = None
    generation_router: Policy | None = None
    mixed_router: Policy | None = None
    router: Policy | None = Field(None, description="one policy object for every stage, instead of the three above")
    admission: Policy = PolicyChoice(name="accept_all")
    queue_order: Policy = Field(PolicyChoice(name="fcfs"), description="of requests that are held")
    roles: Policy | None = Field(
        None, description="changes executors' roles while the cluster runs; default: they stay"
    )
    migration: Policy | None = Field(
        None, description="moves running requests between executors that generate; default: they stay"
    )


class Slo(Keys):
    preset: str | None = None
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    e2e_ms: Milliseconds | None = None
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.99

    def resolved(self) -> Slo:
        """The same objectives with the preset and the scale worked in: preset None, scale 1."""
        ttft, tpot = SLO_PRESETS.get(self.preset or "", (self.ttft_ms, self.tpot_ms))
        return self.model_copy(
            update={
                "preset": None,
                "scale": 1.0,
                "ttft_ms": None if ttft is None else ttft * self.scale,
                "tpot_ms": None if tpot is None else tpot * self.scale,
                "e2e_ms": None if self.e2e_ms is None else self.e2e_ms * self.scale,
            }
        )


class Sampling(Keys):
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    beam_width: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    end_id: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(
        None, description="token that ends an output on hardware; default: none, only lengths do"
    )


class PlanRouters(Keys):
    """The routers of one candidate; what is left out is least_tokens, least_kv and least_requests."""

    context_router: Policy | None = None
    generation_router: Policy | None = None
    mixed_router: Policy | None = None
    router: Policy | None = Field(None, description="one policy object for every stage, instead of the three above")


def _routers_from_name(value: Any) -> Any:
    return {"router": value} if isinstance(value, str) else value


class Plan(Keys):
    """What `disagg plan` searches. Executors take their other keys from the groups of `cluster`."""

    max_gpus: Annotated[int, Field(ge=1, le=4096)] = 8
    min_gpus: Annotated[int, Field(ge=1, le=4096)] = 1
    roles: Literal["disaggregated", "mixed", "both"] = "both"
    tensor_parallel_sizes: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)] = Field(
        [1, 2, 4, 8]
    )
    pipeline_parallel_sizes: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)] = Field([1])
    routers: (
        Annotated[
            list[Annotated[PlanRouters, BeforeValidator(_routers_from_name)]], Field(min_length=1, max_length=100)
        ]
        | None
    ) = Field(None, description="default: the file's own, and round_robin")
    mixed_max_num_tokens: Annotated[list[Count], Field(min_length=1, max_length=100)] | None = Field(
        None, description="token budgets of a step to try with mixed executors; default: that of mixed_servers, or 2048"
    )
    seeds: Annotated[int, Field(ge=1, le=1000)] = Field(5, description="repeats of the finalists, seed, seed + 1, …")
    tolerance: Annotated[float, Field(ge=0.001, le=0.5)] = Field(0.02, description="rates tried are so far apart")
    horizon_s: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="arrivals simulated at each rate; default: 5 x the longest latency that the objectives allow"
    )
    exhaustive: bool = Field(False, description="no screening: every candidate with every seed")


class ReportKeys(Keys):
    percentiles: list[Annotated[float, Field(gt=0, lt=100)]] = Field([50, 90, 95, 99])


class Experiment(Keys):
    schema_version: Literal[1]
    name: Name
    seed: Seed = 0
    model: Model
    backend: Literal["simulation", "hardware"] = "simulation"
    device: Literal["cuda", "cpu"] | None = Field(None, description="default: cpu for a cpu profile, otherwise cuda")
    cluster: Cluster
    policy: Policies
    workload: Workload
    sampling: Sampling = Field(default_factory=lambda: Sampling.model_validate({}))
    slo: Slo | None = None
    sweep: dict[str, Annotated[list[Any], Field(min_length=1, max_length=10_000)]] = Field({})
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    faults: Annotated[list[Any], Field(max_length=0)] = Field([])
    plan: Plan | None = Field(None, description="of `disagg plan`; a run does not read it")
    report: ReportKeys = Field(default_factory=lambda: ReportKeys.model_validate({}))

    _root: Path = PrivateAttr(default=Path("."))

    @property
    def root(self) -> Path:
        """Where relative paths of the file start: its folder."""
        return self._root

    @property
    def device_type(self) -> str:
        """`cuda` or `cpu`."""
        return self.device or ("cpu" if self.cluster.profile.startswith(("spec:cpu", "cpu-")) else "cuda")

    def expanded(self) -> dict[str, Any]:
        """The file with every default written out, as plain values; it loads to an equal experiment."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        plain["device"] = self.device_type
        return plain


def json_schema() -> dict[str, Any]:
    """JSON Schema of the experiment file."""
    schema = Experiment.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "disagg experiment"
    return schema


def validate_mapping(data: Mapping[str, Any], keys_by_id: dict[int, list[str]]) -> Experiment:
    """Validate plain values. Raises pydantic's ValidationError; `keys_by_id` learns which keys each mapping may have."""
    return Experiment.model_validate(data, context=keys_by_id)
