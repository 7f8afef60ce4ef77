"""What a real cluster is made from, and who is who in its MPI world. Values, checked before any process starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ..core.commands import ORCHESTRATOR
from ..core.config import ExecutorConfig, OrchestratorConfig
from ..core.kv_layout import KvLayout
from ..core.model_shapes import ModelShape
from ..core.prefix_names import token_hashes
from ..policies.vocabulary import Request, Role
from .launcher import LaunchError
from .transport import NOT_ENABLED, TransportError, check_backend

EXIT_CONFIGURATION: Final = 2


class SpecError(ValueError):
    """A cluster that cannot be built as described; the text says what is allowed."""

    exit_code: Final = EXIT_CONFIGURATION


class DeviceError(LaunchError):
    """A device that is not here, or memory that it does not have."""


class ModelSource(Struct, frozen=True):
    """`folder`: a Hugging Face folder with weights. Otherwise `shape`, with random weights drawn from `seed`."""

    shape: ModelShape | None = None
    folder: str | None = None
    dtype: str | None = None
    seed: int = 0

    def read(self) -> ModelShape:
        """The model's shape. Raises ModelError or SpecError."""
        if self.folder is not None:
            from .weights import read_shape

            return read_shape(Path(self.folder), dtype=self.dtype)
        if self.shape is None:
            raise SpecError("a model needs a folder, or a shape for random weights")
        return self.shape


class Placement(Struct, frozen=True):
    """Where one executor lives: MPI ranks (the first leads), pipeline rank · tp + tensor rank, and their devices."""

    executor: int
    participant_ids: tuple[int, ...]
    device_ids: tuple[int, ...] = ()
    layers_per_stage: tuple[int, ...] | None = None
    steps_per_grant: int = 1
    pipeline_depth: int = 1
    plan_ahead: bool = False  # make the next plan while the last granted steps of this one still run
    free_gpu_memory_fraction: float | None = None  # on a GPU the KV takes so much of what is left; None: num_blocks


class HardwareSpec(Struct, frozen=True):
    """`leader_mode`: no orchestrator rank; participant ids then start from 0. `transport`: a backend by name.

    `verify_kv`: checksums of every transferred (layer, KV head, block) at both ends. `record_margins`: top-1 minus
    top-2 logit of every sampled row (for tests). `workload_names_blocks`: where blocks are reused, the `block_hashes` that
    requests come with are true, and what is generated has no names, as in simulation; else blocks are named by their tokens.
    """

    orchestrator: OrchestratorConfig
    model: ModelSource
    placements: tuple[Placement, ...]
    transport: str | None = None
    device: str = "cpu"
    leader_mode: bool = False
    verify_kv: bool = False
    record_margins: bool = False
    silence_limit_s: float = 30.0
    throttle_gb_per_s: float | None = None  # of KV between two executors, in each direction
    workload_names_blocks: bool = False
    across_domains_gb_per_s: float | None = None  # the same between executors of different domains, where it is lower


@dataclass(frozen=True)
class Roster:
    """Who is who. Ranks are those of the MPI world; executors are numbered from 1, 0 is the orchestrator."""

    spec: HardwareSpec
    shape: ModelShape
    configs: dict[int, ExecutorConfig]
    placements: dict[int, Placement]
    layouts: dict[int, KvLayout]
    executor_of: dict[int, int]  # rank: executor

    @property
    def num_ranks(self) -> int:
        return len(self.executor_of) + (not self.spec.leader_mode)

    def with_config(self, config: ExecutorConfig) -> Roster:
        """The same cluster with another configuration of one executor, as it turned out when it was built."""
        configs = self.configs | {config.id: config}
        orchestrator = replace(self.spec.orchestrator, executors=tuple(configs.values()))
        return dataclass_replace(self, spec=replace(self.spec, orchestrator=orchestrator), configs=configs)

    @property
    def reuses_blocks(self) -> bool:
        """Whether any executor does."""
        return any(config.enable_block_reuse for config in self.configs.values())

    def named(self, request: Request) -> Request:
        """The request as executors are to see it: its blocks named by their tokens, where names are wanted."""
        if self.spec.workload_names_blocks or not self.reuses_blocks:
            return request
        size = next(config.tokens_per_block for config in self.configs.values() if config.enable_block_reuse)
        return replace(request, block_hashes=token_hashes(request.input_token_ids or (), size))

    def leader_of(self, executor: int) -> int:
        return self.placements[executor].participant_ids[0]

    def core_of(self, rank: int) -> int:
        """The rank in messages of whoever speaks from MPI rank `rank`."""
        return self.executor_of.get(rank, ORCHESTRATOR)

    def device_of(self, rank: int) -> str:
        placement = self.placements[self.executor_of[rank]]
        if self.spec.device == "cpu" or not placement.device_ids:
            return self.spec.device
        return f"{self.spec.device}:{placement.device_ids[placement.participant_ids.index(rank)]}"

    def devices_on(self, host: str, hosts: Sequence[str]) -> tuple[int, ...]:
        """The devices that ranks on `host` take; `hosts` by rank. Empty where they are not named."""
        found = set()
        for rank in self.executor_of:
            _, _, index = self.device_of(rank).partition(":")
            if index and hosts[rank] == host:
                found.add(int(index))
        return tuple(sorted(found))


