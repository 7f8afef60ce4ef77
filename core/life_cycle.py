"""The life cycle of a request, as one table: in which state what may happen, and where it leads.

The same states serve the orchestrator (which sees a request's whole life, but not its KV in flight) and an executor
(which sees one visit). `docs/architecture.md` draws its diagram from this table.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from .errors import LifeCycleError


class State(Enum):
    QUEUED = "queued"
    CONTEXT_RUNNING = "context running"
    CONTEXT_DONE = "context done"  # first token out, KV held
    GENERATION_QUEUED = "generation queued"
    KV_IN_FLIGHT = "KV in flight"
    KV_EARLY = "KV early"  # all of it here, but the first token of a context phase that was bound early is not
    KV_READY = "KV ready"  # all of it here, waiting for a place in the decode batch
    GENERATION_RUNNING = "generation running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a Python call on a hot path


class Cause(Enum):
    START = "its first chunk is scheduled"
    CONTEXT_ENDS = "its prompt is computed and the generation phase is another visit"
    GENERATE_HERE = "its prompt is computed and it goes on here"
    ROUTE_GENERATION = "a generation executor is chosen"
    PULL = "its blocks are reserved and its KV is asked for"
    KV_ARRIVES = "every rank has its part of the KV"
    KV_COMES_FIRST = "every rank has its part of the KV, and the first token is still to come"
    FIRST_TOKEN = "its context phase is done, and the first token is here"
    JOIN = "it enters the decode batch"
    MOVE = "its KV is held for another executor, where it goes on"
    PREEMPT = "its blocks are taken away; it will be recomputed"
    RETRY = "executor or KV were lost; it is run again from its prompt"
    FINISH = "its last token is out, or its held KV has been read"
    CANCEL = "its user gave it up"
    FAIL = "it cannot go on"

    __hash__ = object.__hash__


_S, _C = State, Cause
LIVE: Final[tuple[State, ...]] = (
    _S.QUEUED,
    _S.CONTEXT_RUNNING,
    _S.CONTEXT_DONE,
    _S.GENERATION_QUEUED,
    _S.KV_IN_FLIGHT,
    _S.KV_EARLY,
    _S.KV_READY,
    _S.GENERATION_RUNNING,
)
FINAL: Final[tuple[State, ...]] = (_S.DONE, _S.CANCELLED, _S.FAILED)

TRANSITIONS: Final[dict[tuple[State, Cause], State]] = {
    (_S.QUEUED, _C.START): _S.CONTEXT_RUNNING,
    (_S.CONTEXT_RUNNING, _C.CONTEXT_ENDS): _S.CONTEXT_DONE,
    (_S.CONTEXT_RUNNING, _C.GENERATE_HERE): _S.GENERATION_RUNNING,
    (_S.CONTEXT_RUNNING, _C.FINISH): _S.DONE,  # a stop token or max_tokens 1: there is no generation phase
    (_S.CONTEXT_RUNNING, _C.PREEMPT): _S.QUEUED,
    (_S.CONTEXT_DONE, _C.ROUTE_GENERATION): _S.GENERATION_QUEUED,
    (_S.CONTEXT_DONE, _C.FINISH): _S.DONE,
    (_S.GENERATION_QUEUED, _C.PULL): _S.KV_IN_FLIGHT,
    (_S.GENERATION_QUEUED, _C.FINISH): _S.DONE,  # as the orchestrator sees it
    (_S.KV_IN_FLIGHT, _C.KV_ARRIVES): _S.KV_READY,
    (_S.KV_IN_FLIGHT, _C.KV_COMES_FIRST): _S.KV_EARLY,
    (_S.KV_EARLY, _C.FIRST_TOKEN): _S.KV_READY,
    (_S.KV_READY, _C.JOIN): _S.GENERATION_RUNNING,
    (_S.GENERATION_RUNNING, _C.FINISH): _S.DONE,
    (_S.GENERATION_RUNNING, _C.PREEMPT): _S.QUEUED,
    (_S.GENERATION_RUNNING, _C.MOVE): _S.CONTEXT_DONE,
    (_S.GENERATION_QUEUED, _C.MOVE): _S.CONTEXT_DONE,  # as the orchestrator sees it
    (_S.CONTEXT_RUNNING, _C.MOVE): _S.CONTEXT_DONE,  # likewise, of one that a mixed executor serves
    (_S.CONTEXT_RUNNING, _C.RETRY): _S.QUEUED,
    (_S.GENERATION_QUEUED, _C.RETRY): _S.QUEUED,
    (_S.GENERATION_RUNNING, _C.RETRY): _S.QUEUED,
    **{(state, _C.CANCEL): _S.CANCELLED for state in LIVE},
    **{(state, _C.FAIL): _S.FAILED for state in LIVE},
}

_AFTER: Final[dict[State, dict[Cause, State]]] = {state: {} for state in State}  # the same, to look up
for (_state, _cause), _after in TRANSITIONS.items():
    _AFTER[_state][_cause] = _after


def advance(state: State, cause: Cause) -> State:
    """The state after `cause`; LifeCycleError, which names what was allowed, if it cannot happen in `state`."""
    after = _AFTER[state].get(cause)
    if after is None:
        allowed = ", ".join(c.name for (s, c) in TRANSITIONS if s is state) or "nothing"
        raise LifeCycleError(f"{cause.name} in state {state.value!r}; allowed there: {allowed}")
    return after


def mermaid() -> str:
    """The table as a Mermaid state diagram; the edges that every live state has are drawn once, from all of them."""
    everywhere = (_C.CANCEL, _C.FAIL)
    lines = ["stateDiagram-v2"]
    lines += [f"    {state.name}: {state.value}" for state in State]
    lines.append(f"    [*] --> {_S.QUEUED.name}")
    lines.append(f"    [*] --> {_S.GENERATION_QUEUED.name}")
    for (state, cause), after in TRANSITIONS.items():
        if cause not in everywhere:
            lines.append(f"    {state.name} --> {after.name}: {cause.name.lower().replace('_', ' ')}")
    for cause in everywhere:
        lines.append(f"    ANY_LIVE_STATE --> {TRANSITIONS[_S.QUEUED, cause].name}: {cause.name.lower()}")
    lines += [f"    {state.name} --> [*]" for state in FINAL]
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())
