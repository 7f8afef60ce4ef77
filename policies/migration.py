"""Migration policies: running requests that go on at another executor, to even out what chance and length have made uneven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from .interfaces import MigrationPolicy
from .parameters import number
from .registry import register
from .views import FleetView
from .vocabulary import PS_PER_S, MoveRequest, Request


@register("pair_by_load", kind="migration", source="Llumnix, migration between paired instances")
class PairByLoad(MigrationPolicy):
    """Pair the most loaded executor with the least loaded, and so on inwards; move a request if the difference shrinks.

    Load is the KV of an executor's requests, those that wait included, as a share of what it has room for. Of a request only
    the prompt's KV is known, so a move shifts that much; the one that leaves the smallest difference goes, if all that it
    may come to fits where nobody waits. `least_difference`: pairs whose loads are closer than this are left alone.
    """

    def __init__(self, *, rng: Random, interval_s: float = 0.1, least_difference: float = 0.1) -> None:
        super().__init__(rng=rng)
        self.interval_ps = round(number("pair_by_load", "interval_s", interval_s, 1e-6) * PS_PER_S)
        self.least_difference = number("pair_by_load", "least_difference", least_difference, 0.0, 1.0)

    def migrate(self, fleet: FleetView, movable: Mapping[int, Sequence[Request]]) -> Sequence[MoveRequest]:
        rows: list[Any] = [*fleet.generation.healthy_rows, *fleet.mixed.healthy_rows]
        loads = sorted((_share(row, _tokens(row)), int(row.executor_id), row) for row in rows)
        moves = []
        for (low, _, to), (high, executor, source) in zip(loads[: len(loads) // 2], reversed(loads)):
            if high - low < self.least_difference:
                break  # pairs further in differ less
            if to.queued_requests + to.wire_requests:
                continue
            room = to.kv_blocks_free * to.tokens_per_block
            fits = [request for request in movable.get(executor, ()) if request.total_kv_tokens <= room]
            differences = [(abs(_after(high, low, source, to, request)), request.id) for request in fits]
            difference, request_id = min(differences, default=(high - low, 0))
            if difference < high - low:
                moves.append(MoveRequest(request_id, int(to.executor_id)))
        return moves


def _tokens(row: Any) -> int:
    """KV of what an executor decodes, of what is on its way there, and of prompts that wait or run on a mixed one."""
    return int(row.decode_kv_tokens + row.wire_tokens + row.queued_prefill_tokens + row.inflight_prefill_tokens)


def _after(high: float, low: float, source: Any, to: Any, request: Request) -> float:
    """The difference of the two loads once the request has moved."""

    tokens = request.num_prompt_tokens
    return (high - _share(source, tokens)) - (low + _share(to, tokens))


def _share(row: Any, num_tokens: int) -> float:
    return float(num_tokens / (row.kv_blocks_total * row.tokens_per_block))
