"""Whose fault an exception is: finds the user's policy that raised it, and tells it in one line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ..policies.registry import KINDS

_PACKAGE: Final = str(__package__).rpartition(".")[0]
_USER_MODULE: Final = "disagg_user_policy_"  # as the registry names the modules that it makes from files
_KINDS: Final = tuple(KINDS.values())


def policy_failure(error: BaseException) -> str | None:
    """`policy Class (file:line): Type: text` if a policy that is not ours was running, otherwise None.

    The line is the innermost one of the policy's own module.
    """
    policy: type | None = None
    module: str | None = None
    frames = list(_frames(error))
    for frame, _ in frames:
        owner = frame.f_locals.get("self")
        name = str(frame.f_globals.get("__name__", ""))
        if isinstance(owner, _KINDS) and not _is_ours(type(owner).__module__):
            policy, module = type(owner), type(owner).__module__
        elif policy is None and name.startswith(_USER_MODULE):
            module = name
    if module is None:
        return None
    lines = [(f.f_code.co_filename, line) for f, line in frames if f.f_globals.get("__name__") == module]
    if lines:
        file, line = lines[-1]
        place = f"{Path(file).name}:{line}"
    else:  # our code tripped over what the policy gave it
        place = "" if policy is None else _file_of(policy)
    who = "policy" if policy is None else f"policy {policy.__name__}"
    text = " ".join(str(error).split())
    return f"{who} ({place}): {type(error).__name__}{': ' if text else ''}{text}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Frame and line, outermost first."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _is_ours(module: str) -> bool:
    return module == _PACKAGE or module.startswith(f"{_PACKAGE}.")


def _file_of(policy: Any) -> str:
    try:
        return Path(inspect.getfile(policy)).name
    except (OSError, TypeError):
        return str(policy.__module__)
