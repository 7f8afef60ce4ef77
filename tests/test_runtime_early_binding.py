"""Early binding and layer-wise sending on real MPI clusters: the same tokens, the same KV, and decisions that the simulator
makes again on the run's own times."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import PrepareReceive, ReceiveKv, ServeKv
from disagg.core.config import PolicySpec, SchedulerConfig
from disagg.core.event_log import Frame, read_log, replay, replay_frames
from disagg.core.events import ContextStarted, FirstTokens, KvReceived, KvWithdrawn
from disagg.core.executor import ExecutorCore
from disagg.core.tables import RequestRow, TransferRow
from disagg.policies.vocabulary import PS_PER_MS, Request
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import Fault, HardwareResult, LoadPhase, PlannedSubmission
from disagg.simulator.recorded import Recording, conform
from tests.run_until_shown import run_until_shown
from tests.runtime_programs.clusters import Layout, cluster, context, generation, num_instants, submissions
from tests.tiny_models import SHAPES, Script, make_engine, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
SHAPE = SHAPES["llama"]
PROMPTS = prompts(SHAPE, [5, 39, 12, 7, 43, 9, 24, 6], seed=5)  # a step holds 16 tokens: up to three chunks


@functools.cache
def expected(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """What one engine alone says."""
    return tuple(Script([make_engine(SHAPE)]).generate(0, prompt, num_tokens))


def run(
    layouts: Sequence[Layout],
    phases: tuple[LoadPhase, ...],
    binding: str,
    layerwise: bool = True,
    faults: Sequence[Fault] = (),
    **values: Any,
) -> HardwareResult:
    for layout in layouts:
        layout.config["layerwise"] = layerwise
    made = cluster(ModelSource(SHAPE, seed=3), layouts, **values)
    made = replace(made, orchestrator=replace(made.orchestrator, generation_binding=binding))
    result = run_cluster(made, phases, faults=faults, timeout_s=120)
    assert isinstance(result, HardwareResult)
    return result


def frames(result: HardwareResult, core: int) -> list[Frame]:
    return list(read_log(result.logs[core])[1])


def commands(result: HardwareResult, kind: type) -> list[Any]:
    return [c for core in result.logs for frame in frames(result, core) for c in frame.commands if isinstance(c, kind)]


def events(result: HardwareResult, kind: type) -> list[Any]:
    return [e for core in result.logs for frame in frames(result, core) for e in frame.events if isinstance(e, kind)]


def step_ends(result: HardwareResult) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for executor, ends in result.step_ends.items():
        for epoch, _, at in sorted(ends):
            found.setdefault((executor, epoch), []).append(at)
    return found


LAYOUTS = {
    "one to one": [(1, 1), (1, 1)],
    "two stages to two slices": [(1, 2), (2, 1)],
    "two slices to two uneven stages": [(2, 1), (1, 2, (3, 1))],
}


@pytest.mark.parametrize(
    ("layout", "binding"),
    [
        ("one to one", "at_arrival"),
        ("one to one", "at_context_start"),
        ("two stages to two slices", "at_arrival"),  # at_context_start: the long prompt below
        ("two slices to two uneven stages", "at_context_start"),
    ],
)
def test_kv_that_travels_while_it_is_computed_is_the_kv_that_one_engine_computes(layout: str, binding: str) -> None:
    source, reader = LAYOUTS[layout]
    slow = SchedulerConfig(max_batch_size=8, max_num_tokens=4)  # many steps to a prompt: time to ask in
    layouts = [context(*source, scheduler=slow), generation(*reader)]
    least = 2 if binding == "at_arrival" else 0

    def one_run() -> HardwareResult:
        done = run(layouts, submissions(PROMPTS, 6, every_ms=2), binding)
        assert [row.token_ids for row in done.sends] == [expected(prompt, 6) for prompt in PROMPTS]
        return done

    def num_early(done: HardwareResult) -> int:
        return sum(command.is_early for command in commands(done, ServeKv))

    result = run_until_shown(one_run, lambda done: num_early(done) >= least, "was KV sent before it was whole")
    served = commands(result, ServeKv)
    assert sum(command.ok for command in served) == len(PROMPTS)
    # a question may overtake the context phase that it is about, and a short prompt be computed before one has come
    assert all(command.ok or "is not held here" in command.error for command in served)
    assert len(commands(result, PrepareReceive)) + len(commands(result, ReceiveKv)) == len(served)
    assert least <= len(events(result, FirstTokens)) <= len(PROMPTS)
    assert {row.num_attempts for row in result.rows if isinstance(row, RequestRow)} == {1}
    assert len(events(result, ContextStarted)) == (len(PROMPTS) if binding == "at_context_start" else 0)
    checks = [part for parts in result.parts.values() for _, part in parts]
    assert all(part.num_checked > 0 if part.ok else "is not held here" in (part.error or "") for part in checks)
    for log in result.logs.values():
        assert replay(log) > 0
    launch = {1: (1, source[1]), 2: (1, reader[1])}
    assert conform(Recording(result.logs, step_ends(result)), launch) == num_instants(result.logs)


def test_a_long_prompt_bound_at_context_start_is_sent_while_it_is_computed() -> None:
    slow = SchedulerConfig(max_batch_size=8, max_num_tokens=2)  # 75 steps: time to ask in, on any machine
    (text,) = prompts(SHAPE, [150], seed=4)
    layouts = [context(1, 2, scheduler=slow), generation(2, 1)]

    def one_run() -> HardwareResult:
        done = run(layouts, submissions([text], 6), "at_context_start")
        assert done.sends[0].token_ids == expected(text, 6)
        return done

    result = run_until_shown(
        one_run, lambda done: commands(done, ServeKv)[0].is_early, "was KV asked for before it was whole"
    )
    (served,) = commands(result, ServeKv)
    assert served.is_early
    (row,) = [row for row in result.rows if isinstance(row, RequestRow)]
    assert row.kv_transfer_overlap_ps is not None
    assert row.kv_transfer_overlap_ps > 0
    assert row.num_attempts == 1


def check_all_blocks_are_free(result: HardwareResult, executors: Sequence[int]) -> None:
    """A fresh core that lives through the log ends without a visit and with every block free."""
    for executor in executors:
        header, logged = read_log(result.logs[executor])
        assert header.executor is not None
        core = ExecutorCore(header.executor, header.policy_root)
        assert replay_frames(core, logged) > 0
        core.check()
        assert core.visits == {}
        assert core.blocks.num_free == header.executor.num_blocks


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_request_that_ends_with_its_first_token_is_answered_once_and_gives_its_reservation_back(
    layerwise: bool,
) -> None:
    lengths = [1, 6, 1, 1, 6, 1, 6, 1]
    phase = LoadPhase(
        tuple(
            PlannedSubmission(Request(i, len(prompt), 12, input_token_ids=prompt), i * 2 * PS_PER_MS, length)
            for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True), 1)
        )
    )
    result = run([context(), generation()], (phase,), "at_arrival", layerwise)
    assert [row.token_ids for row in result.sends] == [expected(p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    ends = Counter(row.request_id for row in result.rows if isinstance(row, RequestRow))
    assert set(ends.values()) == {1}
    assert len(ends) == len(PROMPTS)
    check_all_blocks_are_free(result, [1, 2])
    assert commands(result, PrepareReceive)  # blocks are reserved early in any case
    if not layerwise:  # but KV moves when the context phase is done
        assert not any(command.is_early for command in commands(result, ServeKv))
    assert conform(Recording(result.logs, step_ends(result))) == num_instants(result.logs)


def test_a_killed_context_executor_costs_no_token_of_requests_that_were_bound_early() -> None:
    faults = [Fault(1, 60 * PS_PER_MS)]
    layouts = [context(), context(), generation()]
    result = run(layouts, submissions(PROMPTS, 20, every_ms=15), "at_arrival", faults=faults)
    assert [row.token_ids for row in result.sends] == [expected(p, 20) for p in PROMPTS]
    check_all_blocks_are_free(result, [2, 3])


def test_a_killed_generation_executor_costs_no_token_of_requests_that_were_bound_to_it() -> None:
    faults = [Fault(2, 60 * PS_PER_MS)]
    layouts = [context(), generation(), generation()]
    result = run(layouts, submissions(PROMPTS, 20, every_ms=15), "at_arrival", faults=faults)
    assert [row.token_ids for row in result.sends] == [expected(p, 20) for p in PROMPTS]
    check_all_blocks_are_free(result, [1, 3])


def test_where_blocks_are_scarce_early_reservations_come_and_go_and_every_request_is_served() -> None:
    """Neither executor can hold more than two of the longer requests."""
    layouts = [context(num_blocks=12), generation(num_blocks=15), generation(num_blocks=14)]
    texts = PROMPTS * 2
    result = run(layouts, submissions(texts, 10, every_ms=1), "at_arrival")
    assert [row.token_ids for row in result.sends] == [expected(prompt, 10) for prompt in texts]
    assert all(row.overlap_ps <= row.end_ps - row.start_ps for row in result.rows if isinstance(row, TransferRow))
    failed = [event.error or "" for event in events(result, KvReceived) if not event.ok]
    withdrawn = [error for error in failed if "was withdrawn" in error]
    assert all("is not held here" in error for error in failed if error not in withdrawn)
    assert len(withdrawn) <= len(events(result, KvWithdrawn))  # taken back by their readers; some too late
    check_all_blocks_are_free(result, [1, 2, 3])
    assert conform(Recording(result.logs, step_ends(result))) == num_instants(result.logs)


HOLD_THE_FIRST = """
from disagg.policies.interfaces import RoutingPolicy
from disagg.policies.vocabulary import Hold, Route

