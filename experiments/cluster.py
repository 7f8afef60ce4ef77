"""From an experiment file to the cluster both worlds build: executors, their ranks and devices, their KV blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from ..core.config import (
    ExecutorConfig,
    OrchestratorConfig,
    PolicySpec,
    RetryConfig,
    SchedulerConfig,
)
from ..core.devices import DEVICES, Device
from ..core.kv_layout import KvLayout
from ..core.model_shapes import PRESETS, ModelError, ModelShape, preset, shape_from_hf_config
from ..policies.vocabulary import PS_PER_MS, PS_PER_S, Role
from .config import Cluster, ExecutorKeys, Experiment, Instance
from .config_keys import PolicyChoice
from .errors import ConfigError, ResourceError, did_you_mean
from .measured_profile import LinkEntry, Profile, find_engine, find_link, shape_hash
from .predictions import prediction_of
from .profile_file import SPEC_PREFIX, is_path, load_profile, profile_path, shipped_profiles
from .weights_checks import check_same_shape, check_tensors

TRANSFER_TIMEOUT_FLOOR: Final = 30 * PS_PER_S
TRANSFER_TIMEOUT_FACTOR: Final = 4  # times the ideal time of the bytes
_MOST_CONFIG_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Placement:
    """Where one executor lives. `participant_ids` are ranks of the MPI world (the first leads), `device_ids` theirs."""

    id: int  # as in ExecutorConfig: from 1
    role: Role
    participant_ids: tuple[int, ...]
    device_ids: tuple[int, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    layers_per_stage: tuple[int, ...]
    pipeline_depth: int
    steps_per_grant: int
    plan_ahead: bool
    keys: ExecutorKeys  # the part of the file that made it
    path: tuple[str | int, ...]  # where that part stands in the file


# ---- the model and the device ---------------------------------------------------------------------------------------


def shape_of(config: Experiment) -> ModelShape:
    """The model's shape from a preset, a Hugging Face folder or a config.json. Raises ModelError."""
    name = config.model.id
    if name in PRESETS:
        return preset(name, config.model.dtype)
    path = config.root / name
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ModelError(
            f"unknown model '{name}'{did_you_mean(name, PRESETS)} (presets: {', '.join(sorted(PRESETS))};"
            f" or a folder with a config.json: there is no {path})"
        )
    return _read_shape(path, name, config.model.dtype, path.stat().st_mtime_ns)


def check_weights(config: Experiment) -> None:
    """ModelError for a folder of weights that does not hold the model named by `model.id`; reads headers only."""
    if config.model.weights == "random":
        return
    folder = config.root / config.model.weights
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; allowed: random, or a folder with safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"there is no {path}, which says what model the weights are")
    shape = shape_of(config)
    found = _read_shape(path, str(folder), config.model.dtype, path.stat().st_mtime_ns)
    check_same_shape(shape, found, config.model.id, folder)
    check_tensors(shape, folder.resolve())


@lru_cache(maxsize=64)
def _read_shape(path: Path, name: str, dtype: str | None, mtime_ns: int) -> ModelShape:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_CONFIG_BYTES + 1)
        if len(raw) > _MOST_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {_MOST_CONFIG_BYTES} bytes")
        values = json.loads(raw)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return shape_from_hf_config(values, Path(name).name, dtype)


def profile_name(config: Experiment, keys: ExecutorKeys | None = None) -> str:
    """What `cluster.profile` names, or, of these executors, their own `profile` where they have one."""
    return config.cluster.profile if keys is None or keys.profile is None else keys.profile


def device_of(config: Experiment, keys: ExecutorKeys | None = None) -> Device:
    """The device that a profile names, the cluster's or that of these executors: a specification, or what it was measured on.

    Raises ConfigError listing what there is, or saying what the profile was measured for if that is something else.
    """
    name = profile_name(config, keys)
    if name.startswith(SPEC_PREFIX):
        known = [f"{SPEC_PREFIX}{device}" for device in DEVICES]
        if name not in known:
            allowed = [*known, *shipped_profiles()]
            raise ConfigError(f"unknown profile '{name}'{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})")
        if (
            keys is not None
            and keys.profile is not None
            and name.startswith("spec:cpu") != (config.device_type == "cpu")
        ):
            raise ConfigError(
                f"profile {name} is of another device type than the cluster, which is of {config.device_type}"
            )
        return DEVICES[name.removeprefix(SPEC_PREFIX)]
    profile = profile_of(config, keys)
    if profile is None:
        raise ConfigError(f"unknown profile '{name}'")
    return profile.device


