"""Layer-wise sending in virtual time: one request by hand, and what early binding is worth on slow and fast links.

The cluster: one context and one generation executor, messages of 10 ps, prompts of 8 tokens of 100 bytes of KV. A step
takes 800 ps, so that one of the 8 layer groups of a chunk is written every 100 ps.
"""

from __future__ import annotations

from typing import Any

import pytest

from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.cost import ConstantCost
from disagg.core.event_log import read_log, replay
from disagg.core.events import KvWithdrawn
from disagg.core.kv_reader import KvReader
from disagg.core.tables import RequestRow, TransferRow
from disagg.policies.interfaces import RoutingPolicy
from disagg.policies.registry import register
from disagg.policies.vocabulary import Hold, Request, Role, Route
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.timing import ModelTiming

NEVER = 10**15
ROUNDED = 1  # picosecond more: where three segments share a link, each third is rounded down
SLOW, FAST = 2, 0.5  # picoseconds a byte: 100 bytes of a group take 200 ps, longer than to compute it, or 50


class World:
    def __init__(
        self,
        binding: str,
        ps_per_byte: float,
        layerwise: bool = True,
        max_num_tokens: int = 64,
        num_blocks: tuple[int, int] = (100, 100),
        router: str | None = None,
    ) -> None:
        executors = tuple(
            ExecutorConfig(
                i,
                role,
                num_blocks[i - 1],
                tokens_per_block=4,
                scheduler=SchedulerConfig(max_num_tokens=max_num_tokens),
                report_interval=NEVER,
                layerwise=layerwise,
            )
            for i, role in enumerate((Role.CONTEXT, Role.GENERATION), 1)
        )
        spec = PolicySpec("round_robin")
        config = OrchestratorConfig(
            executors, spec, spec, router=None if router is None else PolicySpec(router), generation_binding=binding
        )
        self.rows: list[Any] = []
        self.logs: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        self.cluster = SimulatedCluster(
            config,
            ModelTiming(dict.fromkeys((1, 2), ConstantCost(800)), 10),
            kv_bytes_per_token=100,
            link_bytes_per_s=1e12 / ps_per_byte,
            records=self.rows.append,
            log_sink=lambda core: self.logs[core].append,
        )

    def run(self, *requests: tuple[int, int, int]) -> World:
        """(arrival, prompt tokens, output tokens) of each."""
        for i, (at, prompt, output) in enumerate(requests, 1):
            self.cluster.submit_at(at, Request(i, prompt, 5, arrival=at), output)
        self.cluster.run()
        return self

    @property
    def request(self) -> RequestRow:
        (row,) = [row for row in self.rows if isinstance(row, RequestRow)]
        return row

    @property
    def transfer(self) -> TransferRow:
        (row,) = [row for row in self.rows if isinstance(row, TransferRow)]
        return row


def kv_time(row: RequestRow) -> int:
    """The stage kv_transfer_time, as `reports/metrics.py` defines it."""
    assert row.first_token_ps is not None
    assert row.transfer_start_ps is not None
    assert row.kv_usable_ps is not None
    return row.kv_usable_ps - max(row.first_token_ps, row.transfer_start_ps)


def test_bound_when_the_context_is_done_all_of_the_kv_moves_after_it() -> None:
    # computed from 10 to 810, answered at 820, pulled at 830, asked at 840, 800 bytes at 2 ps each
    row = World("at_context_done", SLOW).run((0, 8, 5)).request
    assert (row.first_token_ps, row.transfer_start_ps, row.kv_usable_ps) == (820, 830, 2440)
    assert row.kv_transfer_overlap_ps is None
    assert kv_time(row) == 1610


def test_bound_at_arrival_a_slow_link_is_busy_from_the_first_layers_on() -> None:
    # asked at 20; the first group is written at 110, and from then on the link has always something to send: 8 x 200
    world = World("at_arrival", SLOW).run((0, 8, 5))
    row = world.request
    assert (row.first_token_ps, row.transfer_start_ps, row.kv_usable_ps) == (820, 10, 110 + 1600 + ROUNDED)
    assert row.kv_transfer_overlap_ps == 810 - 20
    assert kv_time(row) == 1711 - 820
    # the reader knows of the first token at 830
    assert (world.transfer.start_ps, world.transfer.end_ps, world.transfer.overlap_ps) == (10, 1711, 820)


def test_on_a_fast_link_only_the_last_layers_are_left_when_the_context_is_done() -> None:
    late = World("at_context_done", FAST).run((0, 8, 5)).request
    early = World("at_arrival", FAST).run((0, 8, 5)).request
    assert (late.kv_usable_ps, kv_time(late)) == (840 + 400, 410)
    assert (early.kv_usable_ps, kv_time(early)) == (810 + 50, 40)


def test_kv_that_is_all_there_waits_for_the_first_token() -> None:
    # at 0.05 ps a byte the last group is through at 815, the token comes at 830
    row = World("at_arrival", 0.05).run((0, 8, 5)).request
    assert row.kv_usable_ps == 830


