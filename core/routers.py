"""The routing policies of a cluster: which one is asked about which phase, what it is told, and whether it may be obeyed."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from ..policies import registry
from ..policies.interfaces import PolicyError, RoutingPolicy
from ..policies.views import FleetView
from ..policies.vocabulary import Hold, Request, Role, Route, RouteMixed, Routing, Stage, plain_integer
from .config import OrchestratorConfig, PolicySpec
from .events import Report
from .fleet import Fleet
from .task import Task


def make_policy(config: OrchestratorConfig, spec: PolicySpec, kind: str, name: str) -> Any:
    """The policy of `kind` that `spec` names. `name` is its place in this cluster: its chance is drawn by that."""
    seed = f"{config.seed}/{name}"
    return registry.create(spec.name, kind, spec.params, seed=seed, root=config.policy_root)


class Routers:
    """`by_stage`: whom to ask about a phase; one router may serve both, a mixed one is asked about the context phase."""

    def __init__(self, config: OrchestratorConfig, fleet: Fleet) -> None:
        self.by_stage: dict[Stage, RoutingPolicy] = _make_routers(config)
        self.hear_reports = self._that_define("on_report")
        self._hear_ends = self._that_define("on_finished")
        self._hear_dispatches = self._that_define("on_dispatched")
        self._fleet = fleet

    def _that_define(self, hook: str) -> list[RoutingPolicy]:
        """The routers for whom this hook does something."""
        different = dict.fromkeys(self.by_stage.values())
        return [router for router in different if getattr(type(router), hook) is not getattr(RoutingPolicy, hook)]

    def _of(self, stage: Stage) -> RoutingPolicy:
        return self.by_stage[Stage.GENERATION if stage is Stage.GENERATION else Stage.CONTEXT]

    # ---- what they are asked ----------------------------------------------------------------------------------------

    def route_context(self, task: Task, fleet: FleetView) -> Routing:
        router = self.by_stage[Stage.CONTEXT]
        return _in_plain_integers(router.route_context(_shown(task, router), fleet))

    def route_generation(self, task: Task, fleet: FleetView) -> Routing:
        """Its context phase is done."""
        router = self.by_stage[Stage.GENERATION]
        fleet.context_executor = task.context_executor
        told = replace(_shown(task, router), context_phase_params=task.params)
        return _in_plain_integers(router.route_generation(told, fleet))

    def bind_generation(self, task: Task, context_executor: int, fleet: FleetView) -> Routing:
        """Its context phase is still to be done, by `context_executor`."""
        router = self.by_stage[Stage.GENERATION]
        fleet.context_executor = context_executor
        told = _shown(task, router)
        return _in_plain_integers(router.route_generation(told, fleet))

    def checked(self, executor: int, roles: tuple[Role, ...], answer: Routing) -> int:
        """The executor that a policy named; PolicyError if it is none of those roles, or not healthy."""
        fleet = self._fleet
        role = fleet.roles.get(executor)
        if role not in roles or not fleet.is_healthy(executor):
            can = [e for e, r in fleet.roles.items() if r in roles and fleet.is_healthy(e)]
            state = "unknown" if role is None else f"{role.value}, {'' if fleet.is_healthy(executor) else 'un'}healthy"
            raise PolicyError(f"{answer!r} names executor {executor} ({state}); allowed here: {can}")
        return executor

    # ---- what they are told -----------------------------------------------------------------------------------------

    def reported(self, report: Report, now: int) -> None:
        for router in self.hear_reports:
            router.on_report(self._fleet.row(report.executor), self._fleet.at(now))

    def dispatched(self, task: Task, stage: Stage, executor: int, now: int) -> None:
        router = self._of(stage)
        if router in self._hear_dispatches:
            router.on_dispatched(_shown(task, router), stage, executor, self._fleet.at(now))

    def finished(self, task: Task, stage: Stage, executor: int, ok: bool, now: int) -> None:
        router = self._of(stage)
        if router in self._hear_ends:
            router.on_finished(_shown(task, router), stage, executor, ok, self._fleet.at(now))


def _make_routers(config: OrchestratorConfig) -> dict[Stage, RoutingPolicy]:
    if config.router is not None:
        both = make_policy(config, config.router, "routing", "router")
        return {Stage.CONTEXT: both, Stage.GENERATION: both}
    routers: dict[Stage, RoutingPolicy] = {}
    first = config.context_router or config.mixed_router
    if first is not None:
        routers[Stage.CONTEXT] = make_policy(config, first, "routing", "context_router")
    if config.generation_router is not None:
        routers[Stage.GENERATION] = make_policy(config, config.generation_router, "routing", "generation_router")
    return routers


def _shown(task: Task, router: RoutingPolicy) -> Request:
    """The request as `router` sees it: without tokens, and without its true output length unless it is an oracle."""
    return task.told_oracle if router.is_oracle else task.shown


def _in_plain_integers(answer: Routing) -> Routing:
    """The answer in Python's own integers: a policy may have read them off columns of numpy's. PolicyError if one is none."""
    parts: Any = answer  # whose types are not what they declare: compiled code would refuse them
    if type(answer) is Route:
        context, generation = parts.context, parts.generation
        if (context is None or type(context) is int) and (generation is None or type(generation) is int):
            return answer
        return Route(
            None if context is None else plain_integer(context, answer),
            None if generation is None else plain_integer(generation, answer),
        )
    if type(answer) is RouteMixed and type(parts.executor) is not int:
        return RouteMixed(plain_integer(parts.executor, answer))
    if type(answer) is Hold and parts.until is not None and type(parts.until) is not int:
        return Hold(plain_integer(parts.until, answer))
    return answer
