"""Measured overheads in the simulator: each is where it is on hardware, and nothing changes without a profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import Chunk, Joined, RunSteps
from disagg.core.cost import UNIT_BITS, ConstantCost
from disagg.core.events import KvRequested, Report, Shutdown
from disagg.core.measured_cost import Curve, MeasuredCost
from disagg.core.measured_range import Measured
from disagg.core.overheads import LaunchGaps, LinkCost, MessageLatency
from disagg.simulator.calls import Environment
from disagg.simulator.link import Link
from disagg.simulator.timing import ModelTiming
from tests.profile_examples import EXPERIMENT, a_profile, entry

MS = 10**9
GAPS = LaunchGaps(
    decode_after_idle=1 * MS,
    decode_after_decode=2 * MS,
    decode_after_chunk=3 * MS,
    chunk_after_idle=4 * MS,
    chunk_after_decode=5 * MS,
    chunk_after_chunk=6 * MS,
    continued=7 * MS,
    joined=MS // 10,
    sequence_after_chunk=MS // 100,
)


def decodes(epoch: int, joined: int = 0) -> RunSteps:
    return RunSteps(epoch, epoch, 1, 100, joined=(Joined(1, 1, ()),) * joined, num_decodes=1, num_kv_tokens=10)


def chunk(epoch: int) -> RunSteps:
    return RunSteps(epoch, epoch, 1, 1, chunks=(Chunk(1, 0, 10, True, ()),), decodes=False)


def test_the_first_step_of_an_epoch_waits_for_its_launch_by_what_was_before_it() -> None:
    timing = ModelTiming({1: ConstantCost(10 * MS)}, 1, gaps={1: GAPS})
    timing.begin(1, decodes(1), 0)  # nothing was before it
    assert timing.end_of_step(1, 1) == 12 * MS - MS
    assert timing.end_of_step(1, 3) == 31 * MS
    timing.begin(1, decodes(2, joined=2), 31 * MS)  # at the very end of the last step
    assert timing.end_of_step(1, 1) == (31 + 2 + 10) * MS + MS // 5
    ended = timing.end_of_step(1, 1)
    timing.begin(1, chunk(3), ended)
    assert timing.end_of_step(1, 1) == ended + 15 * MS
    ended = timing.end_of_step(1, 1)
    timing.begin(1, chunk(4), ended)
    assert timing.end_of_step(1, 1) == ended + 16 * MS
    ended = timing.end_of_step(1, 1)
    timing.begin(1, decodes(5), ended)
    assert timing.end_of_step(1, 1) == ended + 13 * MS + MS // 100  # and the one sequence's part
    ended = timing.end_of_step(1, 1)
    timing.begin(1, chunk(6), ended + 1)  # after a rest
    assert timing.end_of_step(1, 1) == ended + 1 + 14 * MS


def test_a_step_that_no_graph_runs_waits_longer_unless_decodes_hide_its_launch() -> None:
    zero = Curve.line(0, 0)
    ten_ms = Curve.line(10 * MS << UNIT_BITS, 0)
    cost = MeasuredCost(
        (8,), 128, ten_ms, zero, 0, ten_ms, 0, 0, 0, 0, zero, 0, Measured(8, 10**6, 10**4, 9, 10**8), chunk_graphs=True
    )
    assert [cost.runs_by_kernels(0, 1, tokens) for tokens in (10, 1024, 1025)] == [False, False, True]
    timing = ModelTiming({1: cost}, 1, gaps={1: replace(GAPS, kernels=MS // 2)})
    timing.begin(1, chunk(1), 0)
    ended = timing.end_of_step(1, 1)
    for epoch, tokens, halves in ((2, 2000, 33), (3, 1024, 32), (4, 1025, 33)):
        timing.begin(1, changed(chunk(epoch), chunks=(Chunk(1, 0, tokens, True, ()),)), ended)
        before, ended = ended, timing.end_of_step(1, 1)
        assert ended - before == halves * MS // 2
    timing.begin(1, decodes(5), ended)
    ended = timing.end_of_step(1, 1)
    timing.begin(1, changed(chunk(6), chunks=(Chunk(1, 0, 2000, True, ()),)), ended)
    assert timing.end_of_step(1, 1) == ended + 15 * MS, "behind decodes there is nothing to wait for"
    ended = timing.end_of_step(1, 1)
    timing.begin(1, changed(chunk(7), chunks=(Chunk(1, 0, 2000, True, ()),)), ended + 1)
    assert timing.end_of_step(1, 1) == ended + 1 + 14 * MS + MS // 2
    # where steps tell of their layers no graph runs any of them, however short
    timing = ModelTiming(
        {1: dataclasses.replace(cost, chunk_graphs=False)}, 1, gaps={1: replace(GAPS, kernels=MS // 2)}
    )
    timing.begin(1, chunk(1), 0)
    ended = timing.end_of_step(1, 1)
    timing.begin(1, changed(chunk(2), chunks=(Chunk(1, 0, 10, True, ()),)), ended)
    assert timing.end_of_step(1, 1) == ended + 33 * MS // 2


def test_prompts_behind_prompts_wait_longer_while_sequences_decode() -> None:
    timing = ModelTiming(
        {1: ConstantCost(10 * MS)}, 1, gaps={1: LaunchGaps(chunk_after_chunk=MS, decodes_after_chunk=3 * MS)}
    )
    along = changed(chunk(2), decodes=decodes(1).decodes, num_decodes=1)
    timing.begin(1, chunk(1), 0)
    ended = timing.end_of_step(1, 1)
    for epoch, run, took in ((2, chunk(2), 11), (3, along, 14), (4, along, 14)):
        timing.begin(1, changed(run, epoch=epoch), ended)
        before, ended = ended, timing.end_of_step(1, 1)
        assert ended - before == took * MS
    timing.begin(1, changed(along, epoch=5), ended + 1)
    assert timing.end_of_step(1, 1) == ended + 1 + 10 * MS, "after a rest the host has seen to them"


def test_the_step_at_an_instant_before_the_first_one_began_is_the_first() -> None:
    timing = ModelTiming({1: ConstantCost(10 * MS)}, 1, gaps={1: GAPS})
    timing.begin(1, decodes(1), 0)
    assert timing.step_by(1, 0, MS // 2, 100) == 1
    assert timing.step_by(1, 0, 11 * MS, 100) == 1
    assert timing.step_by(1, 0, 11 * MS + 1, 100) == 2


def test_a_plan_that_goes_on_with_its_epoch_puts_off_the_steps_that_follow() -> None:
    timing = ModelTiming({1: ConstantCost(10 * MS)}, 1, gaps={1: GAPS})
    timing.begin(1, decodes(1), 0)
    assert timing.end_of_step(1, 2) == 21 * MS
    timing.begin(1, changed(decodes(1), first_step=3), 21 * MS)
    assert timing.end_of_step(1, 3) == 38 * MS
    without = ModelTiming({1: ConstantCost(10 * MS)}, 1)
    without.begin(1, decodes(1), 0)
    without.begin(1, changed(decodes(1), first_step=3), 20 * MS)
    assert without.end_of_step(1, 3) == 30 * MS


def changed(run: RunSteps, **values: Any) -> RunSteps:
    return replace(run, **values)


def test_without_gaps_a_step_takes_what_the_cost_model_says() -> None:
    timing = ModelTiming({1: ConstantCost(10 * MS)}, 5)
    for epoch, at in ((1, 0), (2, 10 * MS), (3, 55 * MS)):
        timing.begin(1, decodes(epoch), at)
        assert timing.end_of_step(1, 1) == at + 10 * MS
    assert timing.message_arrives(0, 1, 100, Shutdown()) == (105, 0)


def test_messages_take_their_time_by_who_speaks_to_whom() -> None:
    timing = ModelTiming({}, MessageLatency(3, 5, 7))
    assert timing.message_arrives(0, 2, 100, Shutdown()) == (103, 0)
    assert timing.message_arrives(2, 0, 100, Report(2)) == (105, 2)
    assert timing.message_arrives(2, 1, 100, KvRequested(1, 2, 3)) == (107, 2)


def test_a_transfer_takes_a_fixed_time_one_for_each_page_and_its_bytes() -> None:
    env = Environment()
    cost = LinkCost(1e9, 5 * MS, MS // 10)
    link = Link(env, cost.bytes_per_s, cost.fixed, 1, cost.page)
    ends: list[int] = []
    link.transfer(20_000_000, lambda _: ends.append(env.now), None, num_pages=30)
    env.run()
    assert ends == [5 * MS + 3 * MS + 20 * MS]


def test_a_simulated_run_takes_dispatch_messages_launch_and_link_from_its_profile(tmp_path: Path) -> None:
    """One request: its stages are sums that can be added up by hand."""
    import json

    import pandas as pd

    from disagg.experiments.cli_run import run_file
    from disagg.experiments.profile_cost import measured_cost
    from disagg.experiments.profile_file import save_profile

    gaps = LaunchGaps(decode_after_idle=2 * MS, chunk_after_idle=4 * MS)
    profile = a_profile(engines=(entry("context", gaps=gaps), entry("generation", gaps=gaps)))
    save_profile(profile, tmp_path / "measured.json")
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT.replace("requests: 20", "requests: 1"), encoding="utf-8")
    assert run_file(tmp_path / "experiment.yaml", output=tmp_path / "run") == 0
    row = pd.read_parquet(tmp_path / "run" / "requests.parquet").iloc[0]
    chunk = measured_cost(profile, profile.engines[0], 8).time_of_sums(0, 0, 1, 100, 5050, 0, 0, 1) / (1 << 20)
    assert row.dispatch_s - row.arrival_s == pytest.approx(0.3e-3, abs=1e-9)
    assert row.context_start_s - row.dispatch_s == pytest.approx(1e-3, abs=1e-9)
    assert row.first_token_s - row.context_start_s == pytest.approx(chunk / 1e12 + 4e-3 + 2e-3, abs=1e-9)
    num_bytes = 100 * profile.kv_bytes_per_token
    assert row.kv_usable_s - row.transfer_start_s == pytest.approx(3e-3 + 2e-3 + num_bytes / 1e9, abs=1e-9)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["profile_measured"] == profile.created
    assert manifest["epochs_outside_measured_range"] == 0
    assert manifest["device"].endswith("(measured)")


def test_a_run_says_how_much_of_it_lies_outside_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from disagg.experiments.cli_run import run_file
    from disagg.experiments.profile_file import save_profile

    save_profile(a_profile(), tmp_path / "measured.json")
    text = EXPERIMENT.replace("isl: 100", "isl: 600").replace("requests: 20", "requests: 5")
    (tmp_path / "experiment.yaml").write_text(text, encoding="utf-8")
    assert run_file(tmp_path / "experiment.yaml", output=tmp_path / "run") == 0
    assert "batches lie outside the measured range of the profile" in capsys.readouterr().out


def test_steps_with_chunks_slow_down_while_they_follow_each_other_and_recover_after_a_rest_or_decodes() -> None:
    gaps = LaunchGaps(chunk_after_chunk=MS, millionths_under_load=100_000, load_after=20 * MS)
    timing = ModelTiming({1: ConstantCost(10 * MS)}, 1, gaps={1: gaps})
    now = 0

    def length(run: RunSteps) -> float:
        nonlocal now
        timing.begin(1, run, now)
        began, now = now, timing.end_of_step(1, 1)
        return (now - began) / MS

    # after 0, 10, 21.5 and 33.5 ms of load: up to a tenth longer, and a launch of 1 ms behind another
    assert [length(chunk(epoch)) for epoch in range(1, 5)] == pytest.approx([10, 11.5, 12, 12], abs=1e-4)
    assert length(decodes(5)) == 10
    assert length(chunk(6)) == 10
    now += 1  # a rest, however short
    assert length(chunk(7)) == 10
