"""When requests are meant to be sent: endless absolute schedules in integer picoseconds from the phase's start.

An open-loop schedule never looks at the cluster, so a slow cluster cannot thin out its own load.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from ..policies.vocabulary import PS_PER_S
from .config_workload import ConstantPhase, GammaPhase, PoissonPhase

_DRAWS = 4096  # at a time; the sequence does not depend on it


def arrival_offsets(phase: PoissonPhase | GammaPhase | ConstantPhase, rng: np.random.Generator) -> Iterator[int]:
    """Offsets of an open-loop phase, not decreasing, without end; the first gap counts for random schedules.

    Poisson gaps are exponential of mean 1/rate; gamma gaps have shape `burstiness` and mean 1/rate, hence a squared
    coefficient of variation of 1/burstiness. At equal seeds schedules of different rate are each other's scaled copies.
    """
    if isinstance(phase, ConstantPhase):
        numerator, denominator = phase.rate.as_integer_ratio()
        for number in count():
            yield number * PS_PER_S * denominator // numerator
    now = 0
    while True:
        if isinstance(phase, GammaPhase):
            gaps = rng.standard_gamma(phase.burstiness, _DRAWS) / phase.burstiness
        else:
            gaps = rng.standard_exponential(_DRAWS)
        for gap in np.rint(gaps * (PS_PER_S / phase.rate)).tolist():
            now += int(gap)
            yield now


def scaled(offset: int, speedup: float) -> int:
    """A trace's offset (picoseconds) played `speedup` times as fast; exact for whole speed-ups and their inverses."""
    numerator, denominator = speedup.as_integer_ratio()
    return offset * denominator // numerator
