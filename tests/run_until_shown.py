"""Runs of real processes whose case the machine's load may keep from coming up. Helper of the tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")
AT_MOST = 4


def run_until_shown(run: Callable[[], R], shown: Callable[[R], object], what: str) -> R:
    """The first result of `run()` of which `shown` is true; `what` is said where that was none of a few.

    What is repeated is only what the machine's load decides: whether a plan was queued behind running steps, whether a
    request still ran when it was to move, whether a question came before its answer. `shown` asks for that alone. Whatever
    must be true of every run is asserted in `run`, whose failure is a failure at once, or of the result.
    """
    for _ in range(AT_MOST):
        result = run()
        if shown(result):
            return result
    raise AssertionError(
        f"in none of {AT_MOST} runs {what}: the machine is too busy for this test, or this never happens"
    )
