"""What one executor still has to say or to do: the parts of its core add to it, and the end of an instant settles it."""

from __future__ import annotations

from typing import Final

from .commands import ExecutorCommand
from .events import Response

CANCELLED: Final = "cancelled"  # why a visit was given up, where that was asked for


class Agenda:
    """Shared by the parts of one executor's core."""

    __slots__ = ("has_news", "is_impatient", "must_plan", "out", "responses")

    def __init__(self) -> None:
        self.out: list[ExecutorCommand] = []  # commands the driver was not given yet
        self.responses: list[Response] = []  # answers of this instant
        self.has_news = False  # something has changed since the last report
        self.must_plan = False  # something has happened since the last planning pass
        self.is_impatient = False  # in this instant: waits for no reader elsewhere

    def emit(self, command: ExecutorCommand) -> None:
        self.out.append(command)

    def take(self) -> list[ExecutorCommand]:
        """The commands so far, in order; they are the driver's from now on."""
        out = self.out
        self.out = []
        return out
