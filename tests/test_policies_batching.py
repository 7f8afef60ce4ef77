"""What batch policies put into a step, on views made by hand, and what the core refuses to run."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.core.commands import ReceiveKv, RunSteps, Send
from disagg.core.config import PolicySpec
from disagg.core.events import Enqueue, KvTaken, StepsDone, Wake
from disagg.core.executor import ExecutorCore
from disagg.policies.batching import ChunkedPrefill, ContextFcfs, PrefillFirst
from disagg.policies.interfaces import BatchPolicy, BatchView, PolicyError, QueueOrder
from disagg.policies.vocabulary import BatchPlan, ChunkPlan, Request, RequestType, Role
from tests.core_desk import ExecutorDesk, asks, context, generation
from tests.simulation_helpers import executors, named


def prompts(*sizes: tuple[int, int] | int, first_id: int) -> list[Any]:
    """Prompts of (tokens left, blocks) or of tokens left alone, with ids from `first_id`."""
    pairs = [size if isinstance(size, tuple) else (size, 0) for size in sizes]
    return [
        SimpleNamespace(request_id=first_id + i, num_tokens_left=tokens, num_blocks=blocks)
        for i, (tokens, blocks) in enumerate(pairs)
    ]


def view(*, begun: Any = (), waiting: Any = (), **fields: Any) -> Any:
    """A step of at most 100 tokens; begun prompts are numbered from 1, waiting ones from 11."""
    settings: dict[str, Any] = {
        "now": 0,
        "role": Role.MIXED,
        "num_decodes": 0,
        "num_free_blocks": 10,
        "num_free_slots": 8,
        "max_num_tokens": 100,
        "chunked": True,
    }
    return SimpleNamespace(
        begun=prompts(*begun, first_id=1), waiting=prompts(*waiting, first_id=11), **{**settings, **fields}
    )


def chunked(**fields: Any) -> list[tuple[int, int]]:
    """(request, tokens) of the step that chunked_prefill plans; the decodes are always in it."""
    plan = ChunkedPrefill(rng=Random(0)).plan(view(**fields))
    assert plan.decodes
    return [(chunk.request_id, chunk.num_tokens) for chunk in plan.chunks]


def test_decodes_take_their_tokens_first() -> None:
    assert chunked(num_decodes=30, waiting=[(200, 1)]) == [(11, 70)]
    assert chunked(num_decodes=100, waiting=[(200, 1)]) == []
    assert chunked(num_decodes=120, begun=[50], waiting=[(200, 1)]) == []


def test_begun_prefills_go_on_oldest_first_before_any_new_prompt() -> None:
    assert chunked(begun=[30, 40], waiting=[(50, 1), (50, 1)]) == [(1, 30), (2, 40), (11, 30)]
    assert chunked(begun=[80, 40], waiting=[(50, 1)]) == [(1, 80), (2, 20)]


def test_new_prompts_come_in_queue_order_and_the_head_of_the_line_blocks() -> None:
    assert chunked(waiting=[(20, 2), (20, 9), (20, 1)]) == [(11, 20)]
    assert chunked(waiting=[(20, 4), (20, 6), (20, 0)]) == [(11, 20), (12, 20), (13, 20)]


def test_no_more_prompts_begin_than_there_are_slots() -> None:
    assert chunked(num_free_slots=2, waiting=[(10, 1), (10, 1), (10, 1)]) == [(11, 10), (12, 10)]
    assert chunked(num_free_slots=0, waiting=[(10, 1)]) == []
    assert chunked(num_free_slots=0, begun=[10], waiting=[(10, 1)]) == [(1, 10)]


def test_a_prompt_is_cut_where_the_budget_ends_unless_chunks_are_off() -> None:
    assert chunked(waiting=[(60, 1), (60, 1)]) == [(11, 60), (12, 40)]
    assert chunked(chunked=False, waiting=[(60, 1), (60, 1), (40, 1)]) == [(11, 60)]


def fcfs(max_tokens: int | None = None, **fields: Any) -> list[tuple[int, int]]:
    """(request, tokens) of the step that context_fcfs plans."""
    plan = ContextFcfs(rng=Random(0), max_tokens=max_tokens).plan(view(**fields))
    return [(chunk.request_id, chunk.num_tokens) for chunk in plan.chunks]


def test_context_fcfs_takes_whole_prompts_where_chunked_prefill_fills_the_step() -> None:
    assert fcfs(waiting=[(60, 1), (60, 1), (40, 1)]) == [(11, 60)]
    assert chunked(waiting=[(60, 1), (60, 1), (40, 1)]) == [(11, 60), (12, 40)]
    assert fcfs(waiting=[(60, 1), (40, 1), (1, 1)]) == [(11, 60), (12, 40)]


def test_context_fcfs_stops_at_the_length_that_saturates_the_device() -> None:
    assert fcfs(50, waiting=[(20, 1), (30, 1), (1, 1)]) == [(11, 20), (12, 30)]
    assert fcfs(50, waiting=[(60, 1), (10, 1)]) == [(11, 60)]  # longer than that: alone, in one step
    assert fcfs(50, waiting=[(160, 1), (10, 1)]) == [(11, 100)]  # longer than a step: in chunks
    assert fcfs(50, begun=[60], waiting=[(10, 1)]) == [(1, 60)]
    assert fcfs(50, waiting=[(160, 1), (10, 1)], chunked=False) == []


def test_context_fcfs_waits_for_blocks_and_slots_with_the_head_of_the_line() -> None:
    assert fcfs(waiting=[(20, 8), (20, 3), (20, 1)]) == [(11, 20)]
    assert fcfs(waiting=[(20, 11), (20, 1)]) == []
    assert fcfs(waiting=[(20, 1), (20, 1)], num_free_slots=1) == [(11, 20)]
    assert fcfs(waiting=[(20, 1)], num_free_slots=0) == []
    assert fcfs(waiting=[(80, 1)], num_decodes=30) == [(11, 70)]


def test_kv_that_nobody_fetches_holds_new_prompts_back() -> None:
    """Back-pressure: five blocks, of which a prompt takes two; with two held the third prompt must wait for a reader."""
    desk = ExecutorDesk(Role.CONTEXT, num_blocks=5, batching="context_fcfs")
    desk.until_context_done(1)
    desk.until_context_done(2)
    desk.give(context(3))
    assert desk.run is None
    desk.give(asks(1), KvTaken(1))
    assert [chunk.request_id for chunk in desk.of(RunSteps)[0].chunks] == [3]


def test_a_pull_leaves_its_reserve_free_unless_the_executor_holds_nothing() -> None:
    """Ten blocks; each request takes three. With four in reserve a second fits (7 - 3 = 4), a third does not."""
    desk = ExecutorDesk(Role.GENERATION, num_blocks=10, batching=PolicySpec("generation_pull", {"reserve_blocks": 4}))
    desk.give(generation(1), generation(2), generation(3))
    assert [pull.request_id for pull in desk.of(ReceiveKv)] == [1, 2]
    plain = ExecutorDesk(Role.GENERATION, num_blocks=10)
    plain.give(generation(1), generation(2), generation(3))
    assert [pull.request_id for pull in plain.of(ReceiveKv)] == [1, 2, 3]


def test_prefill_first_runs_prompts_alone_and_decodes_when_there_are_none() -> None:
    policy = PrefillFirst(rng=Random(0))
    plan = policy.plan(view(num_decodes=90, waiting=[(60, 1), (60, 1)]))
    assert plan == BatchPlan((ChunkPlan(11, 60), ChunkPlan(12, 40)), decodes=False)
    assert chunked(num_decodes=90, waiting=[(60, 1), (60, 1)]) == [(11, 10)]  # beside the decodes
    assert policy.plan(view(num_decodes=90)) == BatchPlan()
    assert policy.plan(view(num_decodes=90, waiting=[(60, 11)])) == BatchPlan()


def test_the_queue_is_read_no_further_than_needed() -> None:
    read = []

    def queue() -> Any:
        for prompt in prompts(*[(60, 1)] * 9, first_id=11):
            read.append(prompt.request_id)
            yield prompt

    batch = view()
    batch.waiting = queue()
    ChunkedPrefill(rng=Random(0)).plan(batch)
    assert read == [11, 12]


# ---- in the core ----------------------------------------------------------------------------------------------------


class Scripted(BatchPolicy):
    """Answers what it was given, whatever it sees."""

    def __init__(self, *, rng: Random, plan: BatchPlan) -> None:
        super().__init__(rng=rng)
        self._plan = plan

    def plan(self, batch: BatchView) -> BatchPlan:
        list(batch.waiting)  # a prompt that was not looked at cannot be named
        return self._plan


def core_with(monkeypatch: pytest.MonkeyPatch, plan: BatchPlan, **settings: Any) -> ExecutorCore:
    spec = named(monkeypatch, Scripted, "batching", plan=plan)
    (config,) = executors("c", batching=spec, max_num_tokens=100, **settings)
    return ExecutorCore(config)


def give(core: ExecutorCore, *prompt_lengths: int) -> list[Any]:
    """Context-only requests with ids from 1, all at one instant."""
    for i, tokens in enumerate(prompt_lengths, 1):
        core.handle(Enqueue(Request(i, tokens, 9, RequestType.CONTEXT_ONLY)), 0, True)
    return core.handle(None, 0)


def test_the_core_runs_the_chunks_that_a_policy_names(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_with(monkeypatch, BatchPlan((ChunkPlan(2, 60), ChunkPlan(1, 40))))
    (run,) = [c for c in give(core, 50, 60) if isinstance(c, RunSteps)]
    assert [(c.request_id, c.start, c.length, c.is_last) for c in run.chunks] == [(2, 0, 60, True), (1, 0, 40, False)]
    assert run.first_step == run.last_step == 1


@pytest.mark.parametrize(
    ("chunks", "settings", "message"),
    [
        (((1, 50), (2, 51)), {}, "prompt tokens; at most 100 are allowed"),
        (((3, 10),), {}, r"Scripted planned ChunkPlan\(request_id=3, num_tokens=10\), which is not there to compute"),
        (((1, 10), (1, 10)), {}, "which is not there to compute"),
        (((1, 61),), {}, "which is not there to compute"),
        (((1, 0),), {}, "which is not there to compute"),
        (((1, -5),), {}, "which is not there to compute"),
        (((1, 10), (2, 10)), {"max_batch_size": 1}, "which takes a slot and"),
        (((1, 10), (2, 10)), {"num_blocks": 7}, "which takes a slot and"),
    ],
)
def test_the_core_refuses_a_batch_that_is_overfull_or_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, chunks: Any, settings: Any, message: str
) -> None:
    core = core_with(monkeypatch, BatchPlan(tuple(ChunkPlan(*chunk) for chunk in chunks)), **settings)
    with pytest.raises(PolicyError, match=message):
        give(core, 60, 60)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "Scripted answered None; allowed: a BatchPlan"),
        (BatchPlan(None), "Scripted answered BatchPlan"),
        (BatchPlan((1, 2)), "Scripted planned 1; allowed: a ChunkPlan"),
        (BatchPlan((ChunkPlan(1, 1.5),)), "1.5 is no whole number"),
        (BatchPlan(ask_again_at="soon"), "'soon' is no whole number"),
    ],
)
def test_the_core_refuses_what_is_no_batch(monkeypatch: pytest.MonkeyPatch, answer: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        give(core_with(monkeypatch, answer), 60, 60)


def test_the_core_refuses_a_policy_that_stands_still_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(BatchPolicy):
        def plan(self, batch: BatchView) -> BatchPlan:
            chunks = tuple(ChunkPlan(p.request_id, p.num_tokens_left) for p in batch.waiting)
            return BatchPlan(chunks if not batch.num_decodes else (), decodes=False)

    (config,) = executors("m", batching=named(monkeypatch, Idle, "batching"))
    core = ExecutorCore(config)
    core.handle(Enqueue(Request(1, 10, 9)), 0)
    core.handle(Enqueue(Request(2, 10, 9)), 1)
    with pytest.raises(PolicyError, match="Idle stood the decode batch still and ran nothing else"):
        core.handle(StepsDone(1, 1, 1), 2)


def test_a_policy_that_waits_is_asked_again_when_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batcher(BatchPolicy):
        """Begins nothing before the instant 100."""

        def plan(self, batch: BatchView) -> BatchPlan:
            if batch.now < 100:
                return BatchPlan(ask_again_at=100)
            return BatchPlan(tuple(ChunkPlan(p.request_id, p.num_tokens_left) for p in batch.waiting))

    (config,) = executors("c", batching=named(monkeypatch, Batcher, "batching"))
    core = ExecutorCore(config)
    commands = give(core, 10, 20)
    assert not [c for c in commands if isinstance(c, RunSteps)]
    assert [c.at for c in commands if type(c).__name__ == "WakeAt"] == [100]
    (run,) = [c for c in core.handle(Wake(), 100) if isinstance(c, RunSteps)]
    assert [chunk.request_id for chunk in run.chunks] == [1, 2]


def test_a_wake_up_for_a_report_asks_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batcher(BatchPolicy):
        """Says that it is to be asked at 100, and would begin prompts from 50 on."""

        def plan(self, batch: BatchView) -> BatchPlan:
            if batch.now < 50:
                return BatchPlan(ask_again_at=100)
            return BatchPlan(tuple(ChunkPlan(p.request_id, p.num_tokens_left) for p in batch.waiting))

    batching = named(monkeypatch, Batcher, "batching")
    (config,) = executors("c", batching=batching, report_interval=60, report_on_batch_change=False)
    core = ExecutorCore(config)
    give(core, 10)
    core.handle(Enqueue(Request(2, 20, 9, RequestType.CONTEXT_ONLY)), 2)
    told = core.handle(Wake(), 60)
    assert [type(c.message).__name__ for c in told if isinstance(c, Send)] == ["Report"]
    assert not [c for c in told if isinstance(c, RunSteps)]
    (run,) = [c for c in core.handle(Wake(), 100) if isinstance(c, RunSteps)]
    assert [chunk.request_id for chunk in run.chunks] == [1, 2]


def test_the_queue_order_decides_who_is_first_and_equals_keep_their_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    class ShortestFirst(QueueOrder):
        def key(self, request: Request, now: int) -> Any:
            return request.num_prompt_tokens

    (config,) = executors("c", queue_order=named(monkeypatch, ShortestFirst, "queue_order"), max_num_tokens=100)
    core = ExecutorCore(config)
    (run,) = [c for c in give(core, 60, 20, 50, 20) if isinstance(c, RunSteps)]
    assert [(chunk.request_id, chunk.length) for chunk in run.chunks] == [(2, 20), (4, 20), (3, 50), (1, 10)]
