"""The fit of steps with chunks of prompts: of the device where a graph runs them or they are long, of the host where not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..core.step_sizes import CHUNK_GRAPH_ROWS, chunk_graph
from .calibration_load import NO_EFFECT, Load, LoadEffect, best_effect
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
)
from .calibration_shared import curve_at, kv_read, residuals_of_shared, saved_part, without_shared
from .measured_profile import ChunkFit, Residual

# Rows of the engine's own steps, which are a staircase: between two of them lies nothing to interpolate.
_ROW_KNOTS: Final = (
    *(0, 16, 32, *CHUNK_GRAPH_ROWS, *range(1152, 2049, 128)),
    *(2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 12_288, 16_384),
)
_BEHIND: Final = 512  # cached tokens: fewer are lost among what a step takes
_LEAST_BEHIND: Final = 40  # steps of either kind: fewer told pairs from cached tokens badly
_LEAST_SEVERAL: Final = 20  # steps of several chunks behind KV, kernel by kernel
_WAITS: Final = 0.15  # of the device's time: a step that takes so much longer waits for the host
# (query, key) pairs that take as long as one token of the longest KV before a chunk, in a graph's attention.
_WALKS: Final = (100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 850, 1000, 1300, 1700, 2200, 3000)
# By what came before a step.
_GAP_BEHIND: Final = {kind: f"chunk_after_{kind}" for kind in ("idle", "decode", "chunk")}


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
    steps = _Steps(columns, multiple, graphs)
    walk = 0
    if steps.in_graphs is not None:
        walk = min(_WALKS, key=lambda walk: steps.solved(walk, NO_EFFECT).error)
    steps.count_from_least(steps.solved(walk, steps.effect(walk)))
    effect = steps.effect(walk)
    found = steps.solved(walk, effect)
    read_ns, by = curve_at(steps.kv_knots, found.of("mixed_kv")), steps.load.slower(effect)
    rest = found.features @ found.coefficients - read_ns(columns["num_kv_tokens"]) * by
    part = saved_part(columns, steps.shared, lambda read: rest + read_ns(read) * by)
    fitted_ns = rest + read_ns(kv_read(columns, part)) * by
    launches = steps.launches
    shifts_ns = found.features[:, launches] @ found.coefficients[launches]
    floor, residuals = _launch_floor(steps.ns, fitted_ns, shifts_ns, steps.waits)
    residuals += residuals_of_shared("steps with chunks that share KV", steps.ns, fitted_ns, steps.shared)
    fit = replace(
        _chunk_fit(found, steps, walk),
        graphs=graphs is not None and bool(graphs.any()),
        launch_floor_ns=round(floor, 3),
        shared_part=part,
    )
    return fit, [found.residual, *residuals], _gaps(found, effect)


def _chunk_fit(found: _Solved, steps: _Steps, walk: int) -> ChunkFit:
    """What the coefficients of a step's own time say."""
    in_graph: list[float | None] = [None, None]
    if steps.in_graphs is not None:
        in_graph = [round(found.one("graph_pair") * pairs, 9) for pairs in (1, walk)]
    return ChunkFit(
        rows=curve_fit(found.one("start"), steps.row_knots, found.of("rows")),
        pair_ns=round(found.one("pair"), 9),
        cached_token_ns=round(found.one("cached_token"), 9),
        chunk_ns=round(found.one("chunk"), 9),
        sample_ns=round(found.one("sample"), 9),
        mixed_kv_tokens=curve_fit(0.0, steps.kv_knots, found.of("mixed_kv")),
        mixed_decode_ns=round(found.one("mixed_decode"), 3),
        graph_pair_ns=in_graph[0],
        graph_cached_token_ns=in_graph[1],
        longest_token_ns=round(found.one("longest_token"), 9),
    )


def _gaps(found: _Solved, effect: LoadEffect) -> dict[str, int]:
    """Fields of `LaunchGaps`: what a step waits for behind others, in picoseconds, and what a load does."""
    gaps = {name: round(found.one(name) * 1000) for name in _GAP_BEHIND.values() if name in found.places}
    known = list(gaps.values())
    for name in _GAP_BEHIND.values():  # what was hardly ever seen is like what was
        if known:
            gaps.setdefault(name, round(sum(known) / len(known)))
    gaps |= {name: round(found.one(name) * 1000) for name in ("kernels", "decodes_after_chunk") if name in found.places}
    if effect.share:
        gaps |= {
            "millionths_under_load": round(effect.share * 1e6),
            "load_after": round(effect.after_ns * 1000),
            "load_drain": effect.drain,
        }
    return gaps


