"""Triton's interpreter without its look through the whole language at each call of a function inside a kernel.

A kernel that is run has the language's functions replaced by interpreted ones, and put back at its end. A function that it
calls has them replaced again (Triton 3.9), which finds nothing to replace and takes a third of the time of these tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def make_quick() -> None:
    """For this process, and those forked from it."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang

    def replace_once(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()  # of no changes: there is nothing to put back
        return replace(function)

    interpreter._patch_lang = replace_once
