"""The oracle beside every routing of a few requests, and the regret of single decisions, against runs made by other means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from disagg.experiments.config import Experiment
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.oracle_gap import instance_of, latency_of, measure_gap, options_of, with_router
from disagg.experiments.regret import regrets_of
from disagg.experiments.simulated_rows import simulate_rows
from disagg.reports.regret import summarise_regret
from disagg.reports.summary import brief_summary, summarise

PINNED = """
from disagg.policies import RouteMixed, RoutingPolicy, Route


class First(RoutingPolicy):
    '''Everything to executor 1, and to executor 3 after it.'''

    def route_context(self, request, fleet):
        return RouteMixed(1) if fleet.mixed.num_healthy else Route(context=1)

    def route_generation(self, request, fleet):
        return Route(generation=3)


class Pinned(First):
    '''But for one request, at one stage.'''

    def __init__(self, *, rng, request, stage, executor):
        super().__init__(rng=rng)
        self.pinned = request, stage, executor

    def route_context(self, request, fleet):
        if self.pinned[:2] == (request.id, "context"):
            return RouteMixed(self.pinned[2]) if fleet.mixed.num_healthy else Route(context=self.pinned[2])
        return super().route_context(request, fleet)

    def route_generation(self, request, fleet):
        pinned = self.pinned[:2] == (request.id, "generation")
        return Route(generation=self.pinned[2]) if pinned else super().route_generation(request, fleet)
"""
SPLIT = {
    "profile": "spec:cpu-2core",
    "context_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "generation_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "cache_transceiver": {"backend": "mpi"},
}
MIXED = {"profile": "spec:cpu-2core", "mixed_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}}}


def write(folder: Path, cluster: dict[str, Any], router: Any = "round_robin", num_requests: int = 12) -> Path:
    (folder / "pinned.py").write_text(PINNED)
    phases = [
        {"name": "warmup", "type": "poisson", "rate": 300, "requests": 3, "exclude_from_results": True},
        {"name": "profiling", "type": "poisson", "rate": 300, "requests": num_requests},
    ]
    isl = {"type": "lognormal", "mean": 200, "stddev": 300, "max": 2000}
    data = {
        "schema_version": 1, "name": "hindsight", "seed": 5, "model": {"id": "tiny-llama"}, "cluster": cluster,
        "policy": {"router": router},
        "workload": {
            "dataset": {"type": "synthetic", "isl": isl, "osl": {"type": "uniform", "min": 2, "max": 30}},
            "max_tokens": 32, "phases": phases,
        },
        "slo": {"ttft_ms": 20, "tpot_ms": 5},
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def experiment(
    folder: Path, cluster: dict[str, Any], router: Any = "round_robin", num_requests: int = 12
) -> Experiment:
    return load_experiment(write(folder, cluster, router, num_requests)).experiment


# ---- the oracle -----------------------------------------------------------------------------------------------------


def test_every_routing_of_a_small_instance_is_tried_and_no_policy_is_better_than_the_best(tmp_path: Path) -> None:
    config = experiment(tmp_path, SPLIT)
    assert [(a[2], b and b[2]) for a, b in options_of(config)] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    gap = measure_gap(instance_of(config, 3, 0), ["oracle", "round_robin", "random"])
    assert gap.num_routings == 4**3
    assert len(gap.best_routing) == 3
    assert all((gap.gap(policy) or 0) >= 0 for policy in gap.policies)


def test_the_best_of_all_routings_is_that_of_runs_with_each_routing_in_a_policy_of_its_own(tmp_path: Path) -> None:
    """Three requests on two mixed executors: the eight routings, each written down as a user's policy."""
    config = instance_of(experiment(tmp_path, MIXED), 3, 1)
    (tmp_path / "eight.py").write_text(
        "from disagg.policies import RouteMixed, RoutingPolicy\n\n"
        + "\n".join(
            f"class R{n}(RoutingPolicy):\n    def route_context(self, request, fleet):\n"
            f"        return RouteMixed(1 + ({n} >> request.id) % 2)\n"
            for n in range(8)
        )
    )
    latencies = [latency_of(with_router(config, f"eight.py:R{n}")) for n in range(8)]
    gap = measure_gap(config, ["eight.py:R0"])
    assert gap.best_s == min(value for value in latencies if value is not None)
    assert gap.policies["eight.py:R0"] == latencies[0]
    assert gap.gap("eight.py:R0") == pytest.approx((latencies[0] or 0) / gap.best_s - 1)


def test_the_oracle_is_called_a_bound_only_where_it_is_one(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, MIXED)
    assert disagg("oracle", file, "--requests", "5", "--instances", "4", "--workers", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    gaps = [instance["gaps"]["oracle"] for instance in told["instances"]]
    assert {instance["num_routings"] for instance in told["instances"]} == {32}
    assert told["is_bound"] is all(gap == 0 for gap in gaps)
    assert min(gaps) == 0  # it is the best one on some of these
    assert max(gaps) > 0  # and not on others: greedy decisions are no bound
    assert disagg("oracle", file, "--requests", "5", "--instances", "4", "--workers", "1", "--policy", "random") == 0
    text = capsys.readouterr().out
    assert "The oracle is no bound: it has the best one on " in text
    assert "random" in text
    assert disagg("oracle", file, "--requests", "1", "--instances", "1", "--workers", "1") == 0
    assert "a bound there, and only there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--requests", "9"), "--requests 9: must be 1 to 8"),
        (("--instances", "0"), "--instances 0: must be 1 to 1000"),
        (("--policy", "orakel"), "there is no routing policy 'orakel'"),
    ],
)
def test_a_wrong_option_of_the_oracle_is_told(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: Any, told: str
) -> None:
    assert disagg("oracle", write(tmp_path, MIXED), *arguments) == 2
    assert told in capsys.readouterr().err


