"""A profile in words: what it was measured for, its costs, its residuals."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from ..core.measured_cost import UNITS_PER_NS
from ..core.overheads import MessageLatency
from .calibration_samples import read_samples
from .errors import ConfigError
from .measured_profile import EngineEntry, Profile, Residual, link_title
from .profile_cost import measured_cost
from .profile_diff import chunk_grid, decode_grid, named_profile
from .profile_file import profile_path
from .profile_plots import write_plots

_PS_PER_MS: Final = 1e9
_PS_PER_US: Final = 1e6


def profile_json(profile: Profile) -> str:
    return json_text.dumps(msgspec.to_builtins(profile), indent=2)


def show_profile(name: str, plots: Path | None, *, as_json: bool) -> None:
    profile = named_profile(name)
    if as_json:
        print(profile_json(profile))
    else:
        print_profile(profile)
    if plots is not None:
        path = profile_path(name, Path("."))
        samples = read_samples(path.with_suffix(".samples"))
        if samples is None:
            raise ConfigError(f"{path.with_suffix('.samples')}: holds no samples, so there is nothing to plot")
        written = write_plots(profile, samples, plots)
        if not as_json:
            print(f"wrote {', '.join(str(path) for path in written)}")


def print_profile(profile: Profile) -> None:
    """Tables for a terminal."""
    for_ = profile.measured_for
    print(f"{profile.name}: {for_.model} ({for_.dtype}) on {for_.device_name}")
    quick = ", with --quick: few points, to see that it works" if profile.effort == "quick" else ""
    print(f"measured {profile.created} in {profile.num_sessions} sessions of {profile.measured_s:.1f} s in all{quick}")
    for entry in profile.engines:
        _print_engine(profile, entry)
    for link in profile.links:
        rate, fixed = link.cost.bytes_per_s / 1e9, link.cost.fixed / _PS_PER_MS
        print(f"\n{link_title(link)}: {fixed:.3f} ms + bytes at {rate:.1f} GB/s")
        _print_residuals(link.residuals)
    latency = profile.messages
    print(
        f"\nmessages (mean): to an executor {latency.into_executor / _PS_PER_MS:.3f} ms{_told_of_prompts(latency)}, from one"
        f" {latency.from_executor / _PS_PER_MS:.3f} ms, between two {latency.between_executors / _PS_PER_MS:.3f} ms;"
        f" a request's way into the orchestrator {profile.dispatch_delay_ps / _PS_PER_MS:.3f} ms"
    )
    spreads = [f"{pair} {ps / _PS_PER_MS:.3f}" for pair, ps in sorted(profile.message_residuals.items(), reverse=True)]
    if spreads:
        print(f"  standard deviations around that in ms: {', '.join(spreads)}")


def _told_of_prompts(latency: MessageLatency) -> str:
    return (
        f" and {latency.prompt_token / _PS_PER_US:.3f} us for each token of its prompt" if latency.prompt_token else ""
    )


def _print_engine(profile: Profile, entry: EngineEntry) -> None:
    cost = measured_cost(profile, entry, entry.max_batch_size)
    most = entry.measured
    print(
        f"\n{entry.title}: decode batches up to {most.decodes} with {most.kv_tokens} KV tokens, chunks up to {most.rows}"
        f" rows in {most.chunks} sequences, with {most.mixed_decodes} decodes along"
    )
    decodes = [f for f in decode_grid(most) if f.num_kv_tokens == 1024 * f.num_decodes]
    chunks = [f for f in chunk_grid(cost) if len(f.chunks) == 1]
    if entry.decode is not None and decodes:
        times = ", ".join(f"{f.num_decodes}: {_ms(cost.step_time(f))}" for f in decodes)
        print(f"  decode step in ms by batch, 1,024 tokens each: {times}")
    if entry.decode is not None and entry.decode.full_batch:
        more_ns = entry.decode.full_kv_ns
        print(f"  from {entry.decode.full_batch} sequences on a KV token of a decode step takes {more_ns:.2f} ns more")
    if entry.chunks is not None and chunks:
        times = ", ".join(f"{f.chunks[0][1]}: {_ms(cost.step_time(f))}" for f in chunks)
        print(f"  step in ms by tokens of one prompt: {times}")
    if entry.chunks is not None and cost.launch_floor:
        print(f"  a step with chunks that is no graph: {_ms(cost.launch_floor)} ms at least, to launch its kernels")
    if told := _told_of_shared(entry):
        print(f"  KV that is read again in a step, from blocks that sequences share, costs {told}")
    gaps = {name: getattr(entry.gaps, name) for name in entry.gaps.__struct_fields__ if "load" not in name}
    told = ", ".join(f"{name.replace('_', ' ')} {value / _PS_PER_MS:.2f}" for name, value in gaps.items() if value)
    print(f"  launch gaps in ms: {told or 'none'}")
    if entry.gaps.millionths_under_load:
        share, after = entry.gaps.millionths_under_load / 1e6, entry.gaps.load_after / _PS_PER_MS
        rest = f"drains at {entry.gaps.load_drain} ms a ms of rest" if entry.gaps.load_drain else "ends with any rest"
        print(
            f"  steps with chunks take {share:+.1%} once they have followed each other for {after:.0f} ms, which {rest}"
        )
    if entry.transfer_slowdown is not None:
        print(f"  decode steps during a transfer take {entry.transfer_slowdown - 1:+.1%} (not in the model)")
    _print_residuals(entry.residuals)


def _told_of_shared(entry: EngineEntry) -> str:
    decode, chunks = entry.decode, entry.chunks
    parts = [] if decode is None else [("decodes alone", decode.shared_part)]
    if decode is not None and decode.full_batch:
        parts = [
            (f"fewer than {decode.full_batch} decodes alone", decode.shared_part),
            ("more", decode.full_shared_part),
        ]
    parts += [] if chunks is None else [("decodes beside chunks", chunks.shared_part)]
    return ", ".join(f"{part:.0%} less by {name}" for name, part in parts if part)


def _print_residuals(residuals: Sequence[Residual]) -> None:
    print(
        f"  {'residuals':34}{'points':>7}{'samples':>9}{'left out':>10}{'mean':>8}{'p90':>8}{'max':>8}{'bias':>8}{'jitter':>8}"
    )
    for r in residuals:
        print(
            f"  {r.family:34}{r.num_points:>7}{r.num_samples:>9}{r.num_outliers:>10}"
            f"{r.mean:>8.1%}{r.p90:>8.1%}{r.max:>8.1%}{r.bias:>+8.1%}{r.jitter:>8.1%}"
        )


def _ms(units: int) -> str:
    return f"{units / UNITS_PER_NS / 1e6:.2f}"
