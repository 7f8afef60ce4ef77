"""Replay: a fresh core, given the logged events only, gives the logged commands to the byte; and nothing else passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace as with_

from disagg.core import scheduler as scheduler_module
from disagg.core.commands import RunSteps
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec
from disagg.core.cost import ConstantCost
from disagg.core.event_log import (
    FORMAT,
    EventLogError,
    Frame,
    LogHeader,
    ReplayDifference,
    make_core,
    read_log,
    replay,
    replay_frames,
)
from disagg.core.events import Arrive, Enqueue, Report, Response, StepsDone
from disagg.policies.interfaces import QueueOrder, ScoringPolicy
from disagg.policies.registry import register
from disagg.policies.vocabulary import Request, Role
from tests.core_cases import NEVER, Case, make_case, make_early_case, simulate


@register("test_youngest_first", kind="queue_order", source="tests")
class YoungestFirst(QueueOrder):
    """Breaks every tie of first come, first served the other way."""

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)
        self._count = 0

    def key(self, request: Request, now: int) -> Any:
        self._count -= 1
        return self._count


def busy_case() -> Case:
    """Two context and two generation executors under enough load that queues form and reports matter."""
    executors = tuple(
        ExecutorConfig(i, role, 60, tokens_per_block=4, report_interval=NEVER)
        for i, role in enumerate((Role.CONTEXT, Role.CONTEXT, Role.GENERATION, Role.GENERATION), 1)
    )
    config = OrchestratorConfig(
        executors, context_router=PolicySpec("least_tokens"), generation_router=PolicySpec("least_kv"), seed=3
    )
    rng = Random(11)
    arrivals = tuple(
        (at, Request(1001 + i, rng.randint(5, 60), 20, arrival=at), rng.randint(1, 25))
        for i, at in enumerate(sorted(rng.choices(range(0, 400, 20), k=30)))
    )
    return Case(config, dict.fromkeys(range(1, 5), ConstantCost(10, 1, 0, 1)), 5, 2, 1, arrivals)


@pytest.fixture(scope="module")
def logs() -> dict[int, bytes]:
    return simulate(busy_case(), check=False).logs


def test_every_core_of_a_run_is_replayed_to_the_byte(logs: dict[int, bytes]) -> None:
    assert [replay(log) > 10 for log in logs.values()] == [True] * 5


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("make", [make_case, make_early_case])
def test_random_runs_are_replayed_to_the_byte(make: Callable[[Random], Case], seed: int) -> None:
    for log in simulate(make(Random(seed)), check=False).logs.values():
        assert replay(log) == len(list(read_log(log)[1]))


def assert_replay_fails(
    log: bytes,
    change: Callable[[Iterator[Frame]], Iterable[Frame]],
    header: Callable[[LogHeader], LogHeader] | None = None,
) -> ReplayDifference:
    head, frames = read_log(log)
    core = make_core(header(head) if header is not None else head)
    with pytest.raises(ReplayDifference) as error:
        replay_frames(core, iter(change(frames)))
    return error.value


def same(frames: Iterator[Frame]) -> Iterable[Frame]:
    return frames


def drop_first(kind: type) -> Callable[[Iterator[Frame]], Iterable[Frame]]:
    """The frames without the first event of `kind`, whose frame's other events and commands stay."""

    def change(frames: Iterator[Frame]) -> Iterable[Frame]:
        dropped = False
        for frame in frames:
            for i, event in enumerate(frame.events):
                if isinstance(event, kind) and not dropped:
                    frame = with_(frame, events=frame.events[:i] + frame.events[i + 1 :])
                    dropped = True
                    break
            yield frame

    return change


def mutate(kind: type, number: int, change_event: Callable[[Any], Any]) -> Callable[[Iterator[Frame]], Iterable[Frame]]:
    """The frames with event `number` of `kind` changed."""

    def change(frames: Iterator[Frame]) -> Iterable[Frame]:
        count = 0
        for frame in frames:
            events = []
            for event in frame.events:
                count += isinstance(event, kind)
                hit = isinstance(event, kind) and count == number
                events.append(change_event(event) if hit else event)
            yield with_(frame, events=tuple(events))

    return change


@pytest.mark.parametrize("executor", [1, 3])
def test_a_mutated_event_of_an_executor_makes_replay_fail(logs: dict[int, bytes], executor: int) -> None:
    def longer(event: Enqueue) -> Enqueue:
        return Enqueue(with_(event.request, num_prompt_tokens=event.request.num_prompt_tokens + 4))

    assert_replay_fails(logs[executor], mutate(Enqueue, 3, longer))
    assert_replay_fails(logs[executor], mutate(StepsDone, 2, lambda event: with_(event, plan=event.plan + 1)))


