"""Layer-wise sending in virtual time: KV that is asked for early goes over the link as the steps compute it.

A chunk's layers are computed at a constant rate over its step, all chunks of a step side by side. At each of
`LAYER_GROUPS` even boundaries of the step, one group's share of the chunk's bytes enters the link as a segment of its
own; a transfer is over when its last segment is through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ..core.commands import Chunk, ServeKv
from .calls import MESSAGE, Environment
from .link import Link

LAYER_GROUPS: Final = 8


class RunningStep:
    """The step under way, its instants in picoseconds. Of an executor at rest there is none."""

    __slots__ = ("chunks", "end", "start")

    def __init__(self, start: int, end: int, chunks: tuple[Chunk, ...]) -> None:
        self.start = start
        self.end = end
        self.chunks = chunks


@dataclass(slots=True)
class _Sending:
    """One transfer that began before all of its KV was written."""

    source: int
    command: ServeKv
    link: Link
    bytes_left: int  # not through the link
    num_on_link: int = 0
    error: str | None = None
    segments: list[int] = field(default_factory=list)  # bytes, for whoever wants to look


class LayerwiseSends:
    """The early transfers of a cluster. `over(source, command, error)` hears the end of each, at its instant.

    `may_send(source)` False: the source is dead, and what it has not sent by then never will be.
    """

    def __init__(
        self,
        env: Environment,
        kv_bytes_per_token: int,
        may_send: Callable[[int], bool],
        over: Callable[[int, ServeKv, str | None], object],
    ) -> None:
        self._env = env
        self._bytes_per_token = kv_bytes_per_token
        self._may_send = may_send
        self._over = over
        self._open: dict[tuple[int, int], _Sending] = {}  # by source and its request

    def begin(self, source: int, command: ServeKv, link: Link, running: RunningStep | None) -> None:
        """Send what is written at once, and what is written from now on as it is."""
        num_bytes = command.num_tokens * self._bytes_per_token
        sending = self._open[source, command.request_id] = _Sending(source, command, link, num_bytes)
        if command.num_written:
            self._submit((sending, command.num_written * self._bytes_per_token))
        for chunk in running.chunks if running is not None else ():
            if running is not None and chunk.request_id == command.request_id:
                self._schedule(sending, chunk, running)

    def compute(self, source: int, step: RunningStep) -> None:
        """A step begins."""
        for chunk in step.chunks:
            sending = self._open.get((source, chunk.request_id))
            if sending is not None:
                self._schedule(sending, chunk, step)

    def _schedule(self, sending: _Sending, chunk: Chunk, step: RunningStep) -> None:
        num_bytes = chunk.length * self._bytes_per_token
        duration = step.end - step.start
        sent = 0
        for group in range(1, LAYER_GROUPS + 1):
            share = num_bytes * group // LAYER_GROUPS - sent
            if share:
                sent += share
                at = max(self._env.now, step.start + duration * group // LAYER_GROUPS)
                self._env.calendar.call_at(at, MESSAGE + sending.source, self._submit, (sending, share))

    def _submit(self, item: tuple[_Sending, int]) -> None:
        sending, num_bytes = item
        if sending.error is None and self._may_send(sending.source):
            sending.num_on_link += 1
            sending.segments.append(num_bytes)
            sending.link.transfer(num_bytes, self._through, item)

    def _through(self, item: tuple[_Sending, int]) -> None:
        sending, num_bytes = item
        sending.num_on_link -= 1
        sending.bytes_left -= num_bytes
        if not sending.num_on_link and (sending.error is not None or not sending.bytes_left):
            self._end(sending)

    def _end(self, sending: _Sending) -> None:
        del self._open[sending.source, sending.command.request_id]
        self._over(sending.source, sending.command, sending.error)

    def abort(self, source: int, request_id: int, reason: str) -> ServeKv | None:
        """Send nothing more. The transfer's command if nothing of it was on the link, and so nobody will hear of its end."""
        sending = self._open.get((source, request_id))
        if sending is None:
            return None
        sending.error = reason
        if sending.num_on_link:
            return None
        del self._open[source, request_id]
        return sending.command
