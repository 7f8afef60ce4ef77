"""The load of a run on real executors: what is sent when, on the clock of rank 0, at absolute instants.

A phase begins when the last request of the one before it was sent, without draining. In a closed loop the requests of
earlier phases that are still out count as sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from ..core.commands import Deliver
from ..policies.vocabulary import ContextPhaseParams, FinishReason, Request
from .clock import Clock
from .executor_inbox import Submitted

_SPIN_S = 0.0002  # shorter waits than this are not worth a sleep


class PlannedSubmission(Struct, frozen=True, array_like=True):
    """One request to be sent. `offset`: intended send in picoseconds since its phase began, None in a closed loop.

    `output_length`: where the world ends the sequence; None leaves that to its end id and `max_tokens`.
    """

    request: Request
    offset: int | None = None
    output_length: int | None = None


class LoadPhase(Struct, frozen=True):
    """`concurrency` None is an open loop: every submission has an offset."""

    submissions: tuple[PlannedSubmission, ...]
    concurrency: int | None = None
    name: str = ""


class SendRow(Struct, frozen=True, array_like=True):
    """What became of a submission. Instants in picoseconds of the run's clock; None where it never came to it.

    `in_burst`: one of those with which a closed loop filled the cluster at its phase's first instant.
    """

    request_id: int
    phase: int
    intended_ps: int
    actual_ps: int
    in_burst: bool
    first_token_ps: int | None = None
    end_ps: int | None = None
    error: str | None = None
    token_ids: tuple[int, ...] = ()


class StalledError(RuntimeError):
    """Everything was sent, nothing is under way, and requests are left."""


class LoadDriver:
    """Sends the phases and waits for the last answer. It is the Listener of the orchestrator's driver."""

    def __init__(self, phases: tuple[LoadPhase, ...], keep_tokens: bool = True) -> None:
        self._phases = phases
        self._keep_tokens = keep_tokens
        self._changed = threading.Condition()
        self._rows: dict[int, SendRow] = {}
        self._tokens: dict[int, list[int]] = {}
        self._num_ended = 0
        self._broken: str | None = None
        self._filling = True  # a closed loop that has not yet waited: what it sends is due at its phase's beginning
        self._num_stalled: Callable[[], int] | None = None
        self.num_requests = sum(len(phase.submissions) for phase in phases)

    # ---- what is told ------------------------------------------------------------------------------------------------

    def tokens(self, request_id: int, first_index: int, token_ids: tuple[int, ...]) -> None:
        known = self._tokens.get(request_id)
        if known is not None and first_index <= len(known):
            known += token_ids[len(known) - first_index :]

    def ended(
        self, request_id: int, reason: FinishReason | None, error: str | None, params: ContextPhaseParams | None
    ) -> None:
        with self._changed:
            self._num_ended += 1
            self._changed.notify_all()

    def broken(self, error: str) -> None:
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def delivered(self, deliver: Deliver, now: int) -> None:
        """To be called with each Deliver of the core."""
        with self._changed:
            row = self._rows.get(deliver.request_id)
            if row is None:
                return
            if deliver.finish_reason is None:
                row = replace(row, first_token_ps=now)
            else:
                row = replace(row, end_ps=now, error=deliver.error)
            self._rows[deliver.request_id] = row

    # ---- sending -----------------------------------------------------------------------------------------------------

    def run(
        self,
        clock: Clock,
        submit: Callable[[Submitted], None],
        progress: Callable[[int, int], None] | None = None,
        num_stalled: Callable[[], int] | None = None,
    ) -> list[SendRow]:
        """Send everything and wait for every end; the rows in order of sending. Returns early if the cluster breaks.

        `num_stalled`: requests that can never end, asked where the load itself can only wait: StalledError if any.
        """
        self._num_stalled = num_stalled
        began = clock.read()
        for number, phase in enumerate(self._phases):
            at = began
            self._filling = True
            for submission in phase.submissions:
                at = self._wait_for_turn(phase, submission, clock, began, progress)
                if self._broken is not None:
                    return self.rows()
                actual = clock.read()
                request = replace(submission.request, arrival=at)
                in_burst = phase.concurrency is not None and at == began and len(phase.submissions) > phase.concurrency
                with self._changed:
                    self._rows[request.id] = SendRow(request.id, number, at, actual, in_burst)
                    if self._keep_tokens:
                        self._tokens[request.id] = []
                submit(Submitted(request, submission.output_length))
            began = at
        with self._changed:
            while self._num_ended < len(self._rows) and self._broken is None:
                self._changed.wait(0.5)
                self._check_stalled()
                if progress is not None:
                    progress(self._num_ended, self.num_requests)
        return self.rows()

    def rows(self) -> list[SendRow]:
        with self._changed:
            return [
                replace(row, token_ids=tuple(self._tokens.get(request_id, ())))
                for request_id, row in self._rows.items()
            ]

    def _check_stalled(self) -> None:
        held = 0 if self._num_stalled is None else self._num_stalled()
        if held and self._num_ended < len(self._rows) and self._broken is None:
            what = "1 request is" if held == 1 else f"{held} requests are"
            raise StalledError(f"{what} held by a policy that never lets {'it' if held == 1 else 'them'} go")

    def _wait_for_turn(
        self,
        phase: LoadPhase,
        submission: PlannedSubmission,
        clock: Clock,
        began: int,
        progress: Callable[[int, int], None] | None,
    ) -> int:
        """Wait until this submission is due; its intended instant."""
        if submission.offset is not None:
            at = began + submission.offset
            while (left := clock.seconds_until(at)) > 0 and self._broken is None:
                if progress is not None:
                    progress(self._num_ended, self.num_requests)
                time.sleep(min(left, 0.5) if left > _SPIN_S else 0)
            return at
        limit = phase.concurrency or 1
        with self._changed:
            while len(self._rows) - self._num_ended >= limit and self._broken is None:
                self._filling = False  # from here on a request is due when another has ended
                self._changed.wait(0.5)
                self._check_stalled()
                if progress is not None:
                    progress(self._num_ended, self.num_requests)
        return began if self._filling else clock.read()
