"""The queue order of a core: what it is asked, and whether it wants to be told."""

from __future__ import annotations

from typing import Any

from ..policies.interfaces import QueueOrder
from ..policies.vocabulary import PolicyError, Request


def key_in(order: QueueOrder, request: Request, now: int) -> Any:
    """The key of `request`; PolicyError if it is none that keys can be put in order by (NaN, None)."""
    key = order.key(request, now)
    if type(key) is not int:
        try:
            is_ordered = bool(key <= key)  # false for NaN
        except (TypeError, ValueError):
            is_ordered = False
        if not is_ordered:
            raise PolicyError(f"{type(order).__name__} gave the key {key!r}, which has no place in an order")
    return key


def hears_of_served(order: QueueOrder) -> bool:
    """Whether `on_served` does anything there; nobody else needs to be told."""
    return type(order).on_served is not QueueOrder.on_served
