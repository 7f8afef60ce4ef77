"""When a request that is served whole by one executor is said to have its first token: by hand, and once."""

from __future__ import annotations

from typing import Any

from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, SchedulerConfig
from disagg.core.cost import ConstantCost
from disagg.core.tables import RequestRow
from disagg.policies.vocabulary import Request, Role
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.timing import ModelTiming

STEP, MESSAGE, NEVER = 800, 10, 10**15


def row_of(max_num_tokens: int = 64, streaming: bool = True) -> RequestRow:
    """One request of 8 prompt tokens and 5 output tokens on a mixed executor whose steps take 800 ps."""
    executor = ExecutorConfig(
        1,
        Role.MIXED,
        100,
        tokens_per_block=4,
        scheduler=SchedulerConfig(max_num_tokens=max_num_tokens),
        report_interval=NEVER,
    )
    rows: list[Any] = []
    cluster = SimulatedCluster(
        OrchestratorConfig((executor,), mixed_router=PolicySpec("round_robin")),
        ModelTiming({1: ConstantCost(STEP)}, MESSAGE),
        kv_bytes_per_token=100,
        link_bytes_per_s=1e12,
        records=rows.append,
    )
    cluster.submit_at(0, Request(1, 8, 5, streaming=streaming), 5)
    cluster.run()
    (row,) = [row for row in rows if isinstance(row, RequestRow)]
    return row


def test_the_first_token_is_out_a_message_after_the_step_that_ends_the_prompt() -> None:
    row = row_of()
    assert row.first_token_ps == MESSAGE + STEP + MESSAGE
    assert row.end_ps == MESSAGE + 5 * STEP + MESSAGE


def test_a_prompt_in_two_chunks_has_its_first_token_a_step_later() -> None:
    assert row_of(max_num_tokens=4).first_token_ps == MESSAGE + 2 * STEP + MESSAGE


def test_without_streaming_the_first_token_comes_with_the_last() -> None:
    row = row_of(streaming=False)
    assert row.first_token_ps == row.end_ps
