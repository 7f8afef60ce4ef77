"""A run again on recorded routes. On a run's own times, its own routes must give that very run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from disagg.experiments.errors import ExperimentError
from disagg.experiments.forced_routes import experiment_of, recorded_choices, replay_routes
from disagg.reports.attribution import ATTRIBUTED
from disagg.reports.metrics import measured
from disagg.reports.runs import ReportError, Run

HOLDING = """
from disagg.policies.interfaces import SelectingPolicy
from disagg.policies.vocabulary import Hold, Reject


class Holding(SelectingPolicy):
    '''At most three requests on an executor; what comes then waits.'''

    def select(self, request, pool):
        row = min(pool.healthy_rows, key=lambda row: row.active_requests)
        return row if row.active_requests < 3 else Hold()

    def route_context(self, request, fleet):
        return Reject("unlucky") if request.id == 13 else super().route_context(request, fleet)
"""

SPLIT_CLUSTER = {
    "profile": "spec:cpu-2core",
    "context_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "generation_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "cache_transceiver": {"backend": "mpi"},
}
MIXED_CLUSTER = {
    "profile": "spec:cpu-2core",
    "mixed_servers": {"num_instances": 3, "kv_cache": {"max_tokens": 4096}},
}
EARLY_CLUSTER = SPLIT_CLUSTER | {"cache_transceiver": {"backend": "mpi", "generation_binding": "at_arrival"}}


def experiment(folder: Path, cluster: dict, router: str, name: str = "experiment.yaml", **phase: object) -> Path:
    config = {
        "schema_version": 1,
        "name": "forced",
        "seed": 3,
        "model": {"id": "tiny-llama"},
        "cluster": cluster,
        "policy": {"router": router},
        "workload": {
            "dataset": {"type": "synthetic", "isl": {"mean": 200, "stddev": 90}, "osl": {"mean": 12, "stddev": 5}},
            "max_tokens": 32,
            "phases": [
                {"name": "warmup", "type": "poisson", "rate": 400, "requests": 5, "exclude_from_results": True},
                {"name": "profiling", "type": "poisson", "rate": 400, "requests": 60} | phase,
            ],
        },
        "slo": {"ttft_ms": 20, "tpot_ms": 5},
    }
    (folder / "policies.py").write_text(HOLDING)
    path = folder / name
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def simulated(disagg: Callable[..., int], file: Path, output: Path) -> Run:
    assert disagg("run", file, "--output", output) == 0
    return Run(output)


CLUSTERS = {
    "disaggregated": (SPLIT_CLUSTER, "random"),
    "mixed": (MIXED_CLUSTER, "random"),
    "bound at arrival": (EARLY_CLUSTER, "random"),
    "holding and rejecting": (SPLIT_CLUSTER, "policies.py:Holding"),
}


@pytest.mark.parametrize("case", list(CLUSTERS))
def test_the_routes_of_a_run_give_that_run_whatever_the_simulated_policy_is(
    tmp_path: Path, disagg: Callable[..., int], case: str
) -> None:
    cluster, router = CLUSTERS[case]
    recorded = simulated(disagg, experiment(tmp_path, cluster, router), tmp_path / "recorded")
    free = simulated(disagg, experiment(tmp_path, cluster, "least_requests"), tmp_path / "free")
    again = replay_routes(free, recorded, tmp_path / "again")
    assert not free.requests.equals(recorded.requests)
    leave_out = ["error"]  # the reason of a rejection is the replay's own
    pd.testing.assert_frame_equal(again.requests.drop(columns=leave_out), recorded.requests.drop(columns=leave_out))
    pd.testing.assert_frame_equal(again.steps, recorded.steps)
    if case == "holding and rejecting":
        assert (recorded.decisions["answer"] == "hold").sum() > 5
        assert (again.requests["finish_reason"] == "rejected").sum() == 1


def test_every_decision_that_was_recorded_is_a_choice(tmp_path: Path, disagg: Callable[..., int]) -> None:
    run = simulated(disagg, experiment(tmp_path, SPLIT_CLUSTER, "random"), tmp_path / "run")
    choices = recorded_choices(run)
    rows = run.requests.set_index("request_id")
    assert len(choices.context) == 65
    assert len(choices.generation) == (rows["num_output_tokens"] > 1).sum()
    for request, ((wait, answer, executor, _),) in choices.context.items():
        assert (wait, answer, executor) == (0, "route", rows.loc[int(request), "context_executor"])


def test_a_late_client_makes_the_same_requests_late_and_no_stage_longer(
    tmp_path: Path, disagg: Callable[..., int]
) -> None:
    """Far apart, requests do not meet: the delay is all that changes."""
    file = experiment(tmp_path, SPLIT_CLUSTER, "random", type="constant", rate=2, requests=8)
    free = simulated(disagg, file, tmp_path / "free")
    late = simulated(disagg, file, tmp_path / "late")
    table = pd.read_parquet(tmp_path / "late" / "requests.parquet")
    table["dispatch_s"] += 0.004
    table.to_parquet(tmp_path / "late" / "requests.parquet", index=False)
    again = replay_routes(free, Run(late.path), tmp_path / "again", with_dispatch=True)
    before, after = measured(free), measured(again)
    assert after["dispatch_delay_s"].to_numpy() == pytest.approx(np.full(8, 0.004))
    assert (after["ttft_s"] - before["ttft_s"]).to_numpy() == pytest.approx(np.full(8, 0.004), abs=1e-9)
    assert (after["tpot_s"] - before["tpot_s"]).to_numpy() == pytest.approx(np.zeros(8), abs=1e-9)
    assert after[list(ATTRIBUTED)].sum(axis=1).to_numpy() == pytest.approx(after["e2e_latency_s"].to_numpy(), abs=1e-11)


def test_a_run_is_not_changed_by_a_client_that_was_never_late(tmp_path: Path, disagg: Callable[..., int]) -> None:
    run = simulated(disagg, experiment(tmp_path, SPLIT_CLUSTER, "least_tokens"), tmp_path / "run")
    again = replay_routes(run, run, tmp_path / "again", with_dispatch=True)
    pd.testing.assert_frame_equal(again.requests, run.requests)


def test_a_request_that_was_never_routed_goes_to_some_healthy_executor(
    tmp_path: Path, disagg: Callable[..., int]
) -> None:
    run = simulated(disagg, experiment(tmp_path, SPLIT_CLUSTER, "random"), tmp_path / "run")
    table = pd.read_parquet(run.path / "decisions.parquet")
    table[table["request_id"] != 7].to_parquet(run.path / "decisions.parquet", index=False)
    again = replay_routes(run, Run(run.path), tmp_path / "again")
    assert set(again.requests["finish_reason"]) == {"stop"}


def test_relative_paths_start_where_the_experiment_file_lies_or_where_one_says(
    tmp_path: Path, disagg: Callable[..., int]
) -> None:
    run = simulated(disagg, experiment(tmp_path, SPLIT_CLUSTER, "policies.py:Holding"), tmp_path / "run")
    assert experiment_of(run).root == tmp_path
    assert experiment_of(run, tmp_path / "run").root == tmp_path / "run"


def test_a_run_without_decisions_cannot_be_replayed(tmp_path: Path, disagg: Callable[..., int]) -> None:
    run = simulated(disagg, experiment(tmp_path, SPLIT_CLUSTER, "random"), tmp_path / "run")
    (run.path / "decisions.parquet").unlink()
    with pytest.raises((ReportError, ExperimentError), match="holds no decisions"):
        replay_routes(run, Run(run.path), tmp_path / "again")
