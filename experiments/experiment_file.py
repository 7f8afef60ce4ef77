"""From an experiment file and its overrides to checked experiments, one per point of its sweep.

Every problem is reported, each on one line that leads with file, line and column (or with the `--set` to blame) and
names the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from .config import Experiment, validate_mapping
from .config_checks import Problem, check_experiment
from .config_loader import KEY_ALIASES, Document, KeyPath, parse_override, read_document
from .errors import ConfigError, ResourceError, did_you_mean
from .set_paths import from_working_folder

MAX_POINTS: Final = 10_000


@dataclass(frozen=True)
class SweepPoint:
    """One combination of swept values: `name` is its folder, empty when there is no sweep."""

    name: str
    values: dict[str, Any]
    experiment: Experiment


@dataclass(frozen=True)
class LoadedExperiment:
    """A checked experiment file. `points` has at least one element; `warnings` are lines for the user."""

    file: Path
    experiment: Experiment
    points: tuple[SweepPoint, ...]
    warnings: tuple[str, ...] = field(default=())


def load_experiment(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    backend: str | None = None,
    seed: int | None = None,
    edit: Callable[[Document], None] | None = None,
) -> LoadedExperiment:
    """Read, override and check `file`; `overrides` have the form `key.path=value`, later ones win. `edit` comes last.

    A relative path in `file` starts at its folder, one in `overrides` at the working folder if it leads to something there.
    Raises `ConfigError` with a line per problem, `ResourceError` when only memory is the trouble.
    """
    document = read_document(file)
    root = file.resolve().parent
    for text in overrides:
        key, value = parse_override(text)
        place = f"--set {text}"
        document.set(key, from_working_folder(key, value, root, place), place)
    if backend is not None:
        document.set("backend", backend, f"--backend {backend}")
    if seed is not None:
        document.set("seed", seed, f"--seed {seed}")
    if edit is not None:
        edit(document)
    warnings: list[str] = []
    experiment = _check(document, root, warnings)
    points = tuple(_points(document, experiment, root, warnings))
    return LoadedExperiment(file, experiment, points, tuple(dict.fromkeys(warnings)))


def _check(document: Document, root: Path, warnings: list[str]) -> Experiment:
    keys_by_id: dict[int, list[str]] = {}
    try:
        experiment = validate_mapping(document.data, keys_by_id)
    except ValidationError as error:
        raise ConfigError(*_told(error, document, keys_by_id)) from None
    experiment._root = root
    problems = check_experiment(experiment)
    warnings += [f"{document.problem(p.path, p.message)}" for p in problems if p.severity == "warning"]
    errors = [p for p in problems if p.severity != "warning"]
    if errors:
        lines = [document.problem(p.path, p.message) for p in errors]
        raise (ResourceError if all(p.severity == "resource" for p in errors) else ConfigError)(*lines)
    if experiment.slo is not None:  # from here on everyone sees objectives, never a preset's name
        experiment = experiment.model_copy(update={"slo": experiment.slo.resolved()})
    return experiment


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def _points(document: Document, base: Experiment, root: Path, warnings: list[str]) -> Iterator[SweepPoint]:
    if not base.sweep:
        yield SweepPoint("", {}, base)
        return
    count = 1
    for values in base.sweep.values():
        count *= len(values)
    if count > MAX_POINTS:
        raise ConfigError(document.problem(("sweep",), f"{count} points; allowed: up to {MAX_POINTS}"))
    labels = _labels(list(base.sweep))
    names: set[str] = set()
    for combination in product(*base.sweep.values()):
        chosen = dict(zip(base.sweep, combination, strict=True))
        point = document.copy()
        point.data.pop("sweep", None)
        for key, value in chosen.items():
            if KEY_ALIASES.get(key, key).split(".")[0] in ("sweep", "repeats", "backend", "schema_version", "name"):
                raise ConfigError(document.problem(("sweep", key), "cannot be swept"))
            place = f"{document.place(('sweep', key))}: sweep {key}={value!r}"
            point.set(key, value, place)
        name = _point_name({labels[key]: value for key, value in chosen.items()}, names)
        names.add(name)
        yield SweepPoint(name, chosen, _check(point, root, warnings))


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each key path that tells it from the others; a final `.name` goes without saying."""
    paths = {key: (key.removesuffix(".name") if "." in key else key).split(".") for key in keys}
    labels = {key: path[-1] for key, path in paths.items()}
    for length in range(2, 1 + max(len(path) for path in paths.values())):
        taken = list(labels.values())
        for key, label in labels.items():
            if taken.count(label) > 1:
                labels[key] = ".".join(paths[key][-length:])
    return labels if len(set(labels.values())) == len(labels) else {key: key for key in keys}


