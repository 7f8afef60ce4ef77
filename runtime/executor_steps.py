"""The spans of an executor that are under way: how far each is granted, how far it has run, and when it ends.

Decides nothing. The rules are those of `core.grants`, which the simulator obeys too: a span that is to end, because its
core asked for it or because a sequence stopped, ends with the last step granted by then; and where plans are made ahead,
a span whose grants leave the window room is committed before it has ended, and the next one queues behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..core.commands import Joined, RunSteps
from ..core.events import StepsCommitted, StepsDone, Stopped, stops_in_order
from ..core.grants import Launch, granted_through, grants_out


class Span:
    """One plan from its RunSteps to its StepsDone. Steps are counted within the epoch."""

    def __init__(self, run: RunSteps, launch: Launch) -> None:
        self.run = run
        self.done = run.first_step - 1
        self.granted = run.first_step - 1
        self.is_stopping = False
        self.is_committed = False
        self.error: str | None = None
        self._launch = launch
        self._stopped: list[Stopped] = []
        self._first_tokens: list[tuple[int, int]] = []
        self.block_hashes: list[tuple[int, tuple[int, ...]]] = []  # of sequences that have ended in it
        self.last_chunks = frozenset(
            chunk.request_id for chunk in run.chunks if chunk.is_last
        )  # they yield first tokens

    def stop(self) -> None:
        """No further grants."""
        self.is_stopping = True

    def grants(self, depth: int) -> Iterator[tuple[int, int]]:
        """The grants that are due now, as (first step, last step), where `depth` may be out; each is given by being taken."""
        if self.is_stopping or self.is_committed:
            return
        run, size = self.run, self._launch.steps_per_grant
        through = granted_through(self.done, run.first_step, run.last_step, size, depth)
        while self.granted < through:
            first = self.granted + 1
            self.granted = min(through, self.granted + size)
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
    def num_out(self) -> int:
        """Grants outstanding."""
        return grants_out(self.done, self.run.first_step, self.granted, self._launch.steps_per_grant)

    @property
    def needs_no_grants(self) -> bool:
        return self.is_stopping or self.granted >= self.run.last_step

    @property
    def is_over(self) -> bool:
        """Everything granted has run, or it has failed. To be asked after `grants`."""
        return self.error is not None or self.done >= self.granted

    def commit(self) -> StepsCommitted:
        """From now on nothing but time ends it."""
        self.is_committed = True
        told, self._stopped = stops_in_order(self._stopped), []
        return StepsCommitted(self.run.plan, self.run.epoch, self.granted, told)

    def result(self) -> StepsDone:
        run = self.run
        stopped = stops_in_order(self._stopped)
        names = tuple(sorted(self.block_hashes))
        return StepsDone(run.plan, run.epoch, self.done, stopped, tuple(self._first_tokens), self.error, names)


class Spans:
    """All spans under way, in order: committed ones, then at most one that is open."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._spans: deque[Span] = deque()

    @property
    def open(self) -> Span | None:
        """The span whose end is not certain."""
        return self._spans[-1] if self._spans and not self._spans[-1].is_committed else None

    def begin(self, run: RunSteps) -> Span:
        self._spans.append(Span(run, self._launch))
        return self._spans[-1]

    def of_plan(self, plan: int) -> Span | None:
        return next((span for span in self._spans if span.run.plan == plan), None)

    def is_followed(self, span: Span) -> bool:
        """Whether a later plan has been made."""
        return self._spans[-1] is not span

    def due(self) -> Iterator[tuple[Span, int, int]]:
        """The grants that are due now: (span, first step, last step)."""
        span = self.open
        if span is not None:
            before = sum(span.num_out for span in self._spans) - span.num_out
            for first, last in span.grants(self._launch.depth - before):
                yield span, first, last

    def pop_over(self) -> Span | None:
        """The first span, taken out, if it is over."""
        return self._spans.popleft() if self._spans and self._spans[0].is_over else None

    def to_commit(self) -> Span | None:
        """The open span, if it is to be committed now. To be asked after `due`."""
        span = self.open
        if span is None or not span.needs_no_grants or span.is_over:
            return None
        num_out = sum(span.num_out for span in self._spans)
        return span if self._launch.may_commit(bool(span.run.chunks), num_out) else None


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
        run.num_shared_kv,
    )
