"""Roles that change, in experiment files: what a run with them leaves behind, and what refuses it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from disagg.experiments.forced_routes import recorded_choices
from disagg.reports.role_changes import role_changes_of
from disagg.reports.runs import ReportError, Run
from tests.test_cli_poisoned_configs import GOOD, disagg

SWITCHING = GOOD.replace("num_instances: 2\n    tensor", "num_instances: 3\n    tensor").replace(
    "policy:\n",
    """policy:
  roles:
    name: scheduled
    changes:
      - {at_s: 0.5, executor: 3, role: generation}
      - {at_s: 1.0, executor: 1, role: parked}
      - {at_s: 1.1, executor: 3, role: context}
""",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    (folder / "experiment.yaml").write_text(SWITCHING)
    with pytest.MonkeyPatch.context() as patch:
        assert disagg(patch, "run", str(folder / "experiment.yaml"), "--output", str(folder / "run")) == 0
    return folder / "run"


def test_decisions_hold_the_changes_and_no_request_is_lost(run: Path) -> None:
    decisions = pd.read_parquet(run / "decisions.parquet")
    roles = decisions[decisions["stage"] == "role"]
    assert set(roles["request_id"]) == {-1}
    changes = roles[roles["answer"] != "drained"]
    assert list(zip(changes["at_s"], changes["executor"], changes["answer"])) == [
        (0.5, 3, "generation"),
        (1.0, 1, "parked"),
        (1.1, 3, "context"),
    ]
    assert set(pd.read_parquet(run / "requests.parquet")["finish_reason"]) <= {"stop", "length"}


def test_a_run_with_changes_is_replayed_and_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disagg(monkeypatch, "replay", str(run)) == 0
    assert disagg(monkeypatch, "report", str(run), "--output", str(run.parent / "page.html")) == 0
    page = (run.parent / "page.html").read_text()
    assert "Roles that changed" in page
    assert "2 context, 2 generation, 1 parked" in page


def test_changes_are_counted_and_old_work_is_timed(run: Path) -> None:
    found = role_changes_of(Run(run))
    assert found is not None
    assert (found.num_changes, found.num_refused) == (3, 0)
    decisions = pd.read_parquet(run / "decisions.parquet")
    drained = decisions[decisions["answer"] == "drained"]
    assert list(drained["executor"]) == [3]  # of what it generated when it went back to prompts; the others were idle
    assert found.drains_s == (drained["at_s"].item() - 1.1,)
    assert found.at_end == {"context": 2, "generation": 2, "parked": 1}


def test_routes_of_a_run_with_changes_are_not_forced_on_another(run: Path) -> None:
    with pytest.raises(ReportError, match="executors changed roles"):
        recorded_choices(Run(run))


def test_regret_names_the_run_whose_roles_changed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg(monkeypatch, "regret", str(run)) == 2
    assert f"{run}: executors changed roles in that run (policy.roles)" in capsys.readouterr().err


def test_mixed_servers_alone_need_a_transceiver_once_roles_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GOOD.replace(
        "context_servers:\n    num_instances: 2\n    tensor_parallel_size: 1", "mixed_servers:\n    num_instances: 2"
    )
    text = text.replace("  generation_servers:\n    num_instances: 2\n  cache_transceiver: {backend: mpi}\n", "")
    text = text.replace(
        "  context_router: {name: least_tokens}\n  generation_router: {name: power_of_two, d: 2}\n",
        "  router: least_tokens\n  roles: scheduled\n",
    )
    (tmp_path / "mixed.yaml").write_text(text)
    assert disagg(monkeypatch, "validate", str(tmp_path / "mixed.yaml")) == 2
    said = capsys.readouterr()
    assert "no cache transceiver backend is given" in said.out + said.err


@pytest.mark.parametrize(
    ("roles", "says"),
    [("scheduled", "no changes are given"), ("mixed_pool", "meant with router: mixed_pool")],
)
def test_role_policies_that_can_do_little_are_warned_of(
    roles: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "roles.yaml").write_text(GOOD.replace("policy:\n", f"policy:\n  roles: {roles}\n"))
    assert disagg(monkeypatch, "validate", str(tmp_path / "roles.yaml")) == 0
    assert says in capsys.readouterr().err
