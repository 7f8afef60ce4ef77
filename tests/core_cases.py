"""Small random clusters and workloads, and what a simulation of one leaves behind. Helpers of the tests of the core."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from itertools import count, islice, pairwise
from random import Random
from typing import Any, NamedTuple

from msgspec.structs import replace as with_

from disagg.core.commands import RunSteps, StopAfterStep
from disagg.core.config import ExecutorConfig, OrchestratorConfig, PolicySpec, RetryConfig, SchedulerConfig
from disagg.core.cost import UNIT_BITS, ConstantCost, CostModel, RooflineCost, StepFeatures, end_of_step
from disagg.core.event_log import Frame, read_log
from disagg.core.events import StepsCommitted, StepsDone
from disagg.core.measured_cost import Curve, MeasuredCost
from disagg.core.measured_range import Measured
from disagg.core.tables import StayRow, StepRow
from disagg.policies.interfaces import MigrationPolicy, RoutingPolicy
from disagg.policies.registry import register
from disagg.policies.vocabulary import Hold, MoveRequest, Reject, Request, Role, Route, RouteMixed, Stage
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.timing import ModelTiming

NEVER = 10**15  # picoseconds; the small clusters live for less than 10**9


@register("test_chaos", kind="routing", source="tests")
class Chaos(RoutingPolicy):
    """Anything that is allowed: any executor of the right roles, both phases on one, holds for a while, few rejections."""

    def route_context(self, request: Request, fleet: Any) -> Any:
        dice = self.rng.random()
        if dice < 0.03:
            return Reject("the dice said so")
        if dice < 0.15:
            return Hold(fleet.now + self.rng.randint(1, 40))
        if dice < 0.4 and fleet.mixed.num_healthy:
            return RouteMixed(self.rng.choice(list(fleet.mixed.healthy_rows)).executor_id)
        rows = [*fleet.context.healthy_rows, *fleet.mixed.healthy_rows]
        return Route(context=self.rng.choice(rows).executor_id)

    def route_generation(self, request: Request, fleet: Any) -> Any:
        dice = self.rng.random()
        if dice < 0.03 and request.context_phase_params is not None:  # what is bound early cannot be rejected
            return Reject("the dice said so")
        if dice < 0.2:
            return Hold(fleet.now + self.rng.randint(1, 200))
        rows = [*fleet.generation.healthy_rows, *fleet.mixed.healthy_rows]  # where its KV is, too
        return Route(generation=self.rng.choice(rows).executor_id)


@register("test_restless", kind="migration", source="tests")
class Restless(MigrationPolicy):
    """Anything that is allowed, often: some of what runs somewhere goes on anywhere else, back again too."""

    def __init__(self, *, rng: Random, interval_ps: int = 20) -> None:
        super().__init__(rng=rng)
        self.interval_ps = interval_ps

    def migrate(self, fleet: Any, movable: Any) -> Any:
        ids = [int(row.executor_id) for pool in (fleet.generation, fleet.mixed) for row in pool.healthy_rows]
        found = []
        for executor, requests in movable.items():
            others = [each for each in ids if each != executor]
            found += [
                MoveRequest(request.id, self.rng.choice(others))
                for request in requests
                if others and self.rng.random() < 0.4
            ]
        return found


@dataclass(frozen=True)
class Case:
    """One cluster and its workload. Bytes are picoseconds on a link: `link_ps_per_token` of its full rate a token."""

    config: OrchestratorConfig
    costs: dict[int, CostModel]
    message_latency: int
    link_latency: int
    link_ps_per_token: int
    arrivals: tuple[tuple[int, Request, int], ...]  # (instant, request, true output length)
    cancels: tuple[tuple[int, int], ...] = ()  # (instant, user's request id)
    kills: tuple[tuple[int, int, int], ...] = ()  # (instant, executor, picoseconds until the others know)
    launch: tuple[int, int, bool] = (1, 1, False)  # steps a grant, grants outstanding, whether plans are made ahead
    switches: tuple[tuple[int, int, str], ...] = ()  # (instant, executor, the role that an operator gives it)
    output_hashes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of blocks behind the prompt's, by request

    def with_executors(self, **changes: Any) -> Case:
        executors = tuple(with_(executor, **changes) for executor in self.config.executors)
        return replace(self, config=with_(self.config, executors=executors))

    @property
    def link_bytes_per_s(self) -> float:
        return 10**12 / self.link_ps_per_token


def make_case(rng: Random) -> Case:
    """A random cluster of one to four executors with few blocks, and 1 to 25 requests, many of them at equal instants."""
    coarse = rng.random() < 0.5  # everything a multiple of 10 ps: exact ties are the rule
    unit = 10 if coarse else 1
    size = rng.randint(1, 8)
    layout = rng.choice(("disaggregated", "disaggregated", "aggregated", "everything"))
    roles = {
        "disaggregated": [Role.CONTEXT] * rng.randint(1, 2) + [Role.GENERATION] * rng.randint(1, 2),
        "aggregated": [Role.MIXED] * rng.randint(1, 2),
        "everything": [Role.CONTEXT, Role.MIXED, Role.GENERATION][: rng.randint(2, 3)],
    }[layout]
    arrivals, max_kv = _make_workload(rng, unit, layout == "everything")
    least = -(-max_kv // size)
    num_blocks = rng.randint(max(1, least - 2), least + rng.choice((2, 10, 60)))
    capacity = rng.choice(("max_utilization", "max_utilization", "guaranteed_no_evict"))
    lease = rng.choice((NEVER, NEVER, 3 * rng.randint(10, 100) * unit))
    timeout = rng.choice((NEVER, NEVER, rng.randint(5, 60) * unit))
    pull_timeout = rng.choice((NEVER, NEVER, rng.randint(5, 300) * unit))
    pull_reserve = rng.choice((0, 0, 0, 1, 3))
    layerwise = rng.random() < 0.7
    max_num_tokens = rng.choice((4, 16, 64, 256))
    executors = tuple(
        ExecutorConfig(
            id=i,
            role=role,
            num_blocks=num_blocks,
            tokens_per_block=size,
            scheduler=SchedulerConfig(
                batching=PolicySpec(rng.choice(("chunked_prefill", "chunked_prefill", "prefill_first"))),
                capacity=capacity,
                max_batch_size=rng.choice((1, 2, 4, 8, 64)),
                max_num_tokens=max_num_tokens,
                chunked_context=max_num_tokens < 64 or rng.random() < 0.5,
            ),
            lease=lease,
            transfer_timeout_base=timeout,
            transfer_timeout_per_token=0,
            pull_timeout=pull_timeout,
            pull_reserve_blocks=pull_reserve,
            layerwise=layerwise,
            report_interval=NEVER,
        )
        for i, role in enumerate(roles, 1)
    )
    routers = ("round_robin", "least_requests", "least_tokens", "least_kv", "power_of_two", "random")
    context, generation = (PolicySpec(rng.choice(routers)) for _ in range(2))
    everything = PolicySpec("test_chaos") if layout == "everything" else None
    binding = rng.choice(("at_context_done", "at_context_done", "at_arrival", "at_context_start"))
    config = OrchestratorConfig(
        executors,
        context_router=context,
        generation_router=generation,
        router=everything,
        generation_binding=binding,
        retry=RetryConfig(rng.choice(("recompute", "recompute", "fail")), rng.randint(1, 3)),
        seed=rng.randrange(1000),
    )
    cost = ConstantCost(
        unit * rng.randint(1, 9), unit * rng.choice((0, 0, 1)), rng.choice((0, 0, unit)), rng.choice((0, 0, unit))
    )
    costs: dict[int, CostModel] = dict.fromkeys(range(1, len(roles) + 1), cost)
    horizon = max(at for at, _, _ in arrivals) + 300 * unit
    cancels = tuple(
        (unit * rng.randint(0, horizon // unit), request.id) for _, request, _ in arrivals if rng.random() < 0.15
    )
    latency = unit * rng.randint(1, 5)
    return Case(
        config,
        costs,
        latency,
        rng.choice((0, unit, 3 * unit)),
        unit * rng.choice((1, 1, 3)),
        arrivals,
        cancels if rng.random() < 0.6 else (),
    )


def make_early_case(rng: Random) -> Case:
    """A random cluster that binds early, whose requests are often cancelled, some of them while they are computed."""
    while True:
        case = make_case(rng)
        if any(executor.role is not Role.MIXED for executor in case.config.executors):
            break
    binding = rng.choice(("at_arrival", "at_context_start"))
    end = max(at for at, _, _ in case.arrivals) + 300
    cancels = tuple((rng.randint(at, end), request.id) for at, request, _ in case.arrivals if rng.random() < 0.4)
    case = replace(case, config=with_(case.config, generation_binding=binding), cancels=cancels)
    return case.with_executors(layerwise=rng.random() < 0.7)


def make_priced_case(rng: Random) -> Case:
    """A random cluster in which each executor has costs of its own: rooflines and measured curves with bends."""
    case = rng.choice((make_case, make_early_case))(rng)
    prices = {executor: rng.choice((_roofline, _measured))(rng) for executor in case.costs}
    return replace(case, costs=prices)


def _units(rng: Random, most_ps: int) -> int:
    """Up to so many picoseconds, and a fraction of one."""
    return rng.randint(0, most_ps << UNIT_BITS)


def _roofline(rng: Random) -> CostModel:
    return RooflineCost(*(_units(rng, most) for most in (40, 40, 3, 3, 1, 1, 2)))


def _curve(rng: Random, start_ps: int) -> Curve:
    knots = [0, *sorted(rng.sample(range(1, 120), rng.randint(0, 4)))]
    return Curve.of(_units(rng, start_ps), knots, [_units(rng, 2) for _ in knots])


def _measured(rng: Random) -> CostModel:
    shared = _part(rng)
    return MeasuredCost(
        rng.choice(((), (1, 2, 4, 8))),
        rng.choice((1, 8)),
        _curve(rng, 30),
        _curve(rng, 5),
        _units(rng, 2),
        _curve(rng, 30),
        *(_units(rng, most) for most in (1, 1, 5, 2)),
        _curve(rng, 5),
        _units(rng, 2),
        Measured(),
        launch_floor=_units(rng, 40),
        decode_shared=shared,
        mixed_shared=_part(rng),
        longest_token=_units(rng, 1),
        full_batch=rng.choice((0, 2, 4)),
        full_kv=_units(rng, 2),
        full_shared=rng.randint(0, shared),
    )


def _part(rng: Random) -> int:
    """From nothing to all, in 2^-20."""
    return rng.choice((0, rng.randint(0, 1 << UNIT_BITS), 1 << UNIT_BITS))


def make_ordered_case(rng: Random) -> Case:
    """A random cluster of either kind whose executors' queues go round classes of traffic, of unequal weights."""
    case = rng.choice((make_case, make_early_case, make_switching_case))(rng)
    params = {"quantum": rng.choice((1, 20, 100)), "weights": {"a": 3}}
    scheduler = {"queue_order": PolicySpec("deficit_round_robin", params)}
    executors = tuple(with_(e, scheduler=with_(e.scheduler, **scheduler)) for e in case.config.executors)
    arrivals = tuple((at, with_(request, traffic_class=rng.choice("abc")), n) for at, request, n in case.arrivals)
    return replace(case, config=with_(case.config, executors=executors), arrivals=arrivals)


