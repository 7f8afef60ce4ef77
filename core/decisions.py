"""A policy's answer as it is recorded: what was chosen, and how old the view was on which it was chosen."""

from __future__ import annotations

from typing import Any, Final

from ..policies.views import ExecutorPool
from ..policies.vocabulary import Hold, Reject, Route, RouteMixed
from .tables import DecisionRow

NO_REQUEST: Final = -1
_ANSWERS: Final[dict[type, str]] = {Route: "route", RouteMixed: "mixed", Hold: "hold", Reject: "reject"}


def decision_row(request_id: int, stage: str, answer: Any, pool: ExecutorPool | None, now: int) -> DecisionRow:
    """`stage` is admission, context, generation or migration; `pool` the candidates, None where there were none to choose from.

    Report versions are listed for small pools only; a large one gives the age of its oldest report.
    """
    executor: int | None = None
    generation: int | None = None
    if isinstance(answer, Route):
        executor = answer.context if stage == "context" else answer.generation
        generation = answer.generation if stage == "context" else None
    elif isinstance(answer, RouteMixed):
        executor = answer.executor
    versions: tuple[int, ...] = ()
    age = None
    if pool is not None and len(pool):
        age = now - pool.oldest_report()
        if not pool.vectorised:
            versions = pool.report_versions()
    return DecisionRow(
        request_id,
        stage,
        _ANSWERS.get(type(answer), "?"),
        None if executor is None else int(executor),
        None if generation is None else int(generation),
        answer.reason if isinstance(answer, Reject) else None,
        now,
        versions,
        age,
    )


def role_row(executor: int, answer: str, reason: str | None, now: int) -> DecisionRow:
    """A change of an executor's role: `answer` is the new role, `refused`, or `drained` once nothing foreign is left."""
    return DecisionRow(NO_REQUEST, "role", answer, executor, None, reason, now, (), None)
