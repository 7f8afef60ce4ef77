"""What no single key can say: whether the keys of an experiment fit together, and whether what they name exists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

from ..core.devices import Device
from ..core.model_shapes import ModelError, ModelShape
from ..policies.interfaces import PolicyError
from ..policies.registry import create, load
from ..policies.vocabulary import Stage
from .cluster import (
    Placement,
    blocks_beside_weights,
    check_weights,
    device_of,
    executor_groups,
    num_blocks_of,
    placements_of,
    shape_of,
)
from .config import SLO_PRESETS, ExecutorKeys, Experiment
from .config_keys import PolicyChoice
from .config_workload import ConcurrencyPhase, SyntheticDataset, TracePhase
from .errors import ConfigError, ResourceError, did_you_mean
from .role_checks import check_roles
from .workload import declared_max_tokens, phase_counts

NOT_ENABLED = "Disaggregated serving is not enabled, please check the configuration"
MOST_REQUESTS_ON_HARDWARE: Final = 200_000
LONGEST_PHASE_S: Final = 30 * 86_400  # tables count picoseconds in 64 bits, which is 106 days


class Problem(NamedTuple):
    """Something wrong at `path`. A `resource` problem means a well-formed file that does not fit the machine."""

    path: tuple[str | int, ...]
    message: str
    severity: Literal["error", "resource", "warning"] = "error"


def check_experiment(config: Experiment) -> list[Problem]:
    """Every problem of a validated experiment, in the order of the file's sections."""
    problems = [*_unavailable(config), *_roles(config), *_policies(config), *_workload(config)]
    problems += _cluster(config)
    return problems


# ---- what does not exist yet, or never will -------------------------------------------------------------------------


def _unavailable(config: Experiment) -> Iterator[Problem]:
    if config.sampling.beam_width > 1:
        yield Problem(
            ("sampling", "beam_width"), f"beam width {config.sampling.beam_width} is not supported; allowed: 1"
        )
    transceiver = config.cluster.cache_transceiver
    if transceiver is not None and transceiver.backend == "cuda_ipc" and config.device_type != "cuda":
        yield Problem(
            ("cluster", "cache_transceiver", "backend"),
            f"cuda_ipc needs device: cuda, not {config.device_type}; allowed here: mpi, host, auto",
        )
    if transceiver is not None and not transceiver.overlap and transceiver.layerwise:
        if transceiver.generation_binding != "at_context_done":
            yield Problem(
                ("cluster", "cache_transceiver", "overlap"),
                "off, and KV would be sent while the context phase computes it; allowed: layerwise: false, or"
                " generation_binding: at_context_done",
            )
    slo = config.slo
    if slo is not None:
        if slo.preset is not None and slo.preset not in SLO_PRESETS:
            hint = did_you_mean(slo.preset, SLO_PRESETS)
            yield Problem(("slo", "preset"), f"unknown preset '{slo.preset}'{hint} (allowed: {', '.join(SLO_PRESETS)})")
        if slo.preset is not None and (slo.ttft_ms is not None or slo.tpot_ms is not None):
            yield Problem(("slo",), "preset excludes ttft_ms and tpot_ms; allowed: one or the other")


# ---- executors ------------------------------------------------------------------------------------------------------


