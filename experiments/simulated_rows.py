"""A simulation whose rows stay in memory: for searches over so many runs that a folder for each would be most of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import astuple

from ..core.tables import DecisionRow, RequestRow
from ..policies.interfaces import PolicyError
from .config import Experiment
from .errors import ExperimentError
from .load_source import LoadSource
from .policy_failure import policy_failure
from .run_point import NoProgress
from .run_simulation import batches_outside, build_cluster
from .simulated_load import SimulatedLoad
from .tables_writer import EXCLUDED, frame_of
from .workload import PlannedRequest, Workload

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SimulatedRows:
    """The requests and decisions of a run, as its folder would hold them.

    `batches_outside`: how many batches began outside what the profile was measured for, and how many there were; of rows that
    come from a folder, none.
    """

    requests: pd.DataFrame
    decisions: pd.DataFrame
    batches_outside: tuple[int, int] = (0, 0)

    @property
    def counted(self) -> pd.DataFrame:
        """The requests that results are made of: no warm-up."""
        return self.requests[~self.requests[EXCLUDED]]


def simulate_rows(config: Experiment) -> SimulatedRows:
    """Simulate `config` to its end. Raises ExperimentError as `simulate_into` does."""
    requests: list[tuple[Any, ...]] = []
    decisions: list[tuple[Any, ...]] = []

    def record(row: Any, planned: PlannedRequest | None) -> None:
        if planned is not None:
            values = astuple(row)
            requests.append((values[0], planned.phase, *values[2:], planned.excluded))
        elif type(row) is DecisionRow:
            decisions.append(astuple(row))

    outside = simulate_into(config, record)
    return SimulatedRows(frame_of(requests, RequestRow), frame_of(decisions, DecisionRow), outside)


def simulate_summary(config: Experiment) -> dict[str, Any]:
    """`summary_of_rows` of a simulation. Raises as `simulate_into` does."""
    return summary_of_rows(config, simulate_rows(config))


def summary_of_rows(config: Experiment, rows: SimulatedRows) -> dict[str, Any]:
    """`brief_summary` of a simulation of `config`: what its summary.json would say of its requests."""
    from ..reports.summary import brief_summary

    keys = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s", "e2e_ms": "e2e_latency_s"}
    objectives = {keys[key]: value / 1e3 for key, value in objectives_of(config).items()}
    return brief_summary(rows.counted, objectives)


def objectives_of(config: Experiment) -> dict[str, float]:
    """Milliseconds by key of `slo`, of those that are given."""
    slo = config.slo
    found = {} if slo is None else {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "e2e_ms": slo.e2e_ms}
    return {key: value for key, value in found.items() if value is not None}


def simulate_into(config: Experiment, record: Callable[[Any, PlannedRequest | None], None]) -> tuple[int, int]:
    """Simulate `config`; every row of every table goes to `record`, a request's row with what was planned of it.

    Returns `batches_outside`.

    Raises ExperimentError for a policy that fails, breaks its contract or holds requests for ever.
    """
    source = LoadSource(Workload(config))
    load = SimulatedLoad(source, config, NoProgress())

    def records(row: Any) -> None:
        record(row, load.planned.pop(row.request_id) if type(row) is RequestRow else None)

    try:
        cluster = build_cluster(config, records=records, delivered=load.delivered)
        load.start(cluster)
        cluster.run()
    except PolicyError as error:
        raise ExperimentError(f"a policy broke its contract: {error}") from error
    except (Exception, SystemExit) as error:
        failure = policy_failure(error)
        if failure is None:
            raise
        raise ExperimentError(failure) from error
    if not source.finished:
        missing = source.num_sent - source.num_ended
        raise ExperimentError(f"{missing} requests are never answered: a policy holds them for ever")
    return batches_outside(cluster)
