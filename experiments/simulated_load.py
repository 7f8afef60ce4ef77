"""The users of a simulated cluster: they send what the load source says is due, and count what comes back."""

from __future__ import annotations

import time
from typing import Final

from ..core.commands import Deliver
from ..policies.vocabulary import FinishReason
from ..simulator.calls import MESSAGE
from ..simulator.cluster import SimulatedCluster
from .cluster import profile_of
from .config import Experiment
from .config_workload import ConcurrencyPhase
from .load_source import LoadSource
from .planned import RequestForm, true_length
from .run_point import Progress
from .workload import PlannedRequest

_PROGRESS_EVERY: Final = 500


class TimeIsUpError(Exception):
    """The run took longer than it was given."""


class SimulatedLoad:
    """The users: sends what the load source says is due, and counts what comes back."""

    def __init__(
        self, source: LoadSource, config: Experiment, progress: Progress, timeout_s: float | None = None
    ) -> None:
        self.source = source
        self.planned: dict[int, PlannedRequest] = {}
        self.num_failed = 0
        self.first_error: str | None = None
        self.num_unservable = 0
        self._form = RequestForm(config)
        self._is_open = is_open_loop(config)
        self._progress = progress
        self._cluster: SimulatedCluster | None = None
        self._sending_at = -1
        profile = profile_of(config)
        self._dispatch_delay = 0 if profile is None else profile.dispatch_delay_ps  # intended send to the orchestrator
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def start(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._send(None)

    def _send(self, _: None) -> None:
        cluster = self._cluster
        if cluster is None:
            return
        now = cluster.now
        # in an open loop, whose sends depend on nothing, a request is looked at when it reaches the orchestrator
        behind = self._dispatch_delay if self._is_open else 0
        for planned in self.source.take(now - behind):
            self.planned[planned.id] = planned
            request, length = self._form.request_of(planned), true_length(planned)
            if self._dispatch_delay and not self._is_open:
                cluster.submit_at(now + self._dispatch_delay, request, length)
            else:
                cluster.submit(request, length)
        following = self.source.next_send()
        # a closed loop is asked again at each end; an open one needs one call per distinct instant
        if following is not None and following + behind > now and following != self._sending_at:
            self._sending_at = following
            cluster.env.calendar.call_at(following + behind, MESSAGE, self._send, None)

    def delivered(self, deliver: Deliver) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeIsUpError
        if deliver.finish_reason is None:
            return
        self.source.ended()
        if deliver.finish_reason in (FinishReason.ERROR, FinishReason.REJECTED):
            self.num_failed += 1
            self.first_error = self.first_error or deliver.error
        if self.source.num_ended % _PROGRESS_EVERY == 0:
            self._progress.update(self.source.num_ended, self.source.num_requests)
        cluster = self._cluster
        following = self.source.next_send()
        if cluster is not None and not self._is_open and following is not None and following <= cluster.now:
            # the user sends its next request as soon as it has read this answer, after this instant's messages
            cluster.env.calendar.call_at(cluster.now + 1, MESSAGE, self._send, None)


def is_open_loop(config: Experiment) -> bool:
    """Whether no send waits for an answer."""
    return not any(isinstance(phase, ConcurrencyPhase) for phase in config.workload.phases)
