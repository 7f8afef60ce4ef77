"""The orchestrator's knowledge of its executors: delivered reports and its own dispatches, as the columns policies see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..policies.prediction import Predictor
from ..policies.views import PLACES, ExecutorPool, ExecutorRow, FleetView, write_list
from ..policies.vocabulary import Role
from .config import ExecutorConfig
from .events import Report
from .links import Links
from .prefix_index import PrefixIndex

_HEALTHY: Final = PLACES["healthy"]
_ACTIVE: Final = PLACES["active_requests"]  # then what is on the wire
_SENT: Final = slice(_ACTIVE, _ACTIVE + 3)
_ANSWERED: Final = slice(_ACTIVE, _ACTIVE + 1)
_NUM_REPORTS: Final = PLACES["num_reports"]
_REPORTED: Final = slice(PLACES["wire_requests"], _NUM_REPORTS + 1)
_PREFIX_BLOCKS: Final = PLACES["prefix_blocks"]


def _write(row: ExecutorRow, places: slice, cells: tuple[int, ...]) -> None:
    if isinstance(row, list):
        write_list(row, places, cells)
    else:
        row.write(places.start, cells)


class _Unread:
    """What an executor has reported since the view was last asked for: how often, and the last report with its instant."""

    __slots__ = ("at", "last", "number")

    def __init__(self) -> None:
        self.last: Report | None = None
        self.at = 0
        self.number = 0


class Fleet:
    """Owns the cells of the view. One write per cell and update; a policy only reads."""

    def __init__(
        self,
        executors: Sequence[ExecutorConfig],
        start: int,
        predictor: Predictor | None = None,
        links: Links | None = None,
    ) -> None:
        pools = {role: ExecutorPool(role, [e.id for e in executors if e.role is role]) for role in Role}
        self.view = FleetView(pools[Role.CONTEXT], pools[Role.GENERATION], pools[Role.MIXED], pools[Role.PARKED])
        self.links = links
        if links is not None:
            self.view.know_links(links)
        self.roles: dict[int, Role] = {}
        self.configs = {e.id: e for e in executors}
        self._rows: dict[int, ExecutorRow] = {}
        self._sent: dict[int, list[int]] = {}  # executor: [requests, tokens] ever sent
        self._gone: set[int] = set()
        # what was received since the view was last asked for: the last report of each executor, when, and how many there were
        self._unread: list[_Unread] = []
        self._heard = {e.id: _Unread() for e in executors}
        self.prefixes = PrefixIndex(
            {e.id: e.num_blocks for e in executors}, [e.id for e in executors if e.enable_block_reuse]
        )
        # block hashes come with the block size of the first executor that computes prompts (see the workload)
        tokens_per_hash = next((e.tokens_per_block for e in executors if e.role is not Role.GENERATION), 1)
        domains = {name: i for i, name in enumerate(dict.fromkeys(e.domain for e in executors))}
        for pool in self.view.pools:
            pool.know_prefixes(self.prefixes, tokens_per_hash)
            if predictor is not None:
                pool.predictor = predictor
            for row in pool:
                config = self.configs[row.executor_id]
                self._rows[config.id] = row
                self.roles[config.id] = pool.role
                self._sent[config.id] = [0, 0]
                known: dict[str, Any] = {
                    "kv_blocks_total": config.num_blocks,
                    "kv_blocks_free": config.num_blocks,
                    "tokens_per_block": config.tokens_per_block,
                    "max_batch_size": config.scheduler.max_batch_size,
                    "max_num_tokens": config.scheduler.max_num_tokens,
                    "tensor_parallel_size": config.tensor_parallel_size,
                    "pipeline_parallel_size": config.pipeline_parallel_size,
                    "device_weight": config.device_weight,
                    "domain": domains[config.domain],
                    "received_at": start,
                }
                for name, cell in known.items():
                    row.write(PLACES[name], (cell,))

    def at(self, now: int) -> FleetView:
        """The view, as of `now`."""
        if self._unread:
            self._read()
        view = self.view
        view.clock[0] = now
        view.context_executor = None
        return view

    def is_healthy(self, executor: int) -> bool:
        if self._unread:
            self._read()
        return bool(self._rows[executor][_HEALTHY])

    def row(self, executor: int) -> ExecutorRow:
        if self._unread:
            self._read()
        return self._rows[executor]

    def dispatched(self, executor: int, num_tokens: int, block_hashes: Sequence[int] = ()) -> None:
        """A phase was sent there, of so many tokens; it will hold the KV of these prompt blocks."""
        sent = self._sent[executor]
        sent[0] += 1
        sent[1] += num_tokens
        row = self._rows[executor]
        _write(row, _SENT, (row[_ACTIVE] + 1, row[_ACTIVE + 1] + 1, row[_ACTIVE + 2] + num_tokens))
        if block_hashes and self.configs[executor].enable_block_reuse:
            # what it holds is known only once it is computed: who was just sent much would seem to have room for more
            row.write(_PREFIX_BLOCKS, (min(row.prefix_blocks + len(block_hashes), row.kv_blocks_total),))
        elif block_hashes and self.prefixes.is_asked:
            self.prefixes.used(executor, block_hashes)
            row.write(_PREFIX_BLOCKS, (self.prefixes.num_blocks(executor),))

    def answered(self, executor: int) -> None:
        row = self._rows[executor]
        _write(row, _ANSWERED, (row[_ACTIVE] - 1,))

    def reported(self, report: Report, now: int) -> None:
        """A report was received. It is written into the view when that is asked for: a third are followed by another first."""
        executor = report.executor
        heard = self._heard[executor]
        if not heard.number:
            self._unread.append(heard)
        heard.number += 1
        heard.last, heard.at = report, now
        if report.cache_events and executor not in self._gone:  # what was on its way when it died is of no use
            self.prefixes.heard(executor, report.cache_events)

    def _read(self) -> None:
        for heard in self._unread:
            if heard.last is not None:
                self._write(heard.last, heard.at, heard.number)
            heard.last, heard.number = None, 0
        self._unread.clear()

    def _write(self, report: Report, now: int, number: int) -> None:
        """The last of `number` reports. What it has not seen is still on the wire."""
        executor = report.executor
        row = self._rows[executor]
        sent = self._sent[executor]
        told: Any = report  # most of its numbers go into the row as the objects that they are
        _write(
            row,
            _REPORTED,
            (  # in the order of COLUMNS
                sent[0] - report.seen_requests,
                sent[1] - report.seen_tokens,
                told.queued_requests,
                told.running_requests,
                told.queued_prefill_tokens,
                told.inflight_prefill_tokens,
                told.decode_kv_tokens,
                report.blocks_free + report.blocks_cached,
                told.blocks_used,
                told.blocks_reserved,
                told.blocks_held,
                told.step_time,
                now,
                row[_NUM_REPORTS] + number,
            ),
        )
        self._set_healthy(executor, report.healthy and not (self._gone and executor in self._gone))

    def lost(self, executor: int) -> None:
        """It is gone for good."""
        self._read()
        self._gone.add(executor)
        self.prefixes.lost(executor)
        row = self._rows[executor]
        row.write(_PREFIX_BLOCKS, (0,))
        self._set_healthy(executor, False)

    def is_gone(self, executor: int) -> bool:
        return executor in self._gone

    def change_role(self, executor: int, role: Role) -> None:
        """Its row goes, as it is, from one pool to another; rows of both are new ones."""
        self._read()
        row = self._rows[executor]
        old, new = row.pool, self.view.pool(role)
        left = [other for other in old if other is not row]
        joined = sorted((*new, row), key=lambda each: int(each.executor_id))
        pools = ExecutorPool.of_rows(old.role, left, old), ExecutorPool.of_rows(role, joined, new)
        self.view.replace_pools(*pools)
        for pool in pools:
            for each in pool:
                self._rows[int(each.executor_id)] = each
        self.roles[executor] = role

    def _set_healthy(self, executor: int, healthy: bool) -> None:
        row = self._rows[executor]
        if bool(row[_HEALTHY]) != healthy:
            row.write(_HEALTHY, (int(healthy),))
            row.pool.change_health(1 if healthy else -1)