def test_bound_at_context_start_the_destination_is_chosen_when_the_prompt_is_begun() -> None:
    # begun at 10, told at 20, promised at 30, asked at 40: before the first group is written
    row = World("at_context_start", SLOW).run((0, 8, 5)).request
    assert (row.transfer_start_ps, row.kv_usable_ps) == (30, 1711)
    assert row.kv_transfer_overlap_ps == 810 - 40


def test_a_reader_that_asks_in_mid_step_is_sent_at_once_what_is_written_by_then() -> None:
    """A second prompt, at 30, waits for the step from 810 to 1610; its promise is there, its reader served at 810."""
    world = World("at_arrival", FAST).run((0, 8, 5), (30, 8, 5))
    rows = {row.request_id: row for row in world.rows if isinstance(row, RequestRow)}
    assert rows[2].kv_usable_ps == 1610 + 50
    assert rows[2].kv_transfer_overlap_ps == 800
    # at context start: begun at 10 with a step of 40 ps, so that 3 of 8 groups are written when the question comes
    world = World("at_context_start", FAST)
    timing = ModelTiming(dict.fromkeys((1, 2), ConstantCost(80)), 10)
    world.cluster.timing = world.cluster.model = timing
    world.cluster.executors[1]._timing = world.cluster.executors[1]._model = timing
    row = world.run((0, 8, 5)).request
    assert row.kv_transfer_overlap_ps == 90 - 40
    # groups written at 20, 30, 40 share the link from 40 on; 400 ps of service in all, and never idle
    assert row.kv_usable_ps == 440 + ROUNDED


def test_without_layer_wise_sending_the_transfer_begins_when_the_context_ends() -> None:
    row = World("at_arrival", SLOW, layerwise=False).run((0, 8, 5)).request
    assert row.kv_usable_ps == 810 + 1600
    assert row.kv_transfer_overlap_ps is None
    assert kv_time(row) == 1590


def test_a_prompt_of_two_chunks_is_sent_chunk_by_chunk() -> None:
    # chunks of 4 tokens, 10 to 810 and 810 to 1610: groups of 50 bytes, 25 ps each
    row = World("at_arrival", FAST, max_num_tokens=4).run((0, 8, 5)).request
    assert row.kv_usable_ps == 1610 + 25
    assert row.kv_transfer_overlap_ps == 1610 - 20


@pytest.mark.parametrize("binding", ["at_arrival", "at_context_start"])
def test_early_binding_brings_the_second_token_forward_and_changes_nothing_before_the_first(binding: str) -> None:
    late, early = (World(name, SLOW).run((0, 8, 2)).request for name in ("at_context_done", binding))
    assert late.first_token_ps == early.first_token_ps
    assert late.end_ps - early.end_ps == 2440 - 1711


def test_a_cancelled_prompt_sends_nothing_more_and_its_reader_hears_of_it() -> None:
    world = World("at_arrival", SLOW, max_num_tokens=4)
    world.cluster.env.timeout(900).callbacks.append(lambda _: world.cluster.cancel(1))
    world.run((0, 8, 5))
    assert world.request.finish_reason == "cancelled"
    # the chunk in progress is computed to its end at 1610, and what was on the link by then goes through
    assert not world.transfer.ok
    assert world.transfer.end_ps < 10 + 800 * 3
    for executor in (1, 2):
        core = world.cluster.executors[executor].core.core
        assert core.visits == {}
        assert core.blocks.num_free == 100


@register("test_hold_the_first", kind="routing", source="tests")
class HoldTheFirst(RoutingPolicy):
    """Binds all but the first request early."""

    def route_context(self, request: Request, fleet: Any) -> Any:
        return Route(context=1)

    def route_generation(self, request: Request, fleet: Any) -> Any:
        if request.id == 1 and request.context_phase_params is None:
            return Hold()
        return Route(generation=2)


def test_two_requests_that_hold_what_the_other_waits_for_both_end() -> None:
    """The first one's KV fills the context executor; the promise to the second fills the generation executor."""
    world = World("at_arrival", SLOW, num_blocks=(2, 3), router="test_hold_the_first").run((0, 8, 5), (0, 8, 5))
    rows = {row.request_id: row for row in world.rows if isinstance(row, RequestRow)}
    assert {row.finish_reason for row in rows.values()} == {"stop"}
    assert {row.num_attempts for row in rows.values()} == {1}
    frames = list(read_log(b"".join(world.logs[1]))[1])
    assert [type(event) for frame in frames for event in frame.events].count(KvWithdrawn) == 1
    assert all(replay(b"".join(log)) for log in world.logs.values())
    assert rows[1].end_ps < 10**5  # not by any time-out


def test_without_taking_reservations_back_they_would_wait_for_a_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvReader, "withdraw", lambda reader: None)
    world = World("at_arrival", SLOW, num_blocks=(2, 3), router="test_hold_the_first").run((0, 8, 5), (0, 8, 5))
    rows = {row.request_id: row for row in world.rows if isinstance(row, RequestRow)}
    assert rows[1].end_ps > 10**14
