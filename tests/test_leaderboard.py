"""The leaderboard: what it computes is what single runs give, and what it says of that follows from tables made by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.leaderboard import FULL, QUICK, Size, cut_short, task_text
from disagg.experiments.leaderboard_entries import entries_of, scenarios_of, shipped
from disagg.experiments.simulated_rows import simulate_rows
from disagg.reports.board import (
    Board,
    BoardPolicy,
    BoardRun,
    BoardScenario,
    ageing,
    board_of,
    goodput_curve,
    overall,
    pareto,
    standings,
)
from disagg.reports.board_figures import goodput, latencies, older_reports
from disagg.reports.board_page import as_page
from disagg.reports.board_text import as_markdown, as_text, behind_text, pareto_text
from tests.every_policy import names

OWN = """
from disagg.policies import ScoringPolicy


class Mine(ScoringPolicy):
    '''The most requests: as bad as can be.'''

    def score(self, request, executors):
        return -executors.active_requests
"""
SPLIT = {
    "profile": "spec:cpu-2core",
    "context_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "generation_servers": {"num_instances": 2, "kv_cache": {"max_tokens": 4096}},
    "cache_transceiver": {"backend": "mpi"},
}
MIXED = {"profile": "spec:cpu-2core", "mixed_servers": {"num_instances": 3, "kv_cache": {"max_tokens": 4096}}}


def scenario(folder: Path, name: str, cluster: dict[str, Any], **keys: Any) -> Path:
    isl = {"type": "lognormal", "mean": 200, "stddev": 300, "max": 2000}
    data = {
        "schema_version": 1, "name": name, "seed": 5, "model": {"id": "tiny-llama"}, "cluster": cluster,
        "policy": {"router": "round_robin"},
        "workload": {
            "dataset": {"type": "synthetic", "isl": isl, "osl": {"type": "uniform", "min": 2, "max": 20}},
            "max_tokens": 32,
            "phases": [
                {"name": "warmup", "type": "poisson", "rate": 200, "requests": 5, "exclude_from_results": True},
                {"name": "profiling", "type": "poisson", "rate": 200, "requests": 25},
            ],
        },
        "slo": {"ttft_ms": 10, "tpot_ms": 5},
    } | keys  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text("# A small one,\n# of two lines.\n" + yaml.safe_dump(data, sort_keys=False))
    return path


SMALLEST = Size(seeds=1, requests=5, loads=(), report_intervals_ms=(), regret_requests=1, regret_run=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | Path]]:
    """Two scenarios, three policies, five seeds: the folder of the board, and the options that made it."""
    from disagg.experiments.cli_leaderboard import leaderboard

    folder = tmp_path_factory.mktemp("leaderboard")
    (folder / "mine.py").write_text(OWN)
    files = [scenario(folder, "apart", SPLIT), scenario(folder, "together", MIXED)]
    policies = ["round_robin", "least_tokens", f"{folder / 'mine.py'}:Mine"]
    code = leaderboard(scenarios=list(map(str, files)), policies=policies, output=folder / "out", quick=True, workers=1)
    assert code == 0
    options: list[str | Path] = [x for file in files for x in ("--scenario", file)]
    return folder, [*options, *(x for policy in policies for x in ("--policy", policy)), "--quick"]


def board_in(folder: Path) -> Board:
    return board_of(json.loads((folder / "leaderboard.json").read_text()))


def test_every_policy_runs_in_every_scenario_with_the_same_seeds(made: tuple[Path, list[str | Path]]) -> None:
    board = board_in(made[0] / "out")
    assert [policy.label for policy in board.policies] == ["round_robin", "least_tokens", "Mine"]
    assert [policy.is_own for policy in board.policies] == [False, False, True]
    assert [s.text for s in board.scenarios] == ["A small one, of two lines."] * 2
    for name in ("apart", "together"):
        for policy in board.policies:
            assert list(board.values(name, policy.label, "slo_attainment")) == [5, 6, 7, 8, 9]
        assert board.loads(name) == sorted([1.0, *QUICK.loads])
    looked_at = [(each.scenario, each.policy) for each in board.regrets if each.rows]
    assert looked_at == [("apart", policy.label) for policy in board.policies]  # where none is chosen for it: the first
    assert board.report_intervals("apart") == [
        0.0,
        *QUICK.report_intervals_ms,
    ]  # where none is chosen for it: the first
    assert board.report_intervals("together") == [0.0]


def test_a_value_on_the_board_is_that_of_the_run_by_itself(
    made: tuple[Path, list[str | Path]], tmp_path: Path, disagg: Callable[..., int]
) -> None:
    folder, _ = made
    board = board_in(folder / "out")
    assert (
        disagg(
            "run",
            folder / "apart.yaml",
            "--seed",
            "6",
            "--set",
            "policy.router=least_tokens",
            "--output",
            tmp_path / "a",
        )
        == 0
    )
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    for key in ("slo_attainment", "mean_ttft_s", "p99_ttft_s", "mean_tpot_s", "num_completed"):
        assert board.values("apart", "least_tokens", key)[6] == summary[key]
    late = ("--set", "cluster.report_interval_ms=1000", "--set", "cluster.report_on_batch_change=false")
    faster = ("--set", "workload.phases.warmup.rate=240", "--set", "workload.phases.profiling.rate=240")
    for sets, at in ((late, {"report_interval_ms": 1000.0}), (faster, {"load": 1.2})):
        assert (
            disagg(
                "run",
                folder / "apart.yaml",
                *sets,
                "--set",
                "policy.router=least_tokens",
                "--output",
                tmp_path / "b",
                "--overwrite",
            )
            == 0
        )
        summary = json.loads((tmp_path / "b" / "summary.json").read_text())
        assert board.values("apart", "least_tokens", "mean_ttft_s", **at)[5] == pytest.approx(
            summary["mean_ttft_s"], rel=1e-12
        )


def test_a_board_that_was_cut_short_goes_on_and_two_processes_make_the_same_of_it_as_one_byte_for_byte(
    made: tuple[Path, list[str | Path]], tmp_path: Path, disagg: Callable[..., int]
) -> None:
    folder, options = made
    shutil.copytree(folder / "out", tmp_path / "out")
    answers = sorted((tmp_path / "out" / "answers").glob("*.json"))
    missing, kept = answers[::2], {path: path.stat().st_mtime_ns for path in answers[1::2]}
    for path in missing:
        path.unlink()
    for name in ("leaderboard.html", "leaderboard.md"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "leaderboard.json").write_text('{"format_version": null}')
    assert disagg("leaderboard", *options, "--workers", "2", "--output", tmp_path / "out") == 2
    assert disagg("leaderboard", *options, "--workers", "2", "--output", tmp_path / "out", "--resume") == 0
    for path in (folder / "out").rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(folder / "out")).read_bytes() == path.read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_changed_file_of_ones_own_makes_another_task(tmp_path: Path) -> None:
    (scenario_,) = scenarios_of([str(scenario(tmp_path, "apart", SPLIT))])[0]
    texts = []
    for line in ("", "        # changed\n"):
        (tmp_path / "mine.py").write_text(OWN + line)
        (entry,) = (entry for entry in entries_of([f"{tmp_path / 'mine.py'}:Mine"]) if entry.is_own)
        texts.append(task_text(scenario_.with_entry(entry), entry.digest))
    assert texts[0] != texts[1]


def test_the_page_shows_places_figures_and_where_decisions_lost(made: tuple[Path, list[str | Path]]) -> None:
    folder, _ = made
    page = (folder / "out" / "leaderboard.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count('src="data:image/svg+xml;base64,') == 5  # two each, and older reports of the first
    assert "Where decisions lost" in page
    assert "Do not quote it" in page
    assert "A small one, of two lines." in page
    text = (folder / "out" / "leaderboard.md").read_text()
    for standing in standings(board_in(folder / "out"), "apart"):
        assert f"| {standing.place} | {standing.policy} |" in text
        assert f'<span class="value">{standing.place}</span>' in page


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--scenario", "heavy_tail"), "there is no such scenario; did you mean 'heavy_tails'?"),
        (("--policy", "least_token"), "there is no routing policy of this name; did you mean 'least_tokens'?"),
        (("--policy", "mine.py"), "--policy mine.py: name the class too: mine.py:MyPolicy"),
        (("--policy", "edf"), "no routing policy of this name; edf is a policy of queue order"),
        (("--policy", "{nam: x}"), "must have a name"),
        (("--policy", "random", "--policy", "random"), "--policy random: is given twice"),
        (("--policy", "absent.py:Mine"), "there is no file"),
        (("--policy", "{name: power_of_two, e: 3}"), "power_of_two"),
        (("--metric", "speed"), "is no metric of a run"),
        (("--metric", "throughput"), "is not one that policies are ranked by"),
        (("--workers", "none"), "must be a whole number or auto"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_made(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], options: Any, told: str
) -> None:
    assert disagg("leaderboard", "--quick", *options, "--output", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scenario_without_objectives_is_refused_and_foreign_files_are_left_alone(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("leaderboard", "--scenario", scenario(tmp_path, "aimless", MIXED, slo=None)) == 2
    assert "a scenario needs objectives" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    for option, told in (((), "is not empty"), (("--overwrite",), "no leaderboard of disagg; it is left alone")):
        assert disagg("leaderboard", "--output", tmp_path / "out", *option) == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_overwriting_removes_the_boards_own_files_and_nothing_else(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "answers").mkdir(parents=True)
    theirs = [out / "letter.txt", out / "answers" / "letter.json"]
    ours = [out / "leaderboard.html", out / "answers" / f"{'0f' * 16}.json", out / ".leaderboard.json.partial-12"]
    monkeypatch.setattr("disagg.experiments.cli_leaderboard.QUICK", SMALLEST)
    options = ("--scenario", scenario(tmp_path, "apart", SPLIT), "--policy", "random", "--quick", "--workers", "1")
    for path in (*theirs, *ours):
        path.write_text("dear")
    for foreign in ("[1, 2]", "{", '{"format_version": 99, "standings": {}}', '{"format_version": 1, "players": []}'):
        (out / "leaderboard.json").write_text(foreign)
        for option in ("--overwrite", "--resume"):
            assert disagg("leaderboard", *options, "--output", out, option) == 2
            assert "leaderboard.json: is no leaderboard of format 1" in capsys.readouterr().err
    assert {path.read_text() for path in (*theirs, *ours)} == {"dear"}
    (out / "leaderboard.json").write_text('{"format_version": null}')
    assert disagg("leaderboard", *options, "--output", out, "--overwrite") == 0
    assert [path.read_text() for path in theirs] == ["dear", "dear"]
    assert [path.exists() and path.read_text() == "dear" for path in ours] == [False] * 3
    assert board_in(out).runs


def test_scenarios_are_listed_without_their_traces_and_one_whose_trace_is_missing_is_left_out(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_TRACES", str(tmp_path))  # set, but the trace is not there
    assert disagg("leaderboard", "--list") == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(shipped())
    found, left_out = scenarios_of([])
    assert len(found) == len(shipped()) - 1
    assert [line.partition(":")[0] for line in left_out] == ["mooncake_conversation"]
    assert str(tmp_path / "mooncake_conversation_trace.jsonl") in left_out[0]


def test_an_experiment_with_changing_roles_has_no_regret_and_what_is_left_out_is_told(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.experiments.cli_leaderboard.QUICK", SMALLEST)
    roles = {"router": "mixed_pool", "roles": {"name": "mixed_pool", "max_prompt_tokens": 512}}
    files = [scenario(tmp_path, "lending", SPLIT, policy=roles), scenario(tmp_path, "apart", SPLIT)]
    options = [x for file in files for x in ("--scenario", file)]
    names = [x for name in ("mixed_pool", "random") for x in ("--policy", name)]
    assert disagg("leaderboard", *options, *names, "--quick", "--workers", "1", "--output", tmp_path / "out") == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "note: lending: no regret: executors change roles",
        "note: apart: left out: mixed_pool (there are no mixed executors)",
    ]
    found = board_in(tmp_path / "out")
    assert {s.policy for s in standings(found, "lending")} == {"mixed_pool", "random"}
    assert {s.policy for s in standings(found, "apart")} == {"random"}
    assert "No regret: executors change roles." in (tmp_path / "out" / "leaderboard.html").read_text()


def test_a_policy_that_fails_is_told_and_the_others_are_ranked(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(OWN.replace("-executors", "1 / 0 - executors"))
    options = (
        "--scenario",
        scenario(tmp_path, "apart", SPLIT),
        "--policy",
        "random",
        "--policy",
        f"{tmp_path / 'mine.py'}:Mine",
    )
    assert disagg("leaderboard", *options, "--quick", "--workers", "1", "--output", tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "error: Mine in apart: policy Mine (mine.py:9): ZeroDivisionError" in told.err
    assert [s.policy for s in standings(board_in(tmp_path / "out"), "apart")] == ["random"]


# ---- who is on it ---------------------------------------------------------------------------------------------------


def test_every_routing_policy_of_the_catalogue_has_a_place_in_a_shipped_scenario(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISAGG_TRACES", raising=False)
    scenarios, left_out = scenarios_of([])
    assert len(scenarios) >= 6
    assert len(scenarios) + len(left_out) == len(shipped())
    assert [line.partition(":")[0] for line in left_out] == ["mooncake_conversation"]
    entries = [entry for entry in entries_of([]) if entry.label in names("routing")]  # not those of other tests
    assert [entry.label for entry in entries] == names("routing")
    for entry in entries:
        assert any(not entry.why_not(each.experiment) for each in scenarios), entry.label
    for each in scenarios:
        assert len(each.text) > 80
        assert each.experiment.repeats >= 3
        assert each.with_entry(entries[0]).slo is not None
        assert load_experiment(each.file).warnings == ()
    assert {*FULL.stale_scenarios, *FULL.regret_scenarios} <= {each.name for each in scenarios}


def test_the_example_that_sees_reports_only_can_be_put_on_the_board() -> None:
    file = Path(__file__).resolve().parent.parent / "examples" / "reported_only.py"
    entries = entries_of([f"{file}:ReportedLeast", f"{file}:ReportedTwo", "least_requests"])
    assert [(entry.label, entry.is_own) for entry in entries] == [
        ("least_requests", False), ("ReportedLeast", True), ("ReportedTwo", True),
    ]  # fmt: skip


def test_a_rule_for_one_stage_gets_a_partner_at_the_other() -> None:
    (scenario_,) = scenarios_of(["heavy_tails"])[0]
    prefix, decode, whole = entries_of(["cache_aware", "least_kv", "{name: power_of_two, d: 3}"])
    routers = [scenario_.with_entry(entry).policy for entry in (prefix, decode, whole)]
    assert [r.context_router and r.context_router.name for r in routers] == ["cache_aware", "least_tokens", None]
    assert [r.generation_router and r.generation_router.name for r in routers] == ["least_kv", "least_kv", None]
    assert routers[2].router is not None
    assert routers[2].router.params == {"d": 3}
    assert whole.label == "power_of_two (d=3)"


def test_where_mixed_executors_go_on_after_context_ones_a_router_is_asked_for_that_and_must_be_given(
    tmp_path: Path,
) -> None:
    cluster = {key: SPLIT[key] for key in ("profile", "context_servers", "cache_transceiver")}
    cluster["mixed_servers"] = SPLIT["generation_servers"]
    file = scenario(tmp_path, "handed_over", cluster)
    (entry,) = entries_of(["prefix_hash"])
    rows = simulate_rows(scenarios_of([str(file)])[0][0].with_entry(entry)).requests
    assert set(rows["context_executor"]) == {1, 2}
    assert set(rows["generation_executor"]) == {3, 4}
    with pytest.raises(ConfigError, match="generation_router: required key is missing: mixed servers generate after"):
        load_experiment(file, ["policy={context_router: random}"])


# ---- what follows from a table --------------------------------------------------------------------------------------


def board(values: dict[str, dict[float, list[float]] | list[float]], key: str = "mean_ttft_s", **more: Any) -> Board:
    """One scenario; `values` by policy, of each seed, or by report interval of each seed."""
    runs = []
    for policy, by_interval in values.items():
        table = by_interval if isinstance(by_interval, dict) else {0.0: by_interval}
        for interval, column in table.items():
            runs += [
                BoardRun("s", policy, 1.0, interval, seed, seed, {key: value, **more.get(policy, {})})
                for seed, value in enumerate(column)
            ]
    policies = tuple(BoardPolicy(policy, "", "", is_oracle=policy == "oracle") for policy in values)
    where = BoardScenario("s", "", "", "", 10.0, {}, {})
    return Board(key, False, None, (where,), policies, tuple(runs), ())


def test_places_are_ranges_that_chance_leaves_open() -> None:
    """b is 1 to 3 behind a in every seed; c is around b; d is far behind. The oracle is before all and has no place."""
    table = board(
        {
            "d": [9.0, 9.1, 9.2, 9.3],
            "c": [3.0, 3.5, 2.0, 5.0],
            "oracle": [0.5, 0.5, 0.5, 0.5],
            "a": [1.0, 1.0, 1.0, 1.0],
            "b": [2.0, 3.0, 4.0, 3.0],
        }
    )
    found = {standing.policy: standing for standing in standings(table, "s")}
    assert list(found) == ["oracle", "a", "b", "c", "d"]
    assert {policy: standing.place for policy, standing in found.items()} == {
        "oracle": "–", "a": "1", "b": "2–3", "c": "2–3", "d": "4",
    }  # fmt: skip
    assert found["a"].is_best
    assert not found["a"].is_tied
    behind = found["b"].behind
    assert behind is not None
    assert behind.value == 2.0
    assert behind.excludes_zero
    assert [each.policy for each in overall(table)] == ["a", "b", "c", "d"]
    assert [each.mean_place for each in overall(table)] == [0.0, 0.5, 0.5, 1.0]
    assert [each.num_among_best for each in overall(table)] == [1, 0, 0, 0]


def test_a_higher_share_is_better_and_equal_policies_share_all_their_places() -> None:
    table = board({"a": [0.9, 0.8], "b": [0.9, 0.8], "c": [0.2, 0.1]}, "slo_attainment")
    found = standings(table, "s")
    assert [(s.policy, s.place) for s in found] == [("a", "1–2"), ("b", "1–2"), ("c", "3")]
    assert [s.is_among_best for s in found] == [True, True, False]


def test_what_is_left_out_for_one_reason_is_told_once() -> None:
    table = board({"a": [1.0]})
    where = [replace(table.scenarios[0], name=name, left_out={"b": "alone", "c": "alone"}) for name in ("s", "t")]
    assert replace(table, scenarios=tuple(where)).notes() == ["s, t: left out: b, c (alone)"]


def test_with_one_seed_no_order_is_claimed() -> None:
    assert [s.place for s in standings(board({"a": [1.0], "b": [2.0]}), "s")] == ["1–2", "1–2"]


def test_the_pareto_set_holds_whom_nobody_beats_in_both_latencies() -> None:
    counts = {"num_completed": 90.0, "num_requests": 100.0}
    tpots = {"a": 3.0, "b": 2.0, "c": 2.5, "oracle": 0.1}
    more = {policy: {"mean_tpot_s": tpot, **counts} for policy, tpot in tpots.items()}
    table = board({"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [2.5, 2.5], "oracle": [0.1, 0.1]}, **more)
    points = pareto(table, "s")
    assert {point.policy for point in points if point.is_efficient} == {"a", "b"}
    assert {point.share_served for point in points} == {0.9}
    assert {pareto_text(point) for point in points} == {"of the 90 % served", ""}
    assert [pareto_text(replace(point, share_served=0.995)) for point in points] == ["yes", "yes", "", ""]


def test_whom_only_chance_puts_behind_stays_in_the_pareto_set() -> None:
    """b is behind a by 1 on average, by −2, 1 and 4 under the three seeds; c by 3 under each."""
    more = {policy: {"mean_tpot_s": 1.0, "num_completed": 9.0, "num_requests": 9.0} for policy in "abc"}
    table = board({"a": [5.0, 5.0, 5.0], "b": [3.0, 6.0, 9.0], "c": [8.0, 8.0, 8.0]}, **more)
    assert [point.policy for point in pareto(table, "s") if point.is_efficient] == ["a", "b"]
    more["b"] = more["b"] | {"mean_tpot_s": 0.995}  # no difference either
    table = board({"a": [5.0, 5.0], "b": [6.0, 6.0], "c": [4.99, 4.99]}, **more)
    assert [point.policy for point in pareto(table, "s") if point.is_efficient] == ["a", "c"]
    single = board({"a": [1.0], "c": [8.0]}, **more)
    assert all(point.is_efficient for point in pareto(single, "s"))  # one seed tells nothing apart


def test_who_turns_requests_away_puts_nobody_out_of_the_pareto_set_who_serves_them() -> None:
    more = {policy: {"mean_tpot_s": 1.0, "num_completed": 100.0, "num_requests": 100.0} for policy in ("all", "most")}
    more["most"]["num_completed"] = 95.0
    table = board({"all": [5.0, 5.0], "most": [3.0, 3.0]}, **more)
    assert [point.policy for point in pareto(table, "s") if point.is_efficient] == ["all", "most"]


def test_policies_of_equal_values_are_all_the_best_and_called_alike() -> None:
    table = board({"a": [0.9, 0.8], "b": [0.9, 0.8], "oracle": [1.0, 1.0]}, "slo_attainment")
    assert [s.policy for s in standings(table, "s") if s.is_best] == ["a", "b"]
    page = as_page(table)
    assert '<a href="#s">s</a>: all alike.' in page
    assert page.count(">best<") == 2
    assert '<span class="count">of 1</span>' in page  # over how many scenarios a mean place is


def test_what_may_be_chance_is_not_marked_as_good_and_axes_show_whole_values_of_a_range_worth_looking_at() -> None:
    more = {p: {"mean_ttft_s": 0.5, "num_completed": 9.0, "num_requests": 9.0} for p in "ab"}
    more["a"]["mean_tpot_s"], more["b"]["mean_tpot_s"] = 0.00391001, 0.00391002
    table = board({"a": [0.9, 0.7], "b": [0.8, 0.75]}, "slo_attainment", **more)
    assert '<span class="mark full ">not distinguishable</span>' in as_page(table)
    drawing = latencies(table, table.scenarios[0])
    assert drawing is not None
    ticks = [float(text) for text in re.findall(rb"<!-- ([\d.]+) -->", drawing.svg)]
    assert any(3.8 < tick < 4.0 for tick in ticks)
    assert max(tick for tick in ticks if tick > 3) - min(tick for tick in ticks if tick > 3) > 0.02


def test_the_terminal_shows_means_beside_places_and_no_line_is_wider_than_a_hundred_columns() -> None:
    table = board({"a": [0.9, 0.9], "bb": [0.2, 0.2]}, "slo_attainment")
    assert as_text(table).splitlines()[3:] == [
        "             s",
        "a   1*  90.0 %",
        "bb  2   20.0 %",
    ]
    names = [f"a_scenario_of_a_long_name_{i}" for i in range(9)]
    many = replace(
        table,
        scenarios=tuple(replace(table.scenarios[0], name=name) for name in names),
        runs=tuple(replace(run, scenario=name) for name in names for run in table.runs),
    )
    lines = as_text(many).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("1*  90.0 %") for line in lines) == len(names)


def test_what_older_reports_cost_is_paired_by_seed() -> None:
    (found,) = ageing(board({"a": {0.0: [1.0, 5.0, 60.0], 100.0: [1.5, 5.5]}}), "s")
    assert (found.ttft_s[0.0].value, found.ttft_s[100.0].value) == (3.0, 3.5)  # on the seeds that both have
    assert (found.added_s[100.0].value, found.added_s[100.0].low, found.added_s[100.0].high) == (0.5, 0.5, 0.5)


def test_curves_are_over_the_same_seeds_at_each_point_and_say_how_many() -> None:
    """One seed at the other load and two with old reports, of three: the third, far off, is in neither curve."""
    table = board({"a": {0.0: [0.5, 0.7, 0.0], 1000.0: [0.5, 0.7]}}, "slo_attainment", a={"mean_ttft_s": 1.0})
    runs = [*table.runs, BoardRun("s", "a", 0.5, 0.0, 0, 0, {"slo_attainment": 1.0})]
    table = replace(table, runs=tuple(runs))
    curve = goodput_curve(table, table.scenarios[0], "a")
    assert [(rate, e.value, e.n) for rate, e in curve] == [(5.0, 5.0, 1), (10.0, 5.0, 1)]
    drawings = goodput(table, table.scenarios[0]), older_reports(table, table.scenarios[0])
    assert [drawing and drawing.title for drawing in drawings] == [
        "Goodput over load; dotted: every request meets them; one seed",
        "Mean TTFT with older reports; the same 2 seeds at each point",
    ]
    assert "(0: at every change of a batch), the same 2 seeds at each point:" in as_markdown(table)


def test_axes_over_the_age_of_reports_hold_every_curve() -> None:
    table = board({"a": {0.0: [0.25, 0.25], 100.0: [0.45, 0.45]}})
    drawing = older_reports(table, table.scenarios[0])
    assert drawing is not None
    ticks = [float(text) for text in re.findall(rb"<!-- ([\d.]+) -->", drawing.svg)]
    assert max(ticks) >= 400  # ms


def test_a_share_is_behind_by_points() -> None:
    table = board({"a": [0.9, 0.9], "b": [0.2, 0.2]}, "slo_attainment")
    assert [behind_text("slo_attainment", each) for each in standings(table, "s")] == ["best", "70.0 points behind"]


def test_a_policy_without_a_common_seed_has_no_curve_over_age() -> None:
    table = board({"a": {0.0: [1.0], 100.0: [1.5]}, "b": {0.0: [1.0]}})
    assert [each.policy for each in ageing(table, "s")] == ["a"]


def test_every_curve_of_the_default_board_is_over_all_seeds_of_its_scenario() -> None:
    seeds = {each.experiment.repeats for each in scenarios_of(list(FULL.stale_scenarios))[0]}
    assert seeds == {FULL.stale_seeds} == {FULL.load_seeds}
    assert QUICK.seeds == QUICK.load_seeds == QUICK.stale_seeds == 5


def test_a_quick_look_counts_fewer_requests_behind_the_whole_warm_up() -> None:
    (shipped,), _ = scenarios_of(["sessions"])
    assert [phase.requests for phase in shipped.experiment.workload.phases] == [250, 500]
    assert [phase.requests for phase in cut_short(shipped.experiment, QUICK.requests).workload.phases] == [250, 60]
    assert [phase.requests for phase in cut_short(shipped.experiment, 120, 40).workload.phases] == [40, 120]


def test_goodput_is_attainment_times_the_rate_of_arrivals() -> None:
    table = board({"a": [0.5, 0.7]}, "slo_attainment")
    ((rate, estimate),) = goodput_curve(table, table.scenarios[0], "a")
    assert (rate, estimate.value) == (10.0, pytest.approx(6.0))
