"""What a policy may see: executors by role as columns, one executor as a row, and the fleet of both.

Everything is as the orchestrator knows it: built from delivered reports and from its own dispatches, never from an
executor's memory, and therefore of some age. A view is valid during the call only.

A pool of few executors keeps plain lists and a large one numpy arrays (an argmin over two numpy elements costs 2 µs);
an expression such as `x.queued_requests + x.running_requests` is true of both `ExecutorPool` (arrays, when
`pool.vectorised`) and `ExecutorRow` (numbers), which is what `ScoringPolicy` relies on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from .vocabulary import Role

VECTORISE_FROM: Final = 16  # executors in a pool

COLUMNS: Final[dict[str, str]] = {
    "executor_id": "its rank in messages",
    "healthy": "1 while it may be sent requests",
    "active_requests": "requests dispatched to it and not yet answered, by the orchestrator's own count (never stale)",
    "queued_requests": "waiting there for their first step or for their KV, as reported",
    "running_requests": "in prefill or in the decode batch, as reported",
    "queued_prefill_tokens": "prompt tokens of requests not begun, as reported",
    "inflight_prefill_tokens": "prompt tokens not yet computed of requests begun, as reported",
    "decode_kv_tokens": "KV tokens of the decode batch and of generation phases waiting to enter it, as reported",
    "wire_requests": "requests sent that no report has counted yet",
    "wire_tokens": "their tokens: prompt tokens for a context phase, KV tokens for a generation phase",
    "kv_blocks_total": "size of its KV pool in blocks",
    "kv_blocks_free": "as reported",
    "kv_blocks_used": "written, as reported",
    "kv_blocks_reserved": "assigned and not yet written, as reported",
    "kv_blocks_held": "held for a transfer, as reported",
    "tokens_per_block": "KV tokens in a block",
    "max_batch_size": "requests in one step",
    "max_num_tokens": "tokens in one step",
    "tensor_parallel_size": "devices that share each layer",
    "pipeline_parallel_size": "stages of layers, one after the other",
    "step_time_ps": "picoseconds a step of its last finished batch, 0 before any",
    "received_at": "instant at which its last report was received, the start of the run before any",
    "num_reports": "reports received from it",
    "device_weight": "how fast its device is beside the others, as configured",
}


class Column(Sequence[Any]):
    """A list that its owner changes and a policy only reads."""

    __slots__ = ("_cells",)

    def __init__(self, cells: list[Any]) -> None:
        self._cells = cells

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cells)

    def __repr__(self) -> str:
        return repr(self._cells)


class ExecutorPool:
    """The executors that serve one role, in order of id: one read-only sequence per name in `COLUMNS`.

    Each is of shape (len(pool),): an int64 array where `vectorised`, else a list; `device_weight` is of floats.
    """

    executor_id: Any
    healthy: Any
    active_requests: Any
    queued_requests: Any
    running_requests: Any
    queued_prefill_tokens: Any
    inflight_prefill_tokens: Any
    decode_kv_tokens: Any
    wire_requests: Any
    wire_tokens: Any
    kv_blocks_total: Any
    kv_blocks_free: Any
    kv_blocks_used: Any
    kv_blocks_reserved: Any
    kv_blocks_held: Any
    tokens_per_block: Any
    max_batch_size: Any
    max_num_tokens: Any
    tensor_parallel_size: Any
    pipeline_parallel_size: Any
    step_time_ps: Any
    received_at: Any
    num_reports: Any
    device_weight: Any

    def __init__(self, role: Role, executor_ids: Sequence[int]) -> None:
        self.role = role
        self.vectorised = len(executor_ids) >= VECTORISE_FROM
        self.num_unhealthy = 0
        self.now = 0
        self._cells: dict[str, Any] = {}
        n = len(executor_ids)
        for name in COLUMNS:
            kind, fill = (np.float64, 1.0) if name == "device_weight" else (np.int64, 0)
            cells: Any = np.full(n, fill, dtype=kind) if self.vectorised else [fill] * n
            self._cells[name] = cells
            shown: Any
            if self.vectorised:
                shown = cells.view()
                shown.flags.writeable = False
            else:
                shown = Column(cells)
            setattr(self, name, shown)
        for i, executor in enumerate(executor_ids):
            self._cells["executor_id"][i] = executor
            self._cells["healthy"][i] = 1
        self._rows = tuple(ExecutorRow(self, i) for i in range(n))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ExecutorRow]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> ExecutorRow:
        return self._rows[index]

    @property
    def num_healthy(self) -> int:
        return len(self._rows) - self.num_unhealthy

    @property
    def healthy_rows(self) -> Sequence[ExecutorRow]:
        if not self.num_unhealthy:
            return self._rows
        return [row for row in self._rows if row.healthy]

    def age(self, index: int) -> int:
        """Picoseconds since the last report of the executor in this row was received."""
        return self.now - int(self.received_at[index])


def _cell(name: str) -> property:
    def get(row: ExecutorRow) -> int:
        return row._cells[name][row.index]  # type: ignore[no-any-return]

    return property(get, doc=COLUMNS.get(name))


class ExecutorRow:
    """One executor of a pool: each column of the pool as a number. `index` is its row in the pool."""

    __slots__ = ("_cells", "index", "pool", "role")

    def __init__(self, pool: ExecutorPool, index: int) -> None:
        self.pool = pool
        self.index = index
        self.role = pool.role
        self._cells = pool._cells

    executor_id = _cell("executor_id")
    healthy = _cell("healthy")
    active_requests = _cell("active_requests")
    queued_requests = _cell("queued_requests")
    running_requests = _cell("running_requests")
    queued_prefill_tokens = _cell("queued_prefill_tokens")
    inflight_prefill_tokens = _cell("inflight_prefill_tokens")
    decode_kv_tokens = _cell("decode_kv_tokens")
    wire_requests = _cell("wire_requests")
    wire_tokens = _cell("wire_tokens")
    kv_blocks_total = _cell("kv_blocks_total")
    kv_blocks_free = _cell("kv_blocks_free")
    kv_blocks_used = _cell("kv_blocks_used")
    kv_blocks_reserved = _cell("kv_blocks_reserved")
    kv_blocks_held = _cell("kv_blocks_held")
    tokens_per_block = _cell("tokens_per_block")
    max_batch_size = _cell("max_batch_size")
    max_num_tokens = _cell("max_num_tokens")
    tensor_parallel_size = _cell("tensor_parallel_size")
    pipeline_parallel_size = _cell("pipeline_parallel_size")
    step_time_ps = _cell("step_time_ps")
    received_at = _cell("received_at")
    num_reports = _cell("num_reports")
    device_weight = _cell("device_weight")

    @property
    def age(self) -> int:
        """Picoseconds since its last report was received."""
        return self.pool.age(self.index)


class FleetView:
    """Every executor, by the role it serves now. `now` is the orchestrator's clock in picoseconds."""

    def __init__(self, context: ExecutorPool, generation: ExecutorPool, mixed: ExecutorPool) -> None:
        self.now = 0
        self.context = context
        self.generation = generation
        self.mixed = mixed
        self.pools = (context, generation, mixed)

    def executor(self, executor_id: int) -> ExecutorRow:
        """The row of one executor; KeyError if there is none of this id."""
        for pool in self.pools:
            for row in pool:
                if row.executor_id == executor_id:
                    return row
        raise KeyError(f"no executor {executor_id}")