def make_switching_case(rng: Random) -> Case:
    """A random cluster whose operator gives executors other roles while it runs, some of which are refused."""
    while True:
        case = rng.choice((make_case, make_case, make_early_case))(rng)
        if len(case.config.executors) > 1:
            break
    router = PolicySpec(rng.choice(("test_chaos", "round_robin", "least_tokens", "mixed_pool", "least_kv")))
    end = max(at for at, _, _ in case.arrivals) + 300
    switches = tuple(
        (rng.randint(0, end), rng.randint(1, len(case.config.executors)), rng.choice(list(Role)).value)
        for _ in range(rng.randint(2, 12))
    )
    config = with_(case.config, router=router, context_router=None, generation_router=None)
    # full executors may wait for each other's blocks, as mixed ones may: the time that a request may take ends that
    arrivals = tuple(
        (at, with_(request, allotted_time=rng.randint(500, 40_000)), length) for at, request, length in case.arrivals
    )
    return replace(case, config=config, arrivals=arrivals, switches=tuple(sorted(switches)))


def make_moving_case(rng: Random) -> Case:
    """A random cluster whose running requests are moved between executors again and again."""
    while True:
        case = rng.choice((make_case, make_case, make_reuse_case, make_early_case, make_switching_case))(rng)
        if sum(executor.role.serves(Stage.GENERATION) for executor in case.config.executors) > 1:
            break
    restless = PolicySpec("test_restless", {"interval_ps": rng.choice((20, 60, 200))})
    # as with roles: executors that hold what others wait for may wait for each other
    arrivals = tuple(
        (at, with_(request, allotted_time=rng.randint(500, 40_000)), length) for at, request, length in case.arrivals
    )
    return replace(case, config=with_(case.config, migration=restless), arrivals=arrivals)


