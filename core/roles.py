"""Which executor serves what, while the cluster runs: who may change it, and what is left of an earlier role.

A change takes effect at once for whatever is routed from then on; what an executor was sent before it finishes, and the
fleet's view counts that as draining. Knows the fleet and how much of what each executor owes an answer for, no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from types import MappingProxyType
from typing import Final

from ..policies.interfaces import PolicyError, RolePolicy
from ..policies.vocabulary import ChangeRole, Request, Role, Stage
from .commands import Record, Send
from .decisions import role_row
from .events import RoleChanged
from .fleet import Fleet
from .timers import Timers

TIMER: Final = "roles"
OPERATOR: Final = "operator"
_NEEDED: Final = (
    (Stage.CONTEXT, "to compute prompts"),
    (Stage.GENERATION, "to generate"),
)


class Roles:
    """`stages_at(executor)` are the stages of the requests that an executor owes an answer for; `routed` those that there
    is a router for; `emit` takes commands.

    `policy` may be None: then roles change only where an operator says so.
    """

    def __init__(
        self,
        policy: RolePolicy | None,
        fleet: Fleet,
        timers: Timers,
        stages_at: Callable[[int], Iterable[Stage]],
        routed: Container[Stage],
        emit: Callable[[Record | Send], object],
    ) -> None:
        self.policy = policy
        self.draining: dict[int, int] = {}  # executor: requests there that its role does not serve
        self._fleet = fleet
        self._timers = timers
        self._stages_at = stages_at
        self._routed = routed
        self._emit = emit
        self._due = False
        self._armed_for: int | None = None
        fleet.view.draining = MappingProxyType(self.draining)

    # ---- when the policy is asked -----------------------------------------------------------------------------------

    def reported(self) -> None:
        """A report was received: it matters to a policy that asks for no interval."""
        if self.policy is not None and not self.policy.interval_ps:
            self._due = True

    def arrived(self, request: Request, now: int) -> None:
        if self.policy is None:
            return
        self.policy.on_arrival(request, self._fleet.at(now))
        self._arm(now)

    def ended(self, request: Request, num_tokens: int, now: int) -> None:
        if self.policy is not None:
            self.policy.on_ended(request, num_tokens, self._fleet.at(now))

    def woken(self) -> None:
        """The instant that `next_at` named has come."""
        self._armed_for = None
        self._due = True

    def ask(self, now: int, is_busy: bool) -> bool:
        """Ask the policy, if it is time; whether a role has changed. `is_busy`: there are requests, to ask for again."""
        if not self._due or self.policy is None:
            return False
        self._due = False
        changes = self.policy.change_roles(self._fleet.at(now))
        for change in changes:
            self._obey(change, now)
        if is_busy:
            self._arm(now)
        return bool(changes)

    def _arm(self, now: int) -> None:
        """One timer for the next instant that the policy names; it stops with the last request, for a run to end."""
        at = None if self.policy is None else self.policy.next_at(now)
        if at is None or (self._armed_for is not None and self._armed_for <= at):
            return
        if at <= now:
            self._due = True
        else:
            self._armed_for = at
            self._timers.set(at, TIMER)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def _obey(self, change: ChangeRole, now: int) -> None:
        who = type(self.policy).__name__
        if not isinstance(change, ChangeRole):
            raise PolicyError(f"{who} answered {change!r}; allowed: a sequence of ChangeRole")
        executor = int(change.executor)
        why_not = self.why_not(executor, change.role)
        if why_not is not None:
            raise PolicyError(f"{who} answered {change!r}, but {why_not}")
        self._change(executor, Role(change.role), who, now)

    def order(self, event: RoleChanged, now: int) -> bool:
        """What an operator wants: done, or recorded as refused; whether a role has changed."""
        why_not = self.why_not(event.executor, event.role)
        if why_not is not None:
            self._emit(Record(role_row(event.executor, "refused", f"{OPERATOR}: {event.role}: {why_not}", now)))
            return False
        self._change(event.executor, Role(event.role), OPERATOR, now)
        return True

    def why_not(self, executor: int, role: str) -> str | None:
        """Why this executor cannot have this role now, or None."""
        if executor not in self._fleet.roles:
            return f"there is no executor {executor}; there are {list(self._fleet.roles)}"
        if role not in list(Role):
            return f"{role!r} is no role; allowed: {', '.join(Role)}"
        if self._fleet.is_gone(executor):
            return f"executor {executor} is gone"
        if role in (Role.CONTEXT, Role.GENERATION) and not all(stage in self._routed for stage, _ in _NEEDED):
            return "context and generation phases have no routers of their own"
        after = {**self._fleet.roles, executor: Role(role)}
        for stage, what in _NEEDED:
            serving = [e for e, r in after.items() if r.serves(stage)]
            if not any(map(self._fleet.is_healthy, serving)):
                return f"no healthy executor would be left {what}"
        return None

    def _change(self, executor: int, role: Role, who: str, now: int) -> None:
        before = self._fleet.roles[executor]
        if role is before:
            return
        self._fleet.change_role(executor, role)
        self._emit(Send(executor, RoleChanged(executor, role.value)))
        self._emit(Record(role_row(executor, role.value, f"{who}: was {before.value}", now)))
        self.draining.pop(executor, None)
        count = Counter(self._stages_at(executor))
        foreign = sum(number for stage, number in count.items() if not role.serves(stage))
        if foreign:
            self.draining[executor] = foreign

    def answered(self, executor: int, stage: Stage, now: int) -> None:
        """A request of `stage` is over at an executor that is draining."""
        if self._fleet.roles[executor].serves(stage):
            return
        self.draining[executor] -= 1
        if not self.draining[executor]:
            del self.draining[executor]
            self._emit(Record(role_row(executor, "drained", None, now)))