def _roles(config: Experiment) -> Iterator[Problem]:
    cluster = config.cluster
    named = [n for n in ("context_servers", "generation_servers", "mixed_servers") if getattr(cluster, n) is not None]
    if cluster.instances is not None and named:
        yield Problem(("cluster", named[0]), f"instances excludes {', '.join(named)}; allowed: one way or the other")
        return
    roles = {role.value for role, _, _ in executor_groups(cluster)}
    if not roles:
        yield Problem(
            ("cluster",),
            "there are no executors; allowed: context_servers and generation_servers, mixed_servers, or instances",
        )
        return
    if "context" in roles and not roles & {"generation", "mixed"}:
        yield Problem(
            ("cluster",), "context servers without generation servers; allowed: add generation_servers or mixed_servers"
        )
    if "generation" in roles and not roles & {"context", "mixed"}:
        yield Problem(
            ("cluster",), "generation servers without context servers; allowed: add context_servers or mixed_servers"
        )
    transceiver = cluster.cache_transceiver
    travels = roles != {"mixed"} or config.policy.roles is not None or config.policy.migration is not None
    if travels and (transceiver is None or transceiver.backend is None):
        yield Problem(
            ("cluster", "cache_transceiver", "backend"),
            f"{NOT_ENABLED}: no cache transceiver backend is given and KV must travel between executors"
            " (allowed: cluster.cache_transceiver: {backend: mpi | cuda_ipc | host | auto})",
        )
    across = None if transceiver is None else transceiver.across_domains_gb_per_s
    if across is not None and len({keys.domain for _, keys, _ in executor_groups(cluster)}) < 2:
        yield Problem(
            ("cluster", "cache_transceiver", "across_domains_gb_per_s"),
            "has no effect: all executors are of one domain; allowed with it: executors whose `domain` differs",
            "warning",
        )
    yield from _routers(config, roles)


def _routers(config: Experiment, roles: set[str]) -> Iterator[Problem]:
    policy = config.policy
    own = {role: f"{role}_router" for role in ("context", "generation", "mixed")}
    given = [name for name in own.values() if getattr(policy, name) is not None]
    if policy.router is not None:
        if given:
            yield Problem(("policy", given[0]), f"router excludes {', '.join(given)}; allowed: one way or the other")
        return
    changes = policy.roles is not None  # then any executor may come to serve any phase
    for role, name in own.items():
        needed = role in roles and not (role == "mixed" and "context" in roles)
        if changes and role != "mixed" and getattr(policy, name) is None:
            yield Problem(
                ("policy", name), "required key is missing: policy.roles may give any role (or give policy.router)"
            )
            continue
        if changes:
            continue
        others = {"context", "mixed"} if policy.migration is None else {"mixed"}
        takes_over = role == "generation" and others <= roles  # mixed executors go on where others began
        if (needed or takes_over) and getattr(policy, name) is None:
            why = f"there are {role} servers" if needed else "mixed servers generate after other servers"
            yield Problem(("policy", name), f"required key is missing: {why} (or give policy.router)")
        if role not in roles and not takes_over and getattr(policy, name) is not None:
            yield Problem(("policy", name), f"has no effect: there are no {role} servers", "warning")