def make_reuse_case(rng: Random) -> Case:
    """A random cluster that reuses blocks: most prompts begin as one before them, or as one before them and its answer."""
    case = rng.choice((make_case, make_case, make_early_case, make_switching_case))(rng)
    case = case.with_executors(enable_block_reuse=True)
    size = case.config.executors[0].tokens_per_block
    known: list[tuple[int, ...]] = [()]
    names = count(10**6)
    arrivals, output_hashes = [], {}
    for at, request, length in case.arrivals:
        whole = request.num_prompt_tokens // size
        kept = rng.choice(known)[: rng.choice((whole, rng.randint(0, whole)))] if rng.random() < 0.8 else ()
        hashes = (*kept, *islice(names, whole - len(kept)))
        if rng.random() < 0.1:  # nobody knows what the rest of it has in common with others
            hashes = hashes[: rng.randint(0, whole)]
        request = with_(request, block_hashes=hashes)
        arrivals.append((at, request, length))
        num_full = (request.num_prompt_tokens + length - 1) // size
        if rng.random() < 0.7:
            output_hashes[request.id] = tuple(islice(names, num_full - whole))
        known.append(hashes + output_hashes.get(request.id, ()))
    cheaper = {executor: _cheaper_when_shared(cost, rng) for executor, cost in case.costs.items()}
    return replace(case, arrivals=tuple(arrivals), output_hashes=output_hashes, costs=cheaper)


