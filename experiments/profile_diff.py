"""Two profiles side by side: what each predicts for one and the same grid of steps, transfers and messages."""

from __future__ import annotations

import json as json_text
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..core.cost import UNIT_BITS, StepFeatures
from ..core.launch_gaps import gap_of
from ..core.measured_cost import MeasuredCost
from ..core.measured_range import Measured
from .errors import ConfigError
from .measured_profile import EngineEntry, LinkEntry, MeasuredFor, Profile
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
    """Relative differences, second over first less one, by family. Raises ConfigError for profiles with nothing in common.

    `remarks` say where the two were measured for other things, so that a difference is no matter of calibrations alone.
    """
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
    families |= _link_families(first.links, second.links)
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
        "first": _side(first),
        "second": _side(second),
        "remarks": _remarks(first.measured_for, second.measured_for),
        "families": families,
        "mean_step_time": max((family["mean_abs"] for family in steps), default=0.0),
    }


def check_limit(limit: float | None) -> None:
    """Raises ConfigError for what no difference could be more than, or every one is."""
    if limit is not None and not 0 <= limit < math.inf:  # of a NaN neither is true
        raise ConfigError(f"--limit {limit:g}: must be a share of 0 or more")


def print_diff(first: str, second: str, *, as_json: bool) -> float:
    """Print the comparison; the largest mean relative difference of step times."""
    told = diff_profiles(named_profile(first), named_profile(second))
    if as_json:
        print(json_text.dumps(told, indent=2))
    else:
        ours, theirs = told["first"], told["second"]
        ours_apart, theirs_apart = _apart((ours, first), (theirs, second))
        print(f"{theirs['name']} ({theirs['device']}{theirs_apart}) over {ours['name']} ({ours['device']}{ours_apart})")
        for remark in told["remarks"]:
            print(f"note: {remark}")
        width = max(44, *(len(name) + 1 for name in told["families"]))
        print(f"{'':{width}}{'points':>8}{'mean':>9}{'mean abs':>10}{'max abs':>9}")
        for name, family in told["families"].items():
            print(
                f"{name:{width}}{family['num_points']:>8}{family['mean']:>+9.1%}{family['mean_abs']:>10.1%}"
                f"{family['max_abs']:>9.1%}"
            )
    return float(told["mean_step_time"])


def _side(profile: Profile) -> dict[str, Any]:
    for_ = profile.measured_for
    return {
        "name": profile.name,
        "device": for_.device_name,
        "model": for_.model,
        "dtype": for_.dtype,
        "created": profile.created,
    }


def _apart(*sides: tuple[dict[str, Any], str]) -> list[str]:
    """What tells profiles of one name apart: when they were measured, or else how they were asked for."""
    if len({told["name"] for told, _ in sides}) == len(sides):
        return ["" for _ in sides]
    if len({told["created"] for told, _ in sides}) == len(sides):
        return [f", measured {told['created']}" for told, _ in sides]
    return [f", {asked}" for _, asked in sides]


def _remarks(first: MeasuredFor, second: MeasuredFor) -> list[str]:
    remarks = []
    models = [(for_.model, for_.dtype, for_.shape_hash) for for_ in (first, second)]
    if models[0] != models[1]:
        shapes = "" if models[0][:2] != models[1][:2] else ", in other shapes"
        (a, a_type, _), (b, b_type, _) = models
        remarks.append(f"measured with different models: {b} in {b_type}, and {a} in {a_type}{shapes}")
    if (first.device_name, first.device_type) != (second.device_name, second.device_type):
        remarks.append(
            f"measured on different devices: {second.device_name} ({second.device_type}), and {first.device_name}"
            f" ({first.device_type})"
        )
    return remarks


def _link_families(first: Sequence[LinkEntry], second: Sequence[LinkEntry]) -> dict[str, Any]:
    """Of the links that both have: of one transport, from layouts into layouts, under a throttle or none."""
    others = {link.kind: link.cost for link in second}
    found = {}
    for link in first:
        cost = others.get(link.kind)
        if cost is None:
            continue
        layouts = {other.kind[1:5] for other in (*first, *second) if other.transport == link.transport}
        name = f"transfers over {link.transport}"
        if len(layouts) > 1:
            name += f", tp {link.source_tp} pp {link.source_pp} to tp {link.reader_tp} pp {link.reader_pp}"
        if link.throttle_gb_per_s is not None:
            name += f", throttled to {link.throttle_gb_per_s:g} GB/s"
        found[name] = _told(
            [
                (cost.fixed / 1e12 + n / cost.bytes_per_s) / (link.cost.fixed / 1e12 + n / link.cost.bytes_per_s) - 1
                for n in _TRANSFER_BYTES
            ]
        )
    return found


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