def _cluster(config: Experiment) -> list[Problem]:
    problems: list[Problem] = []
    try:
        device = device_of(config)
    except ModelError:  # told below
        device = None
    except ConfigError as error:
        device = None
        problems.append(Problem(("cluster", "profile"), str(error)))
    try:
        shape = shape_of(config)
    except ModelError as error:
        return [*problems, Problem(("model", "id"), str(error))]
    try:
        check_weights(config)
    except ModelError as error:
        problems.append(Problem(("model", "weights"), str(error)))
    devices: dict[str | None, Device | None] = {None: device}  # by the profile that executors give
    seen: set[tuple[str | int, ...]] = set()
    for _, keys, path in executor_groups(config.cluster):
        if path in seen:
            continue
        seen.add(path)
        cache = keys.kv_cache
        if cache.max_tokens is not None and cache.free_gpu_memory_fraction is not None:
            problems.append(
                Problem((*path, "kv_cache"), "max_tokens and free_gpu_memory_fraction exclude each other; allowed: one")
            )
        scheduler = keys.scheduler
        if scheduler.max_num_tokens < scheduler.max_batch_size:
            problems.append(
                Problem(
                    (*path, "scheduler", "max_num_tokens"),
                    f"{scheduler.max_num_tokens} is less than max_batch_size {scheduler.max_batch_size}: a step could not"
                    " run a full decode batch; allowed: at least max_batch_size",
                )
            )
        if cache.enable_block_reuse:
            sizes = {other.kv_cache.tokens_per_block for _, other, _ in executor_groups(config.cluster)}
            if len(sizes) > 1:
                problems.append(
                    Problem(
                        (*path, "kv_cache", "enable_block_reuse"),
                        f"blocks are found by hashes of equal blocks, and the executors' tokens_per_block are"
                        f" {sorted(sizes)}; allowed with true: one tokens_per_block for all executors",
                    )
                )
        if keys.profile not in devices:
            try:
                devices[keys.profile] = device_of(config, keys)
            except ConfigError as error:
                problems.append(Problem((*path, "profile"), str(error)))
                devices[keys.profile] = None
        its_device = devices[keys.profile]
        if its_device is None:
            continue
        try:
            num_blocks = num_blocks_of(keys, shape, its_device)
            problems += _kv_beside_weights(keys, shape, its_device, num_blocks, path)
        except ModelError as error:
            key = "layers_per_stage" if "layers_per_stage" in str(error).split(" ")[0] else _parallel_key(str(error))
            problems.append(Problem((*path, key), str(error)))
        except ResourceError as error:
            problems.append(Problem((*path, "kv_cache"), str(error), "resource"))
        except ConfigError as error:
            problems.append(Problem((*path, "kv_cache"), str(error)))
    try:
        placements = placements_of(config)
    except ModelError as error:
        if not any(problem.message == str(error) for problem in problems):
            problems.append(Problem(("cluster",), str(error)))
        return problems
    return [*problems, *_participants(config, placements)]


def _kv_beside_weights(
    keys: ExecutorKeys, shape: ModelShape, device: Device, num_blocks: int, path: tuple[str | int, ...]
) -> Iterator[Problem]:
    """A warning for a `max_tokens` that the device cannot hold: a simulation may ask what more memory would bring."""
    if keys.kv_cache.max_tokens is None:
        return
    where = (*path, "kv_cache", "max_tokens")
    try:
        fitting = blocks_beside_weights(keys, shape, device, 1.0)
    except ResourceError as error:
        yield Problem(where, str(error), "warning")
        return
    if num_blocks > fitting:
        yield Problem(
            where,
            f"{keys.kv_cache.max_tokens} KV tokens are more than {device.name} has memory for beside the weights"
            f" ({fitting * keys.kv_cache.tokens_per_block})",
            "warning",
        )


def _parallel_key(message: str) -> str:
    return "pipeline_parallel_size" if message.startswith("pipeline") else "tensor_parallel_size"


def _participants(config: Experiment, placements: tuple[Placement, ...]) -> Iterator[Problem]:
    instances = config.cluster.instances or []
    stated = [instance.participant_ids is not None for instance in instances]
    if any(stated) and not all(stated):
        yield Problem(
            ("cluster", "instances", stated.index(False)),
            "participant_ids must be given for every instance or for none",
        )
        return
    rank_of: dict[int, int] = {}
    device_user: dict[int, int] = {}
    for placement in placements:
        size = placement.tensor_parallel_size * placement.pipeline_parallel_size
        path = (*placement.path, "participant_ids")
        if len(placement.participant_ids) != size:
            yield Problem(
                path,
                f"{len(placement.participant_ids)} ranks for tensor_parallel_size {placement.tensor_parallel_size} x"
                f" pipeline_parallel_size {placement.pipeline_parallel_size}; allowed: {size}",
            )
        if len(placement.device_ids) != len(placement.participant_ids):
            yield Problem(
                (*placement.path, "device_ids"),
                f"{len(placement.device_ids)} devices for {len(placement.participant_ids)} ranks; allowed: one per rank",
            )
        for rank in placement.participant_ids:
            if rank == 0:
                yield Problem(path, "rank 0 is the orchestrator's; allowed: ranks from 1")
            elif rank in rank_of:
                pair = (
                    f"{rank_of[rank]} and {placement.id}" if rank_of[rank] != placement.id else f"{placement.id} twice"
                )
                text = "two executors share" if rank_of[rank] != placement.id else "one executor names twice"
                yield Problem(
                    path, f"{text} rank {rank} (executors {pair}); allowed: participant_ids that are disjoint"
                )
            rank_of.setdefault(rank, placement.id)
        for device in dict.fromkeys(placement.device_ids):
            other = device_user.setdefault(device, placement.id)
            if other != placement.id:
                yield Problem(
                    (*placement.path, "device_ids"),
                    f"executors {other} and {placement.id} share device {device}",
                    "warning",
                )
    if rank_of and not any(rank == 0 for rank in rank_of):
        idle = [rank for rank in range(1, max(rank_of)) if rank not in rank_of]
        if idle:
            shown = ", ".join(map(str, idle[:8])) + ("…" if len(idle) > 8 else "")
            yield Problem(
                ("cluster", "instances"), f"no executor has rank {shown}; allowed: ranks from 1 without a gap"
            )


