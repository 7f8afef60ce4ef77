"""What a load does to steps with chunks of prompts: once they have followed each other for long they take longer each.

A load builds up while steps follow each other and drains in rests; samples tell by how much, after how long and how fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .calibration_points import Floats

_AFTER_NS: Final = (5e7, 1e8, 2e8, 4e8)  # until a device's clock has followed its load
_DRAINS: Final = (0, 1, 2, 3, 5, 10, 15, 20, 30, 50)  # ns of load that a ns of rest takes; 0: all of it at once
_RESTS_NS: Final = (1e6, 6e7)  # that tell at which rate
# Samples of small, of middling and of large steps, to tell what a load does from what rows do.
_LEAST_LOADED: Final = 20
_LEAST_RESTED: Final = 20  # steps behind a rest behind a load
_MOST_SHARE: Final = 0.25
_LEAST_GAIN: Final = 0.05  # of the fit's error


class LoadEffect(NamedTuple):
    """How much longer, in proportion, steps under a load are, after how many ns of it in full, and how many ns of it a ns of
    rest takes; 0: any rest takes all of it.
    """

    share: float
    after_ns: float
    drain: int


NO_EFFECT: Final = LoadEffect(0.0, _AFTER_NS[0], 0)


class Load:
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

    def slower(self, effect: LoadEffect) -> Floats:
        """What the step's own time is multiplied by, of each step."""
        share, after_ns, drain = effect
        return np.asarray(1 + share * np.minimum(self.ns(after_ns, drain) / after_ns, 1.0))

    def tells(self, rows: NDArray[np.int64], told: NDArray[np.bool_]) -> bool:
        """Whether there are enough steps under a load of small, of middling and of large `rows`."""
        under = rows[told & (self.ns(_AFTER_NS[0], 0) > _AFTER_NS[0])]
        return bool(np.histogram(under, np.array((0, 1, 3, 4)) * rows.max() / 4)[0].min() >= _LEAST_LOADED)

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
            ([0.0], (self.ns(_AFTER_NS[0], 0)[self._order] + np.array(self._durations) / 1000)[:-1])
        )
        behind = (before >= _AFTER_NS[0]) & (rests >= least) & (rests <= most)
        return int((behind & told[self._order]).sum()) >= _LEAST_RESTED


def best_effect(error: Callable[[LoadEffect], float], with_rests: bool) -> LoadEffect:
    """The effect of a load where the error is least: for each rate at which a rest may drain it (`with_rests`: samples tell
    of rests; without, any rest takes all of it) first over a coarse grid, then closer around the best share, to a thousandth.
    No effect where that gains less than a twentieth of the error.
    """
    least = {}
    for drain in _DRAINS if with_rests else _DRAINS[:1]:
        coarse = [LoadEffect(share, after_ns, drain) for share in (0.04, 0.08, 0.12) for after_ns in _AFTER_NS]
        tried = {effect: error(effect) for effect in coarse}
        for step in (0.02, 0.01, 0.005, 0.002, 0.001):
            best = _least_off(tried)
            for share in (best.share - step, best.share + step):
                effect = best._replace(share=share)
                if 0 < share <= _MOST_SHARE and effect not in tried:
                    tried[effect] = error(effect)
        best = _least_off(tried)
        least[best] = tried[best]
    best = _least_off(least)
    if least[best] >= (1 - _LEAST_GAIN) * error(NO_EFFECT):
        return NO_EFFECT
    return best._replace(share=round(best.share, 4))


def _least_off(errors: dict[LoadEffect, float]) -> LoadEffect:
    """Of equal ones the least effect."""
    return min(errors, key=lambda effect: (errors[effect], effect))
