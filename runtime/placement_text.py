"""Who runs where, in words: one line a rank, for whoever started a run."""

from __future__ import annotations

import os
from collections.abc import Iterable

from .executor_spec import Roster
from .rank_record import RankInfo


def placement_text(hostname: str, roster: Roster, ranks: Iterable[RankInfo]) -> str:
    """A table of rank, host, process, device, role and executor. `hostname`: the orchestrator's, which is this process."""
    rows = [("rank", "host", "pid", "device", "role", "executor")]
    rows.append(("0", hostname, str(os.getpid()), "-", "orchestrator", "-"))
    for info in sorted(ranks, key=lambda info: info.rank):
        role = roster.configs[info.executor].role.value
        rows.append((str(info.rank), info.hostname, str(info.pid), info.device, role, str(info.executor)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
