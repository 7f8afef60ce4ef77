"""Every registered policy in one cluster: requests are dealt out to them in turn. A user's file, for runs of both worlds."""

from __future__ import annotations

from random import Random
from typing import Any

from disagg.policies import AdmissionPolicy, QueueOrder, RolePolicy, RoutingPolicy, Stage
from disagg.policies.registry import available, create
from disagg.policies.vocabulary import PS_PER_MS

PARAMS: dict[str, dict[str, Any]] = {
    "reject_at_limit": {"max_active": 10_000},
    "mixed_pool": {"max_prompt_tokens": 64},
    "hold_when_full": {"max_active": 2, "max_wait_ms": 60_000},
    "shed_sheddable": {"below_priority": 0.0},
    "bucket": {"interval_s": 0.05},
    "scheduled": {
        "changes": [
            {"at_s": 0.0001, "executor": 2, "role": "mixed"},
            {"at_s": 0.0003, "executor": 1, "role": "generation"},
            {"at_s": 0.0006, "executor": 1, "role": "context"},
        ]
    },
    "switch_by_load": {"interval_s": 1e-4, "max_prompt_tokens": 64, "max_kv": 0.02, "low": 0.9},
    "rate_matching": {"interval_s": 1e-4},
    "planner": {"interval_s": 1e-4, "ttft_ms": 0.3, "tpot_ms": 0.01},
}


def names(kind: str) -> list[str]:
    """Those of this project, in order."""
    return [i.name for i in available() if i.kind == kind and i.policy.__module__.startswith("disagg.policies.")]


class _Every:
    kind = ""

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)  # type: ignore[call-arg]
        self.policies = [create(n, self.kind, PARAMS.get(n, {}), seed=str(rng.random())) for n in names(self.kind)]

    def of(self, request: Any) -> Any:
        return self.policies[request.id % len(self.policies)]


class EveryRouter(_Every, RoutingPolicy):
    kind = "routing"
    is_oracle = True

    def route_context(self, request: Any, fleet: Any) -> Any:
        return self.of(request).route_context(request, fleet)

    def route_generation(self, request: Any, fleet: Any) -> Any:
        return self.of(request).route_generation(request, fleet)

    def on_dispatched(self, request: Any, stage: Stage, executor: int, fleet: Any) -> None:
        self.of(request).on_dispatched(request, stage, executor, fleet)

    def on_finished(self, request: Any, stage: Stage, executor: int, ok: bool, fleet: Any) -> None:
        self.of(request).on_finished(request, stage, executor, ok, fleet)

    def on_report(self, executor: Any, fleet: Any) -> None:
        for policy in self.policies:
            policy.on_report(executor, fleet)


class EveryRoles(_Every, RolePolicy):
    """One after the other, each time that they are asked."""

    kind = "roles"

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)
        self.interval_ps = 100 * PS_PER_MS
        self._turn = 0

    def change_roles(self, fleet: Any) -> Any:
        self._turn += 1
        return self.policies[self._turn % len(self.policies)].change_roles(fleet)

    def on_arrival(self, request: Any, fleet: Any) -> None:
        for policy in self.policies:
            policy.on_arrival(request, fleet)

    def on_ended(self, request: Any, num_output_tokens: int, fleet: Any) -> None:
        for policy in self.policies:
            policy.on_ended(request, num_output_tokens, fleet)


class EveryAdmission(_Every, AdmissionPolicy):
    kind = "admission"

    def admit(self, request: Any, fleet: Any) -> Any:
        return self.of(request).admit(request, fleet)


class EveryOrder(_Every, QueueOrder):
    """Keys are numbers all, and can be mixed, though the order they make is nobody's."""

    kind = "queue_order"

    def key(self, request: Any, now: int) -> Any:
        return self.of(request).key(request, now)

    def on_served(self, request: Any, key: Any, now: int) -> None:
        self.of(request).on_served(request, key, now)
