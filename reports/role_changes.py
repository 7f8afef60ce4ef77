"""How executors' roles changed in a run: how often, how long old work took, and what everybody was in the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from .runs import Run

_REFUSED: Final = "refused"
_DRAINED: Final = "drained"


class RoleChanges(Struct, frozen=True):
    """`drains_s`: seconds from each change that left foreign work to the end of the last of it; a change that came before
    that end is not in it. `at_end` counts executors by role.
    """

    num_changes: int
    num_refused: int
    drains_s: tuple[float, ...]
    at_end: dict[str, int]

    @property
    def mean_drain_s(self) -> float | None:
        return sum(self.drains_s) / len(self.drains_s) if self.drains_s else None

    @property
    def roles_text(self) -> str:
        return ", ".join(f"{number} {role}" for role, number in self.at_end.items())


def role_changes_of(run: Run) -> RoleChanges | None:
    """None for a run in which no role was changed, and none refused."""
    decisions = run.columns("decisions", ["stage", "executor", "answer", "at_s"])
    rows = decisions[decisions["stage"] == "role"].sort_values("at_s", kind="stable")
    if not len(rows):
        return None
    roles = dict(run.roles)
    changed_at: dict[int, float] = {}
    drains: list[float] = []
    counts: Counter[str] = Counter()
    for executor, answer, at in zip(rows["executor"], rows["answer"], rows["at_s"]):
        executor, at = int(executor), float(at)
        if answer == _DRAINED:
            drains.append(at - changed_at[executor])
        elif answer == _REFUSED:
            counts[_REFUSED] += 1
        else:
            counts["changes"] += 1
            changed_at[executor] = at
            roles[executor] = str(answer)
    return RoleChanges(
        counts["changes"], counts[_REFUSED], tuple(drains), dict(sorted(Counter(roles.values()).items()))
    )