def kinds_of(config: Experiment) -> dict[str | None, tuple[Device, Profile | None]]:
    """Device and measured profile by the `profile` that executors give, None for those that give none."""
    given = {keys.profile: keys for _, keys, _ in executor_groups(config.cluster)}
    return {name: (device_of(config, keys), profile_of(config, keys)) for name, keys in given.items()}


def profile_of(config: Experiment, keys: ExecutorKeys | None = None) -> Profile | None:
    """The measured profile that the cluster, or these executors, name; None for a specification.

    Raises ConfigError if there is none of that name, or one that was measured for something else.
    """
    name = profile_name(config, keys)
    if name.startswith(SPEC_PREFIX):
        return None
    if not is_path(name) and name not in shipped_profiles():
        allowed = [*(f"{SPEC_PREFIX}{device}" for device in DEVICES), *shipped_profiles()]
        raise ConfigError(
            f"unknown profile '{name}'{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)}, or a path)"
        )
    profile = load_profile(profile_path(name, config.root))
    _check_profile(profile, config, name)
    return profile


def _check_profile(profile: Profile, config: Experiment, name: str) -> None:
    """ConfigError with what the profile was measured for, unless that is what this experiment's executors of that name are."""
    for_ = profile.measured_for
    if for_.device_type != config.device_type:
        raise ConfigError(
            f"profile {profile.name} was measured for device: {for_.device_type} ({for_.device_name}), not {config.device_type}"
        )
    shape = shape_of(config)
    if for_.dtype != shape.dtype or for_.shape_hash != shape_hash(shape):
        other = "" if for_.model != shape.name else ", of another shape"
        raise ConfigError(
            f"profile {profile.name} was measured for {for_.model} in {for_.dtype}, not {shape.name} in {shape.dtype}{other}"
        )
    kinds: dict[tuple[bool, Role, int, int], None] = {}  # whether it is of this profile, and what it is
    for role, keys, _ in executor_groups(config.cluster):
        tp, pp = keys.tensor_parallel_size, keys.pipeline_parallel_size
        is_ours = profile_name(config, keys) == name
        kinds[is_ours, role, tp, pp] = None
        if not is_ours:
            continue
        entry = find_engine(profile, role.value, tp, pp)
        if entry.tokens_per_block != keys.kv_cache.tokens_per_block:
            raise ConfigError(
                f"profile {profile.name} was measured for KV blocks of {entry.tokens_per_block} tokens,"
                f" not {keys.kv_cache.tokens_per_block}"
            )
        layers = KvLayout.of(shape, tp, pp, keys.layers_per_stage).layers_per_stage
        if layers != entry.layers_per_stage:
            raise ConfigError(
                f"profile {profile.name} was measured for layers_per_stage {list(entry.layers_per_stage)}, not {list(layers)}"
            )
    for source_is_ours, source_role, *source in kinds:
        for reader_is_ours, reader_role, *reader in kinds:
            if not source_is_ours and not reader_is_ours:
                continue
            moves = config.policy.migration is not None and Role.CONTEXT not in (source_role, reader_role)
            if (
                config.policy.roles is not None
                or moves
                or (source_role is Role.CONTEXT and reader_role is not Role.CONTEXT)
            ):
                link_of(profile, config, (*source, *reader))


def link_of(profile: Profile, config: Experiment, layouts: Sequence[int]) -> LinkEntry:
    """The link between executors of these (tp, pp of the source, of the reader). Raises ConfigError if none fits."""
    transceiver = config.cluster.cache_transceiver
    backend = None if transceiver is None else transceiver.backend
    return find_link(profile, backend, layouts, None if transceiver is None else transceiver.throttle_gb_per_s)


# ---- executors ------------------------------------------------------------------------------------------------------