def _cheaper_when_shared(cost: CostModel, rng: Random) -> CostModel:
    """A cost model to which a KV token that is read again matters, half the time."""
    if rng.random() < 0.25:
        return _measured(rng)
    if not isinstance(cost, ConstantCost) or rng.random() < 0.3:
        return cost
    kv_token = max(cost.c, 2)
    return with_(cost, c=kv_token, shared=rng.randint(1, kv_token))


def _make_workload(rng: Random, unit: int, allotted: bool) -> tuple[tuple[tuple[int, Request, int], ...], int]:
    now = 0
    arrivals = []
    max_kv = 1
    for i in range(rng.randint(1, 25)):
        if rng.random() < 0.5:
            now += unit * rng.choice((1, 5, 40))
        prompt, max_tokens = rng.randint(1, 60), rng.randint(1, 40)
        true_length = rng.randint(1, max_tokens + 5)
        limit = unit * rng.randint(50, 4000) if allotted else None
        # ids far from those that the orchestrator issues
        request = Request(1001 + i, prompt, max_tokens, arrival=now, allotted_time=limit)
        arrivals.append((now, request, true_length))
        max_kv = max(max_kv, request.total_kv_tokens)
    return tuple(arrivals), max_kv


class Step(NamedTuple):
    """One step of one executor: (request, first token computed, tokens computed) of each chunk."""

    start: int
    end: int
    decodes: tuple[int, ...]
    chunks: tuple[tuple[int, int, int], ...]


