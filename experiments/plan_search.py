"""The highest rate of one candidate under one seed: bisection over the grid of rates; and that search as a worker's task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from .config import Experiment, validate_mapping
from .errors import ExperimentError
from .plan_probe import Verdict, probe
from .plan_rates import at_rate, grid_rate
from .policy_failure import policy_failure
from .run_simulation import costs_of

_FIRST_STEP: Final = 0.3  # how much higher or lower the second rate is than the first
_FARTHEST: Final = 1000.0  # from the rate to start at: a cluster that meets its objectives at no rate, or at any
_VERSION: Final = 2  # of what a task means: results of another one are not taken up


@dataclass(frozen=True)
class RateSearch:
    """What to find out: the highest rate of `experiment` under its own seed. `start` is the first place on the grid."""

    experiment: Experiment
    base: float
    tolerance: float
    start: int
    horizon_s: float

    def text(self) -> str:
        """All of it as JSON; equal searches have equal texts, also of measured costs that changed in place."""
        return json.dumps(
            {
                "version": _VERSION,
                "experiment": self.experiment.expanded(),
                "root": str(self.experiment.root),
                "base": self.base,
                "tolerance": self.tolerance,
                "start": self.start,
                "horizon_s": self.horizon_s,
                "costs": sha256(repr(sorted(costs_of(self.experiment).items())).encode()).hexdigest(),
            },
            sort_keys=True,
        )


def search_of(text: str) -> RateSearch:
    data = json.loads(text)
    experiment = validate_mapping(data["experiment"], {})
    experiment._root = Path(data["root"])
    return RateSearch(experiment, data["base"], data["tolerance"], data["start"], data["horizon_s"])


@dataclass(frozen=True)
class Found:
    """`rate` 0: the objectives are met at no rate. `at` is the verdict there, `above` that of the next rate of the grid.

    `num_requests` is how many requests its simulations sent out to count, `num_known` how many had to be simulated.
    """

    rate: float
    at: dict[str, Any] | None
    above: dict[str, Any] | None
    num_probes: int
    num_requests: int
    num_known: int
    error: str | None = None

    @property
    def attainment(self) -> float | None:
        return None if self.at is None else float(self.at["attainment"])

    @property
    def outside(self) -> tuple[int, int]:
        """Batches that the profile was not measured for, and all, at the rate found; where none was, at the lowest tried."""
        seen = self.at or self.above
        return (0, 0) if seen is None else (seen["num_outside"], seen["num_batches"])

    @property
    def limit(self) -> str:
        """What stands against a higher rate."""
        return "" if self.above is None else Verdict(**self.above).why


def highest_rate(is_met: Callable[[int], bool], start: int, tolerance: float) -> tuple[int | None, int | None]:
    """Places on the grid: the highest that `is_met`, and the next one, which is not. None: there is none.

    Steps away from `start`, each twice as wide as the last, until both sides are found, then halves what is between. Where
    attainment is not monotone in the rate, the place is one at which it changes.
    """
    step = max(1, round(math.log1p(_FIRST_STEP) / math.log1p(tolerance)))
    farthest = round(math.log(_FARTHEST) / math.log1p(tolerance))
    met: int | None = None
    missed: int | None = None
    place = start
    while met is None or missed is None:
        if is_met(place):
            met = place
            following = min(place + step, start + farthest)
        else:
            missed = place
            following = max(place - step, start - farthest)
        if (met is None or missed is None) and following == place:
            return met, missed
        place, step = following, 2 * step
    while missed - met > 1:
        middle = (met + missed) // 2
        if is_met(middle):
            met = middle
        else:
            missed = middle
    return met, missed


def search(task: RateSearch) -> Found:
    """Raises what a simulation raises."""
    verdicts: dict[int, Verdict] = {}

    def is_met(place: int) -> bool:
        rate = grid_rate(place, task.tolerance)
        config = at_rate(task.experiment, rate, task.base, horizon_s=task.horizon_s)
        verdicts[place] = probe(config, rate)
        return verdicts[place].is_met

    met, missed = highest_rate(is_met, task.start, task.tolerance)
    return Found(
        rate=0.0 if met is None else verdicts[met].rate,
        at=None if met is None else verdicts[met].plain(),
        above=None if missed is None else verdicts[missed].plain(),
        num_probes=len(verdicts),
        num_requests=sum(verdict.num_requests for verdict in verdicts.values()),
        num_known=sum(verdict.num_known for verdict in verdicts.values()),
    )


def search_task(text: str) -> str:
    """A worker's deed: `search` of a RateSearch's text. Returns a Found as JSON, with `error` for what went wrong."""
    try:
        found = search(search_of(text))
    except (ModelError, PolicyError, ExperimentError) as error:
        found = _failed(str(error))
    except Exception as error:
        found = _failed(policy_failure(error) or f"{type(error).__name__}: {error}")
    return json.dumps(asdict(found))


def _failed(error: str) -> Found:
    return Found(0.0, None, None, 0, 0, 0, " ".join(error.split()))


def failed_answer(error: str) -> str:
    """The answer to a search whose worker could not give one."""
    return json.dumps(asdict(_failed(error)))


def found_of(text: str) -> Found:
    return Found(**json.loads(text))
