"""`disagg plan` from file to file: the same plan whoever computes it, resumed after a kill, and a winner that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_plan_search import TEXT
from tests.test_sweep_runs import environment

MORE = ("plan.max_gpus=3", "plan.routers=[round_robin, random]", "workload.phases.profiling.requests=60")


def command(*arguments: str | Path) -> list[str]:
    sets = [word for item in MORE for word in ("--set", item)]
    return [sys.executable, "-m", "disagg.experiments.cli", "plan", *map(str, arguments), *sets]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=200, check=False, cwd=cwd, env=environment()
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with experiment.yaml and the plan of one process in `out`."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "experiment.yaml").write_text(TEXT)
    done = run("experiment.yaml", "--output", "out", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def plan_in(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "plan.json").read_text())
    return found


def test_the_plan_is_printed_with_its_arithmetic_and_reasons(planned: Path) -> None:
    text = (planned / "stdout").read_text()
    ranking = plan_in(planned / "out")["ranking"]
    assert isinstance(ranking, list)
    assert ranking[0]["candidate"].split(";")[0] in text
    for part in ("goodput per GPU", "rate matching", "best disaggregated", "best mixed", "not ranked", "winner: "):
        assert part in text
    for part in ("side idles ", "prompt tokens takes "):
        assert part in text
    perfect = [each for each in ranking if each["distinguishable_from_best"] is False]
    assert text.count("not distinguishable") == len(perfect)


def test_two_processes_find_the_same_plan_as_one(planned: Path, tmp_path: Path) -> None:
    done = run(planned / "experiment.yaml", "--output", "out", "--workers", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == plan_in(tmp_path / "out") == plan_in(planned / "out")
    assert (tmp_path / "out" / "winner.yaml").read_bytes() == (planned / "out" / "winner.yaml").read_bytes()


def test_a_search_killed_in_the_middle_takes_up_what_it_had(planned: Path, tmp_path: Path) -> None:
    searches = tmp_path / "out" / "searches"
    process = subprocess.Popen(
        command(planned / "experiment.yaml", "--output", "out", "--workers", "1"),
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    try:
        while len(list(searches.glob("*.json"))) < 3:
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in searches.glob("*.json")}
    assert len(kept) < len(list((planned / "out" / "searches").glob("*.json")))
    refused = run(planned / "experiment.yaml", "--output", "out", cwd=tmp_path)
    assert refused.returncode == 2
    assert "allowed: --resume, --overwrite" in refused.stderr
    done = run(planned / "experiment.yaml", "--output", "out", "--workers", "1", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert plan_in(tmp_path / "out") == plan_in(planned / "out")
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("slo=null", "plan: needs objectives"),
        ("workload.phases=[{name: loop, type: concurrency, concurrency: 2, requests: 4}]", "is a closed loop"),
        ("plan={max_gpus: 1, roles: disaggregated}", "plan: "),
        ("plan={max_gpus: 6, tensor_parallel_sizes: [3]}", "plan: no cluster of the space can be built"),
    ],
)
def test_a_file_that_cannot_be_searched_leaves_no_folder_and_no_plan_behind_or_destroyed(
    wrong: str, told: str, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment.yaml").write_text(TEXT)
    arguments = ("plan", tmp_path / "experiment.yaml", "--workers", "1", "--set", wrong, "--output")
    assert disagg(*arguments, tmp_path / "new") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "plan.json").write_text("{}")
    assert disagg(*arguments, tmp_path / "old", "--overwrite") == 2
    assert (tmp_path / "old" / "plan.json").read_text() == "{}"


def test_the_winner_runs_and_does_what_the_plan_says(
    planned: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    winner = planned / "out" / "winner.yaml"
    assert disagg("validate", winner) == 0
    assert disagg("run", winner, "--backend", "hardware", "--dry-run") == 0
    assert "(hardware, spec:h200)" in capsys.readouterr().out
    assert disagg("run", winner, "--output", tmp_path / "out", "--workers", "1") == 0
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("all/*/summary.json"))]
    assert len(summaries) == 2
    assert all(summary["slo_attainment"] >= 0.9 for summary in summaries)


def test_a_router_that_fails_is_told_and_the_others_are_ranked(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "from disagg.policies.routing import RoundRobin\n\n\n"
        "class Deadly(RoundRobin):\n    def select(self, *arguments):\n        raise ValueError('no such road')\n"
    )
    (tmp_path / "experiment.yaml").write_text(TEXT)
    sets = (
        "--set",
        "plan.max_gpus=2",
        "--set",
        "plan.routers=[round_robin, 'deadly.py:Deadly']",
        "--set",
        "plan.roles=mixed",
    )
    done = subprocess.run(
        [sys.executable, "-m", "disagg.experiments.cli", "plan", "experiment.yaml", "--workers", "1", "--output", "o", *sets],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        "error: 1 mixed tp1, 2048 tokens; Deadly: policy Deadly (deadly.py:6): ValueError: no such road" in done.stderr
    )
    assert {each["routers"] for each in plan_in(tmp_path / "o")["ranking"]} == {"round_robin"}  # type: ignore[attr-defined]
