"""Two profiles side by side: what each predicts for one and the same grid of steps, transfers and messages."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..core.cost import UNIT_BITS, StepFeatures
from ..core.launch_gaps import gap_of
from ..core.measured_cost import MeasuredCost
from ..core.measured_range import Measured
from .errors import ConfigError
from .measured_profile import EngineEntry, Profile
from .profile_cost import measured_cost
from .profile_file import load_profile, profile_path

_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS: Final = (128, 512, 1024, 2048, 4096, 8192)
_PROMPTS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SEQUENCES: Final = (1, 2, 4)
_PAIRS: Final = ("into_executor", "from_executor", "between_executors")
_PROMPT_TOKENS: Final = (256, 1024, 4096, 16_384)
_TRANSFER_BYTES: Final = (1 << 20, 16 << 20, 128 << 20, 1 << 30)


def named_profile(name: str) -> Profile:
    """A shipped profile, or a file from the working folder. Raises ConfigError."""
    return load_profile(profile_path(name, Path(".")))


def decode_grid(most: Measured) -> Iterator[StepFeatures]:
    """Decode steps within what was measured."""
    for batch in _BATCHES:
        for context in _CONTEXTS:
            if batch <= most.decodes and batch * context <= most.kv_tokens:
                yield StepFeatures(batch, batch * context)


def chunk_grid(cost: MeasuredCost) -> Iterator[StepFeatures]:
    """Steps of whole prompts within what was measured."""
    for length in _PROMPTS:
        for count in _SEQUENCES:
            features = StepFeatures(0, 0, ((0, length, True),) * count)
            if cost.covers(features):
                yield features


def chunks_time(entry: EngineEntry, cost: MeasuredCost, features: StepFeatures, before: str) -> int:
    """In 2^-20 ps, a step with chunks behind a rest (`idle`) or another one (`chunk`), the gap that it begins with included:
    every such step begins with one, so that a fit has it there or in the time of rows, as noise will have it.
    """
    num_tokens = sum(length for _, length, _ in features.chunks)
    by_kernels = cost.runs_by_kernels(0, len(features.chunks), num_tokens)
    gap = gap_of(entry.gaps, before, True, 0, 0, 0, by_kernels)
    return (gap << UNIT_BITS) + cost.step_time(features)


def diff_profiles(first: Profile, second: Profile) -> dict[str, Any]:
    """Relative differences, second over first less one, by family. Raises ConfigError for profiles with nothing in common."""
    families: dict[str, Any] = {}
    others = {_kind(entry): entry for entry in second.engines}
    for entry in first.engines:
        other = others.get(_kind(entry))
        if other is None:
            continue
        batch = min(entry.max_batch_size, other.max_batch_size)
        a, b = measured_cost(first, entry, batch), measured_cost(second, other, batch)
        decodes = decode_grid(_lesser(entry.measured, other.measured))
        chunks = [f for f in chunk_grid(a) if b.covers(f)]
        for name, differences in (
            ("decode steps", [b.step_time(f) / a.step_time(f) - 1 for f in decodes]),
            (
                "steps with chunks",
                [
                    chunks_time(other, b, f, before) / chunks_time(entry, a, f, before) - 1
                    for f in chunks
                    for before in ("idle", "chunk")
                ],
            ),
        ):
            if differences:
                families[f"{entry.title}: {name}"] = _told(differences)
    links = {(x.transport, x.source_tp, x.source_pp, x.reader_tp, x.reader_pp): x.cost for x in second.links}
    for link in first.links:
        cost = links.get((link.transport, link.source_tp, link.source_pp, link.reader_tp, link.reader_pp))
        if cost is not None:
            families[f"transfers over {link.transport}"] = _told(
                [
                    (cost.fixed / 1e12 + n / cost.bytes_per_s) / (link.cost.fixed / 1e12 + n / link.cost.bytes_per_s)
                    - 1
                    for n in _TRANSFER_BYTES
                ]
            )
    if not families:
        raise ConfigError(f"profiles {first.name} and {second.name} have no kind of executor in common")
    messages, theirs = first.messages, second.messages
    pairs = [(getattr(messages, name), getattr(theirs, name)) for name in _PAIRS]
    families["messages"] = _told([y / x - 1 for x, y in pairs if x])
    if messages.prompt_token or theirs.prompt_token:
        into, to = [[m.into_executor + n * m.prompt_token for n in _PROMPT_TOKENS] for m in (messages, theirs)]
        families["messages with prompts"] = _told([y / x - 1 for x, y in zip(into, to, strict=True) if x])
    steps = [family for name, family in families.items() if "steps" in name]
    return {
        "first": {"name": first.name, "device": first.measured_for.device_name, "created": first.created},
        "second": {"name": second.name, "device": second.measured_for.device_name, "created": second.created},
        "families": families,
        "mean_step_time": max((family["mean_abs"] for family in steps), default=0.0),
    }


def print_diff(first: str, second: str, *, as_json: bool) -> float:
    """Print the comparison; the largest mean relative difference of step times."""
    told = diff_profiles(named_profile(first), named_profile(second))
    if as_json:
        print(json_text.dumps(told, indent=2))
    else:
        print(
            f"{told['second']['name']} ({told['second']['device']}) over {told['first']['name']} ({told['first']['device']})"
        )
        print(f"{'':44}{'points':>8}{'mean':>9}{'mean abs':>10}{'max abs':>9}")
        for name, family in told["families"].items():
            print(
                f"{name:44}{family['num_points']:>8}{family['mean']:>+9.1%}{family['mean_abs']:>10.1%}{family['max_abs']:>9.1%}"
            )
    return float(told["mean_step_time"])


def _told(differences: list[float]) -> dict[str, Any]:
    count = max(1, len(differences))
    return {
        "num_points": len(differences),
        "mean": sum(differences) / count,
        "mean_abs": sum(map(abs, differences)) / count,
        "max_abs": max(map(abs, differences), default=0.0),
    }


def _kind(entry: EngineEntry) -> tuple[str, int, int]:
    return entry.role, entry.tensor_parallel_size, entry.pipeline_parallel_size


def _lesser(a: Measured, b: Measured) -> Measured:
    return Measured(*(min(getattr(a, name), getattr(b, name)) for name in Measured.__struct_fields__))
