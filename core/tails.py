"""Committed plans: all their steps are launched, not all have run, and the next plan may have been made already.

What such a plan's steps touch stays untouched by others until it has ended: a sequence that leaves the decode batch with
it keeps its blocks, and is answered, only then. Where the world ends a sequence in a step that was committed before, the
plans made meanwhile still name it; what they compute for it is surplus.
"""

from __future__ import annotations

from ..policies.vocabulary import FinishReason
from .commands import RunSteps
from .epochs import Epoch
from .visit import Visit, serial_of


class Stop:
    """Where the world ended a sequence, in the counts of the executor's decode steps and of all its steps."""

    __slots__ = ("decode_step", "last_step", "reason")

    def __init__(self, reason: FinishReason, decode_step: int, last_step: int) -> None:
        self.reason = reason
        self.decode_step = decode_step
        self.last_step = last_step


class Ended:
    """A sequence whose last token came in a plan. `last_step` is a running count of the executor's steps."""

    __slots__ = ("last_step", "reason", "visit")

    def __init__(self, visit: Visit, reason: FinishReason, last_step: int) -> None:
        self.visit = visit
        self.reason = reason
        self.last_step = last_step


class Prefilled:
    """A prompt whose last chunk was computed; `stopped` if the world ended the sequence at the token it gave."""

    __slots__ = ("stopped", "visit")

    def __init__(self, visit: Visit, stopped: bool) -> None:
        self.visit = visit
        self.stopped = stopped


class Over:
    """What the end of a plan brings about. `given_up`: cancelled or failed, and from now on nothing touches their blocks."""

    __slots__ = ("ended", "given_up", "prefilled", "run")

    def __init__(self, run: RunSteps, ended: list[Ended], prefilled: list[Prefilled], given_up: list[Visit]) -> None:
        self.run = run
        self.ended = ended
        self.prefilled = prefilled
        self.given_up = given_up


class Tail:
    """One committed plan. The counts are those after its last step, `num_steps` within the epoch.

    `leaving`: who is out of the decode batch with it, by id; `given_up` those of them that did not end by themselves.
    """

    __slots__ = ("decode_step", "epoch", "given_up", "last_step", "leaving", "num_steps", "run")

    def __init__(self, run: RunSteps, epoch: Epoch, num_steps: int, decode_step: int, last_step: int) -> None:
        self.run = run
        self.epoch = epoch
        self.num_steps = num_steps
        self.decode_step = decode_step
        self.last_step = last_step
        self.leaving: dict[int, Visit] = {}
        self.given_up: set[int] = set()

    def take(self, visit: Visit, has_ended: bool) -> None:
        """It has left the batch; its own counts are as of the plan's last step."""
        visit.left_at = self.last_step
        self.leaving[visit.id] = visit
        if not has_ended:
            self.given_up.add(visit.id)

    def over(self) -> Over:
        """The plan has ended. A stop found meanwhile goes before whatever else was known of a sequence."""
        ended: list[Ended] = []
        given_up: list[Visit] = []
        if not self.leaving:
            return Over(self.run, ended, [], given_up)
        leaving = list(self.leaving.values())
        if len(leaving) > 1:
            leaving.sort(key=serial_of)
        for visit in leaving:
            if visit.id in self.given_up and visit.stop is None:
                given_up.append(visit)
            else:
                ended.append(ended_at(visit, self.decode_step, self.last_step))
        return Over(self.run, ended, [], given_up)

    def fail(self, error: str) -> None:
        """What it computes for those in it is worth nothing."""
        for visit in self.leaving.values():
            visit.stop = None
            visit.doom = visit.doom or error
        self.given_up.update(self.leaving)


def ended_at(visit: Visit, decode_step: int, last_step: int) -> Ended:
    """How a visit ended that left the batch after those steps: tokens of steps launched after its stop are surplus."""
    stop = visit.stop
    if stop is None:
        return Ended(visit, FinishReason.LENGTH, last_step)
    visit.num_generated -= decode_step - stop.decode_step
    return Ended(visit, stop.reason, stop.last_step)
