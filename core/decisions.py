"""A policy's answer as it is recorded: what was chosen, and how old the view was on which it was chosen."""

from __future__ import annotations

from typing import Any, Final

from ..policies.views import PLACES, ExecutorPool
from ..policies.vocabulary import Hold, Reject, Route, RouteMixed
from .tables import DecisionRow

NO_REQUEST: Final = -1
_NUM_REPORTS: Final = PLACES["num_reports"]
_RECEIVED_AT: Final = PLACES["received_at"]
_ANSWERS: Final[dict[type, str]] = {Route: "route", RouteMixed: "mixed", Hold: "hold", Reject: "reject"}


def decision_row(request_id: int, stage: str, answer: Any, pool: ExecutorPool | None, now: int) -> DecisionRow:
    """`stage` is admission, context, generation or migration; `pool` the candidates, None where there were none to choose from.

    Report versions are listed for small pools only; a large one gives the age of its oldest report.
    """
    executor: int | None = None
    generation: int | None = None
    kind = _ANSWERS.get(type(answer)) or _kind_of(answer)
    if kind == "route":
        executor = answer.context if stage == "context" else answer.generation
        generation = answer.generation if stage == "context" else None
    elif kind == "mixed":
        executor = answer.executor
    versions: tuple[int, ...] = ()
    age = None
    if pool is not None and pool.vectorised:
        age = now - pool.oldest_report()
    elif pool is not None and pool.rows:
        rows = pool.rows
        versions = tuple([row[_NUM_REPORTS] for row in rows])
        oldest: int = rows[0][_RECEIVED_AT]
        for row in rows:
            received: int = row[_RECEIVED_AT]
            if received < oldest:
                oldest = received
        age = now - oldest
    return DecisionRow(
        request_id,
        stage,
        kind,
        None if executor is None else int(executor),
        None if generation is None else int(generation),
        answer.reason if kind == "reject" else None,
        now,
        versions,
        age,
    )


def role_row(executor: int, answer: str, reason: str | None, now: int) -> DecisionRow:
    """A change of an executor's role: `answer` is the new role, `refused`, or `drained` once nothing foreign is left."""
    return DecisionRow(NO_REQUEST, "role", answer, executor, None, reason, now, (), None)


def _kind_of(answer: Any) -> str:
    """Of one whose class a policy has derived from an answer's; a question mark for what is none."""
    return next((kind for answers, kind in _ANSWERS.items() if isinstance(answer, answers)), "?")
