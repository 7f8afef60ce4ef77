"""Changes of roles that a file announces: whether they can be done, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..policies.vocabulary import Role, Stage
from .cluster import executor_groups
from .config import Experiment

Found = tuple[tuple[str | int, ...], str, Literal["error", "warning"]]
_PATH = ("policy", "roles")


def check_roles(config: Experiment) -> Iterator[Found]:
    """Of a role policy that was created without an error: place, message and severity of what is wrong with its use."""
    policy = config.policy
    if policy.roles is None:
        return
    if policy.roles.name == "mixed_pool" and (policy.router is None or policy.router.name != "mixed_pool"):
        yield (
            _PATH,
            "roles mixed_pool is meant with router: mixed_pool: no other router sends a phase to what was lent only when its"
            " own pool has no room",
            "warning",
        )
    if policy.roles.name == "scheduled":
        yield from _scheduled(config)


def _scheduled(config: Experiment) -> Iterator[Found]:
    """The changes in the order of their times, on the roles as they then are."""
    roles = {number: role for number, (role, *_) in enumerate(executor_groups(config.cluster), start=1)}
    changes = list((config.policy.roles.params if config.policy.roles else {}).get("changes") or ())
    if not changes:
        yield _PATH, "no changes are given: roles stay as they are", "warning"
    for number, change in sorted(enumerate(changes), key=lambda each: float(each[1].get("at_s", 0))):
        path = (*_PATH, "changes", number)
        executor = change["executor"]
        if executor not in roles:
            yield (
                (*path, "executor"),
                f"there is no executor {executor}; allowed: {', '.join(map(str, roles))}",
                "error",
            )
            continue
        roles[executor] = Role(change["role"])
        for stage, what in ((Stage.CONTEXT, "to compute prompts"), (Stage.GENERATION, "to generate")):
            if not any(role.serves(stage) for role in roles.values()):
                yield (
                    (*path, "role"),
                    f"with executor {executor} {change['role']} from {float(change.get('at_s', 0)):g} s on, no executor is"
                    f" left {what}; allowed: changes that leave one for each",
                    "error",
                )
                return
