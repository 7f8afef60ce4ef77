"""Small simulated clusters for tests, and `python -m tests.simulation_helpers FIRST LAST`: the hash of random runs."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from disagg.core.commands import Deliver, Dispatched
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, RetryConfig, SchedulerConfig
from disagg.core.cost import ConstantCost
from disagg.core.event_log import Frame, read_log
from disagg.core.overheads import LaunchGaps, MessageLatency
from disagg.policies import registry
from disagg.policies.vocabulary import PS_PER_MS, PS_PER_S, PS_PER_US, Request, Role
from disagg.simulator import ModelTiming, SimulatedCluster

ROOT = Path(__file__).resolve().parent.parent
ROLES = {"c": Role.CONTEXT, "g": Role.GENERATION, "m": Role.MIXED}
# picoseconds: the time of a step does not depend on its KV, so all steps of an epoch take equally long
COST = ConstantCost(a=1_000_003, b=10_007, d=1_009)


def named(monkeypatch: Any, policy: type, kind: str = "routing", **params: Any) -> PolicySpec:
    """The name under which a class of a test can stand in a config, for as long as the test lasts."""
    info = registry.PolicyInfo(f"test:{policy.__name__}", kind, "a test", "", policy)
    monkeypatch.setitem(registry._registry, (kind, info.name), info)
    return PolicySpec(info.name, params)


def executors(roles: str, **settings: Any) -> tuple[ExecutorConfig, ...]:
    """One executor per letter of `roles` (c, g, m), numbered from 1; `settings` are its own or its scheduler's."""
    of_scheduler = {k: settings.pop(k) for k in list(settings) if k in SchedulerConfig.__struct_fields__}
    settings = {"num_blocks": 1000, "tokens_per_block": 16, **settings}
    scheduler = SchedulerConfig(**of_scheduler)
    return tuple(ExecutorConfig(i, ROLES[role], scheduler=scheduler, **settings) for i, role in enumerate(roles, 1))


class World:
    """A simulated cluster that keeps everything it leaves behind.

    `is_late`: whether cores hear at their instants, or late, what nobody waits for; None: as a user's cluster does.
    """

    def __init__(
        self,
        fleet: tuple[ExecutorConfig, ...] | str,
        *,
        cost: Any = COST,
        latency: int | MessageLatency = 50 * PS_PER_US,
        jitter: float = 0.0,
        link_bytes_per_s: float = 1e12,
        link_latency: int = 0,
        kv_bytes_per_token: int = 1000,
        launch: tuple[int, int] | tuple[int, int, bool] | None = None,
        is_late: bool | None = None,
        is_logged: bool = True,
        gaps: LaunchGaps | None = None,
        **config: Any,
    ) -> None:
        fleet = executors(fleet) if isinstance(fleet, str) else fleet
        if "router" not in config:
            config = {
                "context_router": PolicySpec("round_robin"),
                "generation_router": PolicySpec("round_robin"),
                **config,
            }
        self.rows: list[Any] = []
        self.delivered: list[Deliver] = []
        self.logs: dict[int, list[bytes]] = {i: [] for i in range(len(fleet) + 1)}
        timing = ModelTiming(
            {e.id: cost for e in fleet}, latency, jitter, gaps=None if gaps is None else {e.id: gaps for e in fleet}
        )
        if is_late is not None:
            timing.may_be_late = is_late
        self.cluster = SimulatedCluster(
            OrchestratorConfig(fleet, **config),
            timing,
            kv_bytes_per_token=kv_bytes_per_token,
            link_bytes_per_s=link_bytes_per_s,
            link_latency=link_latency,
            launch=None if launch is None else {e.id: launch for e in fleet},
            records=self.rows.append,
            delivered=self.delivered.append,
            log_sink=(lambda core: self.logs[core].append) if is_logged else None,
            users_act=None if is_late is None else not is_late,
        )

    def submit(self, request_id: int, at: int, prompt: int, length: int, max_tokens: int = 64, **fields: Any) -> None:
        """A request sent at `at` (picoseconds) that the world ends after `length` tokens."""
        self.cluster.submit_at(at, Request(request_id, prompt, max_tokens, arrival=at, **fields), length)

    def run(self) -> World:
        """Run to the end and check that nothing is left in any living core."""
        self.cluster.run()
        for executor in self.cluster.executors.values():
            core = getattr(executor.core, "core", executor.core)
            core.check()
            if executor.is_alive and (core.visits or core.blocks.num_free != core.config.num_blocks):
                raise RuntimeError(f"executor {executor.id} still has {list(core.visits)}")
        return self

    def table(self, name: str) -> list[Any]:
        """The rows of one table (`Request`, `Stay`, `Step`, `Transfer`, `Decision`) in order of writing."""
        return [row for row in self.rows if type(row).__name__ == f"{name}Row"]

    def frames(self, core: int) -> list[Frame]:
        return list(read_log(b"".join(self.logs[core]))[1])

    def users_of(self) -> dict[int, int]:
        """The user's request id of each executor-level id."""
        commands = [c for frame in self.frames(0) for c in frame.commands if isinstance(c, Dispatched)]
        return {c.executor_request.id: c.request_id for c in commands}

    def rows_in_order(self) -> list[str]:
        return sorted(map(repr, self.rows))

    def digest(self) -> str:
        """A hash of every core's event log."""
        digest = hashlib.blake2b(digest_size=16)
        for core in sorted(self.logs):
            digest.update(b"".join(self.logs[core]))
        return digest.hexdigest()


