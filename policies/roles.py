"""Role policies: which executor serves what, while the cluster runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from random import Random
from typing import Any

from .interfaces import PolicyError, RolePolicy
from .parameters import number, one_of, whole
from .registry import register
from .views import FleetView
from .vocabulary import PS_PER_S, ChangeRole, Role

_KEYS = ("at_s", "executor", "role")


@register("scheduled", kind="roles", source="SGLang, live role switch by an operator (POST /pd_role_switch)")
class Scheduled(RolePolicy):
    """What an operator would order, by the clock: `changes` are (at_s, executor, role), of the run's start.

    Each is done at its time, or, where no request is there then, with the next arrival; one that cannot be done then, of an
    executor that is gone, is recorded as refused. The switch itself is SGLang's: new phases are routed by the new role at
    once, what the executor has it finishes, weights and KV pool stay as they are.
    """

    def __init__(self, *, rng: Random, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(rng=rng)
        if isinstance(changes, str) or not all(isinstance(each, Mapping) for each in changes):
            raise PolicyError(f"scheduled: changes must list mappings of at_s, executor and role, got {changes!r}")
        self._changes = sorted((_scheduled(each) for each in changes), key=lambda each: each[0])

    def change_roles(self, fleet: FleetView) -> Sequence[ChangeRole]:
        due = []
        while self._changes and self._changes[0][0] <= fleet.now:
            due.append(self._changes.pop(0)[1])
        return due

    def next_at(self, now: int) -> int | None:
        return self._changes[0][0] if self._changes else None


def _scheduled(change: Mapping[str, Any]) -> tuple[int, ChangeRole]:
    unknown = [key for key in change if key not in _KEYS]
    if unknown:
        guess = get_close_matches(unknown[0], _KEYS, 1)
        hint = f", did you mean {guess[0]!r}?" if guess else ";"
        raise PolicyError(f"scheduled: changes have no {unknown[0]!r}{hint} allowed: {', '.join(_KEYS)}")
    at = round(number("scheduled", "changes: at_s", change.get("at_s", 0)) * PS_PER_S)
    role = one_of("scheduled", "changes: role", change.get("role"), tuple(Role))
    return at, ChangeRole(whole("scheduled", "changes: executor", change.get("executor")), Role(role))
