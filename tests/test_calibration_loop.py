"""Sessions and fit together, on a simulated executor whose costs are known: what is measured gives those costs back."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from disagg.core.commands import Deliver, RunSteps
from disagg.core.cost import UNIT_BITS, StepFeatures, end_of_step, roofline
from disagg.core.event_log import read_log
from disagg.core.events import StepsDone
from disagg.core.measured_cost import UNITS_PER_NS, Curve, MeasuredCost
from disagg.core.measured_range import Measured
from disagg.core.overheads import LaunchGaps
from disagg.core.step_sizes import ROW_MULTIPLE, graph_sizes
from disagg.experiments.calibration_fit import EngineFit, fit_engine
from disagg.experiments.calibration_plan import STANDARD, plan_sessions
from disagg.experiments.calibration_samples import Samples
from disagg.experiments.cluster import device_of, shape_of
from disagg.experiments.experiment_file import load_experiment
from disagg.runtime.session_series import Session, SessionResult
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.timing import ModelTiming

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "h200" / "calibrate_mixed.yaml"
WANTED = (
    "decodes that share",
    "decodes at 1024",
    "decodes at 4096",
    "contexts one at a time",
    "contexts in",
    "contexts behind",
    "serving",
)

EVERY = 30_000_000_000  # picoseconds between requests of closed loops: about what a busy executor takes


def line(start_ns: float, each_ns: float) -> Curve:
    return Curve.line(round(start_ns * UNITS_PER_NS), round(each_ns * UNITS_PER_NS))


COST = MeasuredCost(
    graph_sizes=graph_sizes(128),
    row_multiple=ROW_MULTIPLE,
    decode_rows=line(4e6, 9000),
    decode_kv=line(0, 36),
    decode=0,
    chunk_rows=line(5e6, 20_000),
    pair=round(1.5 * UNITS_PER_NS),
    cached_token=100 * UNITS_PER_NS,
    chunk=0,
    sample=0,
    mixed_kv=line(0, 38),
    mixed_decode=0,
    measured=Measured(),
    chunk_graphs=True,
    graph_pair=2 * UNITS_PER_NS,
    graph_cached_token=900 * UNITS_PER_NS,
    longest_token=500 * UNITS_PER_NS,
    decode_shared=round(0.4 * (1 << UNIT_BITS)),
    full_batch=41,
    full_kv=6 * UNITS_PER_NS,
    full_shared=round(0.15 * (1 << UNIT_BITS)),
    mixed_shared=round(0.5 * (1 << UNIT_BITS)),
)


def simulated(session: Session) -> SessionResult:
    """The session on one executor whose steps take just what `COST` says."""
    logs: dict[int, bytearray] = defaultdict(bytearray)
    cluster = SimulatedCluster(
        session.orchestrator,
        ModelTiming({1: COST}, 700_000_000),
        kv_bytes_per_token=1,
        log_sink=lambda core: logs[core].extend,
    )
    for number, each in enumerate(session.phases[0].submissions):
        at = EVERY * number if each.offset is None else each.offset
        cluster.submit_at(at, each.request, each.output_length or 1)
    cluster.run()
    return SessionResult(session.name, 1.0, {core: bytes(log) for core, log in logs.items()}, ends_in(logs[1]), {}, [])


def ends_in(log: bytearray) -> dict[int, list[tuple[int, int, int]]]:
    """When each step of each epoch ended, by the plans and the model."""
    runs: deque[tuple[RunSteps, int]] = deque()
    opened_at, first, ends = 0, StepFeatures(0, 0), []
    for frame in read_log(bytes(log))[1]:
        for event in frame.events:
            if isinstance(event, StepsDone):
                run, ordered = runs.popleft()
                if run.first_step == 1:
                    chunks = tuple((chunk.start, chunk.length, chunk.is_last) for chunk in run.chunks)
                    first = StepFeatures(run.num_decodes, run.num_kv_tokens, chunks, run.num_shared_kv)
                    opened_at = ordered
                steps = range(run.first_step, event.num_steps + 1)
                ends += [(run.epoch, step, opened_at + end_of_step(COST, first, step)) for step in steps]
                assert ends[-1][2] == frame.now
        runs += [(command, frame.now) for command in frame.commands if isinstance(command, RunSteps)]
    return {1: ends}


MS = 1_000_000_000
LOADED = (
    "contexts one at a time",
    "contexts in",
    "contexts without a rest",
    "contexts after rests",
    "hand-overs without",
)


def simulated_pair(session: Session, gaps: LaunchGaps) -> SessionResult:
    """The session on a context and a generation executor, over a link of 5 GB/s; a closed loop's next request comes when one
    has ended. Steps of the context executor take a tenth longer than the plan of the sessions foresees.
    """
    logs: dict[int, bytearray] = defaultdict(bytearray)
    (phase,) = session.phases
    waiting = deque(phase.submissions)

    def ended(deliver: Deliver) -> None:
        if deliver.finish_reason is not None and phase.concurrency is not None and waiting:
            send_next(cluster.now + MS)

    def send_next(at: int) -> None:
        each = waiting.popleft()
        cluster.submit_at(at, each.request, each.output_length or 1)

    cluster = SimulatedCluster(
        session.orchestrator,
        ModelTiming({1: replace(COST, chunk_rows=line(5e6, 23_000)), 2: COST}, MS // 2, gaps={1: gaps}),
        kv_bytes_per_token=131_072,
        link_bytes_per_s=5e9,
        log_sink=lambda core: logs[core].extend,
        delivered=ended,
    )
    for each in list(phase.submissions)[: phase.concurrency]:
        send_next(each.offset or 0)
    cluster.run()
    ends = [
        (event.epoch, event.num_steps, frame.now)  # of a context executor every step is an epoch
        for frame in read_log(bytes(logs[1]))[1]
        for event in frame.events
        if isinstance(event, StepsDone)
    ]
    return SessionResult(session.name, 1.0, {core: bytes(log) for core, log in logs.items()}, {1: ends}, {}, [])


def test_how_steps_slow_under_a_load_and_how_it_drains_come_out_of_a_calibration_as_they_are() -> None:
    gaps = LaunchGaps(
        chunk_after_idle=MS, chunk_after_chunk=MS, millionths_under_load=70_000, load_after=100 * MS, load_drain=3
    )
    config = load_experiment(FILE.with_name("calibrate_1p1.yaml"), []).experiment
    samples = Samples()
    for number, session in enumerate(plan_sessions(config, roofline(shape_of(config), device_of(config)), STANDARD)):
        if session.name.startswith(LOADED):
            samples.add(number, simulated_pair(session, gaps), is_open_loop=False)
    of_context = [step for step in samples.steps if step.executor == 1]
    for sample in of_context:
        assert sample.rest_in_transfer_ps <= max(0, sample.rest_ps)
        assert (sample.rest_ps == 0) == (sample.before == "chunk")
    rested = [sample for sample in of_context if MS <= sample.rest_ps <= 60 * MS]
    assert len(rested) > 100
    found = fit_engine(of_context, "cuda", 32, chunk_graphs=True).gaps
    assert found.load_drain == 3
    assert found.load_after == 100 * MS
    assert found.millionths_under_load == pytest.approx(70_000, abs=6000)


def test_samples_say_how_long_kv_left_in_the_rest_before_a_step() -> None:
    """One hand-over at a time: the whole transfer of each lies between its own step and the next."""
    config = load_experiment(FILE.with_name("calibrate_1p1.yaml"), []).experiment
    sessions = plan_sessions(config, roofline(shape_of(config), device_of(config)), STANDARD)
    (session,) = [session for session in sessions if session.name == "hand-overs one at a time"]
    samples = Samples()
    samples.add(0, simulated_pair(session, LaunchGaps()), is_open_loop=False)
    first, *steps = (step for step in samples.steps if step.executor == 1 and step.num_sampled)
    assert (first.rest_ps, first.rest_in_transfer_ps) == (-1, 0)
    took = [transfer.duration_ps for transfer in sorted(samples.transfers, key=lambda t: t.num_tokens)]
    assert sorted(step.rest_in_transfer_ps for step in steps) == took[: len(steps)]
    assert all(step.rest_ps > step.rest_in_transfer_ps for step in steps)


@pytest.fixture(scope="module")
def fit() -> EngineFit:
    config = load_experiment(FILE, []).experiment
    sessions = plan_sessions(config, roofline(shape_of(config), device_of(config)), STANDARD)
    samples = Samples()
    for number, session in enumerate(s for s in sessions if s.name.startswith(WANTED)):
        samples.add(number, simulated(session), is_open_loop=False)
    return fit_engine(samples.steps, "cuda", 128, chunk_graphs=True)


def test_what_kv_costs_that_is_read_again_comes_out_as_it_is(fit: EngineFit) -> None:
    assert fit.decode is not None
    assert fit.chunks is not None
    assert fit.decode.shared_part == pytest.approx(0.4, abs=0.02)
    assert fit.decode.full_shared_part == pytest.approx(0.15, abs=0.02)
    assert fit.chunks.shared_part == pytest.approx(0.5, abs=0.05)
    told = {residual.family: residual for residual in fit.residuals}
    assert told["decode steps that share KV"].num_samples > 300
    assert told["decode steps that share KV"].mean < 0.005
    assert told["steps with chunks that share KV"].mean < 0.005


def test_attention_behind_cached_kv_comes_out_as_it_is_in_graphs_and_kernel_by_kernel(fit: EngineFit) -> None:
    assert fit.chunks is not None
    assert fit.chunks.graph_cached_token_ns == pytest.approx(900, rel=0.03)
    assert fit.chunks.graph_pair_ns == pytest.approx(2, rel=0.03)
    assert fit.chunks.cached_token_ns == pytest.approx(100, abs=30)
    assert fit.chunks.longest_token_ns == pytest.approx(500, rel=0.1)
    assert fit.chunks.pair_ns == pytest.approx(1.5, rel=0.05)


def test_the_batch_from_which_another_kernel_reads_kv_is_found_and_what_it_takes_more(fit: EngineFit) -> None:
    assert fit.decode is not None
    assert fit.decode.full_batch == 41
    assert fit.decode.full_kv_ns == pytest.approx(6, rel=0.05)