def random_world(
    seed: int,
    lengths: Mapping[int, int] | None = None,
    *,
    faults: bool = True,
    is_late: bool | None = None,
    is_logged: bool = True,
    prompt_token: int = 0,
) -> World:
    """A cluster and a load drawn from `seed`. `lengths` replaces hidden output lengths, and nothing else.

    `prompt_token`: picoseconds that a message to an executor takes longer for each token of its prompt.
    """
    draw = random.Random(seed)
    roles = draw.choice(["cg", "ccg", "cgg", "m", "mm", "ccgg", "cgm"])
    routers = ["round_robin", "random", "least_requests", "least_tokens", "power_of_two", "least_kv"]
    fleet = executors(
        roles,
        num_blocks=draw.choice([24, 60, 200]),
        max_batch_size=draw.choice([2, 8]),
        max_num_tokens=draw.choice([64, 256]),
        capacity=draw.choice(["guaranteed_no_evict", "max_utilization"]),
        report_interval=draw.choice([PS_PER_MS, PS_PER_MS // 20]),
        report_on_batch_change=draw.random() < 0.5,
        lease=draw.choice([PS_PER_MS, 8 * PS_PER_MS, 10 * PS_PER_S]),
        seed=seed,
    )
    gaps = LaunchGaps(*(i * PS_PER_US for i in range(1, 10)))
    if seed % 2 == 0:
        gaps = replace(gaps, millionths_under_load=200_000, load_after=PS_PER_MS // 5, load_drain=1)
    latency = draw.choice([1, 3 * PS_PER_US, 50 * PS_PER_US])
    world = World(
        fleet,
        latency=MessageLatency(latency, latency, latency, prompt_token),
        launch=draw.choice([None, (1, 2), (1, 2, True), (4, 2, True)]),
        is_late=is_late,
        is_logged=is_logged,
        gaps=gaps if seed % 3 == 0 else None,
        context_router=PolicySpec(draw.choice(routers)),
        generation_router=PolicySpec(draw.choice(routers)),
        generation_binding=draw.choice(["at_context_done", "at_arrival"]),
        retry=RetryConfig(max_attempts=2),
        seed=seed,
    )
    at = 0
    for i in range(1, 21):
        if draw.random() < 0.8:  # else at the same instant as the one before
            at += round(draw.expovariate(1) * 20 * PS_PER_US)
        length = draw.randint(1, 40)
        prompt = draw.randint(1, 200)
        world.submit(i, at, prompt, length if lengths is None else lengths.get(i, length), max_tokens=48)
    cancelled, cancel_at = draw.randint(1, 20), draw.randrange(at + 1)
    killed, kill_at = draw.randint(1, len(roles)), draw.randrange(at + 1)
    kills, cancels = draw.random() < 0.3, draw.random() < 0.5
    cluster = world.cluster

    def fault() -> Any:
        yield cluster.env.timeout(kill_at)
        cluster.kill(killed, notice_after=PS_PER_S // 10_000)

    def impatient_user() -> Any:
        yield cluster.env.timeout(cancel_at)
        cluster.cancel(cancelled)

    if faults and kills:
        cluster.env.process(fault())
    if faults and cancels:
        cluster.env.process(impatient_user())
    return world


def main() -> None:
    first, last = map(int, sys.argv[1:])
    for seed in range(first, last):
        print(seed, random_world(seed).run().digest(), flush=True)


if __name__ == "__main__":
    main()
