"""The contract between the orchestrator's core and its policies: what may be answered, what is refused, who is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from disagg.core.commands import Deliver, Record, Send, WakeAt
from disagg.core.config import OrchestratorConfig, PolicySpec
from disagg.core.events import Arrive, Cancel, Enqueue, LeaseRenewed, PeerDown, Report, Response, Wake
from disagg.core.executor import ExecutorCore
from disagg.core.orchestrator import OrchestratorCore
from disagg.core.tables import DecisionRow
from disagg.policies.interfaces import AdmissionPolicy, PolicyError, QueueOrder, RoutingPolicy, ScoringPolicy
from disagg.policies.vocabulary import (
    Admit,
    ContextPhaseParams,
    FinishReason,
    Hold,
    Reject,
    Request,
    RequestType,
    Route,
    RouteMixed,
    Stage,
)
from tests.simulation_helpers import World, executors, named


class Scripted(RoutingPolicy):
    """Gives the answers of two lists, the last of each for ever, and keeps what it was shown and told."""

    def __init__(self, *, rng: Random, context: Any = (), generation: Any = ()) -> None:
        super().__init__(rng=rng)
        self._answers = {Stage.CONTEXT: list(context), Stage.GENERATION: list(generation)}
        self.asked: list[tuple[Stage, Request, int]] = []
        self.told: list[Any] = []

    def _answer(self, stage: Stage, request: Request, now: int) -> Any:
        self.asked.append((stage, request, now))
        answers = self._answers[stage]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def route_context(self, request: Request, fleet: Any) -> Any:
        return self._answer(Stage.CONTEXT, request, fleet.now)

    def route_generation(self, request: Request, fleet: Any) -> Any:
        return self._answer(Stage.GENERATION, request, fleet.now)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: Any) -> None:
        active = fleet.executor(executor).active_requests
        self.told.append(("dispatched", request.id, stage.value, executor, active))

    def on_finished(self, request: Request, stage: Stage, executor: int, ok: bool, fleet: Any) -> None:
        self.told.append(("finished", request.id, stage.value, executor, ok))

    def on_report(self, executor: Any, fleet: Any) -> None:
        self.told.append(("report", executor.executor_id, executor.queued_requests, executor.age))


class Orchestrator:
    """A core under a scripted router, and what it ordered."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, roles: str, *, context: Any = (), generation: Any = (), **config: Any
    ):
        router = named(monkeypatch, Scripted, context=context, generation=generation)
        self.core = OrchestratorCore(OrchestratorConfig(executors(roles), router=router, **config))
        self.policy: Scripted = self.core.routers.by_stage[Stage.CONTEXT]  # type: ignore[assignment]

    def give(self, event: Any, now: int) -> list[Any]:
        return self.core.handle(event, now)

    def arrive(self, request_id: int, now: int, **fields: Any) -> list[Any]:
        return self.give(Arrive(Request(request_id, 100, 8, arrival=now, **fields)), now)

    def context_done(self, executor: int, executor_request: int, now: int) -> list[Any]:
        params = ContextPhaseParams(executor_request, executor, 100)
        return self.give(Response(executor_request, executor, None, 1, context_phase_params=params), now)


def enqueued(commands: list[Any]) -> list[tuple[int, Request]]:
    """(executor, request) of each phase sent."""
    return [(c.to, c.message.request) for c in commands if isinstance(c, Send) and isinstance(c.message, Enqueue)]


def ends(commands: list[Any]) -> list[tuple[int, FinishReason, str | None]]:
    return [(c.request_id, c.finish_reason, c.error) for c in commands if isinstance(c, Deliver) and c.finish_reason]


def decisions(commands: list[Any]) -> list[DecisionRow]:
    return [c.row for c in commands if isinstance(c, Record) and isinstance(c.row, DecisionRow)]


def wake_ups(commands: list[Any]) -> list[int | None]:
    return [c.at for c in commands if isinstance(c, WakeAt)]


# ---- answers that are carried out -----------------------------------------------------------------------------------


