"""The orchestrator's knowledge of its executors: delivered reports and its own dispatches, as the columns policies see."""

from __future__ import annotations

from collections.abc import Sequence

from ..policies.prediction import Predictor
from ..policies.views import ExecutorPool, ExecutorRow, FleetView
from ..policies.vocabulary import Role
from .config import ExecutorConfig
from .events import Report
from .prefix_index import PrefixIndex


class Fleet:
    """Owns the cells of the view. One write per cell and update; a policy only reads."""

    def __init__(self, executors: Sequence[ExecutorConfig], start: int, predictor: Predictor | None = None) -> None:
        pools = {role: ExecutorPool(role, [e.id for e in executors if e.role is role]) for role in Role}
        self.view = FleetView(pools[Role.CONTEXT], pools[Role.GENERATION], pools[Role.MIXED], pools[Role.PARKED])
        self.roles: dict[int, Role] = {}
        self.configs = {e.id: e for e in executors}
        self._rows: dict[int, ExecutorRow] = {}
        self._sent: dict[int, list[int]] = {}  # executor: [requests, tokens] ever sent
        self._gone: set[int] = set()
        # what was received since the view was last asked for: the last report of each executor, when, and how many there were
        self._unread: dict[int, tuple[Report, int, int]] = {}
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
                cells, i = pool._cells, row.index
                cells["kv_blocks_total"][i] = cells["kv_blocks_free"][i] = config.num_blocks
                cells["tokens_per_block"][i] = config.tokens_per_block
                cells["max_batch_size"][i] = config.scheduler.max_batch_size
                cells["max_num_tokens"][i] = config.scheduler.max_num_tokens
                cells["tensor_parallel_size"][i] = config.tensor_parallel_size
                cells["pipeline_parallel_size"][i] = config.pipeline_parallel_size
                cells["device_weight"][i] = config.device_weight
                cells["domain"][i] = domains[config.domain]
                cells["received_at"][i] = start

    def at(self, now: int) -> FleetView:
        """The view, as of `now`."""
        if self._unread:
            self._read()
        view = self.view
        view.now = view.context.now = view.generation.now = view.mixed.now = view.parked.now = now
        view.context_executor = None
        return view

    def is_healthy(self, executor: int) -> bool:
        if self._unread:
            self._read()
        return bool(self._rows[executor].healthy)

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
        cells, i = row._cells, row.index
        cells["active_requests"][i] += 1
        cells["wire_requests"][i] += 1
        cells["wire_tokens"][i] += num_tokens
        if block_hashes and self.configs[executor].enable_block_reuse:
            # what it holds is known only once it is computed: who was just sent much would seem to have room for more
            cells["prefix_blocks"][i] = min(cells["prefix_blocks"][i] + len(block_hashes), cells["kv_blocks_total"][i])
        elif block_hashes and self.prefixes.is_asked:
            self.prefixes.used(executor, block_hashes)
            cells["prefix_blocks"][i] = self.prefixes.num_blocks(executor)

    def answered(self, executor: int) -> None:
        row = self._rows[executor]
        row._cells["active_requests"][row.index] -= 1

    def reported(self, report: Report, now: int) -> None:
        """A report was received. It is written into the view when that is asked for: a third are followed by another first."""
        executor = report.executor
        before = self._unread.get(executor)
        self._unread[executor] = (report, now, 1 if before is None else before[2] + 1)
        if report.cache_events and executor not in self._gone:  # what was on its way when it died is of no use
            self.prefixes.heard(executor, report.cache_events)

    def _read(self) -> None:
        for report, now, number in self._unread.values():
            self._write(report, now, number)
        self._unread.clear()

    def _write(self, report: Report, now: int, number: int) -> None:
        """The last of `number` reports. What it has not seen is still on the wire."""
        executor = report.executor
        row = self._rows[executor]
        cells, i = row._cells, row.index
        sent = self._sent[executor]
        cells["wire_requests"][i] = sent[0] - report.seen_requests
        cells["wire_tokens"][i] = sent[1] - report.seen_tokens
        cells["queued_requests"][i] = report.queued_requests
        cells["running_requests"][i] = report.running_requests
        cells["queued_prefill_tokens"][i] = report.queued_prefill_tokens
        cells["inflight_prefill_tokens"][i] = report.inflight_prefill_tokens
        cells["decode_kv_tokens"][i] = report.decode_kv_tokens
        cells["kv_blocks_free"][i] = report.blocks_free + report.blocks_cached
        cells["kv_blocks_used"][i] = report.blocks_used
        cells["kv_blocks_reserved"][i] = report.blocks_reserved
        cells["kv_blocks_held"][i] = report.blocks_held
        cells["step_time_ps"][i] = report.step_time
        cells["received_at"][i] = now
        cells["num_reports"][i] += number
        self._set_healthy(executor, report.healthy and executor not in self._gone)

    def lost(self, executor: int) -> None:
        """It is gone for good."""
        self._read()
        self._gone.add(executor)
        self.prefixes.lost(executor)
        row = self._rows[executor]
        row._cells["prefix_blocks"][row.index] = 0
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
        if bool(row.healthy) != healthy:
            row._cells["healthy"][row.index] = int(healthy)
            row.pool.num_unhealthy += -1 if healthy else 1