# ---- policies -------------------------------------------------------------------------------------------------------


def _policies(config: Experiment) -> Iterator[Problem]:
    for name in ("context_router", "generation_router", "mixed_router", "router"):
        choice = getattr(config.policy, name)
        if choice is not None:
            yield from _policy(choice, "routing", ("policy", name), config)
    if config.policy.roles is not None:
        wrong = list(_policy(config.policy.roles, "roles", ("policy", "roles"), config))
        yield from wrong or (Problem(*found) for found in check_roles(config))
    if config.policy.migration is not None:
        yield from _policy(config.policy.migration, "migration", ("policy", "migration"), config)
        generates = [role for role, *_ in executor_groups(config.cluster) if role.serves(Stage.GENERATION)]
        if len(generates) < 2 and config.policy.roles is None:
            yield Problem(
                ("policy", "migration"), f"requests move between executors that generate; there is {len(generates)}"
            )
        if config.cluster.skip_context_phase:
            yield Problem(("policy", "migration"), "what moves is KV that was computed; skip_context_phase leaves none")
    yield from _policy(config.policy.admission, "admission", ("policy", "admission"), config)
    yield from _policy(config.policy.queue_order, "queue_order", ("policy", "queue_order"), config)
    seen: set[tuple[str | int, ...]] = set()
    for _, keys, path in executor_groups(config.cluster):
        if path not in seen:
            seen.add(path)
            scheduler = (*path, "scheduler")
            yield from _policy(keys.scheduler.queue_order, "queue_order", (*scheduler, "queue_order"), config)
            yield from _policy(keys.scheduler.batching, "batching", (*scheduler, "batching"), config)


def _policy(choice: PolicyChoice, kind: str, path: tuple[str | int, ...], config: Experiment) -> Iterator[Problem]:
    try:
        policy = load(choice.name, kind, str(config.root))
    except PolicyError as error:
        yield Problem((*path, "name"), str(error))
        return
    allowed = [name for name in _parameters(policy) if name not in ("self", "rng")]
    for name in choice.params:
        if name not in allowed:
            listing = ", ".join(allowed) or "it has none"
            yield Problem(
                (*path, name),
                f"'{choice.name}' has no parameter '{name}'{did_you_mean(name, allowed)} (allowed: {listing})",
            )
    missing = [
        name
        for name, parameter in _parameters(policy).items()
        if name in allowed and parameter.default is parameter.empty and name not in choice.params
    ]
    if missing:
        yield Problem(path, f"'{choice.name}' needs the parameters {', '.join(missing)}")
    elif all(name in allowed for name in choice.params):
        try:
            create(choice.name, kind, choice.params, seed="check", root=str(config.root))
        except (Exception, SystemExit) as error:  # a user's class may raise anything
            told = re.findall(r"\w+", str(error))
            named = [name for name in choice.params if name in told]  # its own words say which one it refuses
            where = (*path, min(named, key=told.index)) if named else path
            yield Problem(where, f"'{choice.name}' refuses its parameters: {type(error).__name__}: {error}")


