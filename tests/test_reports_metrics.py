from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.core.tables import StayRow, StepRow, TransferRow
from disagg.reports.gaps import token_gaps
from disagg.reports.metric_table import METRICS, STAGES
from disagg.reports.metrics import instants_ps, measure, measured
from disagg.reports.runs import TABLES, Run
from disagg.reports.summary import summarise, summary_of
from tests.test_reports_runs import MS, config_of, frame_of, request, serve, write_run


def rows_of(*requests: object) -> object:
    return measure(frame_of(requests, "requests"))


def step(executor: int, first: int, count: int, start_ms: int, end_ms: int, **changes: int) -> StepRow:
    counts = {"decodes": 1, "chunk": 0, "free": 100, "used": 0, "held": 0} | changes
    return StepRow(
        executor, first, first, count, counts["decodes"], 0, int(counts["chunk"] > 0), counts["chunk"], 0,
        start_ms * MS, end_ms * MS, counts["free"], 0, counts["used"], counts["held"], 0,
    )  # fmt: skip


def test_latencies_of_one_request_by_hand() -> None:
    row = rows_of(request()).iloc[0]
    assert row["ttft_s"] == 0.051
    assert row["e2e_latency_s"] == 0.146
    assert row["tpot_s"] == pytest.approx((0.146 - 0.051) / 4)
    assert row["normalized_latency_s"] == pytest.approx(0.146 / 5)
    assert row["output_tokens_per_s_per_user"] == pytest.approx(4 / 0.095)
    assert row["dispatch_delay_s"] == 0.001


def test_stages_of_one_request_by_hand() -> None:
    row = rows_of(request()).iloc[0]
    assert [row[stage] for stage in STAGES] == [0.010, 0.040, 0.005, 0.010, 0.080]


def test_a_mixed_request_decodes_from_its_first_token_on() -> None:
    row = rows_of(request(generation_executor=1, transfer_start_ps=None, kv_usable_ps=None)).iloc[0]
    assert [row[stage] for stage in STAGES] == [0.010, 0.040, 0.0, 0.0, 0.095]


def test_a_transfer_before_the_first_token_is_reported_apart() -> None:
    early = request(transfer_start_ps=5 * MS, kv_usable_ps=61 * MS, kv_transfer_overlap_ps=20 * MS)
    row = rows_of(early).iloc[0]
    assert row["kv_transfer_overlap_s"] == 0.020
    assert row["queue_time_gen_s"] == 0.0
    assert row["kv_transfer_time_s"] == 0.010


def test_a_transfer_after_the_context_phase_overlaps_nothing_and_a_mixed_request_has_none() -> None:
    assert rows_of(request()).iloc[0]["kv_transfer_overlap_s"] == 0.0
    mixed = request(generation_executor=1, transfer_start_ps=None, kv_usable_ps=None)
    assert math.isnan(rows_of(mixed).iloc[0]["kv_transfer_overlap_s"])


def test_the_transfer_rate_leaves_out_transfers_that_waited_for_their_context_phase(tmp_path: Path) -> None:
    def rate(*transfers: TransferRow) -> float | None:
        run = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", requests=[request()], transfers=transfers)
        found: float | None = summarise(run)["transfer_rate_tokens_per_s"]
        return found

    late = TransferRow(9, 1, 3, 100, 4, 56 * MS, 66 * MS, True, None, 0)
    early = TransferRow(8, 1, 3, 100, 4, 6 * MS, 66 * MS, True, None, 1, 50 * MS)
    assert rate(late) == rate(late, early) == pytest.approx(100 / 0.010)
    assert rate(early) is None


def test_one_output_token_has_no_tpot_and_meets_its_objective(tmp_path: Path) -> None:
    one = request(num_output_tokens=1, transfer_start_ps=None, kv_usable_ps=None, end_ps=51 * MS)
    assert math.isnan(rows_of(one).iloc[0]["tpot_s"])
    summary = summarise(write_run(tmp_path / "run", requests=[one]))
    assert summary["slo_attainment"] == 1.0
    assert summary["mean_tpot_s"] is None


