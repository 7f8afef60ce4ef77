"""Migration on views computed by hand, and what the orchestrator makes of an answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from disagg.core.commands import Send
from disagg.core.config import PolicySpec
from disagg.core.event_log import read_log
from disagg.core.events import MoveOut, Response
from disagg.policies.interfaces import PolicyError
from disagg.policies.vocabulary import Request
from tests.core_cases import make_moving_case, simulate
from tests.core_reference import run_reference
from tests.policy_views import BLOCK, fleet_of, made, report
from tests.simulation_helpers import World, executors
from tests.test_core_exactness import assert_equal_lives
from tests.test_core_faults import kill_generation

NUM_BLOCKS = 100


def moves(
    used: dict[int, int], prompts: dict[int, list[int]], waiting: tuple[int, ...] = (), **params: Any
) -> list[tuple[int, int]]:
    """(request, where to) with so many of 100 blocks used at each generation executor, and prompts of so many blocks there.

    A request's id is its executor's times 10, and its place there. At executors of `waiting` one waits for blocks.
    """
    fleet = fleet_of("c" + "g" * len(used), NUM_BLOCKS)
    for executor, blocks in used.items():
        queued = int(executor in waiting)
        report(
            fleet, executor, blocks_free=NUM_BLOCKS - blocks, decode_kv_tokens=blocks * BLOCK, queued_requests=queued
        )
    movable = {e: [Request(10 * e + i, n * BLOCK, BLOCK) for i, n in enumerate(each)] for e, each in prompts.items()}
    policy = made("pair_by_load", "migration", **params)
    return [(move.request_id, move.executor) for move in policy.migrate(fleet.at(0), movable)]


def test_the_most_loaded_gives_the_least_loaded_the_request_that_makes_them_most_alike() -> None:
    # 60 and 20 blocks: moving 22 leaves 38 and 42, moving 8 leaves 52 and 28, moving 45 leaves 15 and 65
    assert moves({2: 60, 3: 20}, {2: [8, 22, 45]}) == [(21, 3)]


def test_no_request_moves_that_would_only_change_who_is_the_most_loaded() -> None:
    assert moves({2: 60, 3: 20}, {2: [40]}) == []
    assert moves({2: 60, 3: 20}, {2: [39]}) == [(20, 3)]


def test_pairs_go_from_the_ends_inwards_and_those_that_are_close_are_left_alone() -> None:
    prompts = {e: [10] for e in (2, 3, 4, 5)}
    assert moves({2: 90, 3: 70, 4: 20, 5: 10}, prompts) == [(20, 5), (30, 4)]
    assert moves({2: 90, 3: 45, 4: 40, 5: 10}, prompts) == [(20, 5)]  # 45 and 40 differ by 0.05
    assert moves({2: 90, 3: 45, 4: 40, 5: 10}, {2: [], 3: [2]}, least_difference=0.0) == [(30, 4)]


def test_a_request_goes_only_where_all_of_its_kv_to_come_has_room() -> None:
    assert moves({2: 100, 3: 92}, {2: [4]}, least_difference=0.05) == [(20, 3)]  # 4 blocks, and one for its answer
    assert moves({2: 100, 3: 96}, {2: [4]}, least_difference=0.01) == []


def test_nothing_goes_where_others_wait_for_blocks() -> None:
    assert moves({2: 60, 3: 20, 4: 20}, {2: [8]}) == [(20, 3)]
    assert moves({2: 60, 3: 20, 4: 20}, {2: [8]}, waiting=(3,)) == []  # its partner is the least loaded, no other


def test_prompts_that_wait_or_run_at_a_mixed_executor_load_it_too() -> None:
    fleet = fleet_of("mm", NUM_BLOCKS)
    counts = {
        "decode_kv_tokens": 10 * BLOCK,
        "queued_prefill_tokens": 60 * BLOCK,
        "inflight_prefill_tokens": 20 * BLOCK,
    }
    report(fleet, 1, blocks_free=70, queued_requests=2, **counts)  # 90 blocks' worth, and 0: moving 10 leaves 80 and 10
    policy = made("pair_by_load", "migration")
    moved = policy.migrate(fleet.at(0), {1: [Request(7, 10 * BLOCK, BLOCK)]})
    assert [(move.request_id, move.executor) for move in moved] == [(7, 2)]


@pytest.mark.parametrize("params", [{"interval_s": 0}, {"least_difference": 2}])
def test_nonsense_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"pair_by_load.*{next(iter(params))}"):
        made("pair_by_load", "migration", **params)


WRONG = """
from disagg.policies import MigrationPolicy, MoveRequest


class ToTheContext(MigrationPolicy):
    interval_ps = 10**6

    def migrate(self, fleet, movable):
        return [MoveRequest(request.id, 1) for requests in movable.values() for request in requests]


class Strangers(ToTheContext):
    def migrate(self, fleet, movable):
        return [MoveRequest(99, 3)]


class Always(ToTheContext):
    interval_ps = 0


class Words(ToTheContext):
    def migrate(self, fleet, movable):
        return "later"
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ToTheContext", "another executor that serves generation"),
        ("Strangers", "it may move"),
        ("Words", "MoveRequest"),
    ],
)
def test_an_answer_that_can_never_be_obeyed_breaks_the_contract(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    world = World(
        executors("cgg"),
        router=PolicySpec("round_robin"),
        migration=PolicySpec(f"wrong.py:{name}"),
        policy_root=str(tmp_path),
    )
    world.submit(1, 0, 20, 10)
    with pytest.raises(PolicyError, match=f"{name} answered .*{told}"):
        world.run()


def test_a_policy_that_would_be_asked_without_end_in_one_instant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    with pytest.raises(PolicyError, match="Always: interval_ps is 0; allowed: at least 1"):
        World(
            executors("cgg"),
            router=PolicySpec("round_robin"),
            migration=PolicySpec("wrong.py:Always"),
            policy_root=str(tmp_path),
        )


def test_requests_that_move_again_and_again_do_what_the_naive_reference_says() -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        case = make_moving_case(Random(seed))
        for launch in ((1, 1, False), (1, 2, True)):
            case = replace(case, launch=launch)
            trace = simulate(case)
            assert_equal_lives(trace, run_reference(case))
            for frame in read_log(trace.logs[0])[1]:
                seen["told"] += sum(isinstance(c, Send) and isinstance(c.message, MoveOut) for c in frame.commands)
                params = [e.context_phase_params for e in frame.events if isinstance(e, Response)]
                seen["moved"] += sum(each is not None and each.num_generated > 1 for each in params)
    assert seen["moved"] > 150, seen


def test_each_request_ends_once_and_nothing_leaks_where_executors_die_while_requests_move() -> None:
    for seed in range(30):
        rng = Random(f"moves/{seed}")
        case = kill_generation(make_moving_case(rng), rng)
        if case is None:
            continue
        trace = simulate(case)
        ends = Counter(d.request_id for d in trace.delivered if d.finish_reason is not None)
        assert ends == Counter(request.id for _, request, _ in case.arrivals), seed
        dead = {executor for _, executor, _ in case.kills}
        cores = [trace.cluster.executors[e.id].core for e in case.config.executors if e.id not in dead]
        assert [getattr(core, "core", core).visits for core in cores] == [{}] * len(cores), seed
