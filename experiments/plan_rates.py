"""The rates that a search tries, and an experiment at another rate of arrivals.

All candidates and seeds share one geometric grid of rates, so that they are compared at equal rates and under equal
random numbers: at equal seeds schedules of different rate are each other's scaled copies.
"""

from __future__ import annotations

import math
from typing import Any

from .config import Experiment
from .config_workload import ConcurrencyPhase, ConstantPhase, GammaPhase, PoissonPhase, TracePhase
from .errors import ConfigError
from .workload import Workload, phase_counts

MOST_REQUESTS = 200_000  # of one simulation; a horizon that asks for more is cut


def grid_rate(k: int, tolerance: float) -> float:
    """Rate number `k` of the grid, requests/s: (1 + tolerance)^k to six digits."""
    return float(f"{(1 + tolerance) ** k:.6g}")


def grid_place(rate: float, tolerance: float) -> int:
    """The number of the grid's rate next to `rate`."""
    return round(math.log(rate) / math.log1p(tolerance))


def base_rate(config: Experiment) -> float:
    """Mean rate (requests/s) of the arrivals that count, as the file has them.

    Raises ConfigError where a phase that counts is a closed loop, which has no rate, or a trace lasts no time.
    """
    counts = phase_counts(config)
    requests, seconds = 0, 0.0
    spans: dict[str, float] | None = None
    for phase, count in zip(config.workload.phases, counts, strict=True):
        if phase.exclude_from_results:
            continue
        if isinstance(phase, ConcurrencyPhase):
            raise ConfigError(
                f"plan: phase '{phase.name}' is a closed loop, whose rate follows the cluster; allowed: poisson, gamma,"
                " constant or trace, or exclude_from_results"
            )
        requests += count
        if isinstance(phase, TracePhase):
            spans = _trace_spans(config) if spans is None else spans
            seconds += spans[phase.name] * count / max(1, count - 1)
        else:
            seconds += count / phase.rate
    if seconds <= 0:
        raise ConfigError("plan: the trace's requests all come at one instant: there is no rate to scale")
    return requests / seconds


def at_rate(
    config: Experiment, rate: float, base: float, *, horizon_s: float = 0.0, seed: int | None = None
) -> Experiment:
    """`config` with arrivals of mean `rate` where `base` is that of the file, for at least `horizon_s` seconds.

    Every open-loop phase is scaled by the same factor. Phases that draw their arrivals get more requests if the horizon
    needs them, never fewer than the file says; a trace is only as long as it is.
    """
    factor = rate / base
    counts = phase_counts(config)
    measured = [
        count
        for phase, count in zip(config.workload.phases, counts, strict=True)
        if not phase.exclude_from_results and not isinstance(phase, TracePhase)
    ]
    more = 1.0
    if measured:
        wanted = min(rate * horizon_s, MOST_REQUESTS)
        more = max(1.0, wanted / sum(measured))
    phases: list[Any] = []
    for phase in config.workload.phases:
        update: dict[str, Any] = {}
        if isinstance(phase, PoissonPhase | GammaPhase | ConstantPhase):
            update["rate"] = rate if phase.rate == base else _bounded(phase.rate * factor)
            if not phase.exclude_from_results:
                update["requests"] = math.ceil(phase.requests * more)
        elif isinstance(phase, TracePhase):
            update["speedup"] = _bounded(phase.speedup * factor)
        phases.append(phase.model_copy(update=update))
    found: dict[str, Any] = {"workload": config.workload.model_copy(update={"phases": phases})}
    if seed is not None:
        found["seed"] = seed
    return config.model_copy(update=found)


def _bounded(value: float) -> float:
    return min(max(value, 1e-6), 1e9)


def _trace_spans(config: Experiment) -> dict[str, float]:
    """Seconds from the first to the last arrival of each phase that follows a trace's times."""
    spans: dict[str, float] = {}
    for phase in Workload(config, with_block_hashes=False).phases():
        last = 0
        for request in phase.requests:
            last = request.offset or 0
        spans[phase.name] = last / 1e12
    return spans