def test_a_mutated_event_of_the_orchestrator_makes_replay_fail(logs: dict[int, bytes]) -> None:
    def longer(event: Arrive) -> Arrive:
        return Arrive(with_(event.request, max_tokens=event.request.max_tokens + 1))

    assert_replay_fails(logs[0], mutate(Arrive, 5, longer))
    count = sum(isinstance(event, Response) for frame in read_log(logs[0])[1] for event in frame.events)
    assert_replay_fails(logs[0], mutate(Response, count, lambda event: with_(event, num_output_tokens=99)))


def test_a_dropped_report_makes_replay_fail(logs: dict[int, bytes]) -> None:
    difference = assert_replay_fails(logs[0], drop_first(Report))
    assert difference.logged != difference.replayed


def test_a_dropped_step_end_makes_replay_fail(logs: dict[int, bytes]) -> None:
    assert_replay_fails(logs[1], drop_first(StepsDone))


def test_an_event_at_another_instant_makes_replay_fail(logs: dict[int, bytes]) -> None:
    assert_replay_fails(logs[1], lambda frames: (with_(frame, now=frame.now + 1) for frame in frames))


def test_events_of_one_instant_in_another_order_make_replay_fail(logs: dict[int, bytes]) -> None:
    """Two arrivals of one instant, the other way round: ties are decided by order."""

    def swap(frames: Iterator[Frame]) -> Iterable[Frame]:
        for frame in frames:
            yield with_(frame, events=tuple(reversed(frame.events))) if len(frame.events) > 1 else frame

    assert_replay_fails(logs[0], swap)


def test_a_queue_that_breaks_ties_the_other_way_makes_replay_fail(logs: dict[int, bytes]) -> None:
    def other_order(header: LogHeader) -> LogHeader:
        executor = header.executor
        assert executor is not None
        scheduler = with_(executor.scheduler, queue_order=PolicySpec("test_youngest_first"))
        return with_(header, executor=with_(executor, scheduler=scheduler))

    difference = assert_replay_fails(logs[1], same, other_order)
    logged = [c for c in difference.logged if isinstance(c, RunSteps)]
    replayed = [c for c in difference.replayed if isinstance(c, RunSteps)]
    assert logged != replayed


def test_a_router_that_breaks_ties_the_other_way_makes_replay_fail(
    logs: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_of_equals(self: ScoringPolicy, request: Request, pool: Any, turn: int) -> int:
        return max(pool.healthy_rows, key=lambda row: (-self.score(request, row), row.index)).index

    monkeypatch.setattr(ScoringPolicy, "_least", last_of_equals)
    assert_replay_fails(logs[0], same)


def test_a_youngest_victim_tie_break_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempting the oldest instead gives other commands on some log with preemptions."""
    seeds = [seed for seed in range(40) if simulate(make_case(Random(seed)), check=False).num_preemptions]
    runs = [simulate(make_case(Random(seed)), check=False).logs for seed in seeds]
    monkeypatch.setattr(scheduler_module, "max", min, raising=False)
    failures = 0
    for logs in runs:
        for log in logs.values():
            try:
                replay(log)
            except ReplayDifference:
                failures += 1
            except Exception:  # a core that has left the path of its log may trip over any later event
                failures += 1
    assert failures >= len(seeds) // 2


def test_a_difference_tells_where_and_what(logs: dict[int, bytes]) -> None:
    difference = assert_replay_fails(logs[1], drop_first(Enqueue))
    frames = list(read_log(logs[1])[1])
    assert frames[difference.frame].now == difference.now
    assert difference.logged == frames[difference.frame].commands
    assert "replayed" in str(difference)


# ---- logs that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [2, 4, 5, -3, -1])  # of the last record, whose length takes four bytes
def test_a_log_that_is_cut_short_is_refused(logs: dict[int, bytes], kept: int) -> None:
    log, end = logs[1], 0
    while end < len(log):
        start, end = end, end + 4 + int.from_bytes(log[end : end + 4], "big")
    with pytest.raises(EventLogError, match="cut short"):
        replay(log[:start] + log[start:][:kept])


def test_what_is_no_log_is_refused() -> None:
    for data in (b"", b"\x00\x00\x00\x05hello", b"\xff\xff\xff\xffxxxx"):
        with pytest.raises(EventLogError):
            read_log(data)


def test_a_log_of_another_format_is_refused() -> None:
    body = msgspec.msgpack.encode({"format": 1, "executor": "as it was written then"})
    with pytest.raises(EventLogError, match="format 1, this version reads 2"):
        read_log(len(body).to_bytes(4, "big") + body)


def test_a_log_of_no_core_is_refused() -> None:
    body = msgspec.msgpack.encode(LogHeader(FORMAT))
    with pytest.raises(EventLogError, match="names no core"):
        replay(len(body).to_bytes(4, "big") + body)
