"""Policies on the leaderboard that do not route: where each stands in a scenario's file, and what it is compared with.

Whoever routes in the scenario goes on routing, and only the policy of that kind is another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from .config import Experiment

_IN_POLICY: Final = frozenset({"admission", "queue_order", "roles", "migration"})  # keys of `policy`
_IN_SCHEDULER: Final = frozenset({"queue_order", "batching", "capacity"})  # keys of an executor's `scheduler`
NONE: Final = "none"
WITHOUT: Final = {  # what a run without such a policy does, as a row of the board
    "roles": "Every executor keeps the role that the file gives it.",
    "migration": "Every request stays where it is.",
}
_OWN_ROUTER: Final = {("roles", "mixed_pool"): "mixed_pool"}  # one that sends work to what is lent


def partner_of(kind: str, name: str) -> str:
    """Who routes in place of the scenario's router, in words; empty where that one does."""
    router = _OWN_ROUTER.get((kind, name))
    return f"router {router}" if router else ""


def changes_of(kind: str, choice: Mapping[str, Any], config: Experiment, policy: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of the scenario's file and their values; `policy` is its mapping of that name."""
    name, given = str(choice["name"]), dict(choice)
    found: dict[str, Any] = {}
    if kind in _IN_POLICY:
        changed = policy | {kind: None if name == NONE and kind in WITHOUT else given}
        router = _OWN_ROUTER.get((kind, name))
        if router is not None:
            changed = {key: value for key, value in changed.items() if not key.endswith("router")}
            changed["router"] = {"name": router}
        found["policy"] = changed
    if kind in _IN_SCHEDULER:
        value = name if kind == "capacity" else given
        cluster = config.cluster
        groups = [key for key in ("context_servers", "generation_servers", "mixed_servers") if getattr(cluster, key)]
        places = groups if cluster.instances is None else [f"instances.{i}" for i in range(len(cluster.instances))]
        found |= {f"cluster.{place}.scheduler.{kind}": value for place in places}
    return found


def why_not(kind: str, choice: Mapping[str, Any], policy: type | None) -> str:
    """Why it cannot run as it is given; empty if it can."""
    if (kind, choice["name"]) == ("roles", "scheduled") and "changes" not in choice:
        return "it does what an operator orders: give it changes"
    if policy is None:
        return ""
    parameters = inspect.signature(policy).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name != "rng" and p.name not in choice]
    return f"it needs {', '.join(missing)}" if missing else ""