def test_a_route_sends_each_phase_where_it_says_under_ids_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "ccgg", context=[Route(context=2)], generation=[Route(generation=4)])
    ((executor, context),) = enqueued(o.arrive(77, 0))
    assert (executor, context.request_type) == (2, RequestType.CONTEXT_ONLY)
    ((executor, generation),) = enqueued(o.context_done(2, context.id, 10))
    assert (executor, generation.request_type) == (4, RequestType.GENERATION_ONLY)
    assert generation.context_phase_params == ContextPhaseParams(context.id, 2, 100)
    assert len({context.id, generation.id, 77}) == 3
    (end,) = ends(o.give(Response(generation.id, 4, FinishReason.STOP, 5), 20))
    assert end == (77, FinishReason.STOP, None)


def test_the_generation_stage_is_shown_what_the_context_phase_left_and_never_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Route(context=1)], generation=[Route(generation=2)])
    ((_, sent),) = enqueued(o.arrive(1, 0, input_token_ids=tuple(range(100))))
    assert sent.input_token_ids == tuple(range(100))
    o.context_done(1, sent.id, 10)
    assert [(stage, request.id, now) for stage, request, now in o.policy.asked] == [
        (Stage.CONTEXT, 1, 0),
        (Stage.GENERATION, 1, 10),
    ]
    assert [request.input_token_ids for _, request, _ in o.policy.asked] == [None, None]
    assert [request.context_phase_params for _, request, _ in o.policy.asked] == [
        None,
        ContextPhaseParams(sent.id, 1, 100),
    ]


def test_a_mixed_route_sends_both_phases_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cgm", context=[RouteMixed(3)])
    commands = o.arrive(1, 0)
    ((executor, sent),) = enqueued(commands)
    assert (executor, sent.request_type) == (3, RequestType.CONTEXT_AND_GENERATION)
    assert [(row.stage, row.answer, row.executor) for row in decisions(commands)] == [("context", "mixed", 3)]
    commands = o.give(Response(sent.id, 3, FinishReason.LENGTH, 8), 10)
    assert ends(commands) == [(1, FinishReason.LENGTH, None)]
    assert len(o.policy.asked) == 1


def test_a_route_of_both_executors_is_not_asked_about_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cgg", context=[Route(context=1, generation=3)], generation=[Route(generation=2)])
    commands = o.arrive(1, 0)
    assert [(row.executor, row.generation_executor) for row in decisions(commands)] == [(1, 3)]
    ((_, sent),) = enqueued(commands)
    ((executor, _),) = enqueued(o.context_done(1, sent.id, 10))
    assert executor == 3
    assert [stage for stage, _, _ in o.policy.asked] == [Stage.CONTEXT]


def test_a_bound_executor_that_died_meanwhile_is_asked_about_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cgg", context=[Route(context=1, generation=3)], generation=[Route(generation=2)])
    ((_, sent),) = enqueued(o.arrive(1, 0))
    o.give(PeerDown(3), 5)
    ((executor, _),) = enqueued(o.context_done(1, sent.id, 10))
    assert executor == 2


def test_binding_at_arrival_asks_for_both_executors_before_either_phase_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(
        monkeypatch,
        "cgg",
        context=[Route(context=1)],
        generation=[Route(generation=3), Route(generation=2)],
        generation_binding="at_arrival",
    )
    commands = o.arrive(1, 0)
    assert [(row.stage, row.executor) for row in decisions(commands)] == [("context", 1), ("generation", 3)]
    (_, sent), (executor, promised) = enqueued(commands)
    assert executor == 3
    assert promised.context_phase_params == ContextPhaseParams(sent.id, 1, sent.num_prompt_tokens, is_promised=True)
    commands = o.context_done(1, sent.id, 10)
    assert not enqueued(commands)
    assert not decisions(commands)