def _point_name(values: dict[str, Any], taken: set[str]) -> str:
    """A folder name such as `context_router=least_tokens,rate=4`; unusual characters become `_`, doubles get a number."""
    text = ",".join(f"{label}={_plain(value)}" for label, value in values.items())
    name = re.sub(r"[^A-Za-z0-9._,=+-]", "_", text)
    if len(name) > 150:
        name = f"{name[:130]}-{sha256(text.encode()).hexdigest()[:12]}"
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):  # a data set: its file says what type it is of
            others = {key: item for key, item in value.items() if key not in ("path", "type")}
            return "+".join([Path(value["path"]).stem, *([_plain(others)] if others else [])])
        return "+".join(_plain(item) if key == "name" else f"{key}-{_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "+".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # null, true and false, as the file says it
    if isinstance(value, str) and ".py:" in value:
        return value.rpartition(":")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- telling what pydantic found ------------------------------------------------------------------------------------


def _told(error: ValidationError, document: Document, keys_by_id: dict[int, list[str]]) -> list[str]:
    lines: list[str] = []
    for item in error.errors(include_url=False):
        path = _data_path(item["loc"], document.data, str(item["type"]))
        message = _message(dict(item), path, document, keys_by_id)
        line = document.problem(path, message)
        if line not in lines:
            lines.append(line)
    return lines


def _data_path(loc: Sequence[str | int], data: Any, kind: str) -> KeyPath:
    """The path in the file for pydantic's `loc`, which also names the union members it went through."""
    path: KeyPath = ()
    node = data
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and (key in node or (last and kind == "missing")):
            path = (*path, key)
            node = node.get(str(key))
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            path = (*path, key)
            node = node[key]
    return path


_KINDS: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}


def _message(item: dict[str, Any], path: KeyPath, document: Document, keys_by_id: dict[int, list[str]]) -> str:
    kind: str = item["type"]
    context: dict[str, Any] = item.get("ctx") or {}
    shown = _short(item.get("input"))
    if path and path[0] == "faults" and kind == "too_long":
        return "fault injection is not available yet; allowed: []"
    if kind == "missing":
        return "required key is missing"
    if kind == "extra_forbidden" and path[:2] == ("workload", "phases") and path[-1] in ("rate", "concurrency"):
        phase = _at(document.data, path[:-1])
        both = "rate and concurrency exclude each other; " if "rate" in phase and "concurrency" in phase else ""
        return f"{both}a phase of type {phase.get('type')} has no {path[-1]}"
    if kind == "extra_forbidden":
        allowed = keys_by_id.get(id(_at(document.data, path[:-1])), [])
        listing = f" (allowed: {', '.join(allowed)})" if allowed else ""
        return f"unknown key '{path[-1]}'{did_you_mean(str(path[-1]), allowed)}{listing}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {shown}"
    if kind in ("literal_error", "union_tag_invalid"):
        tag = kind == "union_tag_invalid"
        expected = context.get("expected_tags" if tag else "expected", "")
        words = re.findall(r"'([^']*)'", expected) or [expected]
        given = str(context.get("tag") if tag else item.get("input"))
        where = " type" if tag else ""
        return f"{where} must be one of {', '.join(words)}, not {_short(given)}{did_you_mean(given, words)}".strip()
    if kind == "union_tag_not_found":
        return f"must be a mapping with a 'type' key, not {shown}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words_of = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    if kind in bounds:
        bound = bounds[kind]
        return f"must be {words_of[bound]} {context.get(bound):g}, not {shown}"
    if kind in ("too_short", "string_too_short"):
        return f"must not be empty (at least {context.get('min_length')})"
    if kind in ("too_long", "string_too_long"):
        return f"too long: allowed are up to {context.get('max_length')}"
    if kind == "string_pattern_mismatch":
        return f"must start with a letter or digit and hold only letters, digits, spaces and . _ + -, not {shown}"
    return f"{item['msg']}, not {shown}"


def _at(node: Any, path: KeyPath) -> Any:
    for key in path:
        node = node[key]
    return node


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


__all__ = ["LoadedExperiment", "Problem", "SweepPoint", "load_experiment"]
