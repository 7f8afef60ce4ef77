"""Short names for runs of one experiment, made of what tells them apart. Two configurations never get one name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Final

LONGEST: Final = 44  # characters of a policy's name; what a legend has room for


def plain(value: Any) -> str:
    """As a file of experiments would say it; floats as short as their value allows."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def flat_keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves as (dotted key, value); list elements go by their `name` or index."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat_keys(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            name = item.get("name", i) if isinstance(item, dict) else i
            yield from flat_keys(item, f"{prefix}.{name}")
    else:
        yield prefix, json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The shortest tail of each key that no other key shares."""
    parts = {key: key.split(".") for key in keys}
    short: dict[str, str] = {}
    for key, path in parts.items():
        for length in range(1, len(path) + 1):
            tail = path[-length:]
            if sum(other[-length:] == tail for other in parts.values()) == 1 or length == len(path):
                short[key] = ".".join(tail)
                break
    return short


def in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once: numbers by size and before the rest, others as they first came."""
    found = {json.dumps(value, sort_keys=True): value for value in values}.values()
    numbers = [value for value in found if _is_number(value)]
    return [*sorted(numbers), *(value for value in found if not _is_number(value))]


def policy_labels(policies: Sequence[Mapping[str, Any]], varying: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """A name of each section `policy` of a configuration, and what the names that had to be shortened stand for.

    `varying` are the dotted keys (`policy.router.name`) in which the sections differ. Sections that differ in them get
    different names: where the words alone would not do, they end in A, B, ...
    """
    keys = sorted(varying)
    flats = [dict(flat_keys(dict(policy), "policy")) for policy in policies]
    identities = [json.dumps([flat.get(key) for key in keys]) for flat in flats]
    words = {identity: _words(policy, keys) for identity, policy in zip(identities, policies)}
    told = {identity: _parameters(flat, keys) for identity, flat in zip(identities, flats)}
    shown = {identity: _shortened(words[identity], told[identity]) for identity in words}
    labels: dict[str, str] = {}
    for identity, label in shown.items():
        alike = [other for other, text in shown.items() if text == label]
        labels[identity] = f"{label} {_letter(alike.index(identity))}" if len(alike) > 1 else label
    for identity, label in labels.items():  # one that is called as another would be with its letter
        while sum(other == label for other in labels.values()) > 1:
            label += "'"
            labels[identity] = label
    full = {
        labels[identity]: _with(words[identity], told[identity])
        if told[identity]
        else ", ".join(f"{key} {plain(flat.get(key))}" for key in keys)
        for identity, flat in zip(identities, flats)
        if labels[identity] != _with(words[identity], told[identity])
    }
    return [labels[identity] for identity in identities], full


def _words(policy: Mapping[str, Any], varying: Sequence[str]) -> str:
    """The names that vary, else all routers: routers by name alone, others by kind and name, `roles none` if there is none."""
    kinds = [key for key in policy if {f"policy.{key}", f"policy.{key}.name"} & set(varying)]
    if not kinds:
        kinds = [key for key in policy if key.endswith("router")] or list(policy)
    names = {key: _name(policy[key]) for key in kinds}
    routers = [name for key, name in names.items() if key.endswith("router") and name]
    others = [f"{key.replace('_', ' ')} {name or 'none'}" for key, name in names.items() if not key.endswith("router")]
    return " + ".join([*dict.fromkeys(routers), *others]) or "default"


def _parameters(flat: Mapping[str, Any], varying: Sequence[str]) -> dict[str, Any]:
    found = {key: flat[key] for key in varying if flat.get(key) is not None}
    return {key: value for key, value in found.items() if key.count(".") > 1 and not _is_name(key)}


def _is_name(key: str) -> bool:
    return key.count(".") == 2 and key.endswith(".name")


def _with(words: str, parameters: Mapping[str, Any]) -> str:
    short = short_keys(parameters)
    extra = ", ".join(f"{short[key]}={plain(value)}" for key, value in parameters.items())
    return f"{words} ({extra})" if extra else words


def _shortened(words: str, parameters: Mapping[str, Any]) -> str:
    """At most `LONGEST` characters: lists of settings are counted, then parameters left out, then words."""
    if len(full := _with(words, parameters)) <= LONGEST:
        return full
    lists: dict[str, set[str]] = {}  # policy.roles.changes.0.at_s: the list changes has an element 0
    for key in parameters:
        if len(path := key.split(".")) > 4:
            lists.setdefault(path[2], set()).add(path[3])
    rest = {key: value for key, value in parameters.items() if key.count(".") < 4}
    counted = [f"{name}: {len(items)}" for name, items in lists.items()]
    if counted and not rest and len(short := f"{words} ({', '.join(counted)})") <= LONGEST:
        return short
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


def _letter(number: int) -> str:
    return ascii_uppercase[number] if number < len(ascii_uppercase) else str(number + 1)


def _name(choice: Any) -> str:
    """A policy's own name: `my_policy.py:Shortest` is `Shortest`."""
    name = str(choice.get("name") or "") if isinstance(choice, dict) else ""
    return name.rpartition(":")[2] if ".py:" in name else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