def test_one_that_holds_an_early_binding_is_asked_when_the_context_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(
        monkeypatch,
        "cg",
        context=[Route(context=1)],
        generation=[Hold(), Route(generation=2)],
        generation_binding="at_arrival",
    )
    ((_, sent),) = enqueued(o.arrive(1, 0))
    assert [executor for executor, _ in enqueued(o.context_done(1, sent.id, 10))] == [2]


@pytest.mark.parametrize("stage", ["context", "generation"])
def test_a_rejected_request_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    answers = {"context": [Route(context=1)], "generation": [Route(generation=2)], stage: [Reject("too busy")]}
    o = Orchestrator(monkeypatch, "cg", **answers)
    commands = o.arrive(1, 0)
    if stage == "generation":
        commands = o.context_done(1, 1, 10)
        (freed,) = [c for c in commands if isinstance(c, Send)]
        assert (freed.to, freed.message) == (1, Cancel(1))
    assert ends(commands) == [(1, FinishReason.REJECTED, "too busy")]
    assert [(row.stage, row.answer, row.reason) for row in decisions(commands)] == [(stage, "reject", "too busy")]


# ---- holding --------------------------------------------------------------------------------------------------------


def test_a_hold_until_an_instant_is_asked_again_at_that_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Hold(until=500), Route(context=1)])
    commands = o.arrive(1, 0)
    assert not enqueued(commands)
    assert wake_ups(commands) == [500]
    assert not enqueued(o.give(Wake(), 499))
    assert [executor for executor, _ in enqueued(o.give(Wake(), 500))] == [1]
    assert [now for _, _, now in o.policy.asked] == [0, 500]


def test_a_hold_is_asked_again_when_the_fleet_changes_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Hold(), Hold(), Route(context=1)])
    assert wake_ups(o.arrive(1, 0)) == []
    o.give(Wake(), 5)
    assert len(o.policy.asked) == 1
    assert not enqueued(o.give(Report(1), 10))
    assert [executor for executor, _ in enqueued(o.give(Report(2), 20))] == [1]
    assert [now for _, _, now in o.policy.asked] == [0, 10, 20]


def test_all_reports_of_an_instant_make_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "ccg", context=[Hold(), Route(context=1)])
    o.arrive(1, 0)
    o.core.handle(Report(1), 10, True)
    o.core.handle(Report(2), 10, True)
    assert len(o.policy.asked) == 1
    o.core.handle(None, 10)
    assert [now for _, _, now in o.policy.asked] == [0, 10]


def test_who_arrives_behind_a_held_request_waits_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Hold(), Route(context=1)])
    o.arrive(1, 0)
    assert not enqueued(o.arrive(2, 5))
    commands = o.give(Report(1), 10)
    assert [row.request_id for row in decisions(commands)] == [1, 2]
    assert len(enqueued(commands)) == 2


def test_the_queue_order_decides_which_held_request_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Urgent(QueueOrder):
        def key(self, request: Request, now: int) -> Any:
            return -request.priority

    order = named(monkeypatch, Urgent, "queue_order")
    o = Orchestrator(monkeypatch, "cg", context=[Hold(), Route(context=1)], queue_order=order)
    o.arrive(1, 0, priority=0.5)
    o.arrive(2, 1, priority=0.2)
    o.arrive(3, 2, priority=0.5)
    assert [request.id for _, request, _ in o.policy.asked] == [1]
    commands = o.give(Report(1), 10)
    assert [row.request_id for row in decisions(commands)] == [1, 3, 2]


def test_the_kv_of_a_held_generation_phase_is_kept_alive_until_it_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Route(context=1)], generation=[Hold()])
    ((_, sent),) = enqueued(o.arrive(1, 0))
    lease = o.core.config.executors[0].lease
    now, commands = 10, o.context_done(1, sent.id, 10)
    for _ in range(5):
        (at,) = wake_ups(commands)
        assert at is not None
        assert now < at < now + lease
        now, commands = at, o.give(Wake(), at)
        (renewal,) = [c for c in commands if isinstance(c, Send)]
        assert (renewal.to, renewal.message) == (1, LeaseRenewed((sent.id,)))
    o.policy._answers[Stage.GENERATION] = [Route(generation=2)]
    assert [executor for executor, _ in enqueued(o.give(Report(1), now + 1))] == [2]
    assert not [c for c in o.give(Wake(), now + lease // 3) if isinstance(c, Send)]


def test_a_held_request_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Hold(), Route(context=1)])
    o.arrive(1, 0)
    o.arrive(2, 1)
    assert ends(o.give(Cancel(1), 5)) == [(1, FinishReason.CANCELLED, None)]
    commands = o.give(Report(1), 10)
    assert [row.request_id for row in decisions(commands)] == [2]