instant = st.one_of(st.none(), st.integers(0, 4000 * 10**12))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**12), st.integers(0, 10**12), st.lists(instant, min_size=4, max_size=4), st.integers(0, 10**15)
)
def test_dispatch_delay_and_stages_sum_to_e2e_exactly(arrival: int, delay: int, middle: list, rest: int) -> None:
    end = max([arrival + delay, *(t for t in middle if t is not None)]) + rest
    row = request(
        arrival_ps=arrival, dispatch_ps=arrival + delay, context_start_ps=middle[0], first_token_ps=middle[1],
        transfer_start_ps=middle[2], kv_usable_ps=middle[3], end_ps=end,
    )  # fmt: skip
    instants = instants_ps(frame_of([row], "requests"))[0]
    stages = np.diff(instants)
    assert (stages >= 0).all()
    assert int(stages.sum()) == end - arrival


def test_stages_of_a_whole_run_sum_to_e2e(tmp_path: Path) -> None:
    rows = measured(Run(write_run(tmp_path / "run", **serve(num_requests=200))))
    total = rows[["dispatch_delay_s", *STAGES]].sum(axis=1)
    np.testing.assert_allclose(total, rows["e2e_latency_s"], rtol=0, atol=1e-12)
    assert (rows["kv_transfer_time_s"] > 0).mean() > 0.9


def test_goodput_counts_requests_that_meet_every_objective_and_errors_as_misses(tmp_path: Path) -> None:
    # objectives: TTFT 400 ms, TPOT 12 ms; the plain request has 51 ms and 23.75 ms
    fast = request(1, end_ps=91 * MS)  # TPOT 10 ms
    slow_tpot = request(2)
    slow_ttft = request(3, first_token_ps=500 * MS, transfer_start_ps=510 * MS, kv_usable_ps=520 * MS, end_ps=530 * MS)
    failed = request(4, finish_reason="error", error="peer lost", first_token_ps=None, end_ps=1000 * MS)
    summary = summarise(write_run(tmp_path / "run", requests=[fast, slow_tpot, slow_ttft, failed]))
    assert summary["slo_attainment"] == 0.25
    assert summary["goodput"] == 1.0  # one in the second from the first arrival to the last end
    assert summary["goodput_per_gpu"] == 0.25
    assert summary["request_throughput"] == 3.0
    assert summary["throughput"] == 15.0
    assert summary["input_throughput"] == 300.0
    assert summary["output_tokens_per_s_per_gpu"] == 15.0 / 4
    assert summary["finish_reasons"] == {"stop": 3, "length": 0, "cancelled": 0, "rejected": 0, "error": 1}
    assert summary["errors"] == {"peer lost": 1}
    assert summary["slo_met"] is False
    assert summary["mean_ttft_s"] == pytest.approx((0.051 + 0.051 + 0.5) / 3)
    assert any("1 of 4 requests did not complete (1 error)" in text for text in summary["warnings"])


def test_warm_up_counts_nowhere(tmp_path: Path) -> None:
    warm = request(0, phase="warmup", first_token_ps=50_000 * MS, end_ps=60_000 * MS)
    alone = summarise(write_run(tmp_path / "alone", requests=[request(1)]))
    both = summarise(write_run(tmp_path / "both", requests=[warm, request(1)]))
    assert both.pop("num_excluded") == 1
    assert alone.pop("num_excluded") == 0
    assert both == alone