def placements_of(config: Experiment) -> tuple[Placement, ...]:
    """All executors in order of id: instances as listed; else context, generation and mixed servers, ranks from 1.

    Raises ModelError for a parallelism that does not fit the model. Ranks that intersect are found by the checks.
    """
    shape = shape_of(config)
    placements: list[Placement] = []
    next_rank = 1
    least_depth = 2 if config.device_type == "cuda" else 1  # a GPU finds its next step launched when it ends one
    for role, keys, path in executor_groups(config.cluster):
        tp, pp = keys.tensor_parallel_size, keys.pipeline_parallel_size
        ranks = tuple(range(next_rank, next_rank + tp * pp))
        devices: tuple[int, ...] | None = None
        if isinstance(keys, Instance):
            ranks = ranks if keys.participant_ids is None else tuple(keys.participant_ids)
            devices = None if keys.device_ids is None else tuple(keys.device_ids)
        next_rank = max((next_rank - 1, *ranks)) + 1
        layout = KvLayout.of(shape, tp, pp, keys.layers_per_stage)
        placements.append(
            Placement(
                id=len(placements) + 1,
                role=role,
                participant_ids=ranks,
                device_ids=tuple(rank - 1 for rank in ranks) if devices is None else devices,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                layers_per_stage=layout.layers_per_stage,
                pipeline_depth=keys.pipeline_depth or max(least_depth, pp),
                steps_per_grant=keys.steps_per_grant,
                plan_ahead=config.device_type == "cuda" if keys.plan_ahead is None else keys.plan_ahead,
                keys=keys,
                path=path,
            )
        )
    return tuple(placements)


def executor_groups(cluster: Cluster) -> list[tuple[Role, ExecutorKeys, tuple[str | int, ...]]]:
    """Role, keys and place in the file of each executor, one entry per executor."""
    if cluster.instances is not None:
        return [
            (Role(keys.role), keys, ("cluster", "instances", number)) for number, keys in enumerate(cluster.instances)
        ]
    found: list[tuple[Role, ExecutorKeys, tuple[str | int, ...]]] = []
    for role in (Role.CONTEXT, Role.GENERATION, Role.MIXED):
        name = f"{role.value}_servers"
        group = getattr(cluster, name)
        if group is not None:
            found += [(role, group, ("cluster", name))] * group.num_instances
    return found


def world_size(config: Experiment) -> int:
    """Ranks of the MPI world in orchestrator mode: rank 0 and every executor's."""
    return 1 + max(max(placement.participant_ids) for placement in placements_of(config))


def num_blocks_of(keys: ExecutorKeys, shape: ModelShape, device: Device) -> int:
    """KV blocks of one executor: given by `max_tokens`, else what its tightest rank can hold beside its weights.

    Raises ModelError for a parallelism that does not fit the model, ResourceError when not even one block fits.
    """
    cache = keys.kv_cache
    KvLayout.of(shape, keys.tensor_parallel_size, keys.pipeline_parallel_size, keys.layers_per_stage)
    if cache.max_tokens is not None:
        num_blocks = cache.max_tokens // cache.tokens_per_block
        if num_blocks < 1:
            raise ResourceError(f"max_tokens {cache.max_tokens} is less than one block of {cache.tokens_per_block}")
        return num_blocks
    return blocks_beside_weights(keys, shape, device, cache.free_gpu_memory_fraction or 0.9)


def blocks_beside_weights(keys: ExecutorKeys, shape: ModelShape, device: Device, fraction: float) -> int:
    """KV blocks that fit into `fraction` of what the weights leave of the tightest rank's memory.

    A rank holds its share of the layers' weights, and of the embedding and the head, split by tp. Raises
    ResourceError when the weights do not fit or not even one block does.
    """
    cache = keys.kv_cache
    tp, pp = keys.tensor_parallel_size, keys.pipeline_parallel_size
    layout = KvLayout.of(shape, tp, pp, keys.layers_per_stage)
    table_bytes = shape.vocab_size * shape.hidden_size * shape.dtype_bytes
    least: int | None = None
    for stage, num_layers in enumerate(layout.layers_per_stage):
        tables = int(stage == 0) + int(stage == pp - 1 and not (shape.tie_word_embeddings and pp == 1))
        weights = (num_layers * shape.num_layer_parameters * shape.dtype_bytes + tables * table_bytes) // tp
        free = device.memory_bytes - weights
        if free <= 0:
            raise ResourceError(
                f"{shape.name} needs {weights / 1e9:.1f} GB of weights on each device of stage {stage} and {device.name}"
                f" has {device.memory_bytes / 1e9:.1f} GB; raise tensor_parallel_size or pipeline_parallel_size"
            )
        block_bytes = layout.kv_bytes_per_token(stage * tp, shape.dtype_bytes) * cache.tokens_per_block
        blocks = int(free * fraction) // block_bytes
        least = blocks if least is None else min(least, blocks)
    if not least:
        raise ResourceError(f"no KV block of {cache.tokens_per_block} tokens fits beside the weights of {shape.name}")
    return least


# ---- what the core is made from -------------------------------------------------------------------------------------


