"""What a policy may see: executors by role as columns, one executor as a row, and the fleet of both.

Everything is as the orchestrator knows it: built from delivered reports and from its own dispatches, never from an
executor's memory, and therefore of some age. A view is valid during the call only.

A pool of few executors keeps a list a row and a large one numpy arrays (an argmin over two numpy elements costs 2 µs);
an expression such as `x.queued_requests + x.running_requests` is true of both `ExecutorPool` (arrays, when
`pool.vectorised`) and `ExecutorRow` (numbers), which is what `ScoringPolicy` relies on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, Protocol

import numpy as np

from .links import Link, LinkSource, NoLinks
from .prediction import Predictor, ReportedTimes
from .vocabulary import Request, Role

VECTORISE_FROM: Final = 16  # executors in a pool

COLUMNS: Final[dict[str, str]] = {
    "executor_id": "its rank in messages",
    "healthy": "1 while it may be sent requests",
    "active_requests": "requests dispatched to it and not yet answered, by the orchestrator's own count (never stale)",
    "wire_requests": "requests sent that no report has counted yet",
    "wire_tokens": "their tokens: prompt tokens for a context phase, KV tokens for a generation phase",
    "queued_requests": "waiting there for their first step or for their KV, as reported",
    "running_requests": "in prefill or in the decode batch, as reported",
    "queued_prefill_tokens": "prompt tokens of requests not begun, less those cached when they were queued, as reported",
    "inflight_prefill_tokens": "prompt tokens not yet computed of requests begun, as reported",
    "decode_kv_tokens": "KV tokens of the decode batch and of generation phases waiting to enter it, as reported",
    "kv_blocks_free": "empty, or cached and nobody's, as reported",
    "kv_blocks_used": "written, as reported",
    "kv_blocks_reserved": "assigned and not yet written, as reported",
    "kv_blocks_held": "held for a transfer, as reported",
    "step_time_ps": "picoseconds a step of its last finished batch, 0 before any",
    "received_at": "instant at which its last report was received, the start of the run before any",
    "num_reports": "reports received from it",
    "kv_blocks_total": "size of its KV pool in blocks",
    "tokens_per_block": "KV tokens in a block",
    "max_batch_size": "requests in one step",
    "max_num_tokens": "tokens in one step",
    "tensor_parallel_size": "devices that share each layer",
    "pipeline_parallel_size": "stages of layers, one after the other",
    "prefix_blocks": "prompt blocks it is believed to hold, once a policy has asked for prefix matches; of one that reports its"
    " blocks, those it was sent, up to its pool",
    "domain": "number of its topology domain: equal for executors whose domain is equal in the file",
    "device_weight": "how fast its device is beside the others, as configured",
}
PLACES: Final[dict[str, int]] = {name: place for place, name in enumerate(COLUMNS)}  # of a column in a row
_RECEIVED_AT: Final = PLACES["received_at"]
_received_at: Final[Any] = itemgetter(_RECEIVED_AT)


class Column(Sequence[Any]):
    """One cell of each row of a small pool."""

    __slots__ = ("_place", "_rows")

    def __init__(self, rows: Sequence[Any], place: int) -> None:
        self._rows = rows
        self._place = place

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return [*self][index] if isinstance(index, slice) else self._rows[index][self._place]

    def __iter__(self) -> Iterator[Any]:
        place = self._place
        return iter([row[place] for row in self._rows])

    def __repr__(self) -> str:
        return repr([*self])


class PrefixSource(Protocol):
    """Who holds which prompt blocks; see `core/prefix_index.py`."""

    version: int

    def place(self, executor: int) -> int: ...
    def levels(self, hashes: Sequence[int]) -> list[tuple[int, int]]: ...


class ExecutorPool:
    """The executors that serve one role, in order of id: one read-only sequence per name in `COLUMNS`.

    Each is of shape (len(pool),): an int64 array where `vectorised`, else a list; `device_weight` is of floats.
    """

    __slots__ = (
        *COLUMNS,
        "_arrays",
        "_last_place",
        "_matched",
        "_places",
        "_prefixes",
        "_row_of",
        "clock",
        "num_healthy",
        "num_unhealthy",
        "predictor",
        "role",
        "rows",
        "tokens_per_hash",
        "vectorised",
    )

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
    prefix_blocks: Any
    domain: Any
    device_weight: Any

    def __init__(self, role: Role, executor_ids: Sequence[int], vectorised: bool | None = None) -> None:
        """`vectorised`: arrays or not, however many executors there are."""
        n = len(executor_ids)
        self.role = role
        self.vectorised = n >= VECTORISE_FROM if vectorised is None else vectorised
        self.num_healthy, self.num_unhealthy = n, 0
        self.clock = [0]  # what it shows is `now`; all pools of a view have one
        self.tokens_per_hash = 1  # prompt tokens that one of `Request.block_hashes` stands for
        self.predictor: Predictor = ReportedTimes()
        self._prefixes: PrefixSource | None = None
        self._places: Any = []
        self._last_place = 0
        self._matched: tuple[tuple[int, ...], int, Any] = ((), -1, None)  # the last answer, and to what
        self._arrays: list[Any] = []  # by place, where vectorised
        self.rows: tuple[ExecutorRow, ...]
        if self.vectorised:
            for name in COLUMNS:
                kind, fill = (np.float64, 1.0) if name == "device_weight" else (np.int64, 0)
                cells = np.full(n, fill, dtype=kind)
                self._arrays.append(cells)
                shown = cells.view()
                shown.flags.writeable = False
                setattr(self, name, shown)
            self.rows = tuple(_RowOfArrays(self, i) for i in range(n))
        else:
            self.rows = tuple(_RowOfCells(self, i) for i in range(n))
            for name, place in PLACES.items():
                setattr(self, name, Column(self.rows, place))
        for executor, row in zip(executor_ids, self.rows, strict=True):
            row.write(0, (executor, 1))
        self._row_of: dict[int | None, ExecutorRow] = dict(zip(executor_ids, self.rows, strict=True))

    @classmethod
    def of_rows(cls, role: Role, rows: Sequence[ExecutorRow], like: ExecutorPool) -> ExecutorPool:
        """For the owner of the view: a pool of these rows, taken over as they are, that asks whom `like` asks."""
        pool = cls(role, [int(row.executor_id) for row in rows])
        for mine, row in zip(pool, rows, strict=True):
            mine.write(0, row.values())
        pool.change_health(-sum(not row.healthy for row in pool))
        pool.predictor = like.predictor
        pool.clock = like.clock
        if like._prefixes is not None:
            pool.know_prefixes(like._prefixes, like.tokens_per_hash)
        return pool

    @property
    def now(self) -> int:
        return self.clock[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ExecutorRow]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> ExecutorRow:
        return self.rows[index]

    def change_health(self, by: int) -> None:
        """For the owner of the view: so many more of its executors are healthy than before."""
        self.num_healthy += by
        self.num_unhealthy -= by

    @property
    def healthy_rows(self) -> Sequence[ExecutorRow]:
        if not self.num_unhealthy:
            return self.rows
        return [row for row in self.rows if row.healthy]

    def row_of(self, executor_id: int | None) -> ExecutorRow | None:
        """The row of this executor; None if it is not of this pool."""
        return self._row_of.get(executor_id)

    def healthy_part(self, column: Any) -> Any:
        """Of a column or an answer of this pool's shape, the entries of healthy executors."""
        if not self.num_unhealthy:
            return column
        if self.vectorised:
            return column[self.healthy == 1]
        return [value for value, healthy in zip(column, self.healthy, strict=True) if healthy]

    def range_of(self, column: Any) -> tuple[Any, Any]:
        """(least, most) over healthy executors."""
        part = self.healthy_part(column)
        return (part.min(), part.max()) if self.vectorised else (min(part), max(part))

    def oldest_report(self) -> int:
        """When the oldest of the last reports was received; of a pool that has executors."""
        if self.vectorised:
            return int(self._arrays[_RECEIVED_AT].min())
        return int(min(map(_received_at, self.rows)))

    def age(self, index: int) -> int:
        """Picoseconds since the last report of the executor in this row was received."""
        return self.now - int(self.received_at[index])

    # ---- prefixes: asked for, not precomputed ---------------------------------------------------------------------

    def know_prefixes(self, source: PrefixSource, tokens_per_hash: int) -> None:
        """For the owner of the pool: where the answers of `prefix_match` come from."""
        self._prefixes = source
        places = [source.place(int(executor)) for executor in self.executor_id]
        self._last_place = max(places, default=0)
        self._places = np.array(places) if self.vectorised else places
        self.tokens_per_hash = tokens_per_hash

    def prefix_match(self, request: Request) -> Any:
        """Leading blocks of the prompt that each executor is believed to hold; shape (len(pool),), read-only."""
        hashes, version, matched = self._matched
        source = self._prefixes
        now = -1 if source is None else source.version
        if matched is None or hashes is not request.block_hashes or version != now:
            levels = [] if source is None else source.levels(request.block_hashes)
            matched = self._matches_of(levels)
            self._matched = (request.block_hashes, now, matched)
        return matched

    def cached_tokens(self, request: Request) -> Any:
        """The same in tokens, of which the prompt has at least one that is not counted: it is always computed."""
        most = request.num_prompt_tokens - 1
        blocks = self.prefix_match(request)
        if self.vectorised:
            return np.minimum(blocks * self.tokens_per_hash, most)
        return [min(number * self.tokens_per_hash, most) for number in blocks]

    def uncached_tokens(self, request: Request) -> Any:
        """Prompt tokens that each would have to compute, at least one."""
        cached = self.cached_tokens(request)
        if self.vectorised:
            return request.num_prompt_tokens - cached
        return [request.num_prompt_tokens - tokens for tokens in cached]

    def _matches_of(self, levels: list[tuple[int, int]]) -> Any:
        n = len(self.rows)
        if not self.vectorised:
            counts = [0] * n
            for depth, holders in levels:
                for i, place in enumerate(self._places):
                    if holders >> place & 1:
                        counts[i] = depth
            return tuple(counts)
        matched = np.zeros(n, dtype=np.int64)
        for depth, holders in levels:
            size = max(self._last_place + 1, holders.bit_length())
            packed = np.frombuffer(holders.to_bytes(size // 8 + 1, "little"), dtype=np.uint8)
            matched[np.unpackbits(packed, bitorder="little")[self._places] == 1] = depth
        matched.flags.writeable = False
        return matched


def _cell(name: str) -> Any:
    return property(itemgetter(PLACES[name]), doc=COLUMNS[name])


class ExecutorRow:
    """One executor of a pool: each column of the pool as a number. `index` is its row in the pool."""

    __slots__ = ()

    index: int
    pool: ExecutorPool
    role: Role

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
    prefix_blocks = _cell("prefix_blocks")
    domain = _cell("domain")
    device_weight = _cell("device_weight")

    @property
    def age(self) -> int:
        """Picoseconds since its last report was received."""
        return self.pool.age(self.index)

    @property
    def now(self) -> int:
        return self.pool.now

    @property
    def predictor(self) -> Predictor:
        return self.pool.predictor

    @property
    def tokens_per_hash(self) -> int:
        return self.pool.tokens_per_hash

    def prefix_match(self, request: Request) -> int:
        """Leading blocks of the prompt that it is believed to hold."""
        return int(self.pool.prefix_match(request)[self.index])

    def cached_tokens(self, request: Request) -> int:
        """The same in tokens, of which the prompt has at least one that is not counted: it is always computed."""
        return min(self.prefix_match(request) * self.pool.tokens_per_hash, request.num_prompt_tokens - 1)

    def uncached_tokens(self, request: Request) -> int:
        """Prompt tokens that it would have to compute, at least one."""
        return request.num_prompt_tokens - self.cached_tokens(request)

    # for the owner of the view

    def __getitem__(self, place: int) -> Any:
        """The cell at this place (`PLACES`)."""
        raise NotImplementedError

    def write(self, first: int, cells: Sequence[Any]) -> None:
        """Write these cells, from the place `first` on (`PLACES`)."""
        raise NotImplementedError

    def values(self) -> list[Any]:
        """All cells, as Python's own numbers."""
        return [self[place].item() if hasattr(self[place], "item") else self[place] for place in PLACES.values()]


write_list: Final[Any] = list.__setitem__  # what `write` comes to for a row that is a list, for an owner in a hurry


def _only_read(*_: Any, **__: Any) -> Any:
    raise TypeError("a policy only reads what it is shown")


class _RowOfCells(list[Any], ExecutorRow):  # type: ignore[misc]
    """A row of a small pool is the list of its cells: to read one, or to write a report's, is one call of C."""

    __slots__ = ("index", "pool", "role")

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, pool: ExecutorPool, index: int) -> None:
        super().__init__([0] * len(PLACES))
        super().__setitem__(PLACES["device_weight"], 1.0)
        self.pool = pool
        self.index = index  # type: ignore[method-assign, assignment]
        self.role = pool.role

    # what a list has to change itself with
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _only_read
    append = extend = insert = remove = pop = clear = sort = reverse = _only_read

    def write(self, first: int, cells: Sequence[Any]) -> None:
        write_list(self, slice(first, first + len(cells)), cells)


class _RowOfArrays(ExecutorRow):
    """A row of a large pool is a place in its arrays."""

    __slots__ = ("_arrays", "index", "pool", "role")

    def __init__(self, pool: ExecutorPool, index: int) -> None:
        self._arrays = pool._arrays
        self.pool = pool
        self.index = index
        self.role = pool.role

    def __getitem__(self, place: int) -> Any:
        return self._arrays[place][self.index]

    def write(self, first: int, cells: Sequence[Any]) -> None:
        index = self.index
        for array, cell in zip(self._arrays[first : first + len(cells)], cells, strict=True):
            array[index] = cell


class FleetView:
    """Every executor, by the role it serves now. `now` is the orchestrator's clock in picoseconds.

    `context_executor`: at the generation stage, who has, or with early binding will have, the KV of the request's context
    phase; None otherwise, and where that phase is canned.
    `parked` executors serve nothing at present. `home` is each executor's role at the start; `draining` counts, for those
    that have any, the requests that an executor has and its present role does not serve.
    """

    __slots__ = (
        "_links",
        "clock",
        "context",
        "context_executor",
        "draining",
        "generation",
        "home",
        "mixed",
        "parked",
        "pools",
    )

    def __init__(
        self, context: ExecutorPool, generation: ExecutorPool, mixed: ExecutorPool, parked: ExecutorPool | None = None
    ) -> None:
        self.context = context
        self.generation = generation
        self.mixed = mixed
        self.parked = ExecutorPool(Role.PARKED, ()) if parked is None else parked
        self.pools = (self.context, self.generation, self.mixed, self.parked)
        self.clock = [0]
        for pool in self.pools:
            pool.clock = self.clock
        self.context_executor: int | None = None
        self.home: Mapping[int, Role] = {
            int(executor): pool.role for pool in self.pools for executor in pool.executor_id
        }
        self.draining: Mapping[int, int] = {}
        self._links: LinkSource = NoLinks()

    def know_links(self, source: LinkSource) -> None:
        """For the owner of the view: where the answers of `link` come from."""
        self._links = source

    def link(self, source: int, reader: int) -> Link:
        """The link on which `reader` fetches KV from `source`: rate, latency, and what is in flight."""
        return self._links.between(source, reader, self.clock[0])

    @property
    def now(self) -> int:
        return self.clock[0]

    def pool(self, role: Role) -> ExecutorPool:
        return next(pool for pool in self.pools if pool.role is role)

    def replace_pools(self, *pools: ExecutorPool) -> None:
        """For the owner of the view: these serve their roles from now on."""
        by_role = {pool.role: pool for pool in (*self.pools, *pools)}
        self.context, self.generation = by_role[Role.CONTEXT], by_role[Role.GENERATION]
        self.mixed, self.parked = by_role[Role.MIXED], by_role[Role.PARKED]
        self.pools = (self.context, self.generation, self.mixed, self.parked)

    @property
    def predictor(self) -> Predictor:
        return self.context.predictor

    def executor(self, executor_id: int) -> ExecutorRow:
        """The row of one executor; KeyError if there is none of this id."""
        for pool in self.pools:
            row = pool.row_of(executor_id)
            if row is not None:
                return row
        raise KeyError(f"no executor {executor_id}")