# ---- admission ------------------------------------------------------------------------------------------------------


class Doorkeeper(AdmissionPolicy):
    """Rejects long prompts, holds short ones until the instant 100."""

    def admit(self, request: Request, fleet: Any) -> Any:
        if request.num_prompt_tokens > 1000:
            return Reject("too long")
        return Admit() if fleet.now >= 100 else Hold(until=100)


def test_admission_is_asked_before_the_router_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = named(monkeypatch, Doorkeeper, "admission")
    o = Orchestrator(monkeypatch, "cg", context=[Hold(), Route(context=1)], admission=admission)
    commands = o.give(Arrive(Request(1, 2000, 8)), 0)
    assert ends(commands) == [(1, FinishReason.REJECTED, "too long")]
    assert [(row.stage, row.answer) for row in decisions(commands)] == [("admission", "reject")]
    commands = o.give(Arrive(Request(2, 100, 8)), 1)
    assert [(row.stage, row.answer) for row in decisions(commands)] == [("admission", "hold")]
    assert not o.policy.asked
    commands = o.give(Wake(), 100)
    assert [(row.stage, row.answer) for row in decisions(commands)] == [("context", "hold")]
    commands = o.give(Report(1), 110)
    assert [(row.stage, row.answer) for row in decisions(commands)] == [("context", "route")]


# ---- answers that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, None, Admit, Route(context=1), "reject"])
def test_an_admission_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    class Says(AdmissionPolicy):
        def admit(self, request: Request, fleet: Any) -> Any:
            return answer

    o = Orchestrator(monkeypatch, "cg", admission=named(monkeypatch, Says, "admission"))
    with pytest.raises(PolicyError, match=r"^Says answered .*; allowed: Admit\(\), Hold or Reject"):
        o.arrive(1, 1)


