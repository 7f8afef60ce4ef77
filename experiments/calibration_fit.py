"""From samples to coefficients: least squares with none negative, on points, each the mean of samples that agree.

Samples of equal features make a point: their mean, less those far from their median, since the simulator is to be right
on average and one compilation is no average. Points that lie far off are left out of a second fit, and counted. Errors
count in proportion, so that short steps are as well told as long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.launch_gaps import gap_of
from ..core.measured_range import Measured
from ..core.overheads import LaunchGaps
from ..core.step_sizes import CHUNK_GRAPH_ROWS, chunk_graph, graph_sizes
from .calibration_samples import CONTINUED, FIRST, FOLLOWING, NOTHING, StepSample, as_arrays
from .profile_file import ChunkFit, CurveFit, DecodeFit, Residual, row_multiple

Floats = NDArray[np.float64]
_KV_KNOTS: Final = (0, 512, 2048, 8192, 32_768, 131_072, 524_288, 2_097_152)
# Rows of the engine's own steps, which are a staircase: between two of them lies nothing to interpolate.
_ROW_KNOTS: Final = (
    *(0, 16, 32, *CHUNK_GRAPH_ROWS, *range(1152, 2049, 128)),
    *(2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 12_288, 16_384),
)
_BATCH_KNOTS: Final = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_FAR: Final = 5.0  # standard deviations, by the median of deviations
_LEAST_FAR: Final = 0.05  # of the value: nearer than this nothing is an outlier
_STALLED: Final = 10.0  # times the median
_LEAST_SAMPLES: Final = 3
_ROUNDS: Final = 5
_WAITS: Final = 0.15  # of the device's time: a step that takes so much longer waits for the host
_LEAST_RATIO: Final = 1.05  # of a knot to the one before


class Points(NamedTuple):
    """`features` [points, columns], mean `ns` [points], `weights` [points], `point_of` [samples], `is_kept` [samples]."""

    features: Floats
    ns: Floats
    weights: Floats
    point_of: NDArray[np.int64]
    is_kept: NDArray[np.bool_]


class Fitted(NamedTuple):
    """The fit of one family: nanoseconds for one of each feature."""

    coefficients: Floats
    residual: Residual


class EngineFit(NamedTuple):
    """What an entry of a profile is made from."""

    decode: DecodeFit | None
    chunks: ChunkFit | None
    gaps: LaunchGaps
    measured: Measured
    residuals: tuple[Residual, ...]
    transfer_slowdown: float | None


# ---- the tools ------------------------------------------------------------------------------------------------------


def keep_near(values: Floats) -> NDArray[np.bool_]:
    """Which values are no outliers: near the median, by the median deviation."""
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    return np.asarray(np.abs(values - median) <= max(_FAR * spread, _LEAST_FAR * abs(median)))


def usual(values: Sequence[int]) -> Floats:
    """All but the largest hundredth, and what is ten times the median or more: of times with a long tail that is part of
    them, and a few accidents that are not. One stall of 20 ms is in many messages of a second, and in none of the next.
    """
    ordered = np.sort(np.array(values, dtype=float))
    kept = ordered[: max(1, len(ordered) - len(ordered) // 100)]
    return np.asarray(kept[kept <= _STALLED * max(float(np.median(kept)), 1.0)])


def points_of(keys: Sequence[NDArray[Any]], features: Floats, ns: Floats) -> Points:
    """Group samples by `keys`; each group is a point at the mean of its features and of its time, less outliers."""
    _, point_of = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    point_of = point_of.reshape(-1)
    is_kept = np.ones(len(ns), dtype=bool)
    order = np.argsort(point_of, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(point_of[order])) + 1):
        if len(group) >= _LEAST_SAMPLES:
            is_kept[group] = keep_near(ns[group])
    count = np.bincount(point_of[is_kept], minlength=point_of.max() + 1).astype(float)
    mean = np.bincount(point_of[is_kept], ns[is_kept], minlength=len(count)) / count
    columns = [np.bincount(point_of[is_kept], column[is_kept], minlength=len(count)) / count for column in features.T]
    return Points(np.stack(columns, axis=1), mean, np.sqrt(np.minimum(count, 30)), point_of, is_kept)


def fit_points(points: Points, ns: Floats, features: Floats, family: str) -> Fitted:
    """Non-negative coefficients of the features; `ns` and `features` are the samples that the points come from."""
    from scipy.optimize import nnls

    keep = np.ones(len(points.ns), dtype=bool)
    scale = np.maximum(points.ns, 1.0)
    largest = np.maximum(points.features.max(axis=0), 1e-12)  # columns of like size: far quicker, and better told
    coefficients = np.zeros(points.features.shape[1])
    for _ in range(_ROUNDS):
        weights = points.weights[keep] / scale[keep]
        system = points.features[keep] / largest * weights[:, None]
        coefficients = nnls(system, points.ns[keep] * weights, maxiter=50 * system.shape[1])[0] / largest
        # in proportion to the fit, not to the sample: that would take the short ones of noisy samples for the truth
        scale = np.maximum(points.features @ coefficients, 1.0)
        relative = points.ns / scale - 1
        spread = 1.4826 * np.median(np.abs(relative[keep]))
        keep = np.abs(relative) <= max(_FAR * spread, 3 * _LEAST_FAR)
        if keep.sum() < len(coefficients):
            keep[:] = True
    kept = points.is_kept & keep[points.point_of]
    return Fitted(coefficients, _residual(family, points, keep, kept, ns, features, coefficients))


def _residual(
    family: str,
    points: Points,
    keep: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    ns: Floats,
    features: Floats,
    coefficients: Floats,
) -> Residual:
    relative = np.abs(points.ns[keep] / np.maximum(points.features[keep] @ coefficients, 1.0) - 1)
    fitted = features[kept] @ coefficients
    return Residual(
        family,
        num_points=int(keep.sum()),
        num_samples=len(ns),
        num_outliers=int((~kept).sum()),
        mean=_rounded(relative.mean()),
        p90=_rounded(np.quantile(relative, 0.9)),
        max=_rounded(relative.max()),
        bias=_rounded(fitted.sum() / ns[kept].sum() - 1),
        jitter=_rounded(np.std(ns[kept] / np.maximum(fitted, 1.0))),
    )


def _rounded(x: Any) -> float:
    return round(float(x), 6)


def knots_for(values: NDArray[Any], candidates: Sequence[int]) -> list[int]:
    """From 0 to the largest value, each at a value: the last one up to each candidate, so that it is held by samples.

    Knots that are nearly alike would tell noise from noise: one of them stays.
    """
    distinct = np.unique(values[values > 0])
    knots = [0]
    for candidate in [*candidates, int(distinct[-1]) if len(distinct) else 1]:
        below = distinct[distinct <= candidate]
        knot = int(below[-1]) if len(below) else 0
        if knot <= knots[-1]:
            continue
        if knots[-1] and knot < knots[-1] * _LEAST_RATIO:
            knots[-1] = knot
        else:
            knots.append(knot)
    return knots if len(knots) > 1 else [0, 1]


def ramps(values: NDArray[Any], knots: Sequence[int]) -> Floats:
    """[values, knots - 1]: how far each value is through each interval, 0 to 1; the last one goes on beyond.

    Coefficients of these are the increments of a piecewise linear function: none negative, it never falls.
    """
    columns = []
    for i, (low, high) in enumerate(pairwise(knots)):
        part = (values - low) / (high - low)
        columns.append(np.maximum(part, 0.0) if i == len(knots) - 2 else np.clip(part, 0.0, 1.0))
    return np.stack(columns, axis=1)


def curve_fit(start: float, knots: Sequence[int], increments: Floats) -> CurveFit:
    """The piecewise linear function that begins at `start`. Beyond the last knot the mean slope of its outer half goes on:
    that of the last interval alone is as much noise as time where knots lie close.
    """
    ns = [float(start)]
    for increment in increments:
        ns.append(ns[-1] + float(increment))
    inner = max(i for i, knot in enumerate(knots[:-1]) if knot <= max(knots[-1] // 2, knots[0]))
    beyond = (ns[-1] - ns[inner]) / (knots[-1] - knots[inner])
    return CurveFit(tuple(int(k) for k in knots), tuple(round(x, 3) for x in ns), round(beyond, 9))


# ---- an executor ----------------------------------------------------------------------------------------------------


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
    if following.sum() >= _LEAST_SAMPLES:
        decode_fit, fitted_ns, residual = _fit_decodes(decodes, following, sizes)
        residuals.append(residual)
        gaps, residual_gaps = _fit_gaps(decodes, fitted_ns)
        residuals += residual_gaps
        slowdown = _transfer_slowdown(decodes, fitted_ns, following)
    chunk_fit = None
    if has_chunks.sum() >= _LEAST_SAMPLES:
        graphs = _chunk_graphs(chunked, max_batch_size) if chunk_graphs else None
        chunk_fit, chunk_residuals, chunk_gaps = _fit_chunks(chunked, row_multiple(device_type), graphs)
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
) -> tuple[DecodeFit, Floats, Residual]:
    """The fit of steps inside a plan, and what it says of every decode step, in nanoseconds."""
    batch, kv = columns["num_decodes"], columns["num_kv_tokens"]
    rows = _padded(batch, sizes)
    row_knots = knots_for(rows[following], sizes if sizes else _BATCH_KNOTS)
    kv_knots = knots_for(kv[following], _KV_KNOTS)
    features = np.concatenate(
        (np.ones((len(batch), 1)), ramps(rows, row_knots), ramps(kv, kv_knots), batch[:, None].astype(float)), axis=1
    )
    quiet = following & ~columns["in_transfer"].astype(bool)
    chosen = quiet if quiet.sum() >= following.sum() // 2 else following
    ns = columns["duration_ps"] / 1000.0
    near = (np.log(np.maximum(kv, 1)) / 0.06).astype(np.int64)  # KV lengths within 6 % make one point
    points = points_of((batch[chosen], near[chosen]), features[chosen], ns[chosen])
    fitted = fit_points(points, ns[chosen], features[chosen], "decode steps")
    x, num_rows = fitted.coefficients, len(row_knots) - 1
    fit = DecodeFit(
        curve_fit(x[0], row_knots, x[1 : 1 + num_rows]),
        curve_fit(0.0, kv_knots, x[1 + num_rows : -1]),
        round(float(x[-1]), 3),
    )
    return fit, features @ x, fitted.residual


def _fit_gaps(columns: dict[str, Any], fitted_ns: Floats) -> tuple[dict[str, int], list[Residual]]:
    """What first steps of plans took beyond what such steps take inside one: picoseconds, by name of `LaunchGaps`."""
    ns = columns["duration_ps"] / 1000.0
    gap = ns - fitted_ns
    gaps: dict[str, int] = {}
    told = np.zeros(len(ns), dtype=bool)
    for before in ("idle", "decode", "chunk"):
        chosen = (columns["kind"] == FIRST) & (columns["before"] == before)
        if chosen.sum() >= _LEAST_SAMPLES:
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
    if chosen.sum() >= _LEAST_SAMPLES:
        gaps["continued"] = max(0, round(float(gap[chosen][keep_near(ns[chosen])].mean()) * 1000))
    if not told.any():
        return gaps, []
    found = LaunchGaps(**gaps)
    beside = zip(columns["before"][told], columns["num_decodes"][told].tolist(), strict=True)
    with_gap = fitted_ns[told] + [gap_of(found, before, False, 0, 0, decodes) / 1000 for before, decodes in beside]
    num_first = int((columns["kind"] == FIRST).sum())
    return gaps, [_residual_of_samples("first decode steps of plans", ns[told], with_gap, num_first)]


def _slope(values: NDArray[Any], ns: Floats) -> float:
    """Nanoseconds more for one more of `values`, by least squares; none where it is not told, or fewer."""
    off = values - values.mean()
    if len(values) < 2 * _LEAST_SAMPLES or not off.any():
        return 0.0
    return max(0.0, float(off @ ns / (off @ off)))


def _residual_of_samples(family: str, ns: Floats, fitted: Floats, num_samples: int) -> Residual:
    """Of samples that are points by themselves; `num_samples`: with those that were left out."""
    relative = np.abs(ns / fitted - 1)
    return Residual(
        family,
        num_points=len(ns),
        num_samples=num_samples,
        num_outliers=num_samples - len(ns),
        mean=_rounded(relative.mean()),
        p90=_rounded(np.quantile(relative, 0.9)),
        max=_rounded(relative.max()),
        bias=_rounded(fitted.sum() / ns.sum() - 1),
        jitter=_rounded(np.std(ns / fitted)),
    )


def _chunk_graphs(columns: dict[str, Any], max_batch: int) -> NDArray[np.int64]:
    """Rows of the graph that ran each step with chunks; 0 where none did."""
    names = ("num_decodes", "num_chunks", "num_chunk_tokens")
    steps = zip(*(columns[name].tolist() for name in names), strict=True)
    found = [chunk_graph(decodes, chunks, tokens, max_batch) for decodes, chunks, tokens in steps]
    rows = np.array([0 if key is None else key[1] for key in found], dtype=np.int64)
    return np.where(columns["sends_early"], 0, rows)


def _fit_chunks(
    columns: dict[str, Any], multiple: int, graphs: NDArray[np.int64] | None
) -> tuple[ChunkFit, list[Residual], dict[str, int]]:
    """Steps with chunks; what came before them shifts them by a constant each.

    Where short ones run as graphs (`graphs`: their rows), those that do not wait for the host: they are no measure of
    the device, but of how long a launch kernel by kernel takes.
    """
    rows = _padded_rows(columns, multiple)
    waits = np.zeros(len(rows), dtype=bool)
    if graphs is not None and graphs.any():
        rows = np.where(graphs > 0, graphs, rows)
        waits = (graphs == 0) & (columns["sends_early"] | (rows <= CHUNK_GRAPH_ROWS[-1]))
    row_knots = knots_for(rows[~waits], _ROW_KNOTS)
    kv = columns["num_kv_tokens"]
    kv_knots = [0, max(1, int(kv.max()))]
    before = columns["before"]
    kinds = [kind for kind in ("idle", "decode", "chunk") if (before == kind).sum() >= _LEAST_SAMPLES]
    parts = (
        np.ones((len(rows), 1)),
        ramps(rows, row_knots),
        *(
            columns[name][:, None].astype(float)
            for name in ("num_pairs", "num_cached_tokens", "num_chunks", "num_sampled")
        ),
        ramps(kv, kv_knots),
        columns["num_decodes"][:, None].astype(float),
        *((before == kind)[:, None].astype(float) for kind in kinds),
        *(column[:, None].astype(float) for column in _late_kernels(graphs, waits, before)),
    )
    features = np.concatenate(parts, axis=1)
    ns = columns["duration_ps"] / 1000.0
    keys = ("num_pairs", "num_cached_tokens", "num_chunks", "num_decodes", "num_sampled")
    which = np.unique(before, return_inverse=True)[1].reshape(-1)
    told, of_told = ~waits, {name: columns[name][~waits] for name in keys}
    points = points_of((rows[told], *of_told.values(), kv[told] // 1024, which[told]), features[told], ns[told])
    fitted = fit_points(points, ns[told], features[told], "steps with chunks")
    x, at = fitted.coefficients, len(row_knots)
    floor, residuals = _launch_floor(ns, features @ x, features[:, at + 6 :] @ x[at + 6 :], waits)
    pair, cached_token, chunk, sample = (round(float(value), 9) for value in x[at : at + 4])
    fit = ChunkFit(
        rows=curve_fit(x[0], row_knots, x[1:at]),
        pair_ns=pair,
        cached_token_ns=cached_token,
        chunk_ns=chunk,
        sample_ns=sample,
        mixed_kv_tokens=curve_fit(0.0, kv_knots, x[at + 4 : at + 5]),
        mixed_decode_ns=round(float(x[at + 5]), 3),
        graphs=graphs is not None and bool(graphs.any()),
        launch_floor_ns=round(floor, 3),
    )
    found = [round(float(value) * 1000) for value in x[at + 6 :]]
    shifts = {f"chunk_after_{kind}": value for kind, value in zip(kinds, found, strict=False)}
    known = list(shifts.values())
    for kind in ("idle", "decode", "chunk"):  # what was hardly ever seen is like what was
        if known:
            shifts.setdefault(f"chunk_after_{kind}", round(sum(known) / len(known)))
    if len(found) > len(kinds):
        shifts["kernels"] = found[-1]
    return fit, [fitted.residual, *residuals], shifts


def _late_kernels(
    graphs: NDArray[np.int64] | None, waits: NDArray[np.bool_], before: NDArray[Any]
) -> tuple[NDArray[np.bool_], ...]:
    """Which steps run kernel by kernel, though others are graphs, and were not launched behind decodes.

    Nothing where there are none, or none of the same kind behind decodes: the rows tell of both then.
    """
    if graphs is None or not graphs.any():
        return ()
    by_kernels = graphs == 0
    late = by_kernels & (before != "decode")
    told = [late & ~waits, by_kernels & ~late & ~waits]
    return (late,) if min(each.sum() for each in told) >= _LEAST_SAMPLES else ()


def _launch_floor(ns: Floats, fitted: Floats, shifts: Floats, waits: NDArray[np.bool_]) -> tuple[float, list[Residual]]:
    """The host's time for a step that it launches kernel by kernel: what short ones take that take longer than the device."""
    late = np.flatnonzero(waits & (ns > (1 + _WAITS) * fitted))
    if len(late) < _LEAST_SAMPLES:
        return 0.0, []
    own = (ns - shifts)[late]
    kept = keep_near(own)
    floor = float(own[kept].mean())
    expected = floor + shifts[late][kept]
    return floor, [_residual_of_samples("short steps without a graph", ns[late][kept], expected, len(late))]


