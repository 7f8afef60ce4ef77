"""How long messages take: the mean of each kind of pair of cores, and what each token of a prompt adds where one is carried."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

import numpy as np

from ..core.overheads import MessageLatency
from .calibration_points import LEAST_SAMPLES, Floats, keep_near, usual
from .calibration_samples import MessageSample, pair_kind
from .errors import CalibrationFailedError

# Of a long prompt to a short one, at least: else a slope would be noise, drawn out to prompts never seen.
_UNLIKE: Final = 2.0
_LEAST_CARRYING: Final = 30  # messages: among fewer a stall or two look like tokens
_LEAST_GAIN: Final = 0.1  # of how far off a constant is
_LEAST_LEFT: Final = 0.1  # of the mean of messages to an executor: something is on its way without tokens, too
_GROUPS: Final = 16
_ROUNDS: Final = 5


def fit_messages(samples: Sequence[MessageSample]) -> tuple[MessageLatency, dict[str, float]]:
    """The mean latency of each kind of pair, less the longest hundredth, and its standard deviation in picoseconds.

    Reports are left out: nobody waits for them. A kind of pair that no message went over is like the others. Of messages to an
    executor the time for the tokens that they carry is taken off first, where samples tell it: the mean is of what is left,
    of messages with a prompt and without, each counted once. So it errs least over all of them should the two differ.
    """
    into, out, between = pair_kind(0, 1), pair_kind(1, 0), pair_kind(1, 2)
    token = prompt_token_time([sample for sample in samples if sample.pair == into])
    means, spreads = _of_pairs(samples, into, token)
    if token:
        plain, plain_spreads = _of_pairs(samples, into, 0)
        if means[into] < _LEAST_LEFT * plain[into]:  # a slope that is steeper than all messages are long
            token, means, spreads = 0, plain, plain_spreads
    if not means:
        raise CalibrationFailedError("no message between two cores was seen")
    any_pair = round(sum(means.values()) / len(means))
    latency = MessageLatency(means.get(into, any_pair), means.get(out, any_pair), means.get(between, any_pair), token)
    return latency, spreads


def _of_pairs(samples: Sequence[MessageSample], into: str, token: int) -> tuple[dict[str, int], dict[str, float]]:
    """Means and standard deviations in picoseconds by pair; `token` of them for each that a message of the pair `into`
    carries are taken off first.
    """
    by_pair: dict[str, list[float]] = {}
    for sample in samples:
        if sample.kind == "Report" or (token and sample.pair == into and sample.num_tokens < 0):
            continue
        carried = token * sample.num_tokens if token and sample.pair == into else 0
        by_pair.setdefault(sample.pair, []).append(sample.latency_ps - carried)
    means: dict[str, int] = {}
    spreads: dict[str, float] = {}
    for pair, values in by_pair.items():
        kept = usual(values)
        means[pair], spreads[pair] = max(0, round(float(kept.mean()))), round(float(kept.std()))
    return means, spreads


def prompt_token_time(samples: Sequence[MessageSample]) -> int:
    """Picoseconds for each token id; 0 where too few prompts, or none of unlike lengths, tell, or where they do not tell
    tokens from what a busy machine takes: a line gains little over a constant, or says that without tokens it took nothing.

    From messages that carry prompts alone, so that others, should they have less to wait for, do not make it steeper. A line
    by least squares in proportion to itself, through all that is not far from it: a stall is no matter of tokens.
    """
    from scipy.optimize import nnls

    carrying = [(sample.num_tokens, sample.latency_ps) for sample in samples if sample.num_tokens > 0]
    if len(carrying) < _LEAST_CARRYING:
        return 0
    tokens, ps = np.array(carrying, dtype=float).T
    short, long = np.quantile(tokens, (0.1, 0.9))
    if long < _UNLIKE * short:
        return 0
    largest = float(tokens.max())  # columns of like size
    features = np.stack((np.ones(len(tokens)), tokens / largest), axis=1)
    line = features @ _through_medians(tokens / largest, ps)
    start, slope = 0.0, 0.0
    for _ in range(_ROUNDS):
        line = np.maximum(line, 1.0)
        near = keep_near(ps / line)
        coefficients = nnls(features[near] / line[near, None], ps[near] / line[near])[0]
        line, start, slope = features @ coefficients, float(coefficients[0]), float(coefficients[1])
    if not start or _off(ps, line) > (1 - _LEAST_GAIN) * _off(ps, np.full(len(ps), np.median(ps))):
        return 0
    return round(slope / largest)


def _off(ps: Floats, line: Floats) -> float:
    """How far off a line is, in proportion to it: of every other message no more."""
    return float(np.median(np.abs(ps / np.maximum(line, 1.0) - 1)))


def _through_medians(x: Floats, y: Floats) -> Floats:
    """A first line, (at 0, slope), that up to a half of outliers cannot bend: the median of the slopes between medians."""
    count = max(2, min(_GROUPS, len(x) // LEAST_SAMPLES))
    groups = np.array_split(np.argsort(x, kind="stable"), count)
    medians = [(float(np.median(x[group])), float(np.median(y[group]))) for group in groups]
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in combinations(medians, 2) if a < c]
    slope = max(0.0, float(np.median(slopes))) if slopes else 0.0
    return np.array((max(0.0, float(np.median(y - slope * x))), slope))