@pytest.mark.parametrize("key", [None, float("nan"), 1j])
def test_a_key_that_has_no_place_in_an_order_is_refused(monkeypatch: pytest.MonkeyPatch, key: Any) -> None:
    class Keys(QueueOrder):
        def key(self, request: Request, now: int) -> Any:
            return key

    order = named(monkeypatch, Keys, "queue_order")
    o = Orchestrator(monkeypatch, "cg", queue_order=order)
    with pytest.raises(PolicyError, match=r"Keys gave the key .*, which has no place in an order"):
        o.arrive(1, 1)
    (config,) = executors("c", queue_order=order)
    with pytest.raises(PolicyError, match="Keys gave the key"):
        ExecutorCore(config).handle(Enqueue(Request(1, 10, 9)), 0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Route(context=9), r"executor 9 \(unknown\); allowed here: \[1, 5\]"),
        (Route(context=0), r"executor 0 \(unknown\); allowed here: \[1, 5\]"),
        (Route(context=2), r"executor 2 \(context, unhealthy\); allowed here: \[1, 5\]"),
        (Route(context=3), r"executor 3 \(generation, healthy\); allowed here: \[1, 5\]"),
        (Route(context=1, generation=1), r"executor 1 \(context, healthy\); allowed here: \[3, 5\]"),
        (Route(context=1, generation=4), r"executor 4 \(generation, unhealthy\); allowed here: \[3, 5\]"),
        (RouteMixed(3), r"executor 3 \(generation, healthy\); allowed here: \[5\]"),
        (Route(generation=3), r"a context phase cannot be routed by Route\(context=None, generation=3\)"),
        (Route(context=1.0), r"Route\(context=1.0, generation=None\): 1.0 is no whole number"),
        (RouteMixed("5"), "'5' is no whole number"),
        (Hold("soon"), "'soon' is no whole number"),
        (None, "a context phase cannot be routed by None"),
        (1, "a context phase cannot be routed by 1"),
    ],
)
def test_a_context_phase_goes_to_no_executor_that_cannot_serve_it(
    monkeypatch: pytest.MonkeyPatch, answer: Any, message: str
) -> None:
    o = Orchestrator(monkeypatch, "ccggm", context=[answer])
    o.give(PeerDown(2), 0)
    o.give(Report(4, healthy=False), 0)
    with pytest.raises(PolicyError, match=message):
        o.arrive(1, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Route(generation=1), r"executor 1 \(context, healthy\); allowed here: \[2\]"),
        (Route(generation=3), r"executor 3 \(generation, unhealthy\); allowed here: \[2\]"),
        (Route(context=1), r"a generation phase cannot be routed by Route\(context=1, generation=None\)"),
        (RouteMixed(2), "a generation phase cannot be routed by RouteMixed"),
        (None, "a generation phase cannot be routed by None"),
    ],
)
def test_a_generation_phase_goes_to_no_executor_that_cannot_serve_it(
    monkeypatch: pytest.MonkeyPatch, answer: Any, message: str
) -> None:
    o = Orchestrator(monkeypatch, "cgg", context=[Route(context=1)], generation=[answer])
    o.give(PeerDown(3), 0)
    ((_, sent),) = enqueued(o.arrive(1, 0))
    with pytest.raises(PolicyError, match=message):
        o.context_done(1, sent.id, 10)


