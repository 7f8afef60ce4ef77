"""Which running requests go on elsewhere, while the cluster runs: when the policy is asked, and whether it may be obeyed.

Knows the fleet and which requests could move; the orchestrator does the moving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ..policies.interfaces import MigrationPolicy, PolicyError
from ..policies.vocabulary import MoveRequest, Request, Stage, plain_integer
from .fleet import Fleet
from .timers import Timers

TIMER: Final = "moves"


class Moves:
    """`movable()` gives, by executor, the requests whose generation phase it was sent, in that order, and may give up.

    `policy` may be None: then nothing moves.
    """

    def __init__(
        self,
        policy: MigrationPolicy | None,
        fleet: Fleet,
        timers: Timers,
        movable: Callable[[], Mapping[int, Sequence[Request]]],
    ) -> None:
        if policy is not None and plain_integer(policy.interval_ps, type(policy).__name__) < 1:
            raise PolicyError(f"{type(policy).__name__}: interval_ps is {policy.interval_ps}; allowed: at least 1")
        self.policy = policy
        self._fleet = fleet
        self._timers = timers
        self._movable = movable
        self._is_armed = False
        self._due = False

    def arrived(self, now: int) -> None:
        if self.policy is not None and not self._is_armed:
            self._arm(now)

    def woken(self) -> None:
        self._is_armed, self._due = False, True

    def ask(self, now: int, is_busy: bool) -> Sequence[MoveRequest]:
        """What is to be moved now. `is_busy`: there are requests, to ask for again; it stops with the last, for a run to end.

        PolicyError for what can never be done: a request that is not there to move, or an executor that cannot take it.
        """
        if not self._due or self.policy is None:
            return ()
        self._due = False
        movable = self._movable()
        moves = self.policy.migrate(self._fleet.at(now), movable)
        who = type(self.policy).__name__
        if not isinstance(moves, Sequence) or not all(isinstance(move, MoveRequest) for move in moves):
            raise PolicyError(f"{who} answered {moves!r}; allowed: a sequence of MoveRequest")
        at = {request.id: executor for executor, requests in movable.items() for request in requests}
        found: dict[int, MoveRequest] = {}
        for move in moves:
            request_id, executor = plain_integer(move.request_id, move), plain_integer(move.executor, move)
            if request_id not in at or request_id in found:
                raise PolicyError(f"{who} answered {move!r}; it may move, each once: {sorted(at)}")
            role = self._fleet.roles.get(executor)
            if role is None or not role.serves(Stage.GENERATION) or executor == at[request_id]:
                raise PolicyError(f"{who} answered {move!r}; allowed: another executor that serves generation phases")
            found[request_id] = MoveRequest(request_id, executor)
        if is_busy:
            self._arm(now)
        return list(found.values())

    def _arm(self, now: int) -> None:
        if self.policy is not None:
            self._is_armed = True
            self._timers.set(now + self.policy.interval_ps, TIMER)
