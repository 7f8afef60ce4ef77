"""Role policies that look at how loaded the pools are now: borrowing between them, and switching for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from .interfaces import RolePolicy
from .parameters import number
from .registry import register
from .routing_pools import kv_in_use, pending_prompts
from .views import ExecutorRow, FleetView
from .vocabulary import PS_PER_S, ChangeRole, Role

_OTHER = {Role.CONTEXT: Role.GENERATION, Role.GENERATION: Role.CONTEXT}


class _ByLoad(RolePolicy):
    """Load of an executor: pending prompt tokens / max_prompt_tokens at the context stage, KV share in use / max_kv after."""

    name = ""

    def __init__(self, *, rng: Random, interval_s: float, max_prompt_tokens: float, max_kv: float) -> None:
        super().__init__(rng=rng)
        self.interval_ps = round(number(self.name, "interval_s", interval_s) * PS_PER_S)
        prompt_tokens = number(self.name, "max_prompt_tokens", max_prompt_tokens, 1)
        kv = number(self.name, "max_kv", max_kv, 0.01, 1)
        self.load: dict[Role, Callable[[ExecutorRow], float]] = {
            Role.CONTEXT: lambda row: float(pending_prompts(row) / prompt_tokens),
            Role.GENERATION: lambda row: float(kv_in_use(row) / kv),
        }

    def lender(self, role: Role, fleet: FleetView) -> ExecutorRow | None:
        """The least loaded executor of the pool that does not serve `role`, if that keeps another."""
        rows = fleet.pool(_OTHER[role]).healthy_rows
        return min(rows, key=self.load[_OTHER[role]]) if len(rows) > 1 else None


@register("mixed_pool", kind="roles", source="Splitwise cluster-level scheduling")
class MixedPoolRoles(_ByLoad):
    """An overloaded pool borrows: the other's least loaded executor becomes mixed, and returns when its foreign work is done.

    Overloaded: each of the pool has at least `max_prompt_tokens` pending, or `max_kv` of its blocks in use. A pool borrows
    when the mixed ones are no better off, lends while it is not overloaded itself and keeps one of its own; what is lent
    returns once the pool that it helped is not overloaded. Meant with the router of the same name, which sends to mixed
    executors what its own pool has no room for.
    """

    name = "mixed_pool"

    def __init__(
        self, *, rng: Random, interval_s: float = 0.0, max_prompt_tokens: float = 8192, max_kv: float = 0.8
    ) -> None:
        super().__init__(rng=rng, interval_s=interval_s, max_prompt_tokens=max_prompt_tokens, max_kv=max_kv)

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        overloaded = {role: self._is_full(fleet.pool(role).healthy_rows, role) for role in _OTHER}
        changes = []
        for role, other in _OTHER.items():
            lender = self.lender(role, fleet)
            borrows = overloaded[role] and self._is_full(fleet.mixed.healthy_rows, role)
            if borrows and not overloaded[other] and lender is not None:
                changes.append(ChangeRole(lender.executor_id, Role.MIXED))
        for row in fleet.mixed.healthy_rows:
            home = fleet.home[row.executor_id]
            if home in _OTHER and not overloaded[_OTHER[home]] and not _foreign_work(row, home):
                changes.append(ChangeRole(row.executor_id, home))
        return changes

    def _is_full(self, rows: Sequence[ExecutorRow], role: Role) -> bool:
        return all(self.load[role](row) >= 1 for row in rows)


def _foreign_work(row: ExecutorRow, home: Role) -> int:
    """Tokens that a mixed executor has of the stage that its home role does not serve; what is on the wire may be such."""
    foreign = row.decode_kv_tokens if home is Role.CONTEXT else row.queued_prefill_tokens + row.inflight_prefill_tokens
    return int(foreign + row.wire_tokens)


@register(
    "switch_by_load", kind="roles", source="SGLang, live role switch; thresholds as in Dynamo's planner, mode load"
)
class SwitchByLoad(_ByLoad):
    """One executor at a time goes over, for good, from a pool with a mean load below `low` to one with a mean load above 1.

    Load: pending prompt tokens / max_prompt_tokens of context executors, KV share in use / max_kv of generation executors.
    The least loaded goes, unless it is the last; while any executor is draining, nobody else does.
    """

    name = "switch_by_load"

    def __init__(
        self,
        *,
        rng: Random,
        interval_s: float = 1.0,
        max_prompt_tokens: float = 8192,
        max_kv: float = 0.8,
        low: float = 0.5,
    ) -> None:
        super().__init__(rng=rng, interval_s=interval_s, max_prompt_tokens=max_prompt_tokens, max_kv=max_kv)
        self.low = number(self.name, "low", low, 0, 1)

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        if fleet.draining:
            return ()
        for role, other in _OTHER.items():
            lender = self.lender(role, fleet)
            if lender is not None and self._mean(role, fleet) > 1 and self._mean(other, fleet) < self.low:
                return (ChangeRole(lender.executor_id, role),)
        return ()

    def _mean(self, role: Role, fleet: FleetView) -> float:
        loads = [self.load[role](row) for row in fleet.pool(role).healthy_rows]
        return sum(loads) / len(loads) if loads else 0.0