def _padded_rows(columns: dict[str, Any], multiple: int) -> NDArray[Any]:
    rows = columns["num_chunk_tokens"] + columns["num_decodes"]
    return np.asarray(np.where(rows <= multiple, rows, -(-rows // multiple) * multiple))


def _transfer_slowdown(columns: dict[str, Any], fitted_ns: Floats, following: NDArray[np.bool_]) -> float | None:
    """Steps during which KV came in, over the others, each beside what the fit says of it."""
    ratio = columns["duration_ps"] / 1000.0 / np.maximum(fitted_ns, 1.0)
    during = following & columns["in_transfer"].astype(bool)
    quiet = following & ~columns["in_transfer"].astype(bool)
    if min(during.sum(), quiet.sum()) < 20:
        return None
    return _rounded(np.median(ratio[during]) / np.median(ratio[quiet]))


def _measured(decodes: dict[str, Any], chunked: dict[str, Any], sizes: Sequence[int], multiple: int) -> Measured:
    def most(columns: dict[str, Any], name: str) -> int:
        return int(columns[name].max()) if len(columns[name]) else 0

    return Measured(
        decodes=int(_padded(decodes["num_decodes"], sizes).max()) if len(decodes["num_decodes"]) else 0,
        kv_tokens=most(decodes, "num_kv_tokens"),
        rows=int(_padded_rows(chunked, multiple).max()) if len(chunked["num_chunks"]) else 0,
        chunks=most(chunked, "num_chunks"),
        pairs=most(chunked, "num_pairs"),
        cached_tokens=most(chunked, "num_cached_tokens"),
        mixed_decodes=most(chunked, "num_decodes"),
        mixed_kv_tokens=most(chunked, "num_kv_tokens"),
    )
