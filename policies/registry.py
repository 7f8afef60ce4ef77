"""Where policies are found: registered here by name, by an installed package's entry point, or in a user's own file.

A file is named `path/to/file.py:Class`. Its code runs with the rights of whoever runs the experiment.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple, TypeVar

from .interfaces import (
    AdmissionPolicy,
    BatchPolicy,
    CapacityPolicy,
    MigrationPolicy,
    PolicyError,
    QueueOrder,
    RolePolicy,
    RoutingPolicy,
)

ENTRY_POINT_GROUP: Final = "disagg.policies"
KINDS: Final[dict[str, type]] = {
    "routing": RoutingPolicy,
    "admission": AdmissionPolicy,
    "queue_order": QueueOrder,
    "batching": BatchPolicy,
    "capacity": CapacityPolicy,
    "roles": RolePolicy,
    "migration": MigrationPolicy,
}
_BUILT_IN: Final = (  # modules beside this one
    "routing",
    "routing_buckets",
    "routing_conditional",
    "routing_hash",
    "routing_memory",
    "routing_oracle",
    "routing_pools",
    "routing_predicted",
    "routing_prefix",
    "routing_scorers",
    "routing_topology",
    "admission",
    "queue_order",
    "batching",
    "capacity",
    "migration",
    "roles",
    "roles_planning",
    "roles_pools",
)

C = TypeVar("C", bound=type)


class PolicyInfo(NamedTuple):
    name: str
    kind: str
    source: str  # where the rule comes from
    summary: str  # first line of its docstring
    policy: type


_registry: dict[tuple[str, str], PolicyInfo] = {}


def register(name: str, *, kind: str, source: str) -> Callable[[C], C]:
    """Class decorator: make a policy known by `name` among those of `kind` (a key of `KINDS`)."""

    def add(policy: C) -> C:
        if (kind, name) in _registry:
            raise PolicyError(f"a {kind} policy named {name!r} is registered already")
        told = (policy.__doc__ or "").strip()
        _registry[kind, name] = PolicyInfo(name, kind, source, told.split("\n")[0], policy)
        policy.__doc__ = f"{told}\n\n    Source: {source}."  # so that `help` has both
        return policy

    return add


def available() -> list[PolicyInfo]:
    """Every policy that can be named in an experiment file, by kind and name.

    A built-in name wins over an entry point's. PolicyError names an entry point that cannot be loaded.
    """
    _import_built_in()
    found = dict(_registry)
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        info = _load_entry_point(entry)
        found.setdefault((info.kind, info.name), info)
    return [found[key] for key in sorted(found)]


def load(name: str, kind: str, root: str = ".") -> type:
    """The policy class called `name`; a relative file path starts at `root`. PolicyError says what there is instead."""
    if ".py:" in name:
        return _load_file(name, kind, root)
    _import_built_in()
    known = _registry.get((kind, name))  # before the entry points: to look through those takes milliseconds
    if known is not None:
        return known.policy
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        info = _load_entry_point(entry)
        if info.kind == kind:
            return info.policy
    names = [info.name for info in available() if info.kind == kind]
    guess = difflib.get_close_matches(name, names, 1)
    hint = f", did you mean {guess[0]!r}?" if guess else "."
    raise PolicyError(
        f"there is no {_said(kind)} policy {name!r}{hint}{_elsewhere(name, kind)}"
        f" Available: {', '.join(names)}, or path/to/file.py:Class"
    )


def _said(kind: str) -> str:
    return {"roles": "role", "queue_order": "queue order"}.get(kind, kind)


def _elsewhere(name: str, kind: str) -> str:
    """What a name that is unknown here may have been meant as."""
    if name.endswith(".py"):
        return f" A file's class is part of its name: {name}:MyPolicy."
    others = [info.kind for info in available() if info.name == name and info.kind != kind]
    return f" {name!r} is of another kind: {', '.join(map(_said, others))}." if others else ""


def create(name: str, kind: str, params: dict[str, Any], *, seed: str, root: str = ".") -> Any:
    """An instance, with a generator of its own seeded by `seed`. PolicyError if it does not take these parameters."""
    policy = load(name, kind, root)
    try:
        inspect.signature(policy).bind(rng=None, **params)
    except TypeError as error:
        allowed = [p for p in inspect.signature(policy).parameters if p != "rng"]
        raise PolicyError(
            f"{_said(kind)} policy {name!r}: {error}. It takes: {', '.join(allowed) or 'no parameters'}"
        ) from None
    return policy(rng=Random(seed), **params)


@cache
def _import_built_in() -> None:
    """Once: a cluster of a thousand executors asks for thousands of policies."""
    for module in _BUILT_IN:
        importlib.import_module(f".{module}", __package__)


def _load_entry_point(entry: metadata.EntryPoint) -> PolicyInfo:
    source = f"package {entry.dist.name}" if entry.dist else "an installed package"
    try:
        policy = entry.load()
    except Exception as error:
        raise PolicyError(
            f"policy {entry.name!r} of {source}: {entry.value} could not be imported: {type(error).__name__}: {error}"
        ) from error
    summary = (getattr(policy, "__doc__", None) or "").strip().split("\n")[0]
    return PolicyInfo(entry.name, _kind_of(policy), source, summary, policy)


def _load_file(name: str, kind: str, root: str) -> type:
    file, _, class_name = name.rpartition(":")
    path = Path(root, file).resolve()
    if not path.is_file():
        raise PolicyError(f"{name!r}: there is no file {path}")
    module_name = f"disagg_user_policy_{path.stem}_{abs(hash(str(path)))}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise PolicyError(f"{name!r}: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise PolicyError(f"{name!r}: {path} could not be imported: {type(error).__name__}: {error}") from error
    policy = getattr(module, class_name, None)
    if not isinstance(policy, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name]
        raise PolicyError(f"{name!r}: {path} has no class {class_name!r}; its classes: {', '.join(classes) or 'none'}")
    if not issubclass(policy, KINDS[kind]):
        raise PolicyError(f"{name!r} is no {kind} policy: it must derive from {KINDS[kind].__name__}")
    return policy


def _kind_of(policy: Any) -> str:
    for kind, base in KINDS.items():
        if isinstance(policy, type) and issubclass(policy, base):
            return kind
    raise PolicyError(f"{policy!r} derives from none of {', '.join(base.__name__ for base in KINDS.values())}")