def _parameters(policy: Any) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n: p for n, p in inspect.signature(policy).parameters.items() if p.kind not in kinds}


# ---- workload -------------------------------------------------------------------------------------------------------


def _workload(config: Experiment) -> Iterator[Problem]:
    workload = config.workload
    names = [phase.name for phase in workload.phases]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Problem(("workload", "phases", number, "name"), f"two phases are named '{name}'")
    if all(phase.exclude_from_results for phase in workload.phases):
        yield Problem(("workload", "phases"), "every phase is excluded from results; allowed: at least one that counts")
    dataset = workload.dataset
    if isinstance(dataset, SyntheticDataset):
        for path, length in _lengths(dataset):
            yield from _length(length, ("workload", "dataset", *path))
        names = [keys.name for keys in dataset.classes or ()]
        for number, name in enumerate(names):
            if name in names[:number]:
                path = ("workload", "dataset", "classes", number, "name")
                yield Problem(path, f"two traffic classes are named '{name}'")
    if isinstance(dataset, SyntheticDataset) or dataset.type in ("sharegpt", "tensorrt_llm"):  # none has times
        for number, phase in enumerate(workload.phases):
            if isinstance(phase, TracePhase):
                yield Problem(
                    ("workload", "phases", number, "type"),
                    "a trace's arrivals need a trace; allowed: dataset type azure, burstgpt or mooncake, or another phase type",
                )
    try:
        counts = phase_counts(config)
        if not isinstance(dataset, SyntheticDataset):
            declared_max_tokens(config)
    except ConfigError as error:
        yield Problem(("workload", "dataset", "path"), str(error))
        return
    if config.backend == "hardware" and sum(counts) > MOST_REQUESTS_ON_HARDWARE:
        yield Problem(
            ("workload", "phases"),
            f"{sum(counts)} requests, whose tokens are all kept in memory; allowed with backend hardware: at most"
            f" {MOST_REQUESTS_ON_HARDWARE}",
            "resource",
        )
    for number, (phase, count) in enumerate(zip(workload.phases, counts, strict=True)):
        if not isinstance(phase, ConcurrencyPhase | TracePhase) and count / phase.rate > LONGEST_PHASE_S:
            yield Problem(
                ("workload", "phases", number, "rate"),
                f"{count} requests at {phase.rate:g} a second take {count / phase.rate / 86_400:.3g} days; allowed: at"
                f" most {LONGEST_PHASE_S // 86_400}",
            )


def _lengths(dataset: SyntheticDataset) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each length distribution of the data set and where it stands in it."""
    yield ("isl",), dataset.isl
    yield ("osl",), dataset.osl
    if dataset.shared_prefixes is not None:
        yield ("shared_prefixes", "length"), dataset.shared_prefixes.length
    if dataset.sessions is not None:
        yield ("sessions", "turns"), dataset.sessions.turns
        if dataset.sessions.turn_isl is not None:
            yield ("sessions", "turn_isl"), dataset.sessions.turn_isl
    for number, keys in enumerate(dataset.classes or ()):
        for name in ("isl", "osl"):
            if getattr(keys, name) is not None:
                yield ("classes", number, name), getattr(keys, name)


def _length(length: Any, path: tuple[str | int, ...]) -> Iterator[Problem]:
    least, most = getattr(length, "min", None), getattr(length, "max", None)
    if least is not None and most is not None and least > most:
        yield Problem((*path, "min"), f"min {least} is greater than max {most}")
    weights = getattr(length, "weights", None)
    if weights is not None:
        if len(weights) != len(length.values):
            yield Problem(
                (*path, "weights"), f"{len(weights)} weights for {len(length.values)} values; allowed: as many"
            )
        elif sum(weights) <= 0:
            yield Problem((*path, "weights"), "all weights are zero")
