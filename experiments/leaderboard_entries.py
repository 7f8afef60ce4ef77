"""Who is on the leaderboard: policies and the stages at which each decides, and the scenarios, which are experiment files.

A rule that its source states for one stage has a partner at the other: prefix and length rules choose the context executor,
with `least_kv` for the generation; rules of decode balance the other way about, after `least_tokens`. All others, and a
user's own, decide at every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from ..policies.interfaces import PolicyError
from ..policies.registry import KINDS, available, load
from . import leaderboard_kinds
from .config import Experiment, validate_mapping
from .config_loader import parse_document, read_document
from .config_workload import TraceDataset
from .errors import ConfigError, did_you_mean
from .experiment_file import load_experiment
from .traces import trace_path

SCENARIOS: Final = Path(__file__).resolve().parent / "scenarios"
CONTEXT_RULES: Final = frozenset(
    {
        "bounded_hash",
        "bucket",
        "cache_aware",
        "conversation",
        "kv_cache_aware",
        "kv_cost",
        "lmetric",
        "prefix_hash",
    }
)
GENERATION_RULES: Final = frozenset({"adaptive_decode", "least_kv", "remaining_steps"})
USES_MIXED: Final = frozenset({"conditional_dynamo", "conditional_llm_d", "conditional_tensorrt_llm", "mixed_pool"})
_USES_DOMAINS: Final = frozenset({"topology"})
_BASELINE: Final = "least_tokens"  # of clusters in which most would leave the mixed executors idle


# ---- policies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard. `choice` is the policy as an experiment file has it; `digest` that of a user's file."""

    label: str
    choice: dict[str, Any]
    source: str
    summary: str
    is_oracle: bool = False
    is_own: bool = False
    digest: str = ""
    kind: str = "routing"
    policy: type | None = None  # None for the row without any

    @property
    def name(self) -> str:
        return str(self.choice["name"])

    @property
    def partner(self) -> str:
        """Who decides at the other stage, in words; empty where it decides at every one."""
        if self.kind != "routing":
            return leaderboard_kinds.partner_of(self.kind, self.name)
        if self.name in CONTEXT_RULES:
            return "generation by least_kv"
        return "context by least_tokens" if self.name in GENERATION_RULES else ""

    def routers(self, config: Experiment) -> dict[str, Any]:
        """The routing keys of `policy` for the cluster of `config`."""
        roles = roles_of(config)
        if not roles & {"context", "generation"} or not (self.name in CONTEXT_RULES or self.name in GENERATION_RULES):
            return {"router": self.choice}
        found = {"context_router": self.choice, "generation_router": {"name": "least_kv"}}
        if self.name in GENERATION_RULES:
            found = {"context_router": {"name": "least_tokens"}, "generation_router": self.choice}
        return found

    def changes(self, config: Experiment, policy: dict[str, Any]) -> dict[str, Any]:
        """Dotted keys of the scenario's file and their values under this entry; `policy` is what it has of that name."""
        if self.kind != "routing":
            return leaderboard_kinds.changes_of(self.kind, self.choice, config, policy)
        return {"policy": {k: v for k, v in policy.items() if not k.endswith("router")} | self.routers(config)}

    def why_not(self, config: Experiment) -> str:
        """Why it has no place in this scenario; empty if it has one."""
        if self.kind != "routing":
            return leaderboard_kinds.why_not(self.kind, self.choice, self.policy)
        if self.is_own:
            return ""
        roles = roles_of(config)
        lends = self.name == "mixed_pool" and config.policy.roles is not None  # executors may become mixed
        if self.name in USES_MIXED and "mixed" not in roles and not lends:
            return "there are no mixed executors"
        idle = roles == {"context", "generation", "mixed"}
        if idle and self.name not in USES_MIXED and self.name != _BASELINE:
            return "it would leave the mixed executors idle"
        if self.name in _USES_DOMAINS and len(domains_of(config)) < 2:
            return "all executors are in one topology domain"
        return ""


def roles_of(config: Experiment) -> set[str]:
    cluster = config.cluster
    if cluster.instances is not None:
        return {instance.role for instance in cluster.instances}
    groups = {role: getattr(cluster, f"{role}_servers") for role in ("context", "generation", "mixed")}
    return {role for role, group in groups.items() if group is not None and group.num_instances}


def domains_of(config: Experiment) -> set[str]:
    return {instance.domain for instance in config.cluster.instances or ()}


