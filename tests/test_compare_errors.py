"""Errors of one run against another, by hand; which runs may be compared; where an error comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from disagg.reports.attribution import split_errors, stage_differences
from disagg.reports.error_figures import scatter
from disagg.reports.error_text import pair_text, table
from disagg.reports.run_errors import RunPair, backlog_grows, differing_keys, match_trees
from disagg.reports.runs import ReportError, Run
from tests.test_reports_runs import MS, config_of, request, serve, write_run


def run_of(path: Path, backend: str, rows: list[Any], manifest: dict | None = None, **changes: Any) -> Run:
    return Run(write_run(path, config_of(backend=backend, **changes), manifest, requests=rows))


def pair_of(tmp_path: Path, simulated: list[Any], measured: list[Any], **changes: Any) -> RunPair:
    return RunPair(
        run_of(tmp_path / "s", "simulation", simulated, **changes),
        run_of(tmp_path / "h", "hardware", measured, **changes),
    )


def spread(first_token_ms: list[int], end_ms: list[int]) -> list[Any]:
    """Requests a second apart; TTFTs and ends in milliseconds after their arrivals."""
    return [
        request(
            i,
            arrival_ps=i * 1000 * MS,
            dispatch_ps=i * 1000 * MS,
            context_start_ps=(i * 1000 + 1) * MS,
            first_token_ps=(i * 1000 + first) * MS,
            transfer_start_ps=(i * 1000 + first) * MS,
            kv_usable_ps=(i * 1000 + first) * MS,
            end_ps=(i * 1000 + end) * MS,
        )
        for i, (first, end) in enumerate(zip(first_token_ms, end_ms))
    ]


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors_of_means_and_percentiles_are_those_computed_by_hand(tmp_path: Path) -> None:
    pair = pair_of(
        tmp_path, spread([9, 18, 27, 46], [109, 118, 127, 146]), spread([10, 20, 30, 40], [110, 120, 130, 160])
    )
    errors = {row.key: row for row in pair.errors()}
    assert errors["mean_ttft_s"].error == pytest.approx(25 / 25 - 1)
    assert errors["p50_ttft_s"].error == pytest.approx(22.5 / 25 - 1)
    assert errors["p90_ttft_s"].error == pytest.approx((27 + 0.7 * 19) / (30 + 0.7 * 10) - 1)
    assert errors["mean_e2e_latency_s"].error == pytest.approx(125 / 130 - 1)
    # five tokens, so four gaps: 100/4 in all of simulation; 100, 100, 100, 120 over 4 on hardware
    assert errors["mean_tpot_s"].error == pytest.approx(25 / 26.25 - 1)
    assert errors["mean_decode_time_s"].measured == pytest.approx(0.105)
    assert errors["mean_ttft_s"].n == 4


def test_attainment_is_compared_in_points_and_only_believed_between_40_and_95_percent(tmp_path: Path) -> None:
    slo = {"slo": {"ttft_ms": 25.0, "tpot_ms": None, "e2e_ms": None, "attainment": 0.9}}
    for name, ttft, error, noted in (("half", [10, 20, 30, 40], 0.25, False), ("all", [10, 20, 21, 22], 0.0, True)):
        measured = spread(ttft, [150] * 4)
        simulated = spread([10, 20, 24, 40], [150] * 4) if name == "half" else measured
        (row,) = pair_of(tmp_path / name, simulated, measured, **slo).errors(["slo_attainment"])
        assert row.in_points
        assert row.error == pytest.approx(error)
        assert bool(row.notes) is noted


def test_p99_of_few_requests_is_marked(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, spread([10] * 5, [100] * 5), spread([11] * 5, [100] * 5))
    notes = {row.key: row.notes for row in pair.errors()}
    assert notes["p99_ttft_s"] == ("n too small",)
    assert notes["p50_ttft_s"] == ()


def test_percentiles_carry_the_order_statistics_of_the_measured_side(tmp_path: Path) -> None:
    ttft = list(range(1, 201))
    pair = pair_of(tmp_path, spread([5] * 200, [300] * 200), spread(ttft, [300] * 200))
    (row,) = pair.errors(["p50_ttft_s"])
    # of 200 values, ranks 86 and 115 bound the median at 95 %
    assert (row.low, row.high) == pytest.approx((0.086, 0.115))


def test_throughput_means_something_in_a_closed_loop_and_past_saturation_only(tmp_path: Path) -> None:
    rows = spread([10] * 60, [100] * 60)
    (row,) = pair_of(tmp_path / "open", rows, rows).errors(["throughput"])
    assert row.notes == ("below saturation: the load's own rate",)
    config = config_of()["workload"]
    phases = [{"name": "profiling", "type": "concurrency", "concurrency": 4, "requests": 60}]
    (row,) = pair_of(tmp_path / "closed", rows, rows, workload=config | {"phases": phases}).errors(["throughput"])
    assert row.notes == ()


def test_where_hardware_fell_behind_an_open_loop_its_throughput_is_not_called_the_load_s_own(tmp_path: Path) -> None:
    """60 requests in 59 s, five tokens each: first tokens after 10 ms, 100 ms in all, so 59.1 s where the cluster keeps up."""

    def notes(name: str, *last: Any, others: int = 60) -> set[str]:
        steady = spread([10] * others, [100] * others)
        (row,) = pair_of(tmp_path / name, steady, [*steady[: others - len(last)], *last]).errors(["throughput"])
        return set(row.notes)

    def ending(at: int, first_ms: int, end_ms: int, **changes: Any) -> Any:
        return msgspec.structs.replace(spread([10] * at + [first_ms], [100] * at + [end_ms])[at], **changes)

    own = {"below saturation: the load's own rate"}
    assert notes("late by 3 %", ending(59, 1700, 1800)) == own  # 59.1 of 60.8 s
    assert notes("later", ending(59, 1900, 2000)) == {"hardware fell behind: 97 % of the load's own rate"}
    assert notes("last ones wait", ending(58, 10_000, 10_100), ending(59, 10_000, 10_100)) == {
        "hardware fell behind: 86 % of the load's own rate"
    }
    assert (
        notes("a long answer at the end", ending(59, 10, 10_000, num_output_tokens=445)) == own
    )  # 22.5 ms each, as all


def test_a_backlog_that_grows_to_the_end_is_told_from_one_that_only_fluctuates(tmp_path: Path) -> None:
    overloaded = spread([10] * 200, [10 + 900 * i for i in range(200)])
    steady = spread([10] * 200, [10 + 4000 * (i % 7) for i in range(200)])
    for name, rows, grows in (("overloaded", overloaded, True), ("steady", steady, False)):
        assert backlog_grows(pair_of(tmp_path / name, rows, rows).measured.rows) is grows


# ---- which runs may be compared -------------------------------------------------------------------------------------


def test_runs_of_different_configuration_are_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    one = run_of(tmp_path / "s", "simulation", [request()])
    other = Run(write_run(tmp_path / "h", config_of("least_tokens", 9.0, "hardware"), requests=[request()]))
    assert [key for key, _, _ in differing_keys(one, other)] == [
        "policy.context_router.name",
        "workload.phases.profiling.rate",
    ]
    with pytest.raises(ReportError, match=r'policy.context_router.name: "round_robin" and "least_tokens"; workload'):
        RunPair(one, other)


def test_backend_profile_and_name_may_differ_and_the_seed_may_not(tmp_path: Path) -> None:
    one = run_of(tmp_path / "s", "simulation", [request()], name="predicted")
    config = config_of(backend="hardware")
    config["cluster"] = config["cluster"] | {"profile": "measured"}
    assert differing_keys(one, Run(write_run(tmp_path / "h", config, requests=[request()]))) == []
    seeded = Run(write_run(tmp_path / "seeded", config | {"seed": 43}, requests=[request()]))
    assert [key for key, _, _ in differing_keys(one, seeded)] == ["seed"]


def test_runs_of_other_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="other requests"):
        pair_of(tmp_path, [request()], [request(num_prompt_tokens=101)])


def test_a_hardware_run_cannot_be_held_against_a_simulation(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / backend, backend, [request()]) for backend in ("hardware", "simulation")]
    with pytest.raises(ReportError, match="comes last"):
        RunPair(*runs)


def test_trees_are_matched_point_by_point_and_what_has_no_partner_is_named(tmp_path: Path) -> None:
    for backend, points in (("simulation", ("rate=2", "rate=4")), ("hardware", ("rate=4", "rate=8"))):
        for point in points:
            run_of(tmp_path / backend / point, backend, [request()], {"point": point})
    matched = match_trees(tmp_path / "simulation", tmp_path / "hardware")
    assert [pair.title for pair in matched.pairs] == ["llama8b-2c2g rate=4"]
    assert {run.path.name for run in matched.alone} == {"rate=2", "rate=8"}


def test_a_tree_that_holds_a_point_twice_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path / "s" / "one", "simulation", [request()], {"point": "rate=2"})
    for name in ("a", "b"):
        run_of(tmp_path / "h" / name, "hardware", [request()], {"point": "rate=2"})
    with pytest.raises(ReportError, match="two runs of rate=2 repeat 0"):
        match_trees(tmp_path / "s", tmp_path / "h")


# ---- causes ---------------------------------------------------------------------------------------------------------


def served(path: Path, backend: str, policy: str = "round_robin", **options: Any) -> Run:
    return Run(write_run(path, config_of(backend=backend), **serve(policy, num_requests=120, **options)))


def test_differences_of_the_stages_sum_to_that_of_the_e2e_latency(tmp_path: Path) -> None:
    pair = RunPair(served(tmp_path / "s", "simulation"), served(tmp_path / "h", "hardware", speed=0.8, jitter=0.1))
    *stages, e2e = stage_differences(pair)
    assert e2e.stage == "e2e_latency_s"
    assert sum(stage.difference for stage in stages) == pytest.approx(e2e.difference, abs=1e-12)
    assert abs(e2e.difference) > 1e-3


def test_only_requests_that_completed_in_both_are_attributed(tmp_path: Path) -> None:
    measured = [*spread([10, 20], [100, 200]), request(2, finish_reason="error", error="gone", first_token_ps=None)]
    pair = pair_of(tmp_path, spread([10, 20, 30], [100, 180, 3000]), measured)
    assert stage_differences(pair)[-1].difference == pytest.approx(-0.010)


def test_an_error_is_the_sum_of_diverged_decisions_client_and_timing(tmp_path: Path) -> None:
    pair = RunPair(
        served(tmp_path / "s", "simulation", "least_tokens"), served(tmp_path / "h", "hardware", speed=0.7, jitter=0.05)
    )
    routes, late = served(tmp_path / "r", "simulation"), served(tmp_path / "l", "simulation", speed=0.95)
    split = split_errors(pair, routes, late)
    assert {row.key for row in split.rows} >= {"mean_ttft_s", "p99_tpot_s", "throughput", "slo_attainment"}
    for row in split.rows:
        assert row.client is not None
        assert row.diverged + row.client + row.timing == pytest.approx(row.total, abs=1e-12)
    mean_ttft = next(row for row in split.rows if row.key == "mean_ttft_s")
    assert mean_ttft.diverged == pytest.approx(
        pair.simulated.summary["mean_ttft_s"] - np.mean(RunPair(routes, pair.measured.run).simulated.rows["ttft_s"])
    )
    # the free simulation went elsewhere with some, the one on given routes with none
    assert split.share_routed_differently is not None
    assert 0.1 < split.share_routed_differently < 0.9
    assert split.share_forced == 1.0


def test_executors_with_another_amount_of_kv_memory_are_named(tmp_path: Path) -> None:
    planned = {
        "executors": [
            {"id": 1, "role": "context", "num_blocks": 100},
            {"id": 2, "role": "generation", "num_blocks": 50},
        ]
    }
    found = {"ranks": [{"executor": None}, {"executor": 1, "num_blocks": 120}, {"executor": 1, "num_blocks": 110}]}
    pair = RunPair(
        run_of(tmp_path / "s", "simulation", [request()], planned),
        run_of(tmp_path / "h", "hardware", [request()], planned | found),
    )
    assert pair.kv_blocks == {1: (100, 110)}
    assert "executor 1: 100 and 110" in pair_text(pair, [], None)


# ---- how it is shown ------------------------------------------------------------------------------------------------


def test_the_text_of_a_pair_is_markdown_with_every_part(tmp_path: Path) -> None:
    pair = RunPair(served(tmp_path / "s", "simulation"), served(tmp_path / "h", "hardware", speed=0.9))
    text = pair_text(pair, stage_differences(pair), None, "no replay here")
    assert "| mean TTFT" in text
    assert "**E2E latency**" in text
    assert "not told apart: no replay here." in text


def test_tables_align_words_left_and_numbers_right() -> None:
    assert table(("a", "value", "note"), [("x", "1", "n"), ("long", "10.5", "")]) == (
        "| a    | value | note |\n| ---- | ----: | ---- |\n| x    |     1 | n    |\n| long |  10.5 |      |"
    )


def test_the_scatter_is_small_where_a_page_has_many_however_many_the_requests(tmp_path: Path) -> None:
    late = np.random.default_rng(1).integers(1, 400, (2, 3000)).tolist()
    pair = pair_of(tmp_path, *(spread(times, [2 * time + 50 for time in times]) for times in late))
    drawing = scatter("plot", pair, small=True)
    assert drawing is not None
    assert drawing.png.startswith(b"\x89PNG")
    assert len(drawing.png) < 40_000
