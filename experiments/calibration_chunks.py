"""The fit of steps with chunks of prompts: of the device where a graph runs them or they are long, of the host where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..core.step_sizes import CHUNK_GRAPH_ROWS, chunk_graph
from .calibration_points import (
    LEAST_SAMPLES,
    Fitted,
    Floats,
    curve_fit,
    fit_points,
    keep_near,
    knots_for,
    points_of,
    ramps,
    residual_of_samples,
)
from .calibration_shared import curve_at, kv_read, residuals_of_shared, saved_part, without_shared
from .profile_file import ChunkFit, Residual

# Rows of the engine's own steps, which are a staircase: between two of them lies nothing to interpolate.
_ROW_KNOTS: Final = (
    *(0, 16, 32, *CHUNK_GRAPH_ROWS, *range(1152, 2049, 128)),
    *(2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 12_288, 16_384),
)
_BEHIND: Final = 512  # cached tokens: fewer are lost among what a step takes
_LEAST_BEHIND: Final = 40  # steps of either kind: fewer told pairs from cached tokens badly
_LEAST_SEVERAL: Final = 20  # steps of several chunks behind KV, kernel by kernel
_WAITS: Final = 0.15  # of the device's time: a step that takes so much longer waits for the host
_LOAD_AFTER_NS: Final = (5e7, 1e8, 2e8, 4e8)  # until a device's clock has followed its load
_DRAINS: Final = (0, 1, 2, 3, 5, 10)  # ns of load that a ns of rest takes; 0: all of it at once
_RESTS_NS: Final = (1e6, 6e7)  # that tell at which rate
# Samples of small, of middling and of large steps, to tell what a load does from what rows do.
_LEAST_LOADED: Final = 20
_LEAST_RESTED: Final = 20  # steps behind a rest behind a load
_MOST_SHARE: Final = 0.25
_LEAST_GAIN: Final = 0.05  # of the fit's error
# (query, key) pairs that take as long as one token of the longest KV before a chunk, in a graph's attention.
_WALKS: Final = (100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 850, 1000, 1300, 1700, 2200, 3000)


def graph_rows(columns: dict[str, Any], max_batch: int) -> NDArray[np.int64]:
    """Rows of the graph that ran each step with chunks; 0 where none did."""
    names = ("num_decodes", "num_chunks", "num_chunk_tokens")
    steps = zip(*(columns[name].tolist() for name in names), strict=True)
    found = [chunk_graph(decodes, chunks, tokens, max_batch) for decodes, chunks, tokens in steps]
    rows = np.array([0 if key is None else key[1] for key in found], dtype=np.int64)
    return np.where(columns["sends_early"], 0, rows)


def fit_chunks(
    columns: dict[str, Any], multiple: int, graphs: NDArray[np.int64] | None
) -> tuple[ChunkFit, list[Residual], dict[str, int]]:
    """Steps with chunks; what came before them shifts them by a constant each, and lengthens those behind others.

    Where short ones run as graphs (`graphs`: their rows), those that do not wait for the host: they are no measure of
    the device, but of how long a launch kernel by kernel takes.
    """
    rows = padded_rows(columns, multiple)
    waits = np.zeros(len(rows), dtype=bool)
    if graphs is not None and graphs.any():
        rows = np.where(graphs > 0, graphs, rows)
        waits = (graphs == 0) & (columns["sends_early"] | (rows <= CHUNK_GRAPH_ROWS[-1]))
    row_knots = knots_for(rows[~waits], _ROW_KNOTS)
    kv = columns["num_kv_tokens"]
    kv_knots = [0, max(1, int(kv.max()))]
    before = columns["before"]
    kinds = [kind for kind in ("idle", "decode", "chunk") if (before == kind).sum() >= LEAST_SAMPLES]
    longest, tells = _longest_cached(columns)
    in_graphs = graphs > 0 if graphs is not None and _tells_attention_apart(columns, graphs > 0, waits) else None
    attention = _attention(columns, longest, waits, in_graphs)
    launches = [*((before == kind) for kind in kinds), *_late_kernels(graphs, waits, before)]
    parts = (
        np.ones((len(rows), 1)),
        ramps(rows, row_knots),
        *_as_columns(attention),
        *_as_columns([columns["num_chunks"], columns["num_sampled"]]),
        ramps(kv, kv_knots),
        *_as_columns([columns["num_decodes"]]),
        *_as_columns([] if in_graphs is None else [np.zeros(len(rows))]),  # attention in graphs, by `walking`
        *_as_columns(launches),
    )
    at = len(row_knots)
    own = at + (7 if in_graphs is None else 8)  # coefficients of the step's own time
    cool = np.concatenate(parts, axis=1)
    ns = columns["duration_ps"] / 1000.0
    keys = ("num_pairs", "num_cached_tokens", "num_chunks", "num_decodes", "num_sampled")
    which = np.unique(before, return_inverse=True)[1].reshape(-1)
    told, shared = without_shared(columns, ~waits if in_graphs is None else ~waits & tells)
    of_told = {name: columns[name][told] for name in keys}
    load = _Load(columns)
    tells_of_rests = load.tells_of_rests(told)
    rests = [load.rests()[told]] if tells_of_rests else []
    groups = (rows[told], *of_told.values(), longest[told], kv[told] // 1024, which[told], *rests)

    def under_load(share: float, after_ns: float, drain: int) -> tuple[Fitted, Floats, float]:
        features = cool.copy()
        features[:, :own] *= load.slower(share, after_ns, drain)[:, None]
        points = points_of(groups, features[told], ns[told])
        found = fit_points(points, ns[told], features[told], "steps with chunks")
        off = np.abs(points.ns / np.maximum(points.features @ found.coefficients, 1.0) - 1)
        return found, features, float((points.weights * off).sum())

    def walking(walk: int) -> None:
        cool[:, own - 1] = np.maximum(columns["num_pairs"], walk * longest) * in_graphs

    def error_of(walk: int) -> float:
        walking(walk)
        return under_load(share, after_ns, drain)[2]

    share, after_ns, drain, walk = 0.0, _LOAD_AFTER_NS[0], 0, 0
    if in_graphs is not None:
        walk = min(_WALKS, key=error_of)
        walking(walk)
    under = rows[told & (load.ns(after_ns, 0) > _LOAD_AFTER_NS[0])]
    if np.histogram(under, np.array((0, 1, 3, 4)) * rows.max() / 4)[0].min() >= _LEAST_LOADED:
        drains = _DRAINS if tells_of_rests else _DRAINS[:1]
        share, after_ns, drain = _best_load(
            lambda share, after_ns, drain: under_load(share, after_ns, drain)[2], drains
        )
    fitted, features, _ = under_load(share, after_ns, drain)
    x = fitted.coefficients
    read_ns, by = curve_at(kv_knots, x[at + 5 : at + 6]), load.slower(share, after_ns, drain)
    rest = features @ x - read_ns(kv) * by
    part = saved_part(columns, shared, lambda read: rest + read_ns(read) * by)
    fitted_ns = rest + read_ns(kv_read(columns, part)) * by
    floor, residuals = _launch_floor(ns, fitted_ns, features[:, own:] @ x[own:], waits)
    residuals += residuals_of_shared("steps with chunks that share KV", ns, fitted_ns, shared)
    in_graph = [None, None] if in_graphs is None else [round(float(x[own - 1]) * pairs, 9) for pairs in (1, walk)]
    pair, cached_token, longest_token, chunk, sample = (round(float(value), 9) for value in x[at : at + 5])
    fit = ChunkFit(
        rows=curve_fit(x[0], row_knots, x[1:at]),
        pair_ns=pair,
        cached_token_ns=cached_token,
        chunk_ns=chunk,
        sample_ns=sample,
        mixed_kv_tokens=curve_fit(0.0, kv_knots, x[at + 5 : at + 6]),
        mixed_decode_ns=round(float(x[at + 6]), 3),
        graphs=graphs is not None and bool(graphs.any()),
        launch_floor_ns=round(floor, 3),
        graph_pair_ns=in_graph[0],
        graph_cached_token_ns=in_graph[1],
        shared_part=part,
        longest_token_ns=longest_token,
    )
    found = [round(float(value) * 1000) for value in x[own:]]
    shifts = {f"chunk_after_{kind}": value for kind, value in zip(kinds, found, strict=False)}
    known = list(shifts.values())
    for kind in ("idle", "decode", "chunk"):  # what was hardly ever seen is like what was
        if known:
            shifts.setdefault(f"chunk_after_{kind}", round(sum(known) / len(known)))
    if len(found) > len(kinds):
        shifts["kernels"] = found[-1]
    if share:
        shifts |= {
            "millionths_under_load": round(share * 1e6),
            "load_after": round(after_ns * 1000),
            "load_drain": drain,
        }
    return fit, [fitted.residual, *residuals], shifts


def _longest_cached(columns: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The most tokens cached before a chunk of each step, and which steps tell: older samples do so of single chunks only."""
    told, cached = columns["longest_cached"], columns["num_cached_tokens"]
    tells = (told >= 0) | (columns["num_chunks"] <= 1) | (cached < _BEHIND)
    return np.where(told >= 0, told, cached), np.asarray(tells)


