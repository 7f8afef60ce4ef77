"""What a session leaves behind, gathered from the pieces that its ranks ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..core.commands import ORCHESTRATOR
from ..core.tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow
from .executor_spec import Roster
from .rank_record import RankRecord
from .wire import KvPart, RecordsChunk

Row = RequestRow | StayRow | StepRow | TransferRow | DecisionRow


@dataclass
class SessionRecord:
    """Logs by core (0: the orchestrator), step ends as (epoch, step, instant)."""

    logs: dict[int, bytes] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    step_ends: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    parts: dict[int, list[tuple[int, KvPart]]] = field(default_factory=dict)


class ShippedRecords:
    """Pieces by rank and kind; the last of each kind is empty."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._chunks: dict[tuple[int, str], list[bytes]] = {}

    def keep(self, rank: int, chunk: RecordsChunk) -> None:
        self._chunks.setdefault((rank, chunk.kind), []).append(chunk.data)

    def complete(self, record: SessionRecord, own_log: Sequence[bytes]) -> None:
        """Add what the executors' leaders shipped; `own_log` is the orchestrator's."""
        record.logs[ORCHESTRATOR] = b"".join(own_log)
        for executor in self._roster.configs:
            record.logs[executor] = self._whole(executor, "log")
            record.rows += self._decoded(executor, "rows", list[Row])
            record.step_ends[executor] = self._decoded(executor, "steps", list[tuple[int, int, int]])
            record.parts[executor] = self._decoded(executor, "parts", list[tuple[int, KvPart]])

    def of_ranks(self) -> dict[int, RankRecord]:
        """What ranks alone know, of those that came to their end in order."""
        pieces = {rank: b"".join(self._chunks.get((rank, "rank"), ())) for rank in self._roster.executor_of}
        return {rank: msgspec.msgpack.decode(data, type=RankRecord) for rank, data in pieces.items() if data}

    def _whole(self, executor: int, kind: str) -> bytes:
        """What a leader shipped, or nothing if it died before: then all of it is missing."""
        pieces = self._chunks.pop((self._roster.leader_of(executor), kind), [])
        return b"".join(pieces) if pieces and not pieces[-1] else b""

    def _decoded(self, executor: int, kind: str, shape: Any) -> Any:
        data = self._whole(executor, kind)
        return msgspec.msgpack.decode(data, type=shape) if data else []