def test_without_objectives_there_is_no_goodput(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", config_of(slo=None), requests=[request()]))
    assert summary["goodput"] is None
    assert summary["slo_attainment"] is None


def test_an_empty_run_has_a_summary_without_numbers(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run"))
    assert summary["num_requests"] == 0
    assert summary["mean_ttft_s"] is None
    assert summary["warnings"] == ["No request outside warm-up phases: nothing was measured."]
    json.dumps(summary, allow_nan=False)


def test_a_late_load_source_is_a_warning(tmp_path: Path) -> None:
    late = summarise(write_run(tmp_path / "late", requests=[request(dispatch_ps=11 * MS)]))
    assert any("load source was late" in text for text in late["warnings"])
    prompt = summarise(write_run(tmp_path / "prompt", requests=[request()]))
    assert not any("load source" in text for text in prompt["warnings"])


def test_cut_outputs_are_a_warning(tmp_path: Path) -> None:
    cut = request(finish_reason="length")
    assert any(
        "1 of 1 outputs were cut" in text for text in summarise(write_run(tmp_path / "a", requests=[cut]))["warnings"]
    )
    known = summarise(write_run(tmp_path / "b", manifest={"num_cut_outputs": 0}, requests=[cut]))
    assert known["num_cut_outputs"] == 0
    assert not any("cut" in text for text in known["warnings"])


def test_a_summary_is_plain_json_with_every_metric_of_the_table(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", **serve(num_requests=60)))
    json.dumps(summary, allow_nan=False)
    for metric in METRICS:
        key = f"p99_{metric.key}" if metric.per_request else metric.key
        assert key in summary
        assert summary["units"][metric.key] == metric.unit


def test_a_summary_keeps_no_table_and_is_the_same_of_whole_tables(tmp_path: Path) -> None:
    run, whole = (Run(path) for path in [write_run(tmp_path / "run", **serve(num_requests=60))] * 2)
    assert [len(getattr(whole, name)) > 0 for name in TABLES] == [True] * len(TABLES)
    assert summary_of(run) == summary_of(whole)
    assert not vars(run).keys() & TABLES.keys()


def test_percentiles_of_the_configuration_are_added(tmp_path: Path) -> None:
    config = config_of(report={"percentiles": [99.9]})
    summary = summarise(write_run(tmp_path / "run", config, requests=[request()]))
    assert summary["p99.9_ttft_s"] == 0.051


# ---- gaps between tokens --------------------------------------------------------------------------------------------


def generation_run(path: Path) -> Path:
    """A request of five tokens: first at 51 ms, the others at 76, 86, 106 and 146 ms (the last at rank 0 at 147)."""
    return write_run(
        path,
        requests=[request(end_ps=147 * MS)],
        transfers=[TransferRow(9, 1, 3, 100, 4, 56 * MS, 66 * MS, True, None, 0)],
        stays=[
            StayRow(1, 8, "context", 1, 1, 1, 0, 2 * MS, 11 * MS, 51 * MS, 0),
            StayRow(3, 9, "generation", 4, 11, 14, 0, 55 * MS, 66 * MS, 146 * MS, 0),
        ],
        steps=[
            step(1, 1, 1, 11, 51, chunk=100),
            step(3, 11, 2, 66, 86),  # steps of 10 ms
            step(3, 13, 1, 86, 106),
            step(3, 14, 1, 106, 146),
        ],
    )


def test_gaps_between_tokens_by_hand(tmp_path: Path) -> None:
    run = Run(generation_run(tmp_path / "run"))
    gaps = token_gaps(run, measured(run))
    found = sorted(np.repeat(gaps.seconds, gaps.weights.astype(int)).tolist())
    # 26 ms to the hand-off's token: 25 ms of step time and 1 ms of message; then 10, 20 and 40 ms
    assert found == pytest.approx([0.010, 0.020, 0.026, 0.040])
    assert sum(found) == pytest.approx(0.147 - 0.051)
    assert gaps.num_left_out == 0


def test_gaps_of_a_whole_run_sum_to_decode_times_and_count_tokens(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", **serve(num_requests=150, rate=20)))
    rows = measured(run)
    gaps = token_gaps(run, rows)
    assert gaps.num_left_out == 0
    assert gaps.weights.sum() == (rows["num_output_tokens"] - 1).sum()
    assert (gaps.seconds * gaps.weights).sum() == pytest.approx((rows["e2e_latency_s"] - rows["ttft_s"]).sum())


def test_stays_are_matched_to_requests_by_the_user_s_id(tmp_path: Path) -> None:
    # ids run against each other: request 0 is the executor's 21, request 1 its 20
    short = request(0, num_output_tokens=3, num_prompt_tokens=100, end_ps=86 * MS)
    long = request(1, num_output_tokens=5, num_prompt_tokens=100, end_ps=106 * MS)
    run = Run(
        write_run(
            tmp_path / "run",
            requests=[short, long],
            transfers=[TransferRow(i, 1, 3, 100, 4, 56 * MS, 66 * MS, True, None, 21 - i) for i in (20, 21)],
            stays=[
                StayRow(3, 20, "generation", 4, 1, 4, 0, 55 * MS, 66 * MS, 106 * MS, 1),
                StayRow(3, 21, "generation", 2, 1, 2, 0, 55 * MS, 66 * MS, 86 * MS, 0),
            ],
            steps=[step(3, 1, 2, 66, 86, decodes=2), step(3, 3, 2, 86, 106)],
        )
    )
    gaps = token_gaps(run, measured(run))
    assert gaps.num_left_out == 0
    assert gaps.weights.sum() == 2 + 4


def test_gaps_of_a_mixed_visit_span_its_epochs(tmp_path: Path) -> None:
    mixed = request(
        generation_executor=1, num_output_tokens=3, transfer_start_ps=None, kv_usable_ps=None, end_ps=91 * MS
    )
    run = Run(
        write_run(
            tmp_path / "run",
            requests=[mixed],
            stays=[StayRow(1, 8, "mixed", 3, 1, 3, 0, 2 * MS, 11 * MS, 91 * MS, 0)],
            steps=[step(1, 1, 1, 11, 51, chunk=100), step(1, 2, 2, 61, 91)],
        )
    )
    gaps = token_gaps(run, measured(run))
    # the pause from 51 to 61 ms belongs to the first gap
    assert sorted(np.repeat(gaps.seconds, gaps.weights.astype(int))) == pytest.approx([0.015, 0.025])


def test_preempted_requests_are_left_out_of_gaps_and_counted(tmp_path: Path) -> None:
    path = generation_run(tmp_path / "run")
    stays = Run(path).stays
    stays["num_preemptions"] = 1
    stays.to_parquet(path / "stays.parquet")
    summary = summarise(path)
    assert summary["num_requests_without_itl"] == 1
    assert summary["mean_itl_s"] is None


# ---- executors and transfers ----------------------------------------------------------------------------------------


def test_busy_share_occupancy_and_held_blocks_by_hand(tmp_path: Path) -> None:
    # the measured time is 0 to 100 ms; free blocks 80 of 100 from 0, 40 from 50 ms on, 20 of those held
    run = write_run(
        tmp_path / "run",
        requests=[request(end_ps=100 * MS)],
        steps=[step(1, 1, 5, 0, 25, free=80, used=20), step(1, 6, 5, 50, 75, free=40, used=40, held=20)],
    )
    summary = summarise(run)
    assert summary["busy_share"] == pytest.approx(0.5)
    assert summary["kv_occupancy"] == pytest.approx((0.2 + 0.6) / 2)
    assert summary["blocks_held"] == pytest.approx(10.0)
    (executor,) = summary["executors"]
    assert executor["max_blocks_held"] == 20
    assert executor["num_steps"] == 10


def test_cached_blocks_are_not_occupied_and_the_prefix_hit_rate_is_that_of_completed_requests(tmp_path: Path) -> None:
    reusing = {"num_instances": 2, "kv_cache": {"enable_block_reuse": True}}
    config = config_of(cluster={"profile": "spec:h200", "mixed_servers": reusing})
    requests = [
        request(0, num_prompt_tokens=100, num_cached_tokens=64),
        request(1, num_prompt_tokens=300, num_cached_tokens=16),
        request(2, num_prompt_tokens=300, num_cached_tokens=288, finish_reason="error", error="lost"),
    ]
    cached = replace(step(1, 1, 5, 0, 146, free=30, used=50), blocks_cached=20)
    summary = summarise(write_run(tmp_path / "on", config, requests=requests, steps=[cached]))
    assert (summary["num_cached_tokens"], summary["prefix_hit_rate"]) == (80, 0.2)
    assert summary["kv_occupancy"] == pytest.approx(0.5)
    off = summarise(write_run(tmp_path / "off", requests=requests, steps=[cached]))
    assert off["prefix_hit_rate"] is None
    old = tmp_path / "on" / "requests.parquet"  # recorded before the column was there
    frame_of(requests, "requests").drop(columns="num_cached_tokens").to_parquet(old)
    assert summarise(tmp_path / "on")["prefix_hit_rate"] == 0.0


def test_bytes_moved_follow_from_the_models_shape(tmp_path: Path) -> None:
    summary = summarise(generation_run(tmp_path / "run"))
    assert summary["transferred_bytes"] == 100 * 131072
    assert summary["transfer_rate_bytes_per_s"] == pytest.approx(100 * 131072 / 0.010)


def test_failed_transfers_are_counted_and_move_nothing(tmp_path: Path) -> None:
    failed = TransferRow(9, 1, 3, 100, 4, 56 * MS, 66 * MS, False, "time-out", 0)
    summary = summarise(write_run(tmp_path / "run", requests=[request()], transfers=[failed]))
    assert (summary["num_transfers"], summary["num_failed_transfers"], summary["transferred_tokens"]) == (1, 1, 0)
