"""Where the time of a transfer goes: the marks that its two ends left, on the one clock of their host."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

Marks = Sequence[tuple[str, int]]  # (what happened, monotonic ns), of one end

_DATA_BEGINS: Final = ("launching", "packing")  # the first, or last, piece of work of either end on pages
_DATA_ENDS: Final = "whole"  # the reader knows that its pages are all written


class Step(Struct, frozen=True):
    """Something that happens at one end of a transfer, `seconds` after the transfer could begin; a median."""

    who: str
    what: str
    seconds: float


class EndPair(Struct, frozen=True):
    """The marks of one transfer."""

    sender: tuple[tuple[str, int], ...]
    reader: tuple[tuple[str, int], ...]

    @property
    def began(self) -> int:
        """When both ends had been called."""
        return max(_first(self.sender, "called"), _first(self.reader, "called"))

    @property
    def whole_seconds(self) -> float:
        """From then to the outcome at the reader."""
        return (_last(self.reader, "told") - self.began) / 1e9

    @property
    def data_seconds(self) -> float:
        """From the first work on pages, at whichever end, to the last byte seen in place."""
        return (_last(self.reader, _DATA_ENDS) - min(self._data_begins())) / 1e9

    @property
    def last_data_seconds(self) -> float:
        """The same from the last such piece of work, where there were many."""
        return (_last(self.reader, _DATA_ENDS) - max(self._data_begins())) / 1e9

    def _data_begins(self) -> list[int]:
        began = self.began  # what was packed before counts from then
        return [max(at, began) for what, at in (*self.sender, *self.reader) if what in _DATA_BEGINS]


def steps_of(pairs: Iterable[EndPair]) -> tuple[Step, ...]:
    """The first time of each mark, medians over transfers of one kind, in their order; what came before is left out.

    Of what happened to several segments also the last time.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        for who, marks in (("sender", pair.sender), ("reader", pair.reader)):
            for what in dict.fromkeys(name for name, _ in marks):
                first, last = _first(marks, what), _last(marks, what)
                found.setdefault((who, what), []).append((first - pair.began) / 1e9)
                if last > first:
                    found.setdefault((who, f"{what}, the last"), []).append((last - pair.began) / 1e9)
    steps = [Step(who, what, statistics.median(seconds)) for (who, what), seconds in found.items()]
    return tuple(sorted((step for step in steps if step.seconds >= 0), key=lambda step: step.seconds))


def _first(marks: Marks, what: str) -> int:
    return min(at for name, at in marks if name == what)


def _last(marks: Marks, what: str) -> int:
    return max(at for name, at in marks if name == what)
