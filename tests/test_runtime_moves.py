"""Running requests that go on at another executor, on real MPI processes: the same tokens, decisions that can be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from disagg.core.config import PolicySpec
from disagg.core.event_log import replay
from disagg.core.tables import DecisionRow, StayRow, TransferRow
from disagg.runtime.executor_spec import HardwareSpec, ModelSource
from disagg.runtime.hardware_run import HardwareResult, run_cluster
from disagg.simulator.recorded import Recording, conform
from tests.runtime_programs.clusters import cluster, context, generation, submissions
from tests.test_runtime_conformance import step_ends
from tests.tiny_models import SHAPES, prompts

pytestmark = pytest.mark.mpi
GRANTS, DEPTH = 2, 2
NUM_TOKENS = 40
RESTLESS = """
from disagg.policies import MigrationPolicy, MoveRequest


class ToAndFro(MigrationPolicy):
    '''Every 8 ms whatever generates at one executor goes to the other.'''

    interval_ps = 8 * 10**9

    def migrate(self, fleet, movable):
        other = {2: 3, 3: 2}
        return [MoveRequest(request.id, other[e]) for e in other for request in movable.get(e, ())]
"""


def served(spec: HardwareSpec) -> HardwareResult:
    texts = prompts(SHAPES["llama"], [5, 19, 12, 7, 23, 9], seed=5)
    result = run_cluster(spec, submissions(texts, NUM_TOKENS), timeout_s=120)
    assert isinstance(result, HardwareResult)
    assert [row.error for row in result.sends] == [None] * len(texts)
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[HardwareResult, HardwareResult]:
    """The same load where everybody stays, and where everybody moves again and again."""
    folder: Path = tmp_path_factory.mktemp("moves")
    (folder / "moves.py").write_text(RESTLESS)
    model = ModelSource(SHAPES["llama"], seed=3)
    spec = cluster(
        model, [context(), generation(), generation()], steps_per_grant=GRANTS, pipeline_depth=DEPTH, plan_ahead=True
    )
    moving = replace(spec.orchestrator, migration=PolicySpec("moves.py:ToAndFro"), policy_root=str(folder))
    return served(cluster(model, [context(), generation()])), served(replace(spec, orchestrator=moving))


def test_requests_that_moved_while_they_ran_have_the_tokens_of_those_that_stayed(
    results: tuple[HardwareResult, HardwareResult],
) -> None:
    stayed, moved = results
    assert [row.token_ids for row in moved.sends] == [row.token_ids for row in stayed.sends]
    assert {len(row.token_ids) for row in moved.sends} == {NUM_TOKENS}
    told = [row for row in moved.rows if isinstance(row, DecisionRow) and row.stage == "migration"]
    stays = [row for row in moved.rows if isinstance(row, StayRow) and row.stage == "generation"]
    transfers = [row for row in moved.rows if isinstance(row, TransferRow)]
    assert len(told) >= len(stays) - len(moved.sends) > len(moved.sends)  # most moved more than once
    assert len(transfers) == len(stays)
    assert sum(row.num_tokens for row in stays) == len(moved.sends) * (NUM_TOKENS - 1)
    assert all(row.ok for row in transfers)
    assert max(row.num_tokens for row in transfers) > 23  # of more than a prompt


def test_what_moved_can_be_replayed_and_simulated_on_its_own_times(
    results: tuple[HardwareResult, HardwareResult],
) -> None:
    _, moved = results
    for log in moved.logs.values():
        assert replay(log) > 6
    assert conform(Recording(moved.logs, step_ends(moved)), dict.fromkeys((1, 2, 3), (GRANTS, DEPTH, True))) > 100