def test_more_routings_than_can_be_tried_are_refused_with_the_number_that_can(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    wide = SPLIT | {"context_servers": {"num_instances": 4, "kv_cache": {"max_tokens": 4096}}}
    assert disagg("oracle", write(tmp_path, wide), "--requests", "8") == 2
    assert "8 choices for each make 16777216 routings" in (told := capsys.readouterr().err)
    assert "allowed for this cluster: 1 to 5" in told


# ---- regret ---------------------------------------------------------------------------------------------------------


def total_latency(config: Experiment) -> float:
    requests = simulate_rows(config).requests
    return float((requests["end_s"] - requests["arrival_s"]).sum())


@pytest.mark.parametrize(("cluster", "others"), [(SPLIT, {"context": 2, "generation": 4}), (MIXED, {"context": 2})])
def test_a_regret_is_what_the_same_run_saves_with_that_one_decision_changed(
    tmp_path: Path, cluster: dict[str, Any], others: dict[str, int]
) -> None:
    config = experiment(tmp_path, cluster, "pinned.py:First")
    before = total_latency(config)
    regrets = regrets_of(config, 4)
    assert len(regrets) == 4 * len(others)
    assert any(regret.regret_s > 0 for regret in regrets)
    for regret in regrets:
        router = {"name": "pinned.py:Pinned", "request": regret.request_id, "stage": regret.stage}
        changed = experiment(tmp_path, cluster, router | {"executor": others[regret.stage]})
        saved = before - total_latency(changed)
        assert regret.regret_s == pytest.approx(max(saved, 0.0), abs=1e-11)
        assert regret.rank == (2 if saved > 0 else 1)
        assert regret.best.split()[0] == str(
            others[regret.stage] if saved > 0 else {"context": 1, "generation": 3}[regret.stage]
        )
        assert regret.request_id >= 3  # none of the warm-up


def test_the_same_requests_are_looked_at_whatever_the_policy_is(tmp_path: Path) -> None:
    drawn = [
        {regret.request_id for regret in regrets_of(experiment(tmp_path, SPLIT, router), 3)}
        for router in ("round_robin", "least_tokens")
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3


def test_regret_of_a_run_directory_is_written_beside_it_and_shown_in_its_report(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("run", write(tmp_path, SPLIT, "pinned.py:First"), "--output", tmp_path / "run") == 0
    assert disagg("regret", tmp_path / "run", "--requests", "4") == 0
    assert "8 decisions on 4 requests" in capsys.readouterr().out
    rows = pd.read_parquet(tmp_path / "run" / "regret.parquet")
    in_memory = regrets_of(experiment(tmp_path, SPLIT, "pinned.py:First"), 4)
    assert rows["regret_s"].tolist() == [regret.regret_s for regret in in_memory]
    assert disagg("report", tmp_path / "run", "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert "Where decisions lost" in page
    assert f"{max(rows['regret_s']):.3f} s:" in page
    assert disagg("regret", tmp_path) == 2
    assert f"holds no finished run itself; allowed: one of {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_summary_of_regrets_counts_them_by_stage_and_length() -> None:
    def row(stage: str, tokens: int, regret_s: float) -> dict[str, Any]:
        return {"stage": stage, "num_prompt_tokens": tokens, "regret_s": regret_s}

    rows = [
        row("context", 100, 0.0),
        row("context", 900, 3.0),
        row("generation", 100, 1.0),
        row("generation", 200, 0.0),
    ]
    summary = summarise_regret(rows)
    assert (summary.num_decisions, summary.share_best, summary.mean.value) == (4, 0.5, 1.0)
    assert summary.stages == {"context": 1.5, "generation": 0.5}
    assert summary.prompts == {"long": 3.0, "short": pytest.approx(1 / 3)}
    assert [each["regret_s"] for each in summary.worst] == [3.0, 1.0]
    assert summary.where == ""  # four decisions name no culprit
    assert summarise_regret(rows * 5).where == "context stage, long prompts"
    chance = [row("context", 100, 0.0)] * 10 + [row("generation", 100, 0.0)] * 9 + [row("generation", 900, 3.0)]
    assert summarise_regret(chance).where == ""  # nor does a mean that may be nothing


# ---- rows in memory -------------------------------------------------------------------------------------------------


def test_rows_in_memory_are_those_of_a_run_directory(tmp_path: Path, disagg: Callable[..., int]) -> None:
    file = write(tmp_path, SPLIT)
    assert disagg("run", file, "--output", tmp_path / "run") == 0
    rows = simulate_rows(load_experiment(file).experiment)
    for name in ("requests", "decisions"):
        stored = pd.read_parquet(tmp_path / "run" / f"{name}.parquet")
        pd.testing.assert_frame_equal(getattr(rows, name), stored)
    summary = summarise(tmp_path / "run")
    brief = brief_summary(rows.counted, {"ttft_s": 0.02, "tpot_s": 0.005, "attainment": 0.99})
    assert brief["goodput"] is not None
    assert brief == {key: summary[key] for key in brief}
