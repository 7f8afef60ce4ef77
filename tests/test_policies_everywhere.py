"""Every registered policy runs: alone in simulations of several clusters, and all in one run on real executors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest

from disagg.core.config import PolicySpec
from disagg.core.event_log import replay
from disagg.core.fleet import Fleet
from disagg.core.prediction import PredictionConfig, step_times
from disagg.policies import registry
from disagg.policies.views import ExecutorRow
from disagg.policies.vocabulary import PS_PER_MS, Request
from tests.every_policy import PARAMS, names
from tests.simulation_helpers import COST, World, executors, named

ROOT = Path(__file__).resolve().parent.parent
DISAGG = Path(sys.executable).with_name("disagg")
CATALOGUE = {
    "routing": """round_robin random least_requests least_tokens power_of_two least_kv cache_aware bucket prefix_hash
        bounded_hash kv_cache_aware conversation kv_cost lmetric weighted_scorers slo_headroom mooncake mixed_pool
        remaining_steps adaptive_decode topology oracle conditional_tensorrt_llm conditional_llm_d conditional_dynamo""",
    "admission": "accept_all hold_when_full reject_at_limit early_rejection shed_sheddable",
    "queue_order": "fcfs priority shortest_prompt_first wspt lcfs edf deficit_round_robin",
    "batching": "chunked_prefill prefill_first context_fcfs generation_pull",
    "capacity": "guaranteed_no_evict max_utilization",
    "roles": "scheduled mixed_pool switch_by_load rate_matching planner",
    "migration": "pair_by_load",
}


def world(
    roles: str,
    /,
    num_requests: int = 40,
    order: str = "fcfs",
    scheduler: Mapping[str, Any] | None = None,
    **config: Any,
) -> World:
    """Sessions with growing prompts, two classes, objectives that are met, a request each 0.02 ms; run to the end.

    `order` is that of the executors' own queues, `scheduler` what else their schedulers have.
    """
    limits: dict[str, Any] = {"num_blocks": 400, "max_batch_size": 4, "max_num_tokens": 256, **(scheduler or {})}
    fleet = executors(roles, queue_order=PolicySpec(order), **limits)
    tables = (step_times(COST, 256, 4),)
    prediction = PredictionConfig(tables, (0,) * len(fleet))
    made = World(fleet, prediction=prediction, **config)
    draw = Random(3)
    turns: dict[int, int] = {}
    for i in range(1, num_requests + 1):
        session = draw.randrange(6)
        blocks = turns[session] = turns.get(session, 1) + 2
        made.submit(
            i,
            i * 20_000_000,
            blocks * 16 + draw.randrange(1, 16),
            draw.randint(1, 20),
            session=str(session),
            traffic_class="ab"[session % 2],
            priority=0.1 * session,
            ttft_objective=1000 * PS_PER_MS,
            tpot_objective=1000 * PS_PER_MS,
            block_hashes=tuple(100 * session + j for j in range(blocks)),
        )
    return made.run()


def check(made: World, num_requests: int = 40) -> None:
    """Every request has ended once, as the world wanted, and replay gives the same commands."""
    ends = [deliver.request_id for deliver in made.delivered if deliver.finish_reason is not None]
    assert sorted(ends) == list(range(1, num_requests + 1))
    rows = made.table("Request")
    assert {row.finish_reason for row in rows} == {"stop"}, [row.error for row in rows]
    assert replay(b"".join(made.logs[0])) == len(made.frames(0))


def test_every_row_of_the_catalogue_is_registered_with_a_source() -> None:
    for kind, row in CATALOGUE.items():
        assert set(row.split()) == set(names(kind))
    done = subprocess.run([DISAGG, "list", "policies", "--format", "json"], capture_output=True, text=True, check=True)
    listed = {(row["kind"], row["name"]) for row in json.loads(done.stdout) if row["source"] and row["summary"]}
    assert {(kind, name) for kind, row in CATALOGUE.items() for name in row.split()} <= listed


@pytest.mark.parametrize("roles", ["ccggm", "ccgg", "mmm"])
@pytest.mark.parametrize("name", names("routing"))
def test_each_router_serves_a_cluster(name: str, roles: str) -> None:
    check(world(roles, router=PolicySpec(name, PARAMS.get(name, {}))))


@pytest.mark.parametrize("binding", ["at_arrival", "at_context_start"])
@pytest.mark.parametrize("name", ["topology", "mixed_pool", "kv_cost", "mooncake", "oracle", "conversation"])
def test_routers_that_look_at_both_phases_bind_early(name: str, binding: str) -> None:
    for roles in ("ccgg", "mmm"):
        check(world(roles, router=PolicySpec(name), generation_binding=binding))


@pytest.mark.parametrize("binding", ["at_arrival", "at_context_start", "at_context_done"])
def test_the_generation_stage_is_told_where_the_context_phase_is(binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    class Near(registry.load("least_kv", "routing")):  # type: ignore[misc]
        def route_context(self, request: Any, fleet: Any) -> Any:
            assert fleet.context_executor is None
            return super().route_context(request, fleet)

        def route_generation(self, request: Any, fleet: Any) -> Any:
            asked.append((request.id, fleet.context_executor))
            return super().route_generation(request, fleet)

    made = world("ccg", router=named(monkeypatch, Near), generation_binding=binding)
    assert dict(asked) == {
        row.request_id: row.context_executor for row in made.table("Request") if row.generation_executor
    }


@pytest.mark.parametrize("name", names("routing"))
def test_each_router_serves_a_cluster_whose_roles_change(name: str) -> None:
    changes = [
        (1, "mixed"),
        (5, "context"),
        (4, "mixed"),
        (1, "generation"),
        (2, "parked"),
        (5, "mixed"),
        (1, "context"),
    ]
    schedule = [{"at_s": 1e-4 * i, "executor": e, "role": role} for i, (e, role) in enumerate(changes, 1)]
    roles = PolicySpec("scheduled", {"changes": schedule})
    made = world("ccggm", router=PolicySpec(name, PARAMS.get(name, {})), roles=roles)
    check(made)
    decided = [(row.executor, row.answer) for row in made.table("Decision") if row.stage == "role"]
    assert [each for each in decided if each[1] != "drained"] == changes


@pytest.mark.parametrize("roles", ["ccgg", "ccggm"])
@pytest.mark.parametrize("name", names("roles"))
def test_each_role_policy_changes_roles_of_a_cluster_that_serves_on(name: str, roles: str) -> None:
    made = world(
        roles, router=PolicySpec("mixed_pool", PARAMS["mixed_pool"]), roles=PolicySpec(name, PARAMS.get(name, {}))
    )
    check(made)
    assert [row for row in made.table("Decision") if row.stage == "role"], "it was never of another mind"


@pytest.mark.parametrize("roles", ["cccggg", "ccgm", "mmm"])
@pytest.mark.parametrize("name", names("migration"))
def test_each_migration_policy_moves_requests_of_a_cluster_that_serves_on(name: str, roles: str) -> None:
    params = {"interval_s": 1e-5, "least_difference": 0.0}
    made = world(roles, router=PolicySpec("random"), migration=PolicySpec(name, params))
    check(made)
    told = [row for row in made.table("Decision") if row.stage == "migration"]
    stays = Counter(row.request_id for row in made.table("Stay") if row.stage != "context" and row.num_tokens)
    assert told
    assert max(stays.values()) > 1, "nothing has moved"


@pytest.mark.parametrize("name", names("admission"))
def test_each_admission_policy_serves_a_cluster(name: str) -> None:
    check(world("cg", admission=PolicySpec(name, PARAMS.get(name, {}))))


@pytest.mark.parametrize("name", names("queue_order"))
def test_each_queue_order_serves_a_cluster_that_holds_requests(name: str) -> None:
    made = world("cg", admission=PolicySpec("hold_when_full", {"max_active": 1}), queue_order=PolicySpec(name))
    check(made)
    held = [row for row in made.table("Decision") if row.answer == "hold"]
    assert held, "nothing was held: the order was never used"


@pytest.mark.parametrize("name", names("queue_order"))
def test_each_queue_order_serves_the_queue_of_an_executor(name: str) -> None:
    check(world("cg", order=name))


@pytest.mark.parametrize("roles", ["cg", "cgm"])
@pytest.mark.parametrize("name", names("batching"))
def test_each_batching_policy_serves_executors_of_every_role(name: str, roles: str) -> None:
    for capacity in names("capacity"):
        scheduler = {"batching": PolicySpec(name, PARAMS.get(name, {})), "capacity": capacity, "num_blocks": 80}
        made = world(roles, scheduler=scheduler, router=PolicySpec("mixed_pool", PARAMS["mixed_pool"]))
        check(made)


def test_an_oracle_is_told_true_lengths_and_nobody_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, set[Any]] = {}

    def watch(policy: type) -> type:
        class Watching(policy):  # type: ignore[misc, valid-type]
            def route_generation(self, request: Any, fleet: Any) -> Any:
                told.setdefault(policy.__name__, set()).add(request.true_output_tokens)
                return super().route_generation(request, fleet)

        Watching.__name__ = f"Watching{policy.__name__}"
        return Watching

    for name in ("oracle", "least_kv"):
        router = named(monkeypatch, watch(registry.load(name, "routing")))
        made = World(executors("cg"), context_router=PolicySpec("round_robin"), generation_router=router)
        made.submit(1, 0, 100, 7, true_output_tokens=7)
        made.run()
        sent = [frame for core in (1, 2) for frame in made.frames(core) for event in frame.events
                if getattr(getattr(event, "request", None), "true_output_tokens", None) is not None]  # fmt: skip
        assert not sent
        assert replay(b"".join(made.logs[0])) == len(made.frames(0))
    assert told == {"Oracle": {7}, "LeastKv": {None}}


COLUMNWISE = [
    "least_tokens",
    "cache_aware",
    "kv_cost",
    "lmetric",
    "weighted_scorers",
    "slo_headroom",
    "remaining_steps",
]


@pytest.mark.parametrize("name", [*COLUMNWISE, "kv_cache_aware", "mooncake", "topology", "conversation"])
def test_a_thousand_executors_are_scored_as_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that goes through rows one by one takes a hundred times as long."""
    fleet = Fleet(executors("m" * 1000), 0)
    request = Request(1, 100, 8, block_hashes=(1, 2, 3), ttft_objective=10**12, tpot_objective=10**12)
    policy = registry.create(name, "routing", {}, seed="1")
    num_read = 0

    def counting(row: Any, attribute: str) -> Any:
        nonlocal num_read
        num_read += 1
        return object.__getattribute__(row, attribute)

    monkeypatch.setattr(ExecutorRow, "__getattribute__", counting)
    for _ in range(3):
        policy.route_context(request, fleet.at(0))
    assert num_read < 500


