"""Reading YAML into plain values that remember their line and column.

Refused: duplicate keys, anchors and aliases, tags, merge keys, nesting over 40 levels, files over 1 MiB, bytes that are
not UTF-8, and anything but one mapping. Scalars follow YAML 1.2's core schema (`1e6` is a number, `yes` a string).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from .errors import ConfigError, did_you_mean

MAX_FILE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 40

KeyPath = tuple[str | int, ...]

# The words of other projects for our keys; whoever writes them gets the same experiment.
KEY_ALIASES: Final = {
    "prefill_servers": "context_servers",
    "decode_servers": "generation_servers",
    "prefill_router": "context_router",
    "decode_router": "generation_router",
}


class _Loader(yaml.SafeLoader):
    """A safe loader without anchors, aliases and YAML 1.1's surprising scalars (`on`, `1:30`, dates)."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        refused = ""
        if isinstance(event, yaml.AliasEvent):
            refused = f"alias *{event.anchor} is not allowed; write the value out"
        elif getattr(event, "anchor", None) is not None:
            refused = f"anchor &{event.anchor} is not allowed; write the value out"
        elif getattr(event, "tag", None) is not None:
            refused = f"tag {event.tag} is not allowed"
        elif self.depth >= MAX_DEPTH:
            refused = f"nested more than {MAX_DEPTH} levels deep"
        if refused:
            raise yaml.MarkedYAMLError(problem=refused, problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML version would read as something other than a string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]{1,30}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))
    return text


@dataclass
class Document:
    """A parsed file: `data` (dict, list, scalars) and where each key path began.

    `places` maps a key path to the text that leads an error about it: `file:line:column`, or the `--set` that wrote it.
    """

    name: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def copy(self) -> Document:
        return Document(self.name, deepcopy(self.data), dict(self.places))

    def place(self, path: KeyPath) -> str:
        """Where `path`, or the nearest of its parents that was written, stands."""
        for end in range(len(path), -1, -1):
            found = self.places.get(path[:end])
            if found is not None:
                return found
        return self.name

    def show(self, path: KeyPath) -> str:
        """The dotted form of `path`, with named list elements by their name."""
        words: list[str] = []
        node: Any = self.data
        for key in path:
            word = str(key)
            if isinstance(node, list) and isinstance(key, int) and 0 <= key < len(node):
                node = node[key]
                if isinstance(node, dict) and isinstance(node.get("name"), str):
                    word = node["name"]
            elif isinstance(node, dict):
                node = node.get(key)
            else:
                node = None
            words.append(word)
        return ".".join(words) or "(whole file)"

    def problem(self, path: KeyPath, message: str) -> str:
        """One line: place, key path, what is wrong."""
        return f"{self.place(path)}: {self.show(path)}: {message}"

    def set(self, dotted: str, value: Any, place: str) -> None:
        """Write `value` at `dotted`, making mappings on the way; errors about it will name `place`.

        A list element is addressed by its `name` (or its index). Raises `ConfigError` when there is no such element.
        """
        keys = [KEY_ALIASES.get(key, key) for key in dotted.split(".")]
        if not all(keys):
            raise ConfigError(f"{place}: '{dotted}' is not a key path; allowed: keys joined by single dots")
        node: Any = self.data
        path: KeyPath = ()
        for position, key in enumerate(keys):
            last = position == len(keys) - 1
            if isinstance(node, list):
                index = self._element(node, key, path, place)
                path = (*path, index)
                if last:
                    node[index] = value
                else:
                    node = node[index]
            elif isinstance(node, dict):
                path = (*path, key)
                if last:
                    node[key] = value
                else:
                    child = node.get(key)
                    if isinstance(child, str):  # a policy written as its bare name
                        child = {"name": child}
                    elif not isinstance(child, dict | list):
                        if child is not None:
                            raise ConfigError(
                                f"{place}: {self.show(path)} is {child!r}, which has no keys; allowed: set it as a whole"
                            )
                        child = {}
                    node[key] = child
                    node = child
            else:
                raise ConfigError(f"{place}: {self.show(path)} has no keys below it")
        for old in [p for p in self.places if p[: len(path)] == path]:
            del self.places[old]
        self.places[path] = place

    def _element(self, node: list[Any], key: str, path: KeyPath, place: str) -> int:
        names = [item.get("name") if isinstance(item, dict) else None for item in node]
        if key in names:
            return names.index(key)
        if key.isdigit() and int(key) < len(node):
            return int(key)
        known = [name for name in names if isinstance(name, str)] or [str(i) for i in range(len(node))]
        raise ConfigError(
            f"{place}: {self.show(path)} has no element '{key}'{did_you_mean(key, known)}"
            f" (allowed: {', '.join(known) or 'none, the list is empty'})"
        )


def _build(node: yaml.Node, path: KeyPath, document: Document, problems: list[str]) -> Any:
    document.places.setdefault(path, _at(document.name, node.start_mark))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = _at(document.name, key_node.start_mark)
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                problems.append(f"{here}: {document.show(path)}: a key must be a word, not {key!r}")
                continue
            key = KEY_ALIASES.get(key, key)
            child = (*path, key)
            if key in mapping:
                problems.append(f"{here}: {'.'.join(map(str, child))}: duplicate key '{key}'")
                continue
            document.places[child] = here
            mapping[key] = _build(value_node, child, document, problems)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), document, problems) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{_at(document.name, node.start_mark)}: a node of unknown kind")
    return _scalar(node)


def _at(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"


def parse_document(text: str, name: str) -> Document:
    """Parse `text`; `name` leads error lines. Raises `ConfigError` with a line for each problem."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_at(name, mark)}: {error.problem or error.context or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}:1:1: must be a mapping of keys to values (schema_version, name, model, …)")
    document = Document(name, {})
    problems: list[str] = []
    document.data = _build(node, (), document, problems)
    if problems:
        raise ConfigError(*problems)
    return document


def read_document(path: Path) -> Document:
    """Read and parse a file. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, the limit for an experiment file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{path}:{line}:{column}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    return parse_document(text, str(path))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`; the value is read as YAML. Raises `ConfigError`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: must have the form key.path=value")
    document = parse_document(f"value: {value}", f"--set {text}")
    if set(document.data) != {"value"}:
        raise ConfigError(f"--set {text}: the value must be a single YAML value")
    return key.strip(), document.data["value"]


def dump_yaml(data: Mapping[str, Any] | Sequence[Any]) -> str:
    """Plain values as YAML text, keys in the order given."""

    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
