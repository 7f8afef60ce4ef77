"""`disagg bench idle`: how much of the time a GPU runs no kernel while sequences decode, and what the profiler costs.

The experiment is run twice with the same load, once under torch's profiler for a window, and the two are compared.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cli_run import run_file
from .errors import ConfigError, ExperimentError, ResourceError
from .event_files import read_step_ends
from .experiment_file import load_experiment

if TYPE_CHECKING:
    from ..runtime.bench_rows import BenchRow

GOAL: Final = 0.03
_PS_PER_S: Final = 1e12
_MOST_NEIGHBOURS: Final = 8
Stretch = tuple[float, float]


def measure_idle(
    file: Path, overrides: Sequence[str], after_s: float, window_s: float, output: Path | None, timeout_s: float | None
) -> list[BenchRow]:
    """Rows of every executor that decodes. `after_s`: from an executor's start to its window.

    Run directories and profiles are left in `output`, if it is given. Raises ExperimentError if a run fails,
    ResourceError for an experiment without a GPU.
    """
    if not 0 < window_s <= 60:
        raise ConfigError(f"--window {window_s:g}: allowed: more than 0, at most 60 seconds")
    if not 0 <= after_s <= 3600:
        raise ConfigError(f"--after {after_s:g}: allowed: 0 to 3600 seconds")
    if load_experiment(file, overrides, backend="hardware").experiment.device_type != "cuda":
        raise ResourceError(f"{file}: device: cpu runs no kernels that a profile could see; allowed: device: cuda")
    with tempfile.TemporaryDirectory(prefix="disagg-idle-") as name:
        folder = (Path(name) if output is None else output).resolve()
        profiles = folder / "profiles"
        for path in profiles.glob("rank-*.json"):
            path.unlink()
        for kind in ("plain", "profiled"):
            with _profiling(f"{profiles},{after_s:g},{window_s:g}" if kind == "profiled" else None):
                code = run_file(
                    file,
                    overrides=[*overrides, "sweep={}", "repeats=1"],
                    backend="hardware",
                    output=folder / kind,
                    overwrite=True,
                    timeout_s=timeout_s,
                )
            if code:
                problem = ExperimentError(f"{file}: the {kind} run failed")
                problem.exit_code = code
                raise problem
        found = [json.loads(path.read_text()) for path in sorted(profiles.glob("rank-*.json"))]
        if not found:
            raise ExperimentError(f"{file}: no rank left a profile")
        return idle_rows(found, folder / "profiled") + overhead_rows(folder / "plain", folder / "profiled", found)


@contextmanager
def _profiling(value: str | None) -> Iterator[None]:
    """The ranks of a run started inside find what profile is wanted."""
    from ..runtime.kernel_profile import VARIABLE

    before = os.environ.pop(VARIABLE, None)
    if value is not None:
        os.environ[VARIABLE] = value
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


# ---- the share ------------------------------------------------------------------------------------------------------


def idle_rows(profiles: Sequence[dict[str, Any]], run_dir: Path) -> list[BenchRow]:
    """For each profiled rank of an executor with decodes: the share without a kernel, and where its gaps lie."""
    from ..runtime.bench_rows import BenchRow
    from ..runtime.kernel_intervals import GAP_NAMES, PLACES
    from ..runtime.kernel_profile import idle_share

    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    executors = {rank["rank"]: rank for rank in manifest.get("ranks", [])}
    rows: list[BenchRow] = []
    for profile in profiles:
        rank = executors[profile["rank"]]
        if rank["role"] == "context":
            continue
        who = f"{rank['role']} executor {rank['executor']}, rank {profile['rank']}"
        if "error" in profile:
            raise ExperimentError(f"{who}: {profile['error']}; allowed: --after, --window, or a longer load")
        exact = profile.get("origin_ns") is not None
        decoding = decoding_stretches(run_dir, rank["executor"], profile) if exact else profile["sampled_decoding"]
        shares = idle_share(profile, [(float(start), float(end)) for start, end in decoding])
        if shares is None:
            raise ExperimentError(f"{who}: nothing was decoded in the window; allowed: --after, --window, or more load")
        window = profile["window_us"]
        note = (
            f"{shares['decoding_us'] / 1e6:.2f} s of decoding in {window / 1e6:.2f} s, by "
            f"{'the tables of the run' if exact else 'samples of the batch, which outlive its last sequence'}; "
            f"{profile['num_kernels']} kernels"
        )
        name, idle = "time without a kernel while decoding", shares["idle"]
        rows.append(BenchRow(f"{name}, {who}", idle, None, idle, GOAL, idle <= GOAL, "of it", note))
        for place in PLACES:
            rows.append(BenchRow(f"  gaps of 50 µs and more {place}", shares[place], unit="of it"))
        for place in PLACES:
            rows.append(_gap_row(f"  all gaps {place}", profile["places"][place]))
        for name in GAP_NAMES:
            rows.append(_gap_row(f"  gaps {name}", profile["gaps"][name]))
        for gap in profile["neighbours"][:_MOST_NEIGHBOURS]:
            text = f"{gap['number']} gaps of {gap['us'] / gap['number']:.0f} µs {gap['place']}"
            rows.append(
                BenchRow(f"  {gap['before']} → {gap['after']}", gap["us"] / window, unit="of the window", note=text)
            )
    return rows


def _gap_row(name: str, entry: dict[str, float]) -> BenchRow:
    from ..runtime.bench_rows import BenchRow

    mean = f", {entry['us'] / entry['number']:.1f} µs each" if entry["number"] else ""
    return BenchRow(name, entry["share"], unit="of the window", note=f"{entry['number']:.0f} gaps{mean}")


def decoding_stretches(run_dir: Path, executor: int, profile: dict[str, Any]) -> list[Stretch]:
    """When that executor had a sequence to decode, in µs of the profile's window.

    A generation phase decodes from its KV being usable on, one on a mixed executor from the end of the step that gave its
    first token.
    """
    import pyarrow.parquet as pq

    shift = profile["began_monotonic_ns"] - profile["origin_ns"]
    step_ends = _step_ends(run_dir, executor)
    found: list[Stretch] = []
    for stay in pq.read_table(run_dir / "stays.parquet").to_pylist():
        if stay["executor"] != executor or stay["first_step"] is None:
            continue
        start = stay["started_s"] if stay["stage"] == "generation" else step_ends.get(stay["first_step"])
        if start is not None and stay["ended_s"] > start:
            found.append((start * 1e6 - shift / 1e3, stay["ended_s"] * 1e6 - shift / 1e3))
    return found


def _step_ends(run_dir: Path, executor: int) -> dict[int, float]:
    """Seconds at which each step ended, by the executor's running count of them."""
    import pyarrow.parquet as pq

    ends = read_step_ends(run_dir)
    found: dict[int, float] = {}
    for epoch in pq.read_table(run_dir / "steps.parquet").to_pylist():
        if epoch["executor"] == executor:
            for number, at in enumerate(ends.get((executor, epoch["epoch"]), ()), start=epoch["first_step"]):
                found[number] = at / _PS_PER_S
    return found


