"""What a policy may know of the link between two executors: `fleet.link(source, reader)`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .vocabulary import PS_PER_S


class Link(NamedTuple):
    """One direction between two executors. The rates are the cost profile's, what is in flight is the orchestrator's own count:
    KV whose reader it has sent off, less what the link has carried since at its full rate.

    `latency`: picoseconds of a transfer that take no bandwidth, `token_latency` picoseconds for each KV token more.
    `bytes_in_flight`: counted from the first question about any link on. `bytes_per_token`: of KV; 0 where none is known.
    """

    bytes_per_s: float
    latency: int = 0
    token_latency: float = 0.0
    bytes_in_flight: float = 0.0
    bytes_per_token: int = 0

    def transfer_time(self, num_tokens: float) -> float:
        """Picoseconds until the KV of so many tokens is there, behind what is in flight."""
        waiting = self.bytes_in_flight + num_tokens * self.bytes_per_token
        return self.latency + num_tokens * self.token_latency + waiting / self.bytes_per_s * PS_PER_S


class LinkSource(Protocol):
    """Answers for the owner of the view; see `core/links.py`."""

    def between(self, source: int, reader: int, now: int) -> Link: ...


class NoLinks:
    """Where nothing is known of links: transfers take no time."""

    def between(self, source: int, reader: int, now: int) -> Link:
        return Link(float("inf"))
