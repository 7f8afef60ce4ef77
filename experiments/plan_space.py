"""The clusters that a search tries: executors of one or two kinds, their number and parallelism, and the routers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..core.model_shapes import ModelError
from .config import Experiment, Plan, validate_mapping
from .config_checks import check_experiment
from .errors import ConfigError, ResourceError
from .run_simulation import costs_of

MOST_CANDIDATES: Final = 5_000
DEFAULT_ROUTERS: Final = {
    "context_router": {"name": "least_tokens"},
    "generation_router": {"name": "least_kv"},
    "mixed_router": {"name": "least_requests"},
}
_MIXED_BUDGET: Final = 2048  # tokens a step: prompts beside decodes must not delay them for long
_NOT_INHERITED: Final = (
    "num_instances",
    "role",
    "participant_ids",
    "device_ids",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "layers_per_stage",
)


@dataclass(frozen=True)
class Group:
    """Equal executors."""

    num_instances: int
    tensor_parallel_size: int
    pipeline_parallel_size: int

    @property
    def num_gpus(self) -> int:
        return self.num_instances * self.tensor_parallel_size * self.pipeline_parallel_size

    def label(self, role: str) -> str:
        stages = f" pp{self.pipeline_parallel_size}" if self.pipeline_parallel_size > 1 else ""
        return f"{self.num_instances} {role} tp{self.tensor_parallel_size}{stages}"


@dataclass(frozen=True)
class Shape:
    """A cluster without its routers: context and generation executors, or mixed ones with a token budget."""

    context: Group | None = None
    generation: Group | None = None
    mixed: Group | None = None
    mixed_max_num_tokens: int | None = None

    @property
    def role(self) -> str:
        return "mixed" if self.mixed is not None else "disaggregated"

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in (self.context, self.generation, self.mixed) if group is not None)

    @property
    def label(self) -> str:
        if self.mixed is not None:
            return f"{self.mixed.label('mixed')}, {self.mixed_max_num_tokens} tokens"
        if self.context is None or self.generation is None:
            return ""
        return f"{self.context.label('context')} + {self.generation.label('generation')}"


@dataclass(frozen=True)
class Candidate:
    """A shape and its routers; `policy` is that section of its file, `data` the whole file's plain values."""

    shape: Shape
    routers: str
    data: dict[str, Any]
    experiment: Experiment

    @property
    def label(self) -> str:
        return f"{self.shape.label}; {self.routers}"


@dataclass(frozen=True)
class Unfit:
    """A candidate that cannot be built, and why."""

    label: str
    why: str


# ---- shapes ---------------------------------------------------------------------------------------------------------


