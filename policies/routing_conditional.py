"""Disaggregate or not: serve a request whole on a mixed executor where that is cheap, else its phases apart.

Each rule wraps two policies: `local` chooses the mixed executor that could serve the request whole, `remote` routes its
phases otherwise; a name, or a mapping of a name and its parameters. Without mixed executors `remote` decides alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from .interfaces import PolicyError, RoutingPolicy, SelectingPolicy
from .parameters import number
from .prediction import pending_prompt_tokens
from .registry import create, register
from .routing_scorers import kv_share
from .views import ExecutorRow, FleetView
from .vocabulary import Hold, Request, Route, RouteMixed, Routing, Stage


class ConditionalPolicy(RoutingPolicy):
    """The frame: only `serves_whole` is left to write."""

    def __init__(self, *, rng: Random, local: Any = "kv_cache_aware", remote: Any = "least_tokens") -> None:
        super().__init__(rng=rng)
        self.local = _made(local, rng)
        self.remote = _made(remote, rng)

    def serves_whole(self, request: Request, mixed: ExecutorRow, context: ExecutorRow, fleet: FleetView) -> bool:
        """Whether `mixed` should serve the request whole rather than `context` compute its prompt; both are healthy."""
        raise PolicyError(f"{type(self).__name__} does not define serves_whole, and was asked for it")

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        if not fleet.mixed.num_healthy:
            return self.remote.route_context(request, fleet)
        mixed = self.local.select(request, fleet.mixed)
        context: ExecutorRow | Hold | None = None
        if fleet.context.num_healthy and (fleet.generation.num_healthy or fleet.mixed.num_healthy):
            context = self.remote.select(request, fleet.context)
        if isinstance(mixed, ExecutorRow) and (
            context is None or (isinstance(context, ExecutorRow) and self.serves_whole(request, mixed, context, fleet))
        ):
            return RouteMixed(mixed.executor_id)
        if isinstance(context, ExecutorRow):
            return Route(context=context.executor_id)
        return Hold()

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        return self.remote.route_generation(request, fleet)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        (self.local if stage is Stage.MIXED else self.remote).on_dispatched(request, stage, executor, fleet)

    def on_finished(self, request: Request, stage: Stage, executor: int, ok: bool, fleet: FleetView) -> None:
        (self.local if stage is Stage.MIXED else self.remote).on_finished(request, stage, executor, ok, fleet)

    def on_report(self, executor: ExecutorRow, fleet: FleetView) -> None:
        self.local.on_report(executor, fleet)
        self.remote.on_report(executor, fleet)


@register("conditional_tensorrt_llm", kind="routing", source="TensorRT-LLM conditional disaggregation")
class ConditionalTensorRtLlm(ConditionalPolicy):
    """Disaggregate if nothing of the prompt matched, or its uncached tokens > max_local_prefill_length."""

    def __init__(
        self,
        *,
        rng: Random,
        max_local_prefill_length: float = 512,
        local: Any = "kv_cache_aware",
        remote: Any = "least_tokens",
    ) -> None:
        super().__init__(rng=rng, local=local, remote=remote)
        self.longest = number("conditional_tensorrt_llm", "max_local_prefill_length", max_local_prefill_length)

    def serves_whole(self, request: Request, mixed: ExecutorRow, context: ExecutorRow, fleet: FleetView) -> bool:
        return mixed.cached_tokens(request) > 0 and mixed.uncached_tokens(request) <= self.longest


@register("conditional_llm_d", kind="routing", source="llm-d prefill/decode profile handler")
class ConditionalLlmD(ConditionalPolicy):
    """Disaggregate if the uncached tokens >= threshold."""

    def __init__(
        self, *, rng: Random, threshold: float = 512, local: Any = "kv_cache_aware", remote: Any = "least_tokens"
    ) -> None:
        super().__init__(rng=rng, local=local, remote=remote)
        self.threshold = number("conditional_llm_d", "threshold", threshold)

    def serves_whole(self, request: Request, mixed: ExecutorRow, context: ExecutorRow, fleet: FleetView) -> bool:
        return mixed.uncached_tokens(request) < self.threshold


@register("conditional_dynamo", kind="routing", source="Dynamo conditional disaggregation")
class ConditionalDynamo(ConditionalPolicy):
    """Whole if uncached < max_tokens and its share < max_share, or the context executor is behind; never with KV too full.

    Behind: more than `max_backlog` prompt tokens pending. Never whole while the mixed executor has more than `max_kv` of its
    KV blocks in use.
    """

    def __init__(
        self,
        *,
        rng: Random,
        max_tokens: float = 2048,
        max_share: float = 0.7,
        max_backlog: float = 65_536,
        max_kv: float = 0.9,
        local: Any = "kv_cache_aware",
        remote: Any = "least_tokens",
    ) -> None:
        super().__init__(rng=rng, local=local, remote=remote)
        self.max_tokens = number("conditional_dynamo", "max_tokens", max_tokens)
        self.max_share = number("conditional_dynamo", "max_share", max_share, 0, 1)
        self.max_backlog = number("conditional_dynamo", "max_backlog", max_backlog)
        self.max_kv = number("conditional_dynamo", "max_kv", max_kv, 0, 1)

    def serves_whole(self, request: Request, mixed: ExecutorRow, context: ExecutorRow, fleet: FleetView) -> bool:
        if kv_share(mixed) > self.max_kv:
            return False
        uncached = mixed.uncached_tokens(request)
        is_short = uncached < self.max_tokens and uncached / request.num_prompt_tokens < self.max_share
        return is_short or pending_prompt_tokens(context) > self.max_backlog


def _made(choice: Any, rng: Random) -> SelectingPolicy:
    """The policy that a parameter names, with a generator of its own."""
    if isinstance(choice, str):
        choice = {"name": choice}
    if not isinstance(choice, Mapping) or not isinstance(choice.get("name"), str):
        raise PolicyError(f"a policy is given as its name, or a mapping with its name and parameters, not {choice!r}")
    params = {key: value for key, value in choice.items() if key != "name"}
    policy = create(choice["name"], "routing", params, seed=str(rng.getrandbits(64)))
    if not isinstance(policy, SelectingPolicy):
        raise PolicyError(f"{choice['name']!r} chooses more than one executor of a pool: it cannot be wrapped")
    return policy