def _attention(
    columns: dict[str, Any], longest: NDArray[np.int64], waits: NDArray[np.bool_], in_graphs: NDArray[np.bool_] | None
) -> list[NDArray[Any]]:
    """Pairs, cached tokens and the most before one chunk, of the steps whose attention takes a sum of them.

    Where graphs have an attention of their own, the other kernel walks through all chunks side by side, too: what a cached
    token takes is a matter of the longest then, unless steps of several chunks behind KV tell which.
    """
    pairs, cached = columns["num_pairs"], columns["num_cached_tokens"]
    if in_graphs is None:
        return [pairs, cached, np.zeros_like(longest)]
    by_kernels = ~in_graphs
    tell = by_kernels & ~waits & (cached - longest >= _BEHIND)
    return [pairs * by_kernels, cached * (by_kernels & (tell.sum() >= _LEAST_SEVERAL)), longest * by_kernels]


def _as_columns(values: Sequence[NDArray[Any]]) -> list[Floats]:
    return [each[:, None].astype(float) for each in values]


def _tells_attention_apart(columns: dict[str, Any], in_graphs: NDArray[np.bool_], waits: NDArray[np.bool_]) -> bool:
    """Whether prompts behind KV were seen both in graphs, which have an attention of their own, and kernel by kernel."""
    behind = ~waits & (columns["num_cached_tokens"] >= _BEHIND)
    found = [columns["num_cached_tokens"][behind & each] for each in (in_graphs, ~in_graphs)]
    return min(len(each) for each in found) >= _LEAST_BEHIND and len(np.unique(found[0])) >= LEAST_SAMPLES