# ---- what the profiler costs ----------------------------------------------------------------------------------------


def overhead_rows(plain: Path, profiled: Path, profiles: Sequence[dict[str, Any]]) -> list[BenchRow]:
    """The decode step under the profiler beside the same load's without it, at the batch sizes that both runs saw."""
    from ..runtime.bench_rows import BenchRow

    windows = {
        (profile["began_monotonic_ns"] - profile["origin_ns"]) / 1e9: profile["window_us"] / 1e6
        for profile in profiles
        if profile.get("origin_ns") is not None
    }
    within = (max(windows), min(start + span for start, span in windows.items())) if windows else None
    with_, without = decode_step_times(profiled, within), decode_step_times(plain)
    both = {key: min(len(with_[key]), len(without[key])) for key in with_.keys() & without.keys()}
    steps = sum(both.values())
    if not steps:
        return []
    mean_with = sum(statistics.median(with_[key]) * count for key, count in both.items()) / steps
    mean_without = sum(statistics.median(without[key]) * count for key, count in both.items()) / steps
    ratio = mean_with / mean_without
    note = f"medians of {len(both)} batch sizes, weighted by their {steps} common steps"
    if within is None:
        note += "; of the whole run, not of the window alone"
    name = "decode step under the profiler beside the same without"
    return [BenchRow(name, mean_with * 1e3, mean_without * 1e3, ratio, unit="ms", note=note)]


def decode_step_times(run_dir: Path, within: Stretch | None = None) -> dict[tuple[int, int], list[float]]:
    """Seconds between reports of steps of one epoch, without chunks, by (executor, decodes); `within` seconds of the run."""
    import pyarrow.parquet as pq

    ends = read_step_ends(run_dir)
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for epoch in pq.read_table(run_dir / "steps.parquet").to_pylist():
        if not epoch["num_decodes"] or epoch["num_chunks"]:
            continue
        at = [end / _PS_PER_S for end in ends.get((epoch["executor"], epoch["epoch"]), ())]
        for now, then in itertools.pairwise(at):
            if within is None or within[0] <= now <= then <= within[1]:
                found[(epoch["executor"], epoch["num_decodes"])].append(then - now)
    return dict(found)
