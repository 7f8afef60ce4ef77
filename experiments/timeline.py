"""trace.json: a run as a timeline for Perfetto or chrome://tracing, made from its tables.

One process per executor: a track of epochs, and tracks of KV transfers sent and received, joined by flow arrows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

MAX_EVENTS: Final = 200_000
_EPOCHS, _RECEIVE, _SEND = 0, 100, 1000  # first track number of each kind
_encoder: Final = msgspec.json.Encoder()  # `json.dumps` was a seventh of a run of 20,000 requests


def write_timeline(run_dir: Path, target: Path, roles: dict[int, str], max_events: int = MAX_EVENTS) -> None:
    """Write at most about `max_events` events, the earliest of each table; `otherData.truncated` says if some are missing."""
    with target.open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        budget = _Budget(file, max_events)
        for executor, role in roles.items():
            budget.write(
                {"ph": "M", "pid": executor, "name": "process_name", "args": {"name": f"executor {executor} ({role})"}}
            )
            budget.write(
                {"ph": "M", "pid": executor, "tid": _EPOCHS, "name": "thread_name", "args": {"name": "epochs"}}
            )
        for row in _rows(run_dir / "transfers.parquet", max_events // 8):
            pass_through = _transfer(row, budget)
            if not pass_through:
                break
        for row in _rows(run_dir / "steps.parquet", max_events):
            if not budget.write(_epoch(row)):
                break
        file.write(b'\n],"otherData":' + _encoder.encode({"truncated": budget.truncated}) + b"}\n")


class _Budget:
    """Counts events, separates them by commas, and keeps lanes so that slices of one track never overlap."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file = file
        self._left = left
        self._first = True
        self.truncated = False
        self.num_flows = 0
        self._lanes: dict[tuple[int, int], list[tuple[float, int]]] = {}

    def write(self, event: dict[str, Any]) -> bool:
        if self._left <= 0:
            self.truncated = True
            return False
        self._left -= 1
        self._file.write((b"" if self._first else b",\n") + _encoder.encode(event))
        self._first = False
        return True

    def lane(self, executor: int, kind: int, start: float, end: float) -> int:
        busy = self._lanes.setdefault((executor, kind), [])
        lane = heapq.heappop(busy)[1] if busy and busy[0][0] <= start else len(busy)
        heapq.heappush(busy, (end, lane))
        return kind + lane


def _transfer(row: dict[str, Any], budget: _Budget) -> bool:
    start, end = row["start_s"] * 1e6, row["end_s"] * 1e6
    duration = max(end - start, 0.001)
    budget.num_flows += 1
    args = {"tokens": row["num_tokens"], "blocks": row["num_blocks"], "ok": row["ok"]}
    sides = (
        (row["source"], _SEND, f"KV to {row['reader']}", "s", start),
        (row["reader"], _RECEIVE, f"KV from {row['source']}", "f", start + duration / 2),
    )
    for executor, kind, name, flow, at in sides:
        track = budget.lane(executor, kind, start, end)
        slice_ = {"ph": "X", "pid": executor, "tid": track, "ts": start, "dur": duration, "name": name, "args": args}
        arrow = {"ph": flow, "pid": executor, "tid": track, "ts": at, "id": budget.num_flows, "name": "kv", "cat": "kv"}
        if flow == "f":
            arrow["bp"] = "e"
        if not (budget.write(slice_) and budget.write(arrow)):
            return False
    return True


def _epoch(row: dict[str, Any]) -> dict[str, Any]:
    decodes, chunk_tokens = row["num_decodes"], row["num_chunk_tokens"]
    parts = [f"prefill {chunk_tokens} tokens"] if chunk_tokens else []
    if decodes:
        parts.append(f"decode {decodes}")
    start, end = row["start_s"] * 1e6, row["end_s"] * 1e6
    return {
        "ph": "X",
        "pid": row["executor"],
        "tid": _EPOCHS,
        "ts": start,
        "dur": max(end - start, 0.0),
        "name": " + ".join(parts) or "idle",
        "args": {
            "epoch": row["epoch"],
            "steps": row["num_steps"],
            "kv_tokens": row["num_kv_tokens"],
            "blocks_free": row["blocks_free"],
            "cached_tokens": row["num_cached_tokens"],
            "blocks_cached": row["blocks_cached"],
        },
    }


def _rows(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    given = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=8192):
            for row in batch.to_pylist():
                if given > limit:
                    return
                given += 1
                yield row
