"""A profile in words and pictures: what it was measured for, its costs, its residuals, measured against fitted."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from ..core.launch_gaps import gap_of
from ..core.measured_cost import UNITS_PER_NS, MeasuredCost
from ..core.overheads import MessageLatency
from .calibration_samples import FIRST, FOLLOWING, NOTHING, Samples, StepSample, TransferSample, as_arrays, read_samples
from .errors import ConfigError
from .measured_profile import EngineEntry, Profile, Residual
from .profile_cost import measured_cost
from .profile_diff import chunk_grid, decode_grid, named_profile
from .profile_file import profile_path

_PS_PER_MS: Final = 1e9
_PS_PER_US: Final = 1e6
_BAND: Final = 0.1
_EDGE: Final = 0.6
_MOST_DOTS: Final = 4000
_SUMS: Final = (
    "num_decodes",
    "num_kv_tokens",
    "num_chunks",
    "num_chunk_tokens",
    "num_pairs",
    "num_cached_tokens",
    "longest_cached",
    "num_sampled",
    "num_shared_kv",
)


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
    print(f"measured {profile.created} in {profile.num_sessions} sessions of {profile.measured_s:.1f} s in all")
    for entry in profile.engines:
        _print_engine(profile, entry)
    for link in profile.links:
        rate, fixed = link.cost.bytes_per_s / 1e9, link.cost.fixed / _PS_PER_MS
        print(
            f"\nKV over {link.transport}, tp {link.source_tp} pp {link.source_pp} to tp {link.reader_tp} pp"
            f" {link.reader_pp}: {fixed:.3f} ms + bytes at {rate:.1f} GB/s"
        )
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


# ---- pictures -------------------------------------------------------------------------------------------------------


def write_plots(profile: Profile, samples: Samples, folder: Path) -> list[Path]:
    """One PNG for each kind of executor, and one of transfers."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for entry in profile.engines:
        steps = [s for s in samples.steps if s.executor in entry.executors and s.before != NOTHING]
        path = folder / f"{entry.title.replace(' ', '-')}.png"
        if steps:
            _plot_engine(measured_cost(profile, entry, entry.max_batch_size), entry, steps, path)
            written.append(path)
    if samples.transfers and profile.links:
        path = folder / "transfers.png"
        _plot_transfers(profile, samples.transfers, path)
        written.append(path)
    return written


def fitted_ns(cost: MeasuredCost, entry: EngineEntry, columns: dict[str, Any]) -> Any:
    """What the profile says of each sample, launch gap included, in nanoseconds."""
    found = []
    launched = replace(cost, chunk_graphs=False)
    for i in range(len(columns["duration_ps"])):
        row = {name: column[i] for name, column in columns.items()}
        if row["longest_cached"] < 0:  # an older sample: nearly all have one chunk behind cached KV
            row["longest_cached"] = row["num_cached_tokens"]
        num_decodes, num_kv, *chunks = (int(row[name]) for name in _SUMS)
        own = launched if row["sends_early"] else cost
        units = own.time_of_sums(num_decodes, num_kv, *chunks)
        gap = 0
        if row["kind"] == FIRST:
            joined, left, decodes = (int(row[name]) for name in ("num_joined", "num_left", "num_decodes"))
            by_kernels = bool(chunks[0]) and own.runs_by_kernels(num_decodes, chunks[0], chunks[1])
            gap = gap_of(entry.gaps, row["before"], bool(row["num_chunks"]), joined, left, decodes, by_kernels)
        elif row["kind"] != FOLLOWING:
            gap = entry.gaps.continued
        found.append(units / UNITS_PER_NS + gap / 1000)
    return np.array(found)


def _plot_engine(cost: MeasuredCost, entry: EngineEntry, steps: Sequence[StepSample], path: Path) -> None:
    columns = as_arrays(steps)
    measured = columns["duration_ps"] / _PS_PER_MS
    fitted = fitted_ns(cost, entry, columns) / 1e6
    chunks = columns["num_chunks"] > 0
    following = columns["kind"] == FOLLOWING
    panels = [
        ("decode steps inside a plan", ~chunks & following, "num_decodes", "sequences in the batch"),
        ("first decode steps of plans", ~chunks & ~following, "num_decodes", "sequences in the batch"),
        ("steps with chunks", chunks, "num_chunk_tokens", "prompt tokens in the step"),
    ]
    panels = [panel for panel in panels if panel[1].any()]
    figure, axes = _figure(len(panels), entry.title)
    for column, (title, chosen, feature, words) in zip(axes.T, panels, strict=True):
        dots = np.flatnonzero(chosen)
        dots = dots[:: max(1, len(dots) // _MOST_DOTS)]
        _scatter(column[0], fitted[dots], measured[dots], title)
        column[1].axhspan(-_BAND, _BAND, color="0.93")
        column[1].axhline(0, color="0.4", linewidth=0.8)
        column[1].plot(
            columns[feature][dots],
            np.clip(measured[dots] / fitted[dots] - 1, -_EDGE, _EDGE),
            ".",
            markersize=3,
            alpha=0.4,
        )
        column[1].set_xscale("symlog", linthresh=1)
        column[1].set_ylim(-_EDGE * 1.02, _EDGE * 1.02)  # what lies beyond is drawn there
        column[1].set_xlabel(words)
        column[1].set_ylabel("measured over fitted, less one")
    _save(figure, path)


def _plot_transfers(profile: Profile, transfers: Sequence[TransferSample], path: Path) -> None:
    columns = as_arrays(transfers)
    cost = profile.links[0].cost
    figure, axes = _figure(1, f"KV over {profile.links[0].transport}")
    alone = columns["num_in_flight"] == 1
    tokens, measured = columns["num_tokens"], columns["duration_ps"] / _PS_PER_MS
    fitted = cost.fixed / _PS_PER_MS + tokens * profile.kv_bytes_per_token / cost.bytes_per_s * 1e3
    _scatter(axes[0, 0], fitted[alone], measured[alone], "alone on the link")
    for chosen, label in ((alone, "alone"), (~alone, "with others")):
        axes[1, 0].plot(tokens[chosen], measured[chosen], ".", markersize=4, alpha=0.5, label=label)
    order = np.argsort(tokens)
    axes[1, 0].plot(tokens[order], fitted[order], color="0.3", linewidth=1, label="fit")
    axes[1, 0].set_xlabel("tokens")
    axes[1, 0].set_ylabel("ms")
    axes[1, 0].legend()
    _save(figure, path)


def _figure(columns: int, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, columns, figsize=(4.6 * columns, 8), squeeze=False, layout="constrained")
    figure.suptitle(title)
    return figure, axes


def _scatter(axes: Any, fitted: Any, measured: Any, title: str) -> None:
    low, high = min(fitted.min(), measured.min()) * 0.9, max(fitted.max(), measured.max()) * 1.1
    line = np.array([max(low, 1e-6), high])
    axes.fill_between(line, line * (1 - _BAND), line * (1 + _BAND), color="0.93", label="±10 %")
    axes.plot(line, line, color="0.4", linewidth=0.8)
    axes.plot(fitted, measured, ".", markersize=3, alpha=0.4)
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, few enough to be read
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / line[0] < 50 else (1,), numticks=8))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.set_xlabel("fitted, ms")
    axes.set_ylabel("measured, ms")
    axes.legend(loc="upper left")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=80)
    pyplot.close(figure)