def entries_of(asked: Sequence[str], kind: str = "routing") -> list[Entry]:
    """The policies to run: those named, or the whole catalogue of `kind` if none is; users' own files come on top of it.

    `asked`: names, `file.py:Class`, or mappings in YAML with a name and parameters. What a kind of policy is compared
    with where a run may do without one is always among them. Raises ConfigError.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"--kind {kind}: there is no such kind{did_you_mean(kind, KINDS)} (allowed: {', '.join(KINDS)})"
        )
    chosen = [_choice(text) for text in asked]
    own = [choice for choice in chosen if ".py:" in str(choice["name"])]
    named = [choice for choice in chosen if ".py:" not in str(choice["name"])]
    try:
        known = {info.name: info for info in available() if info.kind == kind and not _is_forced(info.policy)}
        for choice in named:
            name = str(choice["name"])
            if name not in known:
                if name.endswith(".py"):
                    raise ConfigError(f"--policy {name}: name the class too: {name}:MyPolicy")
                kinds = [info.kind.replace("_", " ") for info in available() if info.name == name]
                other = f"; {name} is a policy of {kinds[0]}" if kinds else did_you_mean(name, known)
                raise ConfigError(
                    f"--policy {name}: there is no {kind.replace('_', ' ')} policy of this name{other}"
                    f" (allowed: {', '.join(known)}, or path/to/file.py:Class)"
                )
        found = [
            Entry(
                _label(choice),
                choice,
                known[str(choice["name"])].source,
                known[str(choice["name"])].summary,
                bool(getattr(known[str(choice["name"])].policy, "is_oracle", False)),
                kind=kind,
                policy=known[str(choice["name"])].policy,
            )
            for choice in (named or [{"name": name} for name in known])
        ]
        if kind in leaderboard_kinds.WITHOUT:
            without = leaderboard_kinds.WITHOUT[kind]
            found.insert(0, Entry(leaderboard_kinds.NONE, {"name": leaderboard_kinds.NONE}, "", without, kind=kind))
        found += [_own(choice, kind) for choice in own]
    except PolicyError as error:
        raise ConfigError(f"--policy: {error}") from error
    labels = [entry.label for entry in found]
    doubles = sorted({label for label in labels if labels.count(label) > 1})
    if doubles:
        raise ConfigError(f"--policy {doubles[0]}: is given twice")
    return found


def _is_forced(policy: type) -> bool:
    """Whether it gives recorded answers; registered only where a replay was loaded."""
    return policy.__module__.startswith(str(__package__))


def _choice(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"name": text}
    value = parse_document(f"policy: {text}", f"--policy {text}").data["policy"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"--policy {text}: must have a name, e.g. {{name: power_of_two, d: 3}}")
    return value


def _own(choice: dict[str, Any], kind: str) -> Entry:
    file, _, class_name = str(choice["name"]).rpartition(":")
    path = Path(file).resolve()
    absolute = choice | {"name": f"{path}:{class_name}"}  # scenarios start their relative paths elsewhere
    policy = load(f"{path}:{class_name}", kind)
    summary = (policy.__doc__ or "").strip().split("\n")[0]
    digest = sha256(path.read_bytes()).hexdigest()
    is_oracle = bool(getattr(policy, "is_oracle", False))
    return Entry(_label(choice), absolute, path.name, summary, is_oracle, True, digest, kind, policy)


def _label(choice: dict[str, Any]) -> str:
    params = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "name")
    name = str(choice["name"])
    name = name.rpartition(":")[2] if ".py:" in name else name
    return f"{name} ({params})" if params else name


# ---- scenarios ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """An experiment file without its sweep. `data` are its plain values, `text` is the comment at its top."""

    name: str
    text: str
    file: Path
    experiment: Experiment
    data: dict[str, Any] = field(repr=False)

    def with_entry(self, entry: Entry) -> Experiment:
        """The scenario's experiment under `entry`. Raises ConfigError for parameters that the policy does not take."""
        changes = entry.changes(self.experiment, dict(self.data.get("policy") or {}))

        def edit(document: Any) -> None:
            for key in ("sweep", "plan"):
                document.data.pop(key, None)
            for dotted, value in changes.items():
                document.set(dotted, value, f"--policy {entry.label}")

        return load_experiment(self.file, backend="simulation", edit=edit).experiment


def shipped() -> dict[str, Path]:
    """The scenarios of the package by name."""
    return {path.stem: path for path in sorted(SCENARIOS.glob("*.yaml"))}


def scenarios_of(asked: Sequence[str]) -> tuple[list[Scenario], list[str]]:
    """The scenarios by name or file, all shipped ones if none is asked for; and lines about those that are left out.

    A shipped scenario whose trace is not there is left out, unless it was asked for. Raises ConfigError.
    """
    known = shipped()
    found: list[Scenario] = []
    left_out: list[str] = []
    for name in dict.fromkeys(asked or known):
        path = known.get(name, Path(name))
        if name not in known and path.suffix not in (".yaml", ".yml"):
            raise ConfigError(
                f"--scenario {name}: there is no such scenario{did_you_mean(name, known)}"
                f" (allowed: {', '.join(known)}, or an experiment file, .yaml)"
            )
        missing = "" if asked else _missing_trace(path)
        if missing:
            left_out.append(f"{name}: {missing}")
            continue
        found.append(_scenario(path))
    doubles = [s.name for s in found if sum(s.name == other.name for other in found) > 1]
    if doubles:
        raise ConfigError(f"--scenario: two scenarios are named {doubles[0]}")
    return found, left_out


def _missing_trace(path: Path) -> str:
    """What there is to say of a trace that is not there; empty where none is needed or it is found."""
    dataset = validate_mapping(read_document(path).data, {}).workload.dataset
    if isinstance(dataset, TraceDataset):
        try:
            trace_path(dataset, path.parent)
        except ConfigError as error:
            return str(error)
    return ""


def text_of(path: Path) -> str:
    """The comment at the top of an experiment file, as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def _scenario(path: Path) -> Scenario:
    document = read_document(path)

    def edit(loaded: Any) -> None:
        for key in ("sweep", "plan"):
            loaded.data.pop(key, None)

    experiment = load_experiment(path, backend="simulation", edit=edit).experiment
    slo = experiment.slo
    if slo is None or (slo.ttft_ms is None and slo.tpot_ms is None and slo.e2e_ms is None):
        raise ConfigError(f"{path}: slo: a scenario needs objectives; allowed: ttft_ms, tpot_ms, e2e_ms or a preset")
    return Scenario(experiment.name, text_of(path), path, experiment, document.data)
