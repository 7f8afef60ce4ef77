"""One simulation of a search: does this cluster meet its objectives at this rate? Ended as soon as the answer is certain.

It meets them if at least `slo.attainment` of the requests that count meet all objectives, as `reports/metrics.py` counts
them, and if the backlog does not grow all the time (a run too short to show that has no say in it). Of n requests
n − ⌈attainment·n⌉ may miss. One more ends the simulation; a request is a miss when it ends as one, and earlier when its
first token or its end is overdue. Once enough have met them, and the last one was sent, nothing can change either.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ..core.commands import Deliver
from ..core.tables import RequestRow
from ..policies.vocabulary import PS_PER_MS, PS_PER_S, FinishReason
from ..reports.statistics import t_quantile
from .config import Experiment, Slo
from .load_source import LoadSource
from .run_point import NoProgress
from .run_simulation import batches_outside, build_cluster
from .simulated_load import SimulatedLoad
from .workload import PlannedRequest, Workload

GROWTH_THAT_MATTERS: Final = 0.05  # of the arrivals: the backlog grows by so much of what comes
_BATCHES: Final = 15
_FILLING: Final = 1.5  # mean latencies that pass before a cluster is as full as it will be
_LEAST_WINDOW: Final = 0.4  # of the arrivals must be left to look at
_CERTAIN: Final = 0.995
_COMPLETED: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)


class _Decided(Exception):
    """Nothing that may follow changes the answer."""


@dataclass(frozen=True)
class Verdict:
    """Whether the objectives are met at `rate` (requests/s), and why not.

    `attainment` is that of the requests whose fate was known at the end. `missed` counts the misses by the objective that
    was missed first: ttft, tpot, e2e, error. `num_outside` of `num_batches` were dearer than any that the profile measured.
    """

    rate: float
    is_met: bool
    attainment: float
    num_requests: int
    num_known: int
    missed: dict[str, int] = field(default_factory=dict)
    is_saturated: bool = False
    error: str | None = None
    num_outside: int = 0
    num_batches: int = 0

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def why(self) -> str:
        """What stands against the rate, in words; empty where nothing does."""
        if self.error:
            return self.error
        if self.is_met:
            return ""
        if self.is_saturated:
            return "backlog grows"
        most = max(self.missed, key=lambda key: self.missed[key], default="")
        return {"ttft": "TTFT", "tpot": "TPOT", "e2e": "latency", "error": "errors"}.get(most, "")


def probe(config: Experiment, rate: float) -> Verdict:
    """Simulate `config`, whose arrivals have mean `rate`, until it is certain whether its objectives are met.

    Raises what a policy raises; ConfigError and its like for a cluster that cannot be built.
    """
    if config.slo is None:
        raise ValueError("there are no objectives")
    workload = Workload(config)
    counts = zip(config.workload.phases, workload.counts, strict=True)
    judge = _Judge(config.slo, sum(count for phase, count in counts if not phase.exclude_from_results))
    source = _WatchedSource(workload, judge)
    load = _WatchedLoad(source, config, judge)
    cluster = build_cluster(config, records=judge.record, delivered=load.delivered)
    error = None
    try:
        load.start(cluster)
        cluster.run()
        if not source.finished:
            error = "requests are never answered"
    except _Decided:
        pass
    saturated = judge.is_saturated()
    outside, batches = batches_outside(cluster)
    return Verdict(
        rate,
        is_met=error is None and judge.is_met and not saturated,
        attainment=judge.num_met / judge.num_known if judge.num_known else 0.0,
        num_requests=judge.num_requests,
        num_known=judge.num_known,
        missed=dict(judge.missed),
        is_saturated=saturated,
        error=error,
        num_outside=outside,
        num_batches=batches,
    )


class _Judge:
    """Counts requests that met all objectives and requests that certainly do not. Instants in picoseconds."""

    def __init__(self, slo: Slo, num_requests: int) -> None:
        self.num_requests = num_requests
        self.needed = math.ceil(slo.attainment * num_requests - 1e-9)
        self.num_met = 0
        self.num_sent = 0
        self.missed: dict[str, int] = {}
        self._ttft, self._tpot, self._e2e = (
            None if value is None else round(value * PS_PER_MS) for value in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
        )
        self._open: dict[int, PlannedRequest] = {}
        self._excluded: set[int] = set()
        self._started: set[int] = set()
        self._known_misses: set[int] = set()  # of those that are open
        self._first_due: deque[tuple[int, int]] = deque()
        self._end_due: list[tuple[int, str, int]] = []
        self._backlog: list[tuple[int, int]] = []  # (instant, requests in the cluster) at each arrival
        self._latencies = [0, 0]  # sum, count

    @property
    def num_known(self) -> int:
        return self.num_met + sum(self.missed.values())

    @property
    def is_met(self) -> bool:
        return self.num_met >= self.needed

    def sent(self, request: PlannedRequest) -> None:
        """`request.offset` is its intended send on the clock of the run."""
        if request.excluded:
            self._excluded.add(request.id)
            return
        at = request.offset or 0
        self._backlog.append((at, len(self._open)))
        self.num_sent += 1
        self._open[request.id] = request
        if self._ttft is not None:
            self._first_due.append((at + self._ttft, request.id))
        if self._e2e is not None:
            heapq.heappush(self._end_due, (at + self._e2e, "e2e", request.id))

    def first_token(self, request_id: int, now: int) -> None:
        request = self._open.get(request_id)
        if request is None:
            return
        self._started.add(request_id)
        if self._tpot is not None and request.num_output_tokens > 1:
            due = now + self._tpot * (request.num_output_tokens - 1)
            heapq.heappush(self._end_due, (due, "tpot", request_id))

    def look(self, now: int) -> None:
        """Find the overdue. Raises _Decided."""
        while self._first_due and self._first_due[0][0] < now:
            _, request_id = self._first_due.popleft()
            if request_id in self._open and request_id not in self._started:
                self._miss("ttft", request_id)
        while self._end_due and self._end_due[0][0] < now:
            _, objective, request_id = heapq.heappop(self._end_due)
            if request_id in self._open:
                self._miss(objective, request_id)

    def record(self, row: Any) -> None:
        """A finished row of any table. Raises _Decided."""
        if type(row) is not RequestRow:
            return
        request_id = row.request_id
        if request_id in self._excluded:
            self._excluded.discard(request_id)
            return
        self._open.pop(request_id, None)
        self._started.discard(request_id)
        self._latencies[0] += row.end_ps - row.arrival_ps
        self._latencies[1] += 1
        if request_id in self._known_misses:
            self._known_misses.discard(request_id)
            return
        missed = self._missed_objective(row)
        if missed is not None:
            self._count(missed)
            return
        self.num_met += 1
        if self.num_met >= self.needed and self.num_sent == self.num_requests:
            raise _Decided

    def _missed_objective(self, row: RequestRow) -> str | None:
        if row.finish_reason not in _COMPLETED or row.first_token_ps is None:
            return "error"
        if self._ttft is not None and row.first_token_ps - row.arrival_ps > self._ttft:
            return "ttft"
        gaps = row.num_output_tokens - 1
        if self._tpot is not None and gaps > 0 and row.end_ps - row.first_token_ps > self._tpot * gaps:
            return "tpot"
        if self._e2e is not None and row.end_ps - row.arrival_ps > self._e2e:
            return "e2e"
        return None

    def _miss(self, objective: str, request_id: int) -> None:
        if request_id not in self._known_misses:
            self._known_misses.add(request_id)
            self._count(objective)

    def _count(self, objective: str) -> None:
        self.missed[objective] = self.missed.get(objective, 0) + 1
        if sum(self.missed.values()) > self.num_requests - self.needed:
            raise _Decided

    def is_saturated(self) -> bool:
        """Whether the backlog's slope, once the cluster has filled, is significantly positive and large.

        Batch means of the backlog at arrivals against time, by least squares.
        """
        if self.num_sent < 8 * _BATCHES or not self._latencies[1]:
            return False
        start, end = self._backlog[0][0], self._backlog[-1][0]
        filled = start + max((end - start) // 4, round(_FILLING * self._latencies[0] / self._latencies[1]))
        rows = [row for row in self._backlog if row[0] >= filled]
        if len(rows) < max(_LEAST_WINDOW * len(self._backlog), 4 * _BATCHES):
            return False
        size = len(rows) // _BATCHES
        batches = [rows[i * size : (i + 1) * size] for i in range(_BATCHES)]
        times = [sum(at for at, _ in batch) / size / PS_PER_S for batch in batches]
        heights = [sum(count for _, count in batch) / size for batch in batches]
        slope, error = _slope(times, heights)
        arrivals_per_s = (len(rows) - 1) * PS_PER_S / max(1, rows[-1][0] - rows[0][0])
        return slope > GROWTH_THAT_MATTERS * arrivals_per_s and slope > error * t_quantile(_BATCHES - 2, _CERTAIN)


def _slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    square = sum((a - mean_x) ** 2 for a in x)
    if square == 0:
        return 0.0, 0.0
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / square
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return slope, math.sqrt(rest / (n - 2) / square)


class _WatchedSource(LoadSource):
    def __init__(self, workload: Workload, judge: _Judge) -> None:
        self._judge = judge
        super().__init__(workload)

    def take(self, now: int) -> list[PlannedRequest]:
        due = super().take(now)
        for request in due:
            self._judge.sent(request)
        return due


class _WatchedLoad(SimulatedLoad):
    def __init__(self, source: LoadSource, config: Experiment, judge: _Judge) -> None:
        super().__init__(source, config, NoProgress())
        self._judge = judge

    def delivered(self, deliver: Deliver) -> None:
        super().delivered(deliver)
        cluster = self._cluster
        if cluster is None:
            return
        now = cluster.env.now
        if deliver.finish_reason is None:
            self._judge.first_token(deliver.request_id, now)
        else:
            self.planned.pop(deliver.request_id, None)
        self._judge.look(now)
