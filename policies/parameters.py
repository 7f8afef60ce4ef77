"""What policies check their parameters with, and expressions that are true of numbers and of arrays."""

from __future__ import annotations

from math import inf
from typing import Any, Final

import numpy as np

from .interfaces import PolicyError

LARGEST: Final = 1e6  # of a number that is multiplied with others: an infinite one would make them all equal, or none


def number(policy: str, name: str, value: Any, least: float = 0.0, most: float = inf) -> float:
    """`value` as a number between `least` and `most`; PolicyError says what is allowed."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        upper = "" if most == inf else f" and at most {most:g}"
        raise PolicyError(f"{policy}: {name} must be a number of at least {least:g}{upper}, got {value!r}")
    return float(value)


def whole(policy: str, name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{policy}: {name} must be a whole number of at least {least}, got {value!r}")
    return value


def flag(policy: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise PolicyError(f"{policy}: {name} must be true or false, got {value!r}")
    return value


def one_of(policy: str, name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise PolicyError(f"{policy}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def where(condition: Any, then: Any, otherwise: Any) -> Any:
    """`np.where`, and the same of plain numbers."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, then, otherwise)
    return then if condition else otherwise


def at_least(value: Any, least: Any) -> Any:
    """The greater of both, of arrays and of plain numbers."""
    if isinstance(value, np.ndarray):
        return np.maximum(value, least)
    return max(value, least)
