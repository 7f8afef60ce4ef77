"""One row of a benchmark's table: what was measured, beside the floor or ceiling that it is judged by."""

from __future__ import annotations

from msgspec import Struct


class BenchRow(Struct, frozen=True):
    """`ceiling`: floor or ceiling in the same unit; `ratio` as the goal is stated; `met` None where there is no goal."""

    name: str
    measured: float
    ceiling: float | None = None
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None
    unit: str = ""
    note: str = ""
