"""Small real clusters for the tests: a spec from a few numbers, and requests from a few prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, RetryConfig, SchedulerConfig
from disagg.core.event_log import read_log
from disagg.core.prefix_names import token_hashes
from disagg.policies.vocabulary import PS_PER_MS, Request, Role
from disagg.runtime.executor_spec import HardwareSpec, ModelSource, Placement
from disagg.runtime.orchestrator_load import LoadPhase, PlannedSubmission

BLOCK = 4
NUM_BLOCKS = 64


class Layout:
    """One executor: its role and its parallelism."""

    def __init__(
        self, role: Role, tp: int = 1, pp: int = 1, layers: Sequence[int] | None = None, **config: Any
    ) -> None:
        self.role = role
        self.tp = tp
        self.pp = pp
        self.layers = None if layers is None else tuple(layers)
        self.config = config


def context(tp: int = 1, pp: int = 1, layers: Sequence[int] | None = None, **config: Any) -> Layout:
    return Layout(Role.CONTEXT, tp, pp, layers, **config)


def generation(tp: int = 1, pp: int = 1, layers: Sequence[int] | None = None, **config: Any) -> Layout:
    return Layout(Role.GENERATION, tp, pp, layers, **config)


def mixed(tp: int = 1, pp: int = 1, layers: Sequence[int] | None = None, **config: Any) -> Layout:
    return Layout(Role.MIXED, tp, pp, layers, **config)


def cluster(
    model: ModelSource,
    layouts: Sequence[Layout],
    *,
    first_rank: int = 1,
    steps_per_grant: int = 1,
    pipeline_depth: int | None = None,
    plan_ahead: bool = False,
    on_failure: str = "recompute",
    num_devices: int = 0,
    **spec: Any,
) -> HardwareSpec:
    """Ranks are dealt out in order; pipelines have as many grants outstanding as stages, unless told otherwise.

    `num_devices`: GPUs to deal the ranks out to, one after the other and round.
    """
    executors, placements = [], []
    rank = first_rank
    for number, layout in enumerate(layouts, 1):
        config: dict[str, Any] = {
            "num_blocks": NUM_BLOCKS,
            "tokens_per_block": BLOCK,
            "scheduler": SchedulerConfig(max_batch_size=8, max_num_tokens=16),
            "tensor_parallel_size": layout.tp,
            "pipeline_parallel_size": layout.pp,
        }
        executors.append(ExecutorConfig(number, layout.role, **(config | layout.config)))
        ranks = tuple(range(rank, rank + layout.tp * layout.pp))
        depth = layout.pp if pipeline_depth is None else pipeline_depth
        devices = tuple((r - first_rank) % num_devices for r in ranks) if num_devices else ()
        placements.append(Placement(number, ranks, devices, layout.layers, steps_per_grant, depth, plan_ahead))
        rank += len(ranks)
    roles = {layout.role for layout in layouts}
    orchestrator = OrchestratorConfig(
        tuple(executors),
        context_router=PolicySpec("round_robin") if Role.CONTEXT in roles else None,
        generation_router=PolicySpec("round_robin") if Role.GENERATION in roles else None,
        mixed_router=PolicySpec("round_robin") if Role.MIXED in roles else None,
        retry=RetryConfig(on_failure),
    )
    values: dict[str, Any] = {"transport": "mpi", "verify_kv": True, "record_margins": True}
    return HardwareSpec(orchestrator, model, tuple(placements), **(values | spec))


def num_instants(logs: Mapping[int, bytes]) -> int:
    """Of all cores. How many there are, the machine decides: what comes at once is one."""
    return sum(1 for log in logs.values() for _ in read_log(log)[1])


def submissions(
    prompts: Sequence[Sequence[int]], num_tokens: int, every_ms: float = 5.0, **fields: Any
) -> tuple[LoadPhase, ...]:
    """One open phase: a request for each prompt, ids from 1."""
    return (
        LoadPhase(
            tuple(
                PlannedSubmission(
                    Request(i + 1, len(prompt), num_tokens, input_token_ids=tuple(prompt), **fields),
                    round(i * every_ms * PS_PER_MS),
                )
                for i, prompt in enumerate(prompts)
            )
        ),
    )


def named_twice(prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[LoadPhase, ...]:
    """Requests whose blocks are named by their tokens: one after the other, then all of them again, four at a time."""
    (phase,) = submissions(prompts, num_tokens)
    named = []
    for each in phase.submissions:
        hashes = token_hashes(each.request.input_token_ids or (), BLOCK)
        named.append(replace(each, offset=None, request=replace(each.request, block_hashes=hashes)))
    again = [replace(each, request=replace(each.request, id=each.request.id + len(prompts))) for each in named]
    return LoadPhase(tuple(named), concurrency=1), LoadPhase(tuple(again), concurrency=4)