def check_spec(spec: HardwareSpec) -> Roster:
    """The roster of `spec`. Raises SpecError, TransportError or ModelError."""
    configs = {config.id: config for config in spec.orchestrator.executors}
    if not configs or len(configs) != len(spec.orchestrator.executors):
        raise SpecError(f"executor ids {[c.id for c in spec.orchestrator.executors]}: at least one, each once")
    placements = {placement.executor: placement for placement in spec.placements}
    if placements.keys() != configs.keys() or len(placements) != len(spec.placements):
        raise SpecError(
            f"placements are of executors {sorted(p.executor for p in spec.placements)}, but the executors are "
            f"{sorted(configs)}; each needs exactly one"
        )
    sizes = sorted({config.tokens_per_block for config in configs.values()})
    if len(sizes) > 1 and any(config.enable_block_reuse for config in configs.values()):
        raise SpecError(
            f"enable_block_reuse with tokens_per_block {sizes}; allowed with it: one size for all executors"
        )
    _check_transport(spec)
    executor_of = _check_participants(spec, configs)
    shape = spec.model.read()
    layouts = {}
    for executor, config in configs.items():
        placement = placements[executor]
        tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
        if len(placement.participant_ids) != tp * pp:
            raise SpecError(
                f"executor {executor} has {len(placement.participant_ids)} participant_ids; allowed: exactly "
                f"tensor_parallel_size {tp} · pipeline_parallel_size {pp} = {tp * pp}"
            )
        if placement.device_ids and len(placement.device_ids) != len(placement.participant_ids):
            raise SpecError(f"executor {executor} has {len(placement.device_ids)} device_ids for {tp * pp} ranks")
        if placement.steps_per_grant < 1 or placement.pipeline_depth < 1:
            raise SpecError(f"executor {executor}: steps_per_grant and pipeline_depth must be at least 1")
        layouts[executor] = KvLayout.of(shape, tp, pp, placement.layers_per_stage)
    return Roster(spec, shape, configs, placements, layouts, executor_of)


def _check_transport(spec: HardwareSpec) -> None:
    orchestrator = spec.orchestrator
    changes = orchestrator.roles is not None or orchestrator.migration is not None
    hands_over = changes or any(e.role is not Role.MIXED for e in orchestrator.executors)
    if spec.transport is None and hands_over:
        raise TransportError(NOT_ENABLED)
    if spec.transport is not None and check_backend(spec.transport) == "cuda_ipc" and spec.device == "cpu":
        raise TransportError("cuda_ipc needs device: cuda, not cpu; allowed here: mpi, host, auto")
    for name in ("throttle_gb_per_s", "across_domains_gb_per_s"):
        throttle = getattr(spec, name)
        if throttle is not None and not 0 < throttle < float("inf"):
            raise TransportError(f"{name} {throttle:g} must be positive")


def _check_participants(spec: HardwareSpec, configs: dict[int, ExecutorConfig]) -> dict[int, int]:
    first = 0 if spec.leader_mode else 1
    executor_of: dict[int, int] = {}
    for placement in spec.placements:
        for rank in placement.participant_ids:
            if rank < first:
                raise SpecError(f"executor {placement.executor}: rank {rank} belongs to the orchestrator, or to nobody")
            if rank in executor_of:
                raise SpecError(
                    f"participant_ids intersect: rank {rank} belongs to executors {executor_of[rank]} and "
                    f"{placement.executor}; each rank may belong to one"
                )
            executor_of[rank] = placement.executor
    allowed = range(first, first + len(executor_of))
    if set(executor_of) != set(allowed):
        raise SpecError(
            f"participant_ids {sorted(executor_of)} leave ranks without an executor; allowed: all of "
            f"{allowed.start} to {allowed.stop - 1}, each once"
        )
    return executor_of
