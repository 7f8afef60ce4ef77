"""Running requests that go on at another executor, on real MPI processes: the same tokens, decisions that can be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from disagg.core.config import PolicySpec
from disagg.core.event_log import replay
from disagg.core.tables import DecisionRow, StayRow, TransferRow
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import HardwareResult
from disagg.runtime.launcher import launch
from disagg.simulator.recorded import Recording, conform
from tests.run_until_shown import run_until_shown
from tests.runtime_programs.clusters import cluster, context, generation, num_instants, submissions
from tests.test_runtime_conformance import step_ends
from tests.tiny_models import SHAPES, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
GRANTS, DEPTH = 2, 2
NUM_TOKENS = 40
MOVED = 6  # requests 1 to 6 move, 7 to 12 ask the same and stay
RESTLESS = f"""
from disagg.policies import MigrationPolicy, MoveRequest


class ToAndFro(MigrationPolicy):
    '''Every 8 ms the first requests go from one executor to the other.'''

    interval_ps = 8 * 10**9

    def migrate(self, fleet, movable):
        other = {{2: 3, 3: 2}}
        return [MoveRequest(r.id, other[e]) for e in other for r in movable.get(e, ()) if r.id <= {MOVED}]
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> HardwareResult:
    folder: Path = tmp_path_factory.mktemp("moves")
    (folder / "moves.py").write_text(RESTLESS)
    layouts = [context(), generation(), generation()]
    model = ModelSource(SHAPES["llama"], seed=3)
    spec = cluster(model, layouts, steps_per_grant=GRANTS, pipeline_depth=DEPTH, plan_ahead=True)
    moving = replace(spec.orchestrator, migration=PolicySpec("moves.py:ToAndFro"), policy_root=str(folder))
    texts = prompts(SHAPES["llama"], [5, 19, 12, 7, 23, 9], seed=5)

    def one_run() -> HardwareResult:
        done = run_cluster(replace(spec, orchestrator=moving), submissions(texts * 2, NUM_TOKENS), timeout_s=120)
        assert isinstance(done, HardwareResult)
        return done

    return run_until_shown(one_run, lambda done: len(generations(done)) > 2 * MOVED, "did a request move")


def generations(result: HardwareResult) -> list[StayRow]:
    """Stays of generation phases: one for each request, and another for each move."""
    return [row for row in result.rows if isinstance(row, StayRow) and row.stage == "generation"]


def test_requests_that_move_while_they_run_have_the_tokens_of_those_that_stay(result: HardwareResult) -> None:
    assert [row.error for row in result.sends] == [None] * 2 * MOVED
    tokens = [row.token_ids for row in result.sends]
    assert tokens[:MOVED] == tokens[MOVED:]
    assert {len(each) for each in tokens} == {NUM_TOKENS}
    told = [row for row in result.rows if isinstance(row, DecisionRow) and row.stage == "migration"]
    stays = generations(result)
    transfers = [row for row in result.rows if isinstance(row, TransferRow)]
    assert len(told) >= len(stays) - 2 * MOVED > 0  # how often, the speed of the machine decides
    assert len([row for row in stays if row.request_id is not None and row.request_id > MOVED]) == MOVED
    assert sum(row.num_tokens for row in stays) == 2 * MOVED * (NUM_TOKENS - 1)
    assert len(transfers) == len(stays)
    assert all(row.ok for row in transfers)
    assert max(row.num_tokens for row in transfers) > 23  # of more than a prompt


def test_what_moved_can_be_replayed_and_simulated_on_its_own_times(result: HardwareResult) -> None:
    assert sum(replay(log) for log in result.logs.values()) == num_instants(result.logs)
    launch = dict.fromkeys((1, 2, 3), (GRANTS, DEPTH, True))
    assert conform(Recording(result.logs, step_ends(result)), launch) == num_instants(result.logs)


def test_a_request_that_is_cancelled_or_loses_either_executor_while_it_moves_ends_once_and_right(
    tmp_path: Path,
) -> None:
    """The program checks itself; it orders the moves, and hangs upon each what happens to it at that moment."""
    root = Path(__file__).parent.parent
    with (tmp_path / "output").open("wb") as output:
        program = str(root / "tests" / "runtime_programs" / "moving.py")
        code = launch(program, (), 6, env={"PYTHONPATH": str(root)}, timeout_s=120, stdout=output, stderr=output)
    said = (tmp_path / "output").read_text(errors="replace")
    assert code == 0, said
    assert "all is well" in said
