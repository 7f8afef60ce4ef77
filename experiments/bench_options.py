"""The options of `disagg bench cluster`: each overrides keys of the experiment file, and errors name the option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .config_loader import Document
from .errors import ConfigError

_GROUPS: Final = (("context_servers", "context"), ("generation_servers", "generation"), ("mixed_servers", "mixed"))
_DATASET_TYPES: Final = {".csv": "azure", ".jsonl": "mooncake", ".json": "tensorrt_llm"}
SCHEDULER_POLICIES: Final = ("guaranteed_no_evict", "max_utilization")


@dataclass(frozen=True)
class BenchOptions:
    """None leaves what the file says. Per-instance values are a text: one value for all, or one each, with commas.

    Instances count as in the file's `instances`, else context, generation, then mixed servers.
    """

    request_rate: float | None = None
    concurrency: int | None = None
    poisson_delays: bool | None = None
    streaming: bool | None = None
    max_samples: int | None = None
    max_prompt_length: int | None = None
    eos_id: int | None = None
    max_batch_size: str | None = None
    max_num_tokens: str | None = None
    kv_fraction: str | None = None
    kv_max_tokens: str | None = None
    kv_reuse: bool | None = None
    chunked_context: str | None = None
    scheduler_policy: str | None = None
    dataset: Path | None = None
    dataset_type: str | None = None

    def check(self) -> None:
        """Raise ConfigError for options that no file could put right."""
        if self.request_rate is not None and self.concurrency is not None:
            raise ConfigError("--request-rate and --concurrency exclude each other; allowed: one of them")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ConfigError(
                f"--request-rate {self.request_rate:g}: must be more than 0; allowed for all at once: --concurrency with"
                " the number of samples"
            )
        if self.concurrency is not None and self.poisson_delays is not None:
            raise ConfigError("--poisson-delays concerns a request rate, and --concurrency has none")
        for name in ("concurrency", "max_samples", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.scheduler_policy is not None and self.scheduler_policy not in SCHEDULER_POLICIES:
            raise ConfigError(
                f"--scheduler-policy {self.scheduler_policy}: must be one of {', '.join(SCHEDULER_POLICIES)}"
            )
        if self.dataset_type is not None and self.dataset is None:
            raise ConfigError("--dataset-type needs --dataset")
        if self.dataset is not None and not self.dataset.is_file():
            raise ConfigError(f"--dataset {self.dataset}: there is no such file")

    def apply(self, document: Document) -> None:
        """Write the overrides into `document`. Raises ConfigError naming an option that cannot be applied."""
        self.check()
        self._dataset(document)
        self._load(document)
        if self.streaming is not None:
            document.set("workload.streaming", self.streaming, _flag("streaming", self.streaming))
        if self.max_prompt_length is not None:
            place = f"--max-prompt-length {self.max_prompt_length}"
            document.set("workload.max_prompt_tokens", self.max_prompt_length, place)
        if self.eos_id is not None:
            document.set("sampling.end_id", None if self.eos_id < 0 else self.eos_id, f"--eos-id {self.eos_id}")
        for option, key, text in (
            ("max-batch-size", "scheduler.max_batch_size", self.max_batch_size),
            ("max-num-tokens", "scheduler.max_num_tokens", self.max_num_tokens),
            ("kv-fraction", "kv_cache.free_gpu_memory_fraction", self.kv_fraction),
            ("kv-max-tokens", "kv_cache.max_tokens", self.kv_max_tokens),
            ("chunked-context", "scheduler.chunked_context", self.chunked_context),
            ("scheduler-policy", "scheduler.capacity", self.scheduler_policy),
            ("kv-reuse", "kv_cache.enable_block_reuse", None if self.kv_reuse is None else str(self.kv_reuse).lower()),
        ):
            if text is not None:
                _set_on_instances(document, option, key, text)

    def _dataset(self, document: Document) -> None:
        if self.dataset is None:
            return
        kind = self.dataset_type or _DATASET_TYPES.get(self.dataset.suffix)
        if kind is None:
            raise ConfigError(
                f"--dataset {self.dataset}: its name does not tell its type; allowed: --dataset-type azure, mooncake or"
                " tensorrt_llm"
            )
        value = {"type": kind, "path": str(self.dataset.resolve())}
        document.set("workload.dataset", value, f"--dataset {self.dataset}")

    def _load(self, document: Document) -> None:
        """What the measured phases send, and how many; warm-up phases of the file stay as they are."""
        workload = document.data.get("workload")
        phases = workload.get("phases") if isinstance(workload, dict) else None
        if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
            return  # the file's own error
        left = self.max_samples
        flags = []
        kept: list[dict[str, Any]] = []
        for phase in phases:
            if phase.get("exclude_from_results"):
                kept.append(phase)
                continue
            phase = dict(phase)
            if self.concurrency is not None:
                _paced(phase, "concurrency", concurrency=self.concurrency)
            elif self.request_rate is not None:
                _paced(phase, "constant" if self.poisson_delays is False else "poisson", rate=self.request_rate)
            elif self.poisson_delays is not None and "rate" in phase:
                _paced(phase, "poisson" if self.poisson_delays else "constant", rate=phase["rate"])
            if left is not None:
                asked = phase.get("requests")
                taken = min(left, asked) if isinstance(asked, int) else left
                left -= taken
                if taken == 0:
                    continue
                phase["requests"] = taken
            kept.append(phase)
        for option, value in (
            ("concurrency", self.concurrency),
            ("request-rate", self.request_rate),
            ("poisson-delays", self.poisson_delays),
            ("max-samples", self.max_samples),
        ):
            if value is not None:
                flags.append(_flag(option, value))
        if flags:
            document.set("workload.phases", kept, " ".join(flags))


def _paced(phase: dict[str, Any], kind: str, **pace: Any) -> None:
    for key in ("type", "rate", "burstiness", "concurrency", "speedup"):
        phase.pop(key, None)
    phase |= {"type": kind, **pace}
    phase.setdefault("requests", 1000)  # a trace phase may leave it out, which these cannot


def _flag(option: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value:g}" if isinstance(value, float) else f"--{option} {value}"


# ---- executors ------------------------------------------------------------------------------------------------------


def _set_on_instances(document: Document, option: str, key: str, text: str) -> None:
    """One value on every executor, or one each: executors of a group that differ become instances of their own."""
    place = f"--{option} {text}"
    values = [_value(part.strip(), place) for part in text.split(",")]
    cluster = document.data.get("cluster")
    if not isinstance(cluster, dict):
        return  # the file's own error
    if len(set(map(repr, values))) > 1:
        _as_instances(document, cluster, place)
    if isinstance(cluster.get("instances"), list):
        instances = cluster["instances"]
        for number, value in enumerate(_spread(values, len(instances), place)):
            _set(document, f"cluster.instances.{number}", key, value, place)
        return
    groups = [name for name, _ in _GROUPS if isinstance(cluster.get(name), dict)]
    _spread(values, sum(_num_instances(cluster[name]) for name in groups), place)
    for name in groups:
        _set(document, f"cluster.{name}", key, values[0], place)


def _set(document: Document, executor: str, key: str, value: Any, place: str) -> None:
    document.set(f"{executor}.{key}", value, place)
    sizes = {"kv_cache.free_gpu_memory_fraction": "max_tokens", "kv_cache.max_tokens": "free_gpu_memory_fraction"}
    if key in sizes:  # the other way to size the cache gives way
        document.set(f"{executor}.kv_cache.{sizes[key]}", None, place)


def _as_instances(document: Document, cluster: dict[str, Any], place: str) -> None:
    if isinstance(cluster.get("instances"), list):
        return
    instances = []
    for name, role in _GROUPS:
        group = cluster.pop(name, None)
        if isinstance(group, dict):
            keys = {key: value for key, value in group.items() if key != "num_instances"}
            for _ in range(_num_instances(group)):
                copied = {key: dict(value) if isinstance(value, dict) else value for key, value in keys.items()}
                instances.append({"role": role, **copied})
    document.set("cluster.instances", instances, place)


def _num_instances(group: dict[str, Any]) -> int:
    number = group.get("num_instances", 1)
    return number if isinstance(number, int) and 0 <= number <= 1 << 16 else 1


def _spread(values: list[Any], num_instances: int, place: str) -> list[Any]:
    if len(values) not in (1, num_instances):
        raise ConfigError(
            f"{place}: {len(values)} values for {num_instances} instances; allowed: 1, or {num_instances}"
        )
    return values * num_instances if len(values) == 1 else values


def _value(text: str, place: str) -> Any:
    """A number, true or false, or a word; what may stand at the key is the key's own check."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if not text:
        raise ConfigError(f"{place}: an empty value; allowed: one value, or one for each instance, with commas")
    return text