@dataclass
class Trace:
    """What happened, in either simulator."""

    heard: list[tuple[int, Any]] = field(default_factory=list)  # (instant, event) into the orchestrator
    steps: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    stays: list[tuple[Any, ...]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    delivered: list[Any] = field(default_factory=list)
    cluster: SimulatedCluster | None = None
    logs: dict[int, bytes] = field(default_factory=dict)
    num_ties: int = 0  # instants at which an executor heard something and ended a step
    num_cut_on_boundary: int = 0  # spans cut by an event at the very instant at which a step ended
    num_cut: int = 0
    num_committed: int = 0
    num_late_stops: int = 0  # found in a step that was committed before
    num_queued_steps: int = 0  # first steps of plans that were there before the step before them had ended

    @property
    def num_preemptions(self) -> int:
        return sum(stay[-1] for stay in self.stays)


def build(case: Case, records: Any = None, delivered: Any = None, log_sink: Any = None) -> SimulatedCluster:
    """The simulated cluster of a case, with its arrivals, cancels and kills on the calendar."""
    cluster = SimulatedCluster(
        case.config,
        ModelTiming(case.costs, case.message_latency),
        kv_bytes_per_token=1,
        link_bytes_per_s=case.link_bytes_per_s,
        link_latency=case.link_latency,
        launch={executor.id: case.launch for executor in case.config.executors},
        records=records,
        delivered=delivered,
        log_sink=log_sink,
    )
    for at, request, true_length in case.arrivals:
        cluster.submit_at(at, request, true_length, case.output_hashes.get(request.id, ()))
    for at, request_id in case.cancels:
        at_instant(cluster, at, lambda request_id=request_id: cluster.cancel(request_id))
    for at, executor, role in case.switches:
        at_instant(cluster, at, lambda executor=executor, role=role: cluster.change_role(executor, role))
    for at, executor, notice in case.kills:
        at_instant(cluster, at, lambda executor=executor, notice=notice: cluster.kill(executor, notice))
    return cluster


def at_instant(cluster: SimulatedCluster, at: int, call: Any) -> None:
    """Call at the instant `at`, before everything else of that instant."""
    timeout = cluster.env.timeout(at - cluster.env.now)
    timeout.callbacks.append(lambda _: call())


def simulate(case: Case, *, check: bool = True, disturb: Any = None) -> Trace:
    """Run the simulator to its end; `check`: the invariants of every executor after every instant at which it acts.

    `disturb(cluster)` may put things on its calendar beforehand.
    """
    trace = Trace()
    logs: dict[int, bytearray] = {i: bytearray() for i in range(len(case.config.executors) + 1)}

    def sink(core: int) -> Any:
        def write(data: bytes) -> None:
            logs[core] += data
            if check and core and trace.cluster is not None:
                core_of(trace.cluster, core).check()

        return write

    trace.cluster = build(case, trace.rows.append, trace.delivered.append, sink)
    if disturb is not None:
        disturb(trace.cluster)
    trace.cluster.run()
    trace.logs = {core: bytes(log) for core, log in logs.items()}
    _, frames = read_log(trace.logs[0])
    trace.heard = [(frame.now, event) for frame in frames for event in frame.events]
    for executor in case.config.executors:
        _, frames = read_log(trace.logs[executor.id])
        _expand(trace, executor.id, list(frames), case.costs[executor.id])
    trace.stays = [
        (row.executor, row.executor_request_id, row.num_tokens, row.started_ps, row.ended_ps, row.num_preemptions)
        for row in trace.rows
        if isinstance(row, StayRow)
    ]
    return trace


def core_of(cluster: SimulatedCluster, executor: int) -> Any:
    """The ExecutorCore of an executor, under its log if it has one."""
    core: Any = cluster.executors[executor].core
    return getattr(core, "core", core)


def _expand(trace: Trace, executor: int, frames: list[Frame], cost: CostModel) -> None:
    """Steps one by one, from the spans that were ordered and the instants at which the model says they end."""
    batch: list[int] = []
    # plans that have not ended: with the batch, the epoch's features, and the instant of the order if nothing ran then
    runs: deque[tuple[RunSteps, tuple[int, ...], StepFeatures, int | None]] = deque()
    committed: dict[int, int] = {}  # plan: its steps
    opened_at = ended_at = 0
    features = StepFeatures(0, 0)
    for frame in frames:
        done = [event for event in frame.events if isinstance(event, StepsDone)]
        trace.num_ties += bool(done) and len(frame.events) > 1
        stops = [command for command in frame.commands if isinstance(command, StopAfterStep)]
        for event in frame.events:
            if isinstance(event, StepsCommitted):
                committed[event.plan] = event.num_steps
                trace.num_committed += 1
            if not isinstance(event, StepsDone):
                continue
            run, decodes, first, at_once = runs.popleft()
            trace.num_late_stops += len(event.stopped) if run.plan in committed else 0
            if event.plan != run.plan or committed.pop(run.plan, event.num_steps) != event.num_steps:
                raise AssertionError(f"{event} ends {run}")
            if run.first_step == 1:
                opened_at = ended_at if at_once is None else at_once
            ends = [opened_at + end_of_step(cost, first, k) for k in range(run.first_step - 1, event.num_steps + 1)]
            if run.first_step == 1:
                ends[0] = opened_at
            if ends[-1] != frame.now:
                raise AssertionError(f"step {event.num_steps} was reported at {frame.now}, it ends at {ends[-1]}")
            chunks = tuple((chunk.request_id, chunk.start, chunk.length) for chunk in run.chunks)
            trace.steps[executor] += [Step(a, b, decodes, chunks) for a, b in pairwise(ends)]
            trace.num_cut += event.num_steps < run.last_step
            trace.num_cut_on_boundary += bool(stops) and event.num_steps < run.last_step
            ended_at = frame.now
        for command in frame.commands:
            if isinstance(command, RunSteps):
                trace.num_queued_steps += bool(runs)
                batch = [i for i in batch if i not in command.left] + [j.request_id for j in command.joined]
                if command.first_step == 1:
                    model_chunks = tuple((c.start, c.length, c.is_last) for c in command.chunks)
                    features = StepFeatures(
                        command.num_decodes, command.num_kv_tokens, model_chunks, command.num_shared_kv
                    )
                decodes = tuple(sorted(batch)) if command.decodes else ()
                runs.append((command, decodes, features, None if runs else frame.now))


def step_rows(trace: Trace) -> list[StepRow]:
    return [row for row in trace.rows if isinstance(row, StepRow)]
