"""Policies that do not route on the leaderboard: each in its place in a scenario's file, beside the scenario's own router."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg.experiments.errors import ConfigError
from disagg.experiments.leaderboard_entries import Scenario, entries_of, scenarios_of
from disagg.experiments.simulated_rows import simulate_rows
from tests.every_policy import names
from tests.test_leaderboard import SPLIT, scenario

KINDS = ("admission", "queue_order", "batching", "capacity", "roles", "migration")
OWN = """
from disagg.policies import AdmissionPolicy, Admit, Reject


class Odd(AdmissionPolicy):
    '''Every second request.'''

    def admit(self, request, fleet):
        return Admit() if request.id % 2 else Reject("even")
"""


@pytest.fixture
def split(tmp_path: Path) -> Scenario:
    (found,) = scenarios_of([str(scenario(tmp_path, "split", SPLIT))])[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_policy_of_a_kind_serves_a_scenario_with_the_router_that_this_has(kind: str, split: Scenario) -> None:
    entries = {entry.label: entry for entry in entries_of([], kind) if entry.label in (*names(kind), "none")}
    assert set(entries) == {*names(kind), *(["none"] if kind in ("roles", "migration") else [])}
    left_out = {label: entry.why_not(split.experiment) for label, entry in entries.items()}
    assert {label: why for label, why in left_out.items() if why} == {
        "admission": {"reject_at_limit": "it needs max_active"},
        "roles": {"scheduled": "it does what an operator orders: give it changes"},
    }.get(kind, {})
    for label, entry in entries.items():
        if left_out[label]:
            continue
        config = split.with_entry(entry)
        ends = set(simulate_rows(config).requests["finish_reason"])
        assert ends <= {"stop", "length", *(["rejected"] if label == "early_rejection" else [])}, label
        assert (config.policy.router == split.experiment.policy.router) != (label == "mixed_pool")
        place: Any = getattr(config.policy, kind, None)
        groups = [config.cluster.context_servers, config.cluster.generation_servers]
        found = {getattr(group.scheduler, kind, place) for group in groups if group is not None} | {place}
        assert {each if isinstance(each, str) else getattr(each, "name", "none") for each in found} - {"none"} <= {
            label
        }


def test_what_is_missing_may_be_given(split: Scenario) -> None:
    (limit,) = entries_of(["{name: reject_at_limit, max_active: 3}"], "admission")
    assert limit.why_not(split.experiment) == ""
    assert split.with_entry(limit).policy.admission.params == {"max_active": 3}
    none, ordered = entries_of(["{name: scheduled, changes: [{at_s: 1, executor: 1, role: mixed}]}"], "roles")
    assert (none.label, ordered.why_not(split.experiment)) == ("none", "")


def test_instances_each_get_the_order_that_is_compared(tmp_path: Path) -> None:
    cluster = {
        "profile": "spec:cpu-2core",
        "instances": [{"role": role, "kv_cache": {"max_tokens": 4096}} for role in ("context", "generation")],
        "cache_transceiver": {"backend": "mpi"},
    }
    (found,) = scenarios_of([str(scenario(tmp_path, "each", cluster))])[0]
    (lcfs,) = entries_of(["lcfs"], "queue_order")
    config = found.with_entry(lcfs)
    assert [each.scheduler.queue_order.name for each in config.cluster.instances or ()] == ["lcfs", "lcfs"]
    assert config.policy.queue_order.name == "lcfs"


def test_ones_own_admission_is_on_the_board_and_the_page_says_what_is_compared(
    tmp_path: Path, disagg: Callable[..., int]
) -> None:
    (tmp_path / "odd.py").write_text(OWN)
    options = ("--scenario", str(scenario(tmp_path, "split", SPLIT)), "--quick", "--workers", "1")
    mine = ("--kind", "admission", "--policy", f"{tmp_path / 'odd.py'}:Odd", "--policy", "accept_all")
    assert disagg("leaderboard", *mine, *options, "--output", str(tmp_path / "out")) == 0
    board = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert board["kind"] == "admission"
    assert {(policy["label"], policy["is_own"]) for policy in board["policies"]} == {
        ("accept_all", False),
        ("Odd", True),
    }
    runs = [run["values"] for run in board["runs"] if run["policy"] == "Odd"]
    assert all(run["num_requests"] > run["num_completed"] for run in runs), runs[0].keys()
    assert "Leaderboard of admission policies" in (tmp_path / "out" / "leaderboard.html").read_text()
    assert (tmp_path / "out" / "leaderboard.md").read_text().startswith("# Leaderboard of admission policies\n")


@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        ([], "order", "--kind order: there is no such kind"),
        (["least_tokens"], "admission", "no admission policy of this name; least_tokens is a policy of routing"),
        (["fcsf"], "queue_order", "no queue order policy of this name; did you mean 'fcfs'"),
    ],
)
def test_a_kind_or_a_policy_that_is_none_of_it_is_told(asked: list[str], kind: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        entries_of(asked, kind)


def test_a_file_with_a_policy_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(OWN)
    with pytest.raises(ConfigError, match="is no routing policy: it must derive from RoutingPolicy"):
        entries_of([f"{tmp_path / 'odd.py'}:Odd"])