class _Load:
    """For how long steps with chunks had followed each other when each of these began, less what rests took of it."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._order = np.lexsort((columns["step"], columns["epoch"], columns["executor"], columns["session"]))
        names = ("session", "executor", "before", "duration_ps", "rest_ps", "rest_in_transfer_ps")
        session, executor, before, duration, rest, kept = (columns[name][self._order] for name in names)
        same = np.concatenate(([False], (session[1:] == session[:-1]) & (executor[1:] == executor[:-1])))
        self._durations: list[int] = duration.tolist()
        self._follows: list[bool] = (same & (before == "chunk")).tolist()
        # of each that does not, the rest before it in which a load drains; -1: none of it is left, however fast it does
        self._rests: list[int] = np.where(same & (before == "idle") & (rest > 0), rest - kept, -1).tolist()
        self._found: dict[tuple[int, int], Floats] = {}

    def ns(self, after_ns: float, drain: int) -> Floats:
        """Of each step. A rest takes `drain` times itself of a load that counts up to `after_ns`; all of it where that is 0."""
        after = round(after_ns * 1000)
        if (after, drain) not in self._found:
            found = np.empty(len(self._order))
            found[self._order] = list(self._picoseconds(after, drain))
            self._found[after, drain] = found / 1000
        return self._found[after, drain]

    def _picoseconds(self, after: int, drain: int) -> Iterator[int]:
        load = 0
        for follows, rest, duration in zip(self._follows, self._rests, self._durations, strict=True):
            if not follows:
                load = max(0, min(load, after) - drain * rest) if drain and rest >= 0 else 0
            yield load
            load += duration

    def slower(self, share: float, after_ns: float, drain: int) -> Floats:
        return np.asarray(1 + share * np.minimum(self.ns(after_ns, drain) / after_ns, 1.0))

    def rests(self) -> NDArray[np.int64]:
        """A number for each step by the rest before it, in which a load drains: about equal ones have the same."""
        found = np.empty(len(self._order), dtype=np.int64)
        found[self._order] = np.log2(np.maximum(np.array(self._rests), 1)).astype(np.int64)
        return found

    def tells_of_rests(self, told: NDArray[np.bool_]) -> bool:
        """Whether there are enough steps behind a rest behind a load."""
        least, most = _RESTS_NS
        rests = np.array(self._rests) / 1000
        before = np.concatenate(
            ([0.0], (self.ns(_LOAD_AFTER_NS[0], 0)[self._order] + np.array(self._durations) / 1000)[:-1])
        )
        behind = (before >= _LOAD_AFTER_NS[0]) & (rests >= least) & (rests <= most)
        return int((behind & told[self._order]).sum()) >= _LEAST_RESTED


def _best_load(error: Callable[[float, float, int], float], drains: Sequence[int]) -> tuple[float, float, int]:
    """(how much longer, in proportion, steps under load are, after how many ns, how much of it a ns of rest takes) where the
    error is least: for each of `drains` first over a coarse grid, then closer around the best share, to a thousandth. None
    longer where that gains less than a tenth.
    """
    least = {}
    for drain in drains:
        tried = {(share, after): error(share, after, drain) for share in (0.04, 0.08, 0.12) for after in _LOAD_AFTER_NS}
        for step in (0.02, 0.01, 0.005, 0.002, 0.001):
            best, after = min(tried, key=lambda key: (tried[key], key))
            for share in (best - step, best + step):
                if 0 < share <= _MOST_SHARE and (share, after) not in tried:
                    tried[share, after] = error(share, after, drain)
        share, after = min(tried, key=lambda key: (tried[key], key))
        least[share, after, drain] = tried[share, after]
    share, after, drain = min(least, key=lambda key: (least[key], key))
    if least[share, after, drain] >= (1 - _LEAST_GAIN) * error(0.0, _LOAD_AFTER_NS[0], 0):
        return 0.0, after, 0
    return round(share, 4), after, drain


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
    return (late,) if min(each.sum() for each in told) >= LEAST_SAMPLES else ()


def _launch_floor(ns: Floats, fitted: Floats, shifts: Floats, waits: NDArray[np.bool_]) -> tuple[float, list[Residual]]:
    """The host's time for a step that it launches kernel by kernel: what short ones take that take longer than the device."""
    late = np.flatnonzero(waits & (ns > (1 + _WAITS) * fitted))
    if len(late) < LEAST_SAMPLES:
        return 0.0, []
    own = (ns - shifts)[late]
    kept = keep_near(own)
    floor = float(own[kept].mean())
    expected = floor + shifts[late][kept]
    return floor, [residual_of_samples("short steps without a graph", ns[late][kept], expected, len(late))]


def padded_rows(columns: dict[str, Any], multiple: int) -> NDArray[Any]:
    rows = columns["num_chunk_tokens"] + columns["num_decodes"]
    return np.asarray(np.where(rows <= multiple, rows, -(-rows // multiple) * multiple))
