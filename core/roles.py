"""Which executor serves what, while the cluster runs: who may change it, and what is left of an earlier role.

A change takes effect at once for whatever is routed from then on; what an executor was sent before it finishes, and the
fleet's view counts that as draining. Knows the fleet and how much of what each executor owes an answer for, no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from types import MappingProxyType
from typing import Final

from ..policies.interfaces import PolicyError, RolePolicy
from ..policies.vocabulary import ChangeRole, Request, Role, Stage, plain_integer
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

    def woken(self, at: int) -> None:
        """A timer's instant has come; it counts if it is the one that `next_at` named last."""
        if at == self._armed_for:
            self._armed_for = None
            self._due = True

    def ask(self, now: int, is_busy: bool) -> bool:
        """Ask the policy, if it is time; whether a role has changed. `is_busy`: there are requests, to ask for again."""
        if not self._due or self.policy is None:
            return False
        self._due = False
        changes = self.policy.change_roles(self._fleet.at(now))
        if not isinstance(changes, Sequence):
            raise PolicyError(f"{type(self.policy).__name__} answered {changes!r}; allowed: a sequence of ChangeRole")
        have_changed = [self._obey(change, now) for change in changes]
        if is_busy:
            self._arm(now)
        return any(have_changed)

    def _arm(self, now: int) -> None:
        """One timer for the next instant that the policy names; it stops with the last request, for a run to end."""
        at = None if self.policy is None else self.policy.next_at(now)
        if at is None:
            return
        at = plain_integer(at, f"{type(self.policy).__name__}.next_at")
        if self._armed_for is not None and self._armed_for <= at:
            return
        if at <= now:
            self._due = True
        else:
            self._armed_for = at
            self._timers.set(at, TIMER, at)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def _obey(self, change: ChangeRole, now: int) -> bool:
        """Do what the policy wants. PolicyError for what can never be; what cannot be now is recorded as refused."""
        who = type(self.policy).__name__
        if not isinstance(change, ChangeRole):
            raise PolicyError(f"{who} answered {change!r}; allowed: a sequence of ChangeRole")
        executor = plain_integer(change.executor, change)
        never = self._why_never(executor, change.role)
        if never is not None:
            raise PolicyError(f"{who} answered {change!r}, but {never}")
        return self._order(executor, change.role, who, now)

    def order(self, event: RoleChanged, now: int) -> bool:
        """What an operator wants: done, or recorded as refused; whether that changed anything."""
        return self._order(event.executor, event.role, OPERATOR, now)

    def _order(self, executor: int, role: str, who: str, now: int) -> bool:
        why_not = self._why_never(executor, role) or self._why_not_now(executor, Role(role))
        if why_not is not None:
            self._emit(Record(role_row(executor, "refused", f"{who}: {role}: {why_not}", now)))
            return False
        self._change(executor, Role(role), who, now)
        return True

    def _why_never(self, executor: int, role: str) -> str | None:
        """Why this executor can never have this role, whatever becomes of the others, or None."""
        if executor not in self._fleet.roles:
            return f"there is no executor {executor}; there are {list(self._fleet.roles)}"
        if role not in list(Role):
            return f"{role!r} is no role; allowed: {', '.join(Role)}"
        if role in (Role.CONTEXT, Role.GENERATION) and not all(stage in self._routed for stage, _ in _NEEDED):
            return "context and generation phases have no routers of their own"
        return None

    def _why_not_now(self, executor: int, role: Role) -> str | None:
        if self._fleet.is_gone(executor):
            return f"executor {executor} is gone"
        after = {**self._fleet.roles, executor: role}
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
