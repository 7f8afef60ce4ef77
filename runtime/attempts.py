"""Whose the ids are that executors know requests by: those of a user's request are new with each attempt and phase."""

from __future__ import annotations

from ..core.commands import Dispatched
from ..policies.vocabulary import RequestType


class Attempts:
    """Of users' requests that go through the core; `output_lengths` are scripted, by user's request."""

    def __init__(self) -> None:
        self.output_lengths: dict[int, int] = {}
        self._owner: dict[int, int] = {}  # executor-level id: user's request
        self._attempt: dict[int, list[int]] = {}  # user's request: executor-level ids of its present attempt

    def owner_of(self, request_id: int) -> int | None:
        """The user's request; None for an id from before a retry."""
        return self._owner.get(request_id)

    def dispatched(self, command: Dispatched) -> None:
        """A phase was sent off: the ids of an attempt before this one are nobody's any more."""
        request = command.executor_request
        attempt = self._attempt.setdefault(command.request_id, [])
        params = request.context_phase_params
        if request.request_type is not RequestType.GENERATION_ONLY or params is None or params.req_id not in attempt:
            for old in attempt:
                self._owner.pop(old, None)
            attempt.clear()
        attempt.append(request.id)
        self._owner[request.id] = command.request_id

    def ended(self, request_id: int) -> None:
        for executor_request in self._attempt.pop(request_id, ()):
            self._owner.pop(executor_request, None)
        self.output_lengths.pop(request_id, None)
