"""Defects of a core that it finds itself."""

from __future__ import annotations


class BlockError(RuntimeError):
    """A request for more blocks than are free, or an owner that has none: a defect of the caller."""


class LifeCycleError(RuntimeError):
    """Something happened to a request that cannot happen in its state: a defect of the core, never of its user."""