def shapes_of(plan: Plan, base: Experiment) -> list[Shape]:
    """All shapes of min_gpus to max_gpus. Raises ConfigError for none, and for more than MOST_CANDIDATES."""
    sizes = sorted({(tp, pp) for tp in plan.tensor_parallel_sizes for pp in plan.pipeline_parallel_sizes})
    groups = [Group(number, tp, pp) for tp, pp in sizes for number in range(1, plan.max_gpus // (tp * pp) + 1)]
    found: list[Shape] = []
    if plan.roles != "mixed":
        for context in groups:
            for generation in groups:
                gpus = context.num_gpus + generation.num_gpus
                if plan.min_gpus <= gpus <= plan.max_gpus:
                    found.append(Shape(context, generation))
                    _check_number(len(found))
    if plan.roles != "disaggregated":
        for budget in plan.mixed_max_num_tokens or [_mixed_budget(base)]:
            found += [
                Shape(mixed=group, mixed_max_num_tokens=budget) for group in groups if group.num_gpus >= plan.min_gpus
            ]
            _check_number(len(found))
    if not found:
        raise ConfigError(f"plan: no cluster has {plan.min_gpus} to {plan.max_gpus} GPUs with these parallel sizes")
    return found


def _check_number(number: int) -> None:
    if number > MOST_CANDIDATES:
        raise ConfigError(
            f"plan: more than {MOST_CANDIDATES} clusters to try; allowed: fewer GPUs, fewer parallel sizes, or min_gpus"
            " closer to max_gpus"
        )


def _mixed_budget(base: Experiment) -> int:
    mixed = base.cluster.mixed_servers
    return _MIXED_BUDGET if mixed is None else mixed.scheduler.max_num_tokens


# ---- routers --------------------------------------------------------------------------------------------------------


def routers_of(plan: Plan, base: Experiment, role: str) -> list[dict[str, Any]]:
    """The routing keys of the `policy` section for clusters of `role`, each once, in the file's order."""
    given: list[Any] = [base.policy]
    if plan.routers is None:
        round_robin: dict[str, Any] = {"router": {"name": "round_robin"}}
        chosen = [_completed(base.policy, role), round_robin]
    else:
        given = list(plan.routers)
        chosen = [_completed(choice, role) for choice in given]
    return [keys for number, keys in enumerate(chosen) if keys not in chosen[:number]]


def _completed(choice: Any, role: str) -> dict[str, Any]:
    if choice.router is not None:
        return {"router": choice.router.model_dump()}
    stages = ("mixed_router",) if role == "mixed" else ("context_router", "generation_router")
    found: dict[str, Any] = {}
    for stage in stages:
        policy = getattr(choice, stage)
        found[stage] = deepcopy(DEFAULT_ROUTERS[stage]) if policy is None else policy.model_dump()
    return found


def routers_label(keys: dict[str, Any]) -> str:
    def name(policy: dict[str, Any]) -> str:
        params = ", ".join(f"{key}={value}" for key, value in policy.items() if key != "name")
        short = str(policy["name"]).rpartition(".py:")[2]
        return f"{short}({params})" if params else short

    return " / ".join(name(policy) for policy in keys.values())


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidate_of(data: dict[str, Any], root: Path, shape: Shape, routers: dict[str, Any]) -> Candidate | Unfit:
    """The file `data` (plain values, valid) with the cluster and the routers changed; Unfit if that cannot be built."""
    label = f"{shape.label}; {routers_label(routers)}"
    data = deepcopy(data)
    for key in ("plan", "sweep", "repeats"):
        data.pop(key, None)
    _set_cluster(data, shape)
    policy = {
        key: value for key, value in (data.get("policy") or {}).items() if key not in ("router", *DEFAULT_ROUTERS)
    }
    data["policy"] = routers | policy
    experiment = validate_mapping(deepcopy(data), {})
    experiment._root = root
    problems = [problem for problem in check_experiment(experiment) if problem.severity != "warning"]
    if problems:
        return Unfit(label, problems[0].message)
    if experiment.slo is not None:
        experiment = experiment.model_copy(update={"slo": experiment.slo.resolved()})
    try:
        costs_of(experiment)
    except (ModelError, ConfigError, ResourceError) as error:  # e.g. a measured profile without such an executor
        return Unfit(label, str(error))
    return Candidate(shape, routers_label(routers), data, experiment)


def _set_cluster(data: dict[str, Any], shape: Shape) -> None:
    cluster = data.setdefault("cluster", {})
    templates = {role: _template(cluster, role) for role in ("context", "generation", "mixed")}
    for key in ("context_servers", "generation_servers", "mixed_servers", "instances"):
        cluster.pop(key, None)
    for role, group in (("context", shape.context), ("generation", shape.generation), ("mixed", shape.mixed)):
        if group is None:
            continue
        keys: dict[str, Any] = {
            "num_instances": group.num_instances,
            "tensor_parallel_size": group.tensor_parallel_size,
        }
        if group.pipeline_parallel_size > 1:
            keys["pipeline_parallel_size"] = group.pipeline_parallel_size
        template = templates[role]
        if role == "mixed":
            template = _mixed_template(templates, shape)
        cluster[f"{role}_servers"] = keys | (template or {})
    if shape.mixed is None:
        transceiver = cluster.get("cache_transceiver") or {}
        if not transceiver.get("backend"):
            cluster["cache_transceiver"] = {"backend": "auto"} | {k: v for k, v in transceiver.items() if v is not None}


def _template(cluster: dict[str, Any], role: str) -> dict[str, Any] | None:
    """What the file says of executors of `role` beside their number and parallelism."""
    group = cluster.get(f"{role}_servers")
    if group is None:
        group = next(
            (
                keys
                for keys in cluster.get("instances") or []
                if {"prefill": "context", "decode": "generation"}.get(keys.get("role"), keys.get("role")) == role
            ),
            None,
        )
    if group is None:
        return None
    return {key: deepcopy(value) for key, value in group.items() if key not in _NOT_INHERITED}


def _mixed_template(templates: dict[str, dict[str, Any] | None], shape: Shape) -> dict[str, Any]:
    """Those of mixed servers; without any in the file those of generation servers, whose batches they decode."""
    template = dict(templates["mixed"] or templates["generation"] or {})
    scheduler = dict(template.get("scheduler") or {})
    if shape.mixed_max_num_tokens is not None:
        scheduler["max_num_tokens"] = shape.mixed_max_num_tokens
    template["scheduler"] = scheduler
    return template
