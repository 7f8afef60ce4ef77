"""The fit of what executors of one kind did, from samples of their steps: an entry of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.launch_gaps import gap_of
from ..core.measured_range import Measured
from ..core.overheads import LaunchGaps
from ..core.step_sizes import graph_sizes
from .calibration_chunks import fit_chunks, graph_rows, padded_rows
from .calibration_points import (
    LEAST_SAMPLES,
    Floats,
    curve_fit,
    fit_points,
    keep_near,
    knots_for,
    points_of,
    ramps,
    residual_of_samples,
    rounded,
)
from .calibration_samples import CONTINUED, FIRST, FOLLOWING, NOTHING, StepSample, as_arrays
from .calibration_shared import curve_at, kv_read, residuals_of_shared, saved_part, without_shared
from .measured_profile import ChunkFit, DecodeFit, Residual
from .profile_cost import row_multiple

_KV_KNOTS: Final = (0, 512, 2048, 8192, 32_768, 131_072, 524_288, 2_097_152)
_LEAST_OF_A_KERNEL: Final = 200  # decode steps of smaller and of larger batches, to tell two kernels apart
_LEAST_GAIN: Final = 0.1  # of the fit's error
_BATCH_KNOTS: Final = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


class EngineFit(NamedTuple):
    """What an entry of a profile is made from."""

    decode: DecodeFit | None
    chunks: ChunkFit | None
    gaps: LaunchGaps
    measured: Measured
    residuals: tuple[Residual, ...]
    transfer_slowdown: float | None


def fit_engine(
    samples: Sequence[StepSample], device_type: str, max_batch_size: int, *, chunk_graphs: bool = False
) -> EngineFit:
    """Fit what executors of one kind did. Families with too few samples are left out.

    `chunk_graphs`: they run steps with short prompts as graphs. Steps that told of their layers are no graphs: they show
    what the host takes to launch one, where there are graphs, and nothing else.
    """
    columns = as_arrays([sample for sample in samples if chunk_graphs or not sample.sends_early])
    if not columns:
        return EngineFit(None, None, LaunchGaps(), Measured(), (), None)
    warm = columns["before"] != NOTHING
    columns = {name: column[warm] for name, column in columns.items()}
    has_chunks = columns["num_chunks"] > 0
    decodes = {name: column[~has_chunks] for name, column in columns.items()}
    chunked = {name: column[has_chunks] for name, column in columns.items()}
    residuals: list[Residual] = []
    gaps: dict[str, int] = {}
    decode_fit, slowdown = None, None
    sizes = graph_sizes(max_batch_size) if device_type == "cuda" else ()
    following = decodes["kind"] == FOLLOWING
    if following.sum() >= LEAST_SAMPLES:
        decode_fit, fitted_ns, of_decodes = _fit_decodes(decodes, following, sizes)
        residuals += of_decodes
        gaps, residual_gaps = _fit_gaps(decodes, fitted_ns)
        residuals += residual_gaps
        slowdown = _transfer_slowdown(decodes, fitted_ns, following)
    chunk_fit = None
    if has_chunks.sum() >= LEAST_SAMPLES:
        graphs = graph_rows(chunked, max_batch_size) if chunk_graphs else None
        chunk_fit, chunk_residuals, chunk_gaps = fit_chunks(chunked, row_multiple(device_type), graphs)
        residuals += chunk_residuals
        gaps |= chunk_gaps
    return EngineFit(
        decode_fit,
        chunk_fit,
        LaunchGaps(**gaps),
        _measured(decodes, chunked, sizes, row_multiple(device_type)),
        tuple(residuals),
        slowdown,
    )


def _padded(batch: NDArray[Any], sizes: Sequence[int]) -> NDArray[Any]:
    if not sizes:
        return batch
    ladder = np.array(sizes)
    return np.asarray(ladder[np.minimum(np.searchsorted(ladder, batch), len(ladder) - 1)])


def _fit_decodes(
    columns: dict[str, Any], following: NDArray[np.bool_], sizes: Sequence[int]
) -> tuple[DecodeFit, Floats, list[Residual]]:
    """The fit of steps inside a plan, and what it says of every decode step, in nanoseconds.

    Those that share KV tell nothing but what that saves.
    """
    batch, kv = columns["num_decodes"], columns["num_kv_tokens"]
    rows = _padded(batch, sizes)
    following, shared = without_shared(columns, following)
    row_knots = knots_for(rows[following], sizes if sizes else _BATCH_KNOTS)
    kv_knots = knots_for(kv[following], _KV_KNOTS)
    quiet = following & ~columns["in_transfer"].astype(bool)
    chosen = quiet if quiet.sum() >= following.sum() // 2 else following
    ns = columns["duration_ps"] / 1000.0
    near = (np.log(np.maximum(kv, 1)) / 0.06).astype(np.int64)  # KV lengths within 6 % make one point

    def fit_with(full_batch: int) -> _Decodes:
        is_full = batch >= full_batch if full_batch else np.zeros(len(batch), dtype=bool)
        columns_of = (np.ones(len(batch)), ramps(rows, row_knots), ramps(kv, kv_knots), batch, kv * is_full)
        features = np.column_stack([each.astype(float) for each in columns_of])
        points = points_of((batch[chosen], near[chosen]), features[chosen], ns[chosen])
        fitted = fit_points(points, ns[chosen], features[chosen], "decode steps")
        x, num_rows = fitted.coefficients, len(row_knots) - 1
        more_ns, own = float(x[-1]), curve_at(kv_knots, x[1 + num_rows : -2])
        rest = features @ x - own(kv) - more_ns * kv * is_full

        def of_kv(read: Floats) -> Floats:
            return np.asarray(rest + own(read) + more_ns * read * is_full)

        part = saved_part(columns, shared & ~is_full, of_kv)
        full_part = min(part, saved_part(columns, shared & is_full, of_kv)) if full_batch else 0.0
        fitted_ns = of_kv(np.where(is_full, kv_read(columns, full_part), kv_read(columns, part)))
        found = DecodeFit(
            curve_fit(x[0], row_knots, x[1 : 1 + num_rows]),
            curve_fit(0.0, kv_knots, x[1 + num_rows : -2]),
            round(float(x[-2]), 3),
            part,
            full_batch,
            round(more_ns, 9),
            full_part,
        )
        off = np.abs(points.ns / np.maximum(points.features @ x, 1.0) - 1)
        error = float((points.weights * off).sum() / points.weights.sum())
        of_shared = np.abs(ns[shared] / fitted_ns[shared] - 1).mean() if shared.any() else 0.0
        return _Decodes(found, fitted_ns, fitted.residual, error + float(of_shared))

    best = alone = fit_with(0)
    for size in sizes:
        if min((batch[chosen] <= size).sum(), (batch[chosen] > size).sum()) >= _LEAST_OF_A_KERNEL:
            best = min(best, fit_with(size + 1), key=lambda each: each.error)
    if best.error > (1 - _LEAST_GAIN) * alone.error:
        best = alone
    return best.fit, best.ns, [best.residual, *residuals_of_shared("decode steps that share KV", ns, best.ns, shared)]


class _Decodes(NamedTuple):
    """A fit of decode steps, what it says of all of them, and how far off it is, in proportion, of steps of either kind."""

    fit: DecodeFit
    ns: Floats
    residual: Residual
    error: float


def _fit_gaps(columns: dict[str, Any], fitted_ns: Floats) -> tuple[dict[str, int], list[Residual]]:
    """What first steps of plans took beyond what such steps take inside one: picoseconds, by name of `LaunchGaps`."""
    ns = columns["duration_ps"] / 1000.0
    gap = ns - fitted_ns
    gaps: dict[str, int] = {}
    told = np.zeros(len(ns), dtype=bool)
    for before in ("idle", "decode", "chunk"):
        chosen = (columns["kind"] == FIRST) & (columns["before"] == before)
        if chosen.sum() >= LEAST_SAMPLES:
            kept = np.flatnonzero(chosen)[keep_near(ns[chosen])]
            each = _slope(columns["num_decodes"][kept], gap[kept]) if before == "chunk" else 0.0
            if each and (gap[kept] - each * columns["num_decodes"][kept]).mean() < 0:  # through the origin then
                each = float(gap[kept] @ columns["num_decodes"][kept] / (columns["num_decodes"][kept] ** 2).sum())
            own = gap[kept] - each * columns["num_decodes"][kept]
            gaps[f"decode_after_{before}"] = max(0, round(float(own.mean()) * 1000))
            if each:
                gaps["sequence_after_chunk"] = round(each * 1000)
            told[kept] = True
    known = [value for name, value in gaps.items() if name.startswith("decode_after")]
    for before in ("idle", "decode", "chunk"):  # what never happened is like what did
        if known:
            gaps.setdefault(f"decode_after_{before}", round(sum(known) / len(known)))
    chosen = columns["kind"] == CONTINUED
    if chosen.sum() >= LEAST_SAMPLES:
        gaps["continued"] = max(0, round(float(gap[chosen][keep_near(ns[chosen])].mean()) * 1000))
    if not told.any():
        return gaps, []
    found = LaunchGaps(**gaps)
    beside = zip(columns["before"][told], columns["num_decodes"][told].tolist(), strict=True)
    with_gap = fitted_ns[told] + [gap_of(found, before, False, 0, 0, decodes) / 1000 for before, decodes in beside]
    num_first = int((columns["kind"] == FIRST).sum())
    return gaps, [residual_of_samples("first decode steps of plans", ns[told], with_gap, num_first)]


def _slope(values: NDArray[Any], ns: Floats) -> float:
    """Nanoseconds more for one more of `values`, by least squares; none where it is not told, or fewer."""
    off = values - values.mean()
    if len(values) < 2 * LEAST_SAMPLES or not off.any():
        return 0.0
    return max(0.0, float(off @ ns / (off @ off)))


def _transfer_slowdown(columns: dict[str, Any], fitted_ns: Floats, following: NDArray[np.bool_]) -> float | None:
    """Steps during which KV came in, over the others, each beside what the fit says of it."""
    ratio = columns["duration_ps"] / 1000.0 / np.maximum(fitted_ns, 1.0)
    during = following & columns["in_transfer"].astype(bool)
    quiet = following & ~columns["in_transfer"].astype(bool)
    if min(during.sum(), quiet.sum()) < 20:
        return None
    return rounded(np.median(ratio[during]) / np.median(ratio[quiet]))


def _measured(decodes: dict[str, Any], chunked: dict[str, Any], sizes: Sequence[int], multiple: int) -> Measured:
    def most(columns: dict[str, Any], name: str) -> int:
        return int(columns[name].max()) if len(columns[name]) else 0

    return Measured(
        decodes=int(_padded(decodes["num_decodes"], sizes).max()) if len(decodes["num_decodes"]) else 0,
        kv_tokens=most(decodes, "num_kv_tokens"),
        rows=int(padded_rows(chunked, multiple).max()) if len(chunked["num_chunks"]) else 0,
        chunks=most(chunked, "num_chunks"),
        pairs=most(chunked, "num_pairs"),
        cached_tokens=most(chunked, "num_cached_tokens"),
        mixed_decodes=most(chunked, "num_decodes"),
        mixed_kv_tokens=most(chunked, "num_kv_tokens"),
    )
