"""The user of a simulated cluster, without a clock: says what is due. The load of real executors
(`runtime/orchestrator_load.py`) sends the same requests by the same rules, on a clock and a thread of its own.

A phase begins when the last request of the one before it was sent, without draining. In a closed loop the requests of
earlier phases that are still out count as sent, so that a hand-over makes no burst.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .workload import PlannedPhase, PlannedRequest, Workload


class LoadSource:
    """Call `take(now)` at the start, at `next_send()` and after `ended()`; times in picoseconds of one clock.

    What `take` returns has `offset` set to the intended send on that clock. The requests with which a measured closed
    loop fills an idle cluster all at once come back `excluded`, if there are more to follow.
    """

    def __init__(self, workload: Workload, start: int = 0) -> None:
        self.num_requests = workload.num_requests
        self.num_sent = 0
        self.num_ended = 0
        self.num_cut = 0  # outputs longer than max_tokens, so far
        self._phases: Iterator[PlannedPhase] = workload.phases()
        self._began = start
        self._phase: PlannedPhase | None = None
        self._next: PlannedRequest | None = None
        self._requests: Iterator[PlannedRequest] = iter(())
        self._advance(start)

    @property
    def finished(self) -> bool:
        """Everything was sent and has ended."""
        return self._next is None and self.num_ended == self.num_sent

    def next_send(self) -> int | None:
        """The next intended send of an open loop; None while a closed loop waits for an end, or nothing is left."""
        if self._next is None or self._phase is None:
            return None
        if self._next.offset is not None:
            return self._began + self._next.offset
        return self._began if self.num_sent - self.num_ended < (self._phase.concurrency or 1) else None

    def ended(self) -> None:
        """One request was answered for good, well or badly."""
        self.num_ended += 1

    def take(self, now: int) -> list[PlannedRequest]:
        """All requests due at or before `now`, in order of their intended send."""
        due: list[PlannedRequest] = []
        while self._next is not None and self._phase is not None:
            request, phase = self._next, self._phase
            if request.offset is not None:
                at = self._began + request.offset
                if at > now:
                    break
                excluded = request.excluded
            else:
                concurrency = phase.concurrency or 1
                if self.num_sent - self.num_ended >= concurrency:
                    break
                at = now
                burst = now == self._began and phase.num_requests > concurrency
                excluded = request.excluded or burst
            if request.offset != at or request.excluded != excluded:
                request = msgspec.structs.replace(request, offset=at, excluded=excluded)
            due.append(request)
            self.num_sent += 1
            self.num_cut += request.output_cut
            self._advance(at)
        return due

    def _advance(self, now: int) -> None:
        """Move to the next planned request; the next phase begins at `now`, the last send of the one before."""
        self._next = next(self._requests, None)
        while self._next is None:
            phase = next(self._phases, None)
            if phase is None:
                self._phase = None
                return
            self._phase = phase
            self._began = now
            self._requests = phase.requests
            self._next = next(self._requests, None)