class _Solved(NamedTuple):
    """Coefficients in ns of one of each feature, those of one name at `places`; `features` [steps, coefficients] of all
    steps, longer by what a load does; `error`: how far off the points of the fit are, in proportion, by their weights.
    """

    coefficients: Floats
    places: dict[str, slice]
    features: Floats
    residual: Residual
    error: float

    def of(self, name: str) -> Floats:
        return np.asarray(self.coefficients[self.places[name]])

    def one(self, name: str) -> float:
        (value,) = self.of(name)
        return float(value)


class _Steps:
    """Steps with chunks and their features by name, for a fit by least squares; what is no factor of a feature is tried."""

    def __init__(self, columns: dict[str, Any], multiple: int, graphs: NDArray[np.int64] | None) -> None:
        """`columns` of samples; rows are padded to `multiple`, or to those of the graph of each step where that is not 0."""
        rows = padded_rows(columns, multiple)
        waits = np.zeros(len(rows), dtype=bool)  # for the host
        if graphs is not None and graphs.any():
            rows = np.where(graphs > 0, graphs, rows)
            waits = (graphs == 0) & (columns["sends_early"] | (rows <= CHUNK_GRAPH_ROWS[-1]))
        kv = columns["num_kv_tokens"]
        longest, tells = _longest_cached(columns)
        in_graphs = None
        if graphs is not None and _tells_attention_apart(columns, graphs > 0, waits):
            in_graphs = graphs > 0
        self.rows, self.waits = rows, waits
        self.ns: Floats = columns["duration_ps"] / 1000.0
        self.row_knots = knots_for(rows[~waits], _ROW_KNOTS)
        self.kv_knots = [0, max(1, int(kv.max()))]
        self.in_graphs = in_graphs  # None: attention in graphs is not told from that of kernels
        self.told, self.shared = without_shared(columns, ~waits if in_graphs is None else ~waits & tells)
        self.load = Load(columns)
        self.tells_of_rests = self.load.tells_of_rests(self.told)
        self._pairs, self._longest = columns["num_pairs"], longest
        features = self._features(columns, _attention(columns, longest, waits, in_graphs))
        num_own = sum(each.shape[1] for each in features.values())
        features |= _launches(graphs, waits, columns)
        self._cool = np.concatenate(list(features.values()), axis=1)
        self._places = _places(features)
        self._own = slice(0, num_own)  # of the step's own time, which is what a load lengthens
        self.launches = slice(num_own, None)
        self._groups = self._alike(columns)

    def effect(self, walk: int) -> LoadEffect:
        """What a load does, if there are enough steps under one."""
        if not self.load.tells(self.rows, self.told):
            return NO_EFFECT
        return best_effect(lambda effect: self.solved(walk, effect).error, self.tells_of_rests)

    def count_from_least(self, found: _Solved) -> None:
        """Have the least of the gaps by what came before in the start of a step's own time, and the others counted from it.

        Every step with chunks came behind something, so how a constant is shared between its start and all gaps is otherwise
        for noise to say: a prompt could take less than a decode step, and every gap five milliseconds.
        """
        gaps = [name for name in _GAP_BEHIND.values() if name in self._places]
        if gaps:
            self._cool[:, self._places[min(gaps, key=found.one)]] = 0.0

    def _features(self, columns: dict[str, Any], attention: Sequence[NDArray[Any]]) -> dict[str, Floats]:
        """[steps, coefficients] each, of what a step's own time is made of."""
        pairs, cached, longest = attention
        features = {
            "start": np.ones((len(self.rows), 1)),
            "rows": ramps(self.rows, self.row_knots),
            "pair": _as_column(pairs),
            "cached_token": _as_column(cached),
            "longest_token": _as_column(longest),
            "chunk": _as_column(columns["num_chunks"]),
            "sample": _as_column(columns["num_sampled"]),
            "mixed_kv": ramps(columns["num_kv_tokens"], self.kv_knots),
            "mixed_decode": _as_column(columns["num_decodes"]),
        }
        if self.in_graphs is not None:
            features["graph_pair"] = np.zeros((len(self.rows), 1))  # a matter of what is tried: see `solved`
        return features

    def _alike(self, columns: dict[str, Any]) -> list[NDArray[Any]]:
        """Keys of the steps that tell: those of equal keys are a point of the fit."""
        names = ("num_pairs", "num_cached_tokens", "num_chunks", "num_decodes", "num_sampled")
        which = np.unique(columns["before"], return_inverse=True)[1].reshape(-1)
        keys = [self.rows, *(columns[name] for name in names), self._longest, columns["num_kv_tokens"] // 1024, which]
        if self.tells_of_rests:
            keys.append(self.load.rests())
        return [key[self.told] for key in keys]

    def solved(self, walk: int, effect: LoadEffect) -> _Solved:
        """The fit where a token of the longest KV before a chunk takes as long as `walk` pairs in a graph's attention, and a
        load lengthens steps by `effect`.
        """
        features, told = self._cool.copy(), self.told
        if self.in_graphs is not None:
            walked = np.maximum(self._pairs, walk * self._longest) * self.in_graphs
            features[:, self._places["graph_pair"]] = walked[:, None]
        features[:, self._own] *= self.load.slower(effect)[:, None]
        points = points_of(self._groups, features[told], self.ns[told])
        found = fit_points(points, self.ns[told], features[told], "steps with chunks")
        off = np.abs(points.ns / np.maximum(points.features @ found.coefficients, 1.0) - 1)
        error = float((points.weights * off).sum())
        return _Solved(found.coefficients, self._places, features, found.residual, error)


def _places(features: dict[str, Floats]) -> dict[str, slice]:
    """Where the columns of each are in all of them side by side."""
    ends = list(accumulate(each.shape[1] for each in features.values()))
    return {name: slice(start, end) for name, (start, end) in zip(features, pairwise([0, *ends]), strict=True)}


def _as_column(values: NDArray[Any]) -> Floats:
    return values[:, None].astype(float)


def _launches(graphs: NDArray[np.int64] | None, waits: NDArray[np.bool_], columns: dict[str, Any]) -> dict[str, Floats]:
    """Which steps came behind what, as far as it was seen often enough, and which of them wait for their kernels or for
    what decodes along, by names of `LaunchGaps`.
    """
    before = columns["before"]
    found = {name: before == kind for kind, name in _GAP_BEHIND.items()}
    found = {name: each for name, each in found.items() if each.sum() >= LEAST_SAMPLES}
    late = _late_kernels(graphs, waits, before)
    if late is not None:
        found["kernels"] = late
    decodes = columns["num_decodes"] > 0
    behind = [(before == "chunk") & each for each in (decodes, ~decodes)]
    if min(each.sum() for each in behind) >= LEAST_SAMPLES:
        found["decodes_after_chunk"] = behind[0]
    return {name: _as_column(each) for name, each in found.items()}


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


def _tells_attention_apart(columns: dict[str, Any], in_graphs: NDArray[np.bool_], waits: NDArray[np.bool_]) -> bool:
    """Whether prompts behind KV were seen both in graphs, which have an attention of their own, and kernel by kernel."""
    behind = ~waits & (columns["num_cached_tokens"] >= _BEHIND)
    found = [columns["num_cached_tokens"][behind & each] for each in (in_graphs, ~in_graphs)]
    return min(len(each) for each in found) >= _LEAST_BEHIND and len(np.unique(found[0])) >= LEAST_SAMPLES


def _late_kernels(
    graphs: NDArray[np.int64] | None, waits: NDArray[np.bool_], before: NDArray[Any]
) -> NDArray[np.bool_] | None:
    """Which steps run kernel by kernel, though others are graphs, and were not launched behind decodes.

    None where there are none, or none of the same kind behind decodes: the rows tell of both then.
    """
    if graphs is None or not graphs.any():
        return None
    by_kernels = graphs == 0
    late = by_kernels & (before != "decode")
    told = [late & ~waits, by_kernels & ~late & ~waits]
    return late if min(each.sum() for each in told) >= LEAST_SAMPLES else None


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
