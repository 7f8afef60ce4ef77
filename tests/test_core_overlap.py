"""Without overlap an executor begins no step while its KV comes or is read: in the core, and in simulated clusters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from disagg.core.commands import ReceiveKv, RunSteps
from disagg.core.events import Cancel, KvReceived, KvTaken
from disagg.core.tables import TransferRow
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.policies.vocabulary import Role
from tests.core_cases import NEVER, make_case, simulate
from tests.core_desk import ExecutorDesk, asks, context, generation


def reader(overlap: bool = False) -> ExecutorDesk:
    """A generation executor that decodes request 1."""
    desk = ExecutorDesk(Role.GENERATION, overlap=overlap)
    desk.until_decoding(1, max_tokens=20)
    return desk


def test_a_reader_asks_between_steps_and_decodes_on_when_its_kv_has_come() -> None:
    desk = reader().give(generation(2), at=10)
    assert desk.asked_to_stop
    assert not desk.of(ReceiveKv)
    desk.end_steps(2, at=12)
    assert desk.pull.request_id == 2
    assert not desk.of(RunSteps)
    desk.give(KvReceived(2, True), at=30)
    assert len(desk.of(RunSteps)) == 1
    assert set(desk.core.batch.members) == {1, 2}


def test_with_overlap_it_asks_at_once_and_goes_on() -> None:
    desk = reader(overlap=True).give(generation(2), at=10)
    assert desk.pull.request_id == 2
    assert not desk.asked_to_stop


def test_kv_that_comes_without_end_lets_a_step_run_in_between() -> None:
    desk = reader().give(generation(2), at=10)
    desk.end_steps(2, at=12)
    desk.give(generation(3), at=13)
    desk.give(KvReceived(2, True), at=30)
    assert desk.of(RunSteps)  # not a transfer again
    assert desk.asked_to_stop or desk.core.scheduler.running is not None
    desk.end_steps(1, at=32)
    assert desk.pull.request_id == 3


def test_kv_of_a_request_that_was_given_up_is_not_waited_for() -> None:
    desk = reader().give(generation(2), at=10)
    desk.end_steps(2, at=12)
    desk.give(Cancel(2), at=15)
    assert desk.of(RunSteps)


def test_a_source_begins_no_step_until_its_reader_is_done() -> None:
    desk = ExecutorDesk(Role.CONTEXT, overlap=False)
    desk.until_context_done(1)
    desk.give(asks(1), at=40)
    desk.give(context(2), at=41)
    assert not desk.of(RunSteps)
    desk.give(KvTaken(1, ok=True), at=60)
    assert desk.of(RunSteps)


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_in_simulated_clusters_no_step_begins_while_kv_comes_or_is_read(plans_ahead: bool) -> None:
    transfers = 0
    for seed in range(60):
        case = make_case(Random(f"apart/{seed}"))
        if all(executor.role is Role.MIXED for executor in case.config.executors):
            continue
        never_late = {"transfer_timeout_base": NEVER, "pull_timeout": NEVER, "lease": NEVER}
        case = case.with_executors(overlap=False, **never_late)
        if plans_ahead:
            case = replace(case, launch=(1, 2, True))
        if case.config.generation_binding != "at_context_done":
            continue
        trace = simulate(case)
        moved = [row for row in trace.rows if isinstance(row, TransferRow) and row.ok]
        for row in moved:
            for executor, since in ((row.reader, row.start_ps), (row.source, row.start_ps + case.message_latency)):
                begun = [step for step in trace.steps[executor] if since < step.start < row.end_ps]
                assert not begun, seed
        transfers += len(moved)
    assert transfers > 100


def test_early_binding_by_layers_cannot_be_without_overlap() -> None:
    file = Path(__file__).parent.parent / "benchmarks" / "h200" / "layerwise.yaml"
    with pytest.raises(ConfigError, match=r"cluster\.cache_transceiver\.overlap: off, and KV would be sent while"):
        load_experiment(file, ["cluster.cache_transceiver.overlap=false", "sweep={}"])
