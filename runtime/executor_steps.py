"""The open span of an executor: how far it is granted, how far it has run, and when it ends. Decides nothing.

The rule of grants is `core.grants.granted_through`, which the simulator obeys too: a span that is to end, because its
core asked for it or because a sequence stopped, ends with the last step granted by then.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..core.commands import Joined, RunSteps
from ..core.events import StepsDone, Stopped, stops_in_order
from ..core.grants import granted_through


class OpenSpan:
    """One plan from its RunSteps to its StepsDone. Steps are counted within the epoch."""

    def __init__(self, run: RunSteps, steps_per_grant: int, depth: int) -> None:
        self.run = run
        self.done = run.first_step - 1
        self.granted = run.first_step - 1
        self.stopping = False
        self._steps_per_grant = steps_per_grant
        self._depth = depth
        self._stopped: list[Stopped] = []
        self._first_tokens: list[tuple[int, int]] = []
        self.last_chunks = frozenset(
            chunk.request_id for chunk in run.chunks if chunk.is_last
        )  # they yield first tokens

    def stop(self) -> None:
        """No further grants."""
        self.stopping = True

    def grants(self) -> Iterator[tuple[int, int]]:
        """The grants that are due now, as (first step, last step); each is given by being taken."""
        if self.stopping:
            return
        run = self.run
        through = granted_through(self.done, run.first_step, run.last_step, self._steps_per_grant, self._depth)
        while self.granted < through:
            first = self.granted + 1
            self.granted = min(through, self.granted + self._steps_per_grant)
            yield first, self.granted

    def report(self, step: int, tokens: tuple[tuple[int, int], ...], ended: list[int]) -> None:
        """Step `step` has run; the sequences in `ended` end with it."""
        self.done = step
        self._stopped += [Stopped(request_id, step) for request_id in ended]
        if ended:
            self.stop()
        if self.last_chunks:
            self._first_tokens += [given for given in tokens if given[0] in self.last_chunks]

    @property
    def is_over(self) -> bool:
        """Everything granted has run. To be asked after `grants`."""
        return self.done >= self.granted

    def result(self, error: str | None = None) -> StepsDone:
        run = self.run
        return StepsDone(
            run.plan, run.epoch, self.done, stops_in_order(self._stopped), tuple(self._first_tokens), error
        )


def merged(refused: RunSteps, run: RunSteps) -> RunSteps:
    """`run` with the delta of `refused`, a plan before it that no engine applied, put in front of its own."""
    joined: dict[int, Joined] = {item.request_id: item for item in refused.joined}
    left = dict.fromkeys(refused.left)
    for request_id in run.left:
        if joined.pop(request_id, None) is None:
            left[request_id] = None
    joined.update((item.request_id, item) for item in run.joined)
    leaving = set(run.left)
    appended = [item for item in refused.appended if item[0] not in leaving] + list(run.appended)
    return RunSteps(
        run.plan,
        run.epoch,
        run.first_step,
        run.last_step,
        tuple(left),
        tuple(joined.values()),
        run.chunks,
        tuple(appended),
        run.num_decodes,
        run.num_kv_tokens,
        run.decodes,
    )
