"""A transfer that ends no sooner than a slower network would have ended it.

The same model as the simulator's links: one per direction and other executor, its rate shared fairly by what is on it.
Nothing is held back, only the news of its end, so a throttled transfer still loads the device as a fast one does.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Final

from ..core.kv_layout import KvLayout

UNTHROTTLED_GB_PER_S: Final = 1e6  # of a link beside throttled ones: more than any has
_BITS: Final = 20  # service is counted in 2^-20 ns of the link's full rate


class Ticket:
    """Something on a link. `then` is called once it is through; None until its bytes have really arrived."""

    __slots__ = ("is_through", "then")

    def __init__(self) -> None:
        self.is_through = False
        self.then: Callable[[], None] | None = None


class FairLink:
    """One direction, `bytes_per_s` shared equally by all that is on it. Times are in nanoseconds."""

    def __init__(self, bytes_per_s: float, now: int) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a throttle needs a positive rate, got {bytes_per_s} bytes/s")
        self._units_per_byte = 1e9 * (1 << _BITS) / bytes_per_s
        self._virtual = 0  # service that each has had since the link was made
        self._updated_at = now
        self._active: list[tuple[int, int, Ticket]] = []  # by the virtual time of their end
        self._serial = 0

    def enter(self, num_bytes: int, now: int) -> Ticket:
        self.advance(now)
        ticket = Ticket()
        self._serial += 1
        service = max(1, round(num_bytes * self._units_per_byte))
        heapq.heappush(self._active, (self._virtual + service, self._serial, ticket))
        return ticket

    def advance(self, now: int) -> list[Ticket]:
        """Those that got through since the last look. Between two ends the shares are constant, so ends are exact."""
        through = []
        while self._active:
            tag, _, ticket = self._active[0]
            wanted = (tag - self._virtual) * len(self._active)
            have = now - self._updated_at << _BITS
            if have < wanted:
                self._virtual += have // len(self._active)
                break
            heapq.heappop(self._active)
            self._virtual = tag
            self._updated_at += wanted >> _BITS
            ticket.is_through = True
            through.append(ticket)
        self._updated_at = now
        return through

    def next_end(self) -> int | None:
        """When the next is through, if nothing else comes."""
        if not self._active:
            return None
        left = (self._active[0][0] - self._virtual) * len(self._active)
        return self._updated_at + (left + (1 << _BITS) - 1 >> _BITS)


class Throttle:
    """The links of one rank. `group_of` gives the executor of a rank; each of its ranks has its part of the rate.

    Not for several threads.
    """

    def __init__(
        self,
        gb_per_s: float | Callable[[int], float],
        rank_share: float,
        group_of: Callable[[int], int],
        clock: Callable[[], int] | None = None,
    ) -> None:
        """`gb_per_s`: of the link with an executor; one number, or as a function of the executor."""
        self._gb_per_s = gb_per_s
        self._share = rank_share
        self._group_of = group_of
        self._clock = clock or time.monotonic_ns
        self._links: dict[tuple[int, bool], FairLink] = {}
        self._through: list[Ticket] = []
        rates = "by topology domain" if callable(gb_per_s) else f"to {gb_per_s:g} GB/s"
        self.description: Final = f"throttled {rates} between two executors"

    def enter(self, peer: int, num_bytes: int, is_send: bool) -> Ticket:
        """Put `num_bytes` on the link with the executor of rank `peer`."""
        key = (self._group_of(peer), is_send)
        now = self._clock()
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = FairLink(self._rate(key[0]), now)
        self._through += link.advance(now)
        return link.enter(num_bytes, now)

    def _rate(self, executor: int) -> float:
        """Bytes/s of this rank's part of the link with that executor."""
        return (self._gb_per_s(executor) if callable(self._gb_per_s) else self._gb_per_s) * 1e9 * self._share

    def when_through(self, ticket: Ticket, then: Callable[[], None]) -> None:
        """Call `then` now, if the ticket is through, or have `due` return it later."""
        if ticket.is_through:
            then()
        else:
            ticket.then = then

    def due(self) -> list[Callable[[], None]]:
        """What waited for tickets that are through by now."""
        now = self._clock()
        for link in self._links.values():
            self._through += link.advance(now)
        through, self._through = self._through, []
        return [ticket.then for ticket in through if ticket.then is not None]

    def seconds_to_next(self) -> float | None:
        """Until `due` has something new to look at; None if nothing is on any link."""
        if any(ticket.then is not None for ticket in self._through):
            return 0.0
        ends = [end for link in self._links.values() if (end := link.next_end()) is not None]
        return max(0.0, (min(ends) - self._clock()) / 1e9) if ends else None


def rank_share(layout: KvLayout, rank: int) -> float:
    """The part of an executor's KV traffic that `rank` has. All shares of an executor add up to 1."""
    own = layout.kv_bytes_per_token(rank, 1)
    return own / sum(layout.kv_bytes_per_token(each, 1) for each in range(layout.num_ranks))