EXPERIMENT = """\
schema_version: 1
name: every
seed: 1
model: {id: tiny-llama, dtype: float32}
device: cpu
cluster:
  profile: spec:cpu-2core
  instances:
    - role: context
      kv_cache: {tokens_per_block: 16, max_tokens: 4096}
      scheduler: {batching: context_fcfs, queue_order: deficit_round_robin}
      domain: a
    - role: generation
      kv_cache: {tokens_per_block: 16, max_tokens: 4096}
      scheduler: {batching: generation_pull, capacity: max_utilization, queue_order: deficit_round_robin}
      domain: a
    - role: mixed
      kv_cache: {tokens_per_block: 16, max_tokens: 4096}
      scheduler: {batching: prefill_first}
      domain: b
      device_weight: 0.5
  cache_transceiver: {backend: mpi}
policy:
  router: "every_policy.py:EveryRouter"
  roles: "every_policy.py:EveryRoles"
  admission: "every_policy.py:EveryAdmission"
  queue_order: "every_policy.py:EveryOrder"
workload:
  dataset:
    type: synthetic
    isl: {mean: 24, stddev: 8}
    osl: {min: 1, max: 6}
    shared_prefixes: {groups: 2, length: 40}
    sessions: {concurrent: 6, turns: 3, turn_isl: 10}
    classes: [{name: a}, {name: b, priority: 0.9}]
  max_tokens: 8
  phases:
    - {name: profiling, type: poisson, rate: 12, requests: 75}
slo: {ttft_ms: 100000, tpot_ms: 100000}
"""


@pytest.mark.mpi
def test_every_policy_decides_in_one_run_on_real_executors(disagg: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "every_policy.py").write_text((ROOT / "tests" / "every_policy.py").read_text())
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    for backend in ("simulation", "hardware"):
        assert disagg("run", tmp_path / "experiment.yaml", "--backend", backend, "--output", tmp_path / backend) == 0
        requests = pd.read_parquet(tmp_path / backend / "requests.parquet")
        assert len(requests) == 75
        assert set(requests["finish_reason"]) == {"stop"}
        manifest = json.loads((tmp_path / backend / "manifest.json").read_text())
        assert manifest["oracle"] is True
        decisions = pd.read_parquet(tmp_path / backend / "decisions.parquet")
        assert {"mixed", "generation", "context"} & set(decisions[decisions["stage"] == "role"]["answer"])
        assert set(requests["session"].value_counts()) <= {1, 2, 3}
    for command in ("replay", "conform"):
        assert disagg(command, tmp_path / "hardware", "--json") == 0
