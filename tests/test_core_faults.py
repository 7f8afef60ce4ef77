"""A fault campaign in simulation: whatever breaks, each request ends exactly once, nothing leaks, and nothing hangs.

Every other cluster reuses blocks of shared prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from msgspec.structs import replace as with_

from disagg.policies.vocabulary import Role
from tests.core_cases import NEVER, Case, Trace, core_of, make_case, make_reuse_case, simulate

SEEDS = 120


def kill(role: Role, case: Case, rng: Random) -> Case | None:
    """Up to two executors of the role, or mixed ones, die at instants of the workload; the others learn of it later."""
    can_die = [e.id for e in case.config.executors if e.role in (role, Role.MIXED)]
    if not can_die:
        return None
    end = max(at for at, _, _ in case.arrivals) + 300
    dead = rng.sample(can_die, rng.randint(1, min(2, len(can_die))))
    return replace(case, kills=tuple((rng.randint(0, end), id, rng.choice((0, 1, 7, 40, 200))) for id in dead))


def kill_context(case: Case, rng: Random) -> Case | None:
    return kill(Role.CONTEXT, case, rng)


def kill_generation(case: Case, rng: Random) -> Case | None:
    return kill(Role.GENERATION, case, rng)


def cancel(case: Case, rng: Random) -> Case | None:
    """Most requests are cancelled, some of them twice, some before they arrive or after they have ended."""
    end = max(at for at, _, _ in case.arrivals) + 300
    ids = [request.id for _, request, _ in case.arrivals]
    return replace(case, cancels=tuple((rng.randint(0, end), id) for id in rng.choices(ids, k=len(ids))))


def kv_full(case: Case, rng: Random) -> Case | None:
    """No more blocks than the largest request needs, so that hardly two fit."""
    size = case.config.executors[0].tokens_per_block
    most = max(-(-request.total_kv_tokens // size) for _, request, _ in case.arrivals)
    return case.with_executors(num_blocks=most)


def slow_transfers(case: Case, rng: Random) -> Case | None:
    """Every transfer of more than a few tokens takes longer than it may."""
    case = replace(case, link_ps_per_token=50)
    return case.with_executors(transfer_timeout_base=rng.choice((10, 100, 300)))


def short_leases(case: Case, rng: Random) -> Case | None:
    """Leases end while readers are on their way or reading."""
    return replace(case, link_ps_per_token=rng.choice((1, 20))).with_executors(lease=rng.choice((3, 9, 30, 90)))


def bind_early(case: Case, rng: Random) -> Case | None:
    """Early binding, and one of the other faults."""
    if all(executor.role is Role.MIXED for executor in case.config.executors):
        return None
    binding = rng.choice(("at_arrival", "at_context_start"))
    case = replace(case, config=with_(case.config, generation_binding=binding))
    case = case.with_executors(layerwise=rng.random() < 0.7)
    other = rng.choice((kill_context, kill_generation, cancel, slow_transfers, short_leases))
    return other(case, rng)


def without_overlap(case: Case, rng: Random) -> Case | None:
    """No step begins during a transfer, plans are made ahead or not, and one of the other faults."""
    if all(executor.role is Role.MIXED for executor in case.config.executors):
        return None
    case = replace(case.with_executors(overlap=False), launch=(1, 2, rng.random() < 0.5))
    other = rng.choice((bind_early, kill_context, kill_generation, cancel, kv_full, slow_transfers, short_leases))
    return other(case, rng)


CAMPAIGNS: list[Callable[[Case, Random], Case | None]] = [
    kill_context,
    kill_generation,
    cancel,
    kv_full,
    slow_transfers,
    short_leases,
    bind_early,
    without_overlap,
]


@pytest.mark.parametrize("breaks", CAMPAIGNS, ids=lambda breaks: breaks.__name__)
def test_each_request_ends_once_and_nothing_leaks_or_hangs(breaks: Callable[[Case, Random], Case | None]) -> None:
    """`simulate` returns only when nothing is left on the calendar, and checks every executor's invariants on its way."""
    broken = 0
    for seed in range(SEEDS):
        rng = Random(f"{breaks.__name__}/{seed}")
        case = breaks((make_reuse_case if seed % 2 else make_case)(rng), rng)
        if case is None:
            continue
        trace = simulate(case)
        ends = Counter(d.request_id for d in trace.delivered if d.finish_reason is not None)
        assert ends == Counter(request.id for _, request, _ in case.arrivals), seed
        _assert_nothing_leaks(case, trace, seed)
        broken += any(d.error or d.finish_reason == "cancelled" for d in trace.delivered)
    if breaks is not kv_full:
        assert broken > SEEDS // 3  # otherwise the faults missed


def _assert_nothing_leaks(case: Case, trace: Trace, seed: int) -> None:
    assert trace.cluster is not None
    dead = {executor for _, executor, _ in case.kills}
    for executor in case.config.executors:
        if executor.id not in dead:
            core = core_of(trace.cluster, executor.id)
            assert core.visits == {}, seed
            assert core.blocks.num_free == executor.num_blocks, seed


def test_all_faults_at_once() -> None:
    for seed in range(SEEDS):
        rng = Random(f"all/{seed}")
        case = (make_reuse_case if seed % 2 else make_case)(rng)
        for breaks in CAMPAIGNS:
            case = breaks(case, rng) or case
        trace = simulate(case)
        ends = Counter(d.request_id for d in trace.delivered if d.finish_reason is not None)
        assert ends == Counter(request.id for _, request, _ in case.arrivals), seed
        _assert_nothing_leaks(case, trace, seed)


def test_time_outs_are_honoured_within_twice_their_setting() -> None:
    """The instants at which transfers are given up, against the instants at which they were asked for.

    Of one that was bound early, against the end of its context phase: before, it waits for somebody else.
    """
    late = 0
    for seed in range(40):
        rng = Random(f"late/{seed}")
        case = replace(make_case(rng), link_ps_per_token=1000)
        case = case.with_executors(transfer_timeout_base=100, lease=NEVER)
        for row in simulate(case, check=False).rows:
            begun = max(getattr(row, name, None) or 0 for name in ("transfer_start_ps", "first_token_ps"))
            waited = getattr(row, "end_ps", 0) - begun
            if "took over" in (getattr(row, "error", None) or "") and hasattr(row, "transfer_start_ps"):
                late += 1
                assert waited <= 200 + case.message_latency
    assert late > 20