def cluster_of(config: Experiment) -> OrchestratorConfig:
    """The cluster that both worlds build. Raises ConfigError, ResourceError or ModelError."""
    shape = shape_of(config)
    cluster = config.cluster
    transceiver = cluster.cache_transceiver
    kinds = kinds_of(config)
    base, per_token = _transfer_timeout(config, shape, [device for device, _ in kinds.values()])
    executors = []
    for placement in placements_of(config):
        keys = placement.keys
        executor = ExecutorConfig(
            id=placement.id,
            role=placement.role,
            num_blocks=num_blocks_of(keys, shape, kinds[keys.profile][0]),
            tokens_per_block=keys.kv_cache.tokens_per_block,
            scheduler=SchedulerConfig(
                queue_order=spec_of(keys.scheduler.queue_order),
                batching=spec_of(keys.scheduler.batching),
                capacity=keys.scheduler.capacity,
                max_batch_size=keys.scheduler.max_batch_size,
                max_num_tokens=keys.scheduler.max_num_tokens,
                chunked_context=keys.scheduler.chunked_context,
            ),
            tensor_parallel_size=placement.tensor_parallel_size,
            pipeline_parallel_size=placement.pipeline_parallel_size,
            device_weight=keys.device_weight,
            domain=keys.domain,
            lease=picoseconds(transceiver.lease_ms) if transceiver else 60 * PS_PER_S,
            transfer_timeout_base=base,
            transfer_timeout_per_token=per_token,
            pull_timeout=picoseconds(transceiver.pull_timeout_ms) if transceiver else 300 * PS_PER_S,
            layerwise=transceiver.layerwise if transceiver else True,
            overlap=transceiver.overlap if transceiver else True,
            quarantine_max_blocks=transceiver.quarantine_max_blocks if transceiver else None,
            report_interval=picoseconds(cluster.report_interval_ms),
            report_on_batch_change=cluster.report_on_batch_change,
            seed=config.seed,
            enable_block_reuse=keys.kv_cache.enable_block_reuse,
        )
        executors.append(executor)
    policy = config.policy
    roles = set(Role) if policy.roles is not None else {executor.role for executor in executors}
    return OrchestratorConfig(
        executors=tuple(executors),
        context_router=_router(policy.context_router, Role.CONTEXT in roles),
        # without generation executors mixed ones go on where a context executor ended
        generation_router=_router(
            policy.generation_router, bool(roles & {Role.GENERATION, Role.CONTEXT}) or policy.migration is not None
        ),
        mixed_router=_router(policy.mixed_router, Role.MIXED in roles),
        router=_router(policy.router, True),
        admission=spec_of(policy.admission),
        queue_order=spec_of(policy.queue_order),
        generation_binding=transceiver.generation_binding if transceiver else "at_context_done",
        retry=RetryConfig(on_failure=transceiver.on_failure if transceiver else "recompute"),
        skip_context_phase=cluster.skip_context_phase,
        prediction=prediction_of(config, tuple(executors), shape.kv_bytes_per_token),
        seed=config.seed,
        policy_root=str(config.root),
        roles=None if policy.roles is None else spec_of(policy.roles),
        migration=None if policy.migration is None else spec_of(policy.migration),
    )


def spec_of(choice: PolicyChoice) -> PolicySpec:
    return PolicySpec(choice.name, choice.params)


def picoseconds(milliseconds: float) -> int:
    return round(milliseconds * PS_PER_MS)


def _router(choice: PolicyChoice | None, wanted: bool) -> PolicySpec | None:
    return spec_of(choice) if choice is not None and wanted else None


def _transfer_timeout(config: Experiment, shape: ModelShape, devices: Sequence[Device]) -> tuple[int, int]:
    """(base, per token) in picoseconds: the time given, or 30 s + 4 × bytes over the slowest link's rate."""
    transceiver = config.cluster.cache_transceiver
    if transceiver is not None and transceiver.kv_transfer_timeout_ms is not None:
        return picoseconds(transceiver.kv_transfer_timeout_ms), 0
    rate = min(device.link_bandwidth * device.link_efficiency for device in devices)
    for throttle in () if transceiver is None else (transceiver.throttle_gb_per_s, transceiver.across_domains_gb_per_s):
        if throttle is not None:
            rate = min(rate, throttle * 1e9)
    return TRANSFER_TIMEOUT_FLOOR, round(TRANSFER_TIMEOUT_FACTOR * shape.kv_bytes_per_token / rate * PS_PER_S)