def test_a_numpy_integer_is_as_good_an_executor_id_as_an_int(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    o = Orchestrator(monkeypatch, "cg", context=[Route(context=np.int64(1))])  # type: ignore[arg-type]
    commands = o.arrive(1, 0)
    (row,) = decisions(commands)
    assert type(row.executor) is int
    assert [type(executor) for executor, _ in enqueued(commands)] == [int]


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_a_stateful_policy_is_told_what_became_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cgg", context=[Route(context=1)], generation=[Route(generation=2)])
    ((_, first),) = enqueued(o.arrive(1, 0))
    o.give(Report(1, seen_requests=1, seen_tokens=100, queued_requests=1), 3)
    ((_, generation),) = enqueued(o.context_done(1, first.id, 10))
    ((_, second),) = enqueued(o.arrive(2, 11))
    o.give(Response(generation.id, 2, FinishReason.STOP, 3, report=Report(2, queued_requests=5)), 20)
    o.give(Response(second.id, 1, FinishReason.ERROR, 0, error="no"), 30)
    assert o.policy.told == [
        ("dispatched", 1, "context", 1, 1),
        ("report", 1, 1, 0),
        ("finished", 1, "context", 1, True),
        ("dispatched", 1, "generation", 2, 1),
        ("dispatched", 2, "context", 1, 1),
        ("report", 2, 5, 0),
        ("finished", 1, "generation", 2, True),
        ("finished", 2, "context", 1, False),
    ]


def test_a_policy_is_told_of_requests_lost_with_their_executor_and_of_cancelled_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    o = Orchestrator(monkeypatch, "ccg", context=[Route(context=1), Route(context=2)])
    o.arrive(1, 0)
    commands = o.give(PeerDown(1), 5)
    ((executor, again),) = enqueued(commands)
    assert executor == 2
    o.give(Cancel(1), 6)
    o.give(Response(again.id, 2, FinishReason.CANCELLED, 0), 7)
    assert o.policy.told == [
        ("dispatched", 1, "context", 1, 1),
        ("finished", 1, "context", 1, False),
        ("dispatched", 1, "context", 2, 1),
        ("finished", 1, "context", 2, False),
    ]


def test_two_routers_are_told_of_their_own_stage_and_both_of_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    context = named(monkeypatch, Scripted, context=[Route(context=1)])
    generation = PolicySpec(context.name, {"generation": [Route(generation=2)]})
    core = OrchestratorCore(OrchestratorConfig(executors("cg"), context_router=context, generation_router=generation))
    for event in (
        Arrive(Request(1, 100, 8)),
        Response(1, 1, None, 1, context_phase_params=ContextPhaseParams(1, 1, 100)),
        Report(1),
        Response(2, 2, FinishReason.STOP, 3),
    ):
        core.handle(event, 0)
    told: list[Any] = [core.routers.by_stage[stage].told for stage in (Stage.CONTEXT, Stage.GENERATION)]  # type: ignore[attr-defined]
    assert [entry[0] for entry in told[0]] == ["dispatched", "finished", "report"]
    assert [entry[0] for entry in told[1]] == ["dispatched", "report", "finished"]


# ---- a user's own policy --------------------------------------------------------------------------------------------

TEN_LINES = """\
from disagg.policies import Hold, RoutingPolicy, Route


class Alternate(RoutingPolicy):
    '''Even prompts to executor 1, odd ones to executor 2; one generation phase at a time.'''

    def route_context(self, request, fleet):
        return Route(context=1 + request.num_prompt_tokens % 2)

    def route_generation(self, request, fleet):
        return Hold() if fleet.generation.active_requests[0] else Route(generation=3)
"""


def test_a_policy_of_ten_lines_in_a_users_own_file_runs_in_simulation(tmp_path: Path) -> None:
    (tmp_path / "alternate.py").write_text(TEN_LINES)
    world = World("ccg", router=PolicySpec("alternate.py:Alternate"), policy_root=str(tmp_path))
    for i in range(1, 21):
        world.submit(i, i * 1000, 100 + i, 5)
    world.run()
    rows = world.table("Request")
    assert len(rows) == 20
    assert {row.finish_reason for row in rows} == {"stop"}
    assert all(row.context_executor == 1 + row.num_prompt_tokens % 2 for row in rows)
    stays = sorted((row.kv_usable_ps, row.end_ps) for row in rows)
    assert all(after[0] > before[1] for before, after in pairwise(stays))


# ---- known defects --------------------------------------------------------------------------------------------------


def test_a_held_generation_phase_whose_kv_is_lost_is_not_asked_about_until_its_context_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generation = [Hold(), Hold(), Route(generation=3)]
    o = Orchestrator(monkeypatch, "ccg", context=[Route(context=1), Route(context=2)], generation=generation)
    ((_, sent),) = enqueued(o.arrive(1, 0))
    o.context_done(1, sent.id, 10)
    commands = o.give(PeerDown(1), 20)
    assert [row.stage for row in decisions(commands)] == ["context"]
    assert [executor for executor, _ in enqueued(commands)] == [2]


def test_a_policy_is_told_of_requests_that_ran_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Route(context=1)])
    o.arrive(1, 0, allotted_time=100)
    o.give(Wake(), 100)
    assert o.policy.told == [("dispatched", 1, "context", 1, 1), ("finished", 1, "context", 1, False)]


def test_a_generation_phase_that_is_held_is_asked_about_once_in_that_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Route(context=1)], generation=[Hold()])
    ((_, sent),) = enqueued(o.arrive(1, 0))
    assert [row.answer for row in decisions(o.context_done(1, sent.id, 10))] == ["hold"]


def test_asking_again_in_the_past_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    o = Orchestrator(monkeypatch, "cg", context=[Hold(until=0)])
    with pytest.raises(PolicyError, match="must lie in the future"):
        o.arrive(1, 10)


def test_a_score_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wordy(ScoringPolicy):
        def score(self, request: Request, executors: Any) -> Any:
            return "hello"

    world = World("ccg", router=named(monkeypatch, Wordy))
    world.submit(1, 0, 8, 2)
    with pytest.raises(PolicyError, match="the score of executor 1 is not a number"):
        world.run()
