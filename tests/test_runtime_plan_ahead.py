"""Plans made ahead of the step that runs, on real clusters: the same tokens, the same decisions as the simulator's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.commands import RunSteps
from disagg.core.config import ExecutorConfig, SchedulerConfig
from disagg.core.event_log import Frame, read_log, replay, replay_frames
from disagg.core.events import StepsCommitted, StepsDone
from disagg.core.executor import ExecutorCore
from disagg.policies.vocabulary import PS_PER_MS, Request
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.hardware_run import Fault, HardwareResult, LoadPhase, PlannedSubmission
from disagg.runtime.weights import write_random_checkpoint
from disagg.simulator.recorded import ConformanceDifference, Recording, conform
from tests.run_until_shown import run_until_shown
from tests.runtime_programs.clusters import Layout, cluster, context, generation, mixed, num_instants
from tests.tiny_models import SHAPES, oracle, prompts
from tests.warm_world import run_cluster

pytestmark = pytest.mark.mpi
SHAPE = SHAPES["llama"]
NUM_TOKENS = 24
LENGTHS = (1, 3, 9, 20, 2, 14, 6, 24, 17, 5, 8, 12)
PROMPTS = prompts(SHAPE, [5, 19, 12, 7, 23, 9, 14, 6, 11, 16, 8, 13], seed=5)
TIGHT = SchedulerConfig(max_batch_size=8, max_num_tokens=16, capacity="max_utilization")


class Known:
    """The model on disk, and what transformers says to each prompt."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_random_checkpoint(folder / SHAPE.name, SHAPE, seed=3)
        self.model = ModelSource(folder=str(self.folder), dtype="float32")
        self.answers = [tuple(oracle(self.folder, prompt, NUM_TOKENS)[0]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known(tmp_path_factory.mktemp("model"))


def scripted(every_ms: float = 4.0, max_tokens: int = NUM_TOKENS) -> tuple[LoadPhase, ...]:
    """Requests that the world ends at `LENGTHS`, one of them at its max_tokens too."""
    return (
        LoadPhase(
            tuple(
                PlannedSubmission(
                    Request(i, len(text), max_tokens, input_token_ids=text), round(i * every_ms * PS_PER_MS), length
                )
                for i, (text, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True), 1)
            )
        ),
    )


def run(
    model: ModelSource,
    layouts: Sequence[Layout],
    phases: tuple[LoadPhase, ...],
    launch: tuple[int, int],
    faults: Sequence[Fault] = (),
) -> HardwareResult:
    spec = cluster(model, layouts, steps_per_grant=launch[0], pipeline_depth=launch[1], plan_ahead=True)
    result = run_cluster(replace(spec, verify_kv=False, record_margins=False), phases, faults=faults, timeout_s=120)
    assert isinstance(result, HardwareResult)
    return result


def frames(result: HardwareResult, core: int) -> list[Frame]:
    return list(read_log(result.logs[core])[1])


def count_queued(frames: Sequence[Frame]) -> int:
    """Plans that were ordered while steps of the plan before them were still to run."""
    num_queued = 0
    certain: set[int] = set()
    for frame in frames:
        certain |= {event.plan for event in frame.events if isinstance(event, StepsCommitted)}
        certain -= {event.plan for event in frame.events if isinstance(event, StepsDone)}
        num_queued += bool(certain) and any(isinstance(command, RunSteps) for command in frame.commands)
    return num_queued


def check_replay_and_conformance(result: HardwareResult, num_executors: int, launch: tuple[int, int]) -> Recording:
    for core in range(num_executors + 1):
        assert replay(result.logs[core]) == len(frames(result, core))
    ends: dict[tuple[int, int], list[int]] = {}
    for executor, steps in result.step_ends.items():
        for epoch, _, at in sorted(steps):
            ends.setdefault((executor, epoch), []).append(at)
    recording = Recording(result.logs, ends)
    depths = dict.fromkeys(range(1, num_executors + 1), (*launch, True))
    assert conform(recording, depths) == num_instants(result.logs)
    return recording


def check_nothing_is_left(result: HardwareResult, executors: Sequence[int]) -> None:
    for executor in executors:
        header, logged = read_log(result.logs[executor])
        assert isinstance(header.executor, ExecutorConfig)
        core = ExecutorCore(header.executor, header.policy_root)
        replay_frames(core, logged)
        core.check()
        assert core.visits == {}
        assert not core.scheduler.tails
        assert core.blocks.num_free == header.executor.num_blocks


CLUSTERS = {
    "mixed": ([mixed()], (1, 2)),
    "mixed, three steps a grant": ([mixed()], (3, 2)),
    "1 + 1": ([context(), generation()], (1, 2)),
    "1 + 1, depth 3": ([context(), generation()], (1, 3)),
    "to tp 2, few blocks": ([context(), generation(tp=2, scheduler=TIGHT, num_blocks=20)], (3, 2)),
    "to pp 2": ([context(), generation(pp=2)], (1, 2)),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_tokens_are_those_of_transformers_and_the_simulator_makes_the_same_plans_at_the_same_instants(
    known: Known, name: str
) -> None:
    layouts, launch = CLUSTERS[name]

    def one_run() -> HardwareResult:
        done = run(known.model, layouts, scripted(), launch)
        assert [row.token_ids for row in done.sends] == [a[:n] for a, n in zip(known.answers, LENGTHS, strict=True)]
        return done

    result = run_until_shown(one_run, lambda done: count_queued(frames(done, len(layouts))), "was a plan queued")
    recording = check_replay_and_conformance(result, len(layouts), launch)
    with pytest.raises(ConformanceDifference):  # the comparison sees whether plans were made ahead
        conform(recording, dict.fromkeys(range(1, len(layouts) + 1), launch))
    check_nothing_is_left(result, range(1, len(layouts) + 1))


def test_a_stop_token_found_in_a_committed_step_ends_the_sequence_there(known: Known) -> None:
    """Every prompt twice: one copy runs into its end id, its twin goes on, and neither disturbs the other."""
    wanted = []
    submissions = []
    for i, (text, answer) in enumerate(zip(PROMPTS, known.answers, strict=True)):
        at = next(k for k in range(2 + i, NUM_TOKENS) if answer[k] not in answer[:k])
        for id, end, tokens in ((2 * i + 1, answer[at], answer[: at + 1]), (2 * i + 2, None, answer)):
            request = Request(id, len(text), NUM_TOKENS, input_token_ids=text, end_id=end)
            submissions.append(PlannedSubmission(request, i * 3 * PS_PER_MS))
            wanted.append(tokens)

    def one_run() -> HardwareResult:
        done = run(known.model, [context(), generation(num_blocks=400)], (LoadPhase(tuple(submissions)),), (1, 3))
        assert [row.token_ids for row in done.sends] == wanted
        return done

    def stops(done: HardwareResult, kind: type) -> list[Any]:
        return [s for f in frames(done, 2) for e in f.events if isinstance(e, kind) for s in e.stopped]

    result = run_until_shown(
        one_run,
        lambda done: stops(done, StepsCommitted) and stops(done, StepsDone),
        "was one stop told with the commitment and another with the end",
    )
    check_replay_and_conformance(result, 2, (1, 3))
    check_nothing_is_left(result, [1, 2])


def test_a_killed_executor_is_survived_by_one_that_plans_ahead(known: Known) -> None:
    layouts = [context(), generation(num_blocks=400), generation(num_blocks=400)]
    result = run(known.model, layouts, scripted(15.0), (1, 2), [Fault(3, 90 * PS_PER_MS)])
    assert [row.token_ids for row in result.sends] == [a[:n] for a, n in zip(known.answers, LENGTHS, strict=True)]
    check_nothing_is_left(result, [1, 2])
