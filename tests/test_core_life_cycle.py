"""The life cycle as a table: what may happen in which state, and that nothing else can."""

from __future__ import annotations

import itertools

import pytest

from disagg.core.errors import LifeCycleError
from disagg.core.life_cycle import FINAL, LIVE, TRANSITIONS, Cause, State, advance, mermaid
from disagg.core.visit import Visit, total_kv_tokens
from disagg.policies.vocabulary import Request

ILLEGAL = [pair for pair in itertools.product(State, Cause) if pair not in TRANSITIONS]


@pytest.mark.parametrize(("state", "cause"), ILLEGAL, ids=lambda item: item.name)
def test_an_illegal_transition_raises_and_changes_nothing(state: State, cause: Cause) -> None:
    visit = Visit(Request(1, 10, 10), 1, 0, 0, state)
    with pytest.raises(LifeCycleError, match=cause.name) as error:
        visit.advance(cause)
    assert visit.state is state
    allowed = [c.name for (s, c) in TRANSITIONS if s is state]
    assert all(name in str(error.value) for name in allowed or ["nothing"])


@pytest.mark.parametrize(("state", "cause"), list(TRANSITIONS), ids=lambda item: item.name)
def test_a_legal_transition_leads_where_the_table_says(state: State, cause: Cause) -> None:
    assert advance(state, cause) is TRANSITIONS[state, cause]


def test_every_live_state_can_be_cancelled_and_can_fail() -> None:
    for state in LIVE:
        assert advance(state, Cause.CANCEL) is State.CANCELLED
        assert advance(state, Cause.FAIL) is State.FAILED


def test_nothing_happens_after_the_end() -> None:
    assert set(LIVE) | set(FINAL) == set(State)
    assert not [state for state, _ in TRANSITIONS if state in FINAL]


def test_every_state_is_reached_from_the_two_beginnings_and_leads_to_an_end() -> None:
    reached = {State.QUEUED, State.GENERATION_QUEUED}
    for _ in State:
        reached |= {after for (state, _), after in TRANSITIONS.items() if state in reached}
    assert reached == set(State)
    ending = set(FINAL)
    for _ in State:
        ending |= {state for (state, _), after in TRANSITIONS.items() if after in ending}
    assert ending == set(State)


def test_the_states_of_the_semantics_page_follow_each_other() -> None:
    state = State.QUEUED
    for cause, expected in (
        (Cause.START, State.CONTEXT_RUNNING),
        (Cause.CONTEXT_ENDS, State.CONTEXT_DONE),
        (Cause.ROUTE_GENERATION, State.GENERATION_QUEUED),
        (Cause.PULL, State.KV_IN_FLIGHT),
        (Cause.KV_ARRIVES, State.KV_READY),
        (Cause.JOIN, State.GENERATION_RUNNING),
        (Cause.FINISH, State.DONE),
    ):
        state = advance(state, cause)
        assert state is expected


def test_the_diagram_shows_every_edge_of_the_table() -> None:
    diagram = mermaid()
    for (state, cause), after in TRANSITIONS.items():
        if cause not in (Cause.CANCEL, Cause.FAIL):
            label = cause.name.lower().replace("_", " ")
            assert f"{state.name} --> {after.name}: {label}" in diagram


@pytest.mark.parametrize(("prompt", "most"), [(1, 1), (7, 1), (100, 32)])
def test_the_core_and_policies_count_the_kv_of_a_request_alike(prompt: int, most: int) -> None:
    request = Request(0, prompt, most)
    assert total_kv_tokens(request) == request.total_kv_tokens == prompt + most - 1