class HoldTheFirst(RoutingPolicy):
    def route_context(self, request, fleet):
        return Route(context=1)

    def route_generation(self, request, fleet):
        return Hold() if request.id == 1 and request.context_phase_params is None else Route(generation=2)
"""


def test_an_early_reservation_that_stands_in_the_way_of_what_it_waits_for_is_taken_back(tmp_path: Path) -> None:
    """The first request's KV fills the context executor, the promise to the second the generation executor."""
    (tmp_path / "hold.py").write_text(HOLD_THE_FIRST)
    texts = prompts(SHAPE, [40, 40], seed=9)
    slow = SchedulerConfig(max_batch_size=8, max_num_tokens=4)  # ten steps: the second comes before the first is done
    made = cluster(ModelSource(SHAPE, seed=3), [context(num_blocks=10, scheduler=slow), generation(num_blocks=11)])
    router = PolicySpec(f"{tmp_path / 'hold.py'}:HoldTheFirst")
    made = replace(made, orchestrator=replace(made.orchestrator, router=router, generation_binding="at_arrival"))

    def one_run() -> HardwareResult:
        done = run_cluster(made, submissions(texts, 5, every_ms=0), timeout_s=120, warm_up=False)
        assert isinstance(done, HardwareResult)
        assert [row.token_ids for row in done.sends] == [expected(text, 5) for text in texts]
        return done

    result = run_until_shown(one_run, lambda done: events(done, KvWithdrawn), "was a reservation taken back")
    assert len(events(result, KvWithdrawn)) == 1
    assert {row.num_attempts for row in result.rows if isinstance(row, RequestRow)} == {1}
    check_all_blocks_are_free(result, [1, 2])
    assert conform(Recording(result.logs, step_ends(result))) == num_instants(result.logs)
