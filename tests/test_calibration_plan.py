"""The sessions of a calibration: each fits the cluster that it is for, and together they go through what is to be known."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from disagg.core.cost import UNITS_PER_S, StepFeatures, roofline
from disagg.core.step_sizes import CHUNK_GRAPH_ROWS, CHUNK_SLOTS, graph_sizes
from disagg.experiments.calibration_plan import QUICK, STANDARD, Effort, _staggered, plan_sessions
from disagg.experiments.calibration_points import LEAST_SAMPLES
from disagg.experiments.cluster import cluster_of, device_of, shape_of
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.workload import Workload
from disagg.runtime.session_series import Session

H200 = Path(__file__).resolve().parent.parent / "benchmarks" / "h200"


def sessions_of(name: str, overrides: list[str], effort: Effort) -> tuple[Session, ...]:
    config = load_experiment(H200 / f"{name}.yaml", overrides).experiment
    return plan_sessions(config, roofline(shape_of(config), device_of(config)), effort)


@pytest.mark.parametrize("effort", [STANDARD, QUICK], ids=["standard", "quick"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("calibrate_1p1", []),
        ("calibrate_mixed", []),
        ("calibrate_1p1", ["cluster.generation_servers.kv_cache={tokens_per_block: 32, max_tokens: 20000}"]),
        ("calibrate_1p1", ["model.id=tiny-llama", "cluster.context_servers.scheduler.max_num_tokens=64"]),
    ],
    ids=["1p1", "mixed", "little KV", "short steps"],
)
def test_every_request_of_every_session_fits_into_the_cluster(name: str, overrides: list[str], effort: Effort) -> None:
    config = load_experiment(H200 / f"{name}.yaml", overrides).experiment
    sessions = sessions_of(name, overrides, effort)
    longest = shape_of(config).max_position_embeddings
    executors = cluster_of(config).executors
    least_kv = min(e.num_blocks * e.tokens_per_block for e in executors)
    for session in sessions:
        assert session.phases[0].submissions
        for submission in session.phases[0].submissions:
            request, length = submission.request, submission.output_length
            assert length is not None
            assert request.input_token_ids is not None
            assert len(request.input_token_ids) == request.num_prompt_tokens
            assert request.total_kv_tokens <= min(longest, least_kv)
            # the world ends every sequence before its bound, but for contexts alone, which end with their first token
            assert length < request.max_tokens or (length == request.max_tokens == 1)
        assert len({s.request.id for s in session.phases[0].submissions}) == len(session.phases[0].submissions)


def test_full_decode_batches_of_every_length_fit_into_the_kv_at_once() -> None:
    overrides = ["cluster.generation_servers.kv_cache={tokens_per_block: 32, max_tokens: 20000}"]
    for session in sessions_of("calibrate_1p1", overrides, STANDARD):
        if session.name.startswith("decodes at") and "mixed" not in session.name:
            assert session.orchestrator.skip_context_phase
            assert sum(s.request.total_kv_tokens for s in session.phases[0].submissions) <= 20000


def test_a_batch_stays_for_a_while_at_each_size_that_has_a_graph() -> None:
    ends = _staggered(48, 6)
    batches = [sum(end > step for end in ends) for step in range(1, max(ends))]
    assert set(batches) == set(graph_sizes(48))
    assert all(batches.count(size) >= 6 for size in graph_sizes(48))
    assert _staggered(0, 6) == []


def test_prompts_go_on_without_a_rest_for_some_seconds_of_the_device() -> None:
    busy = [s for s in sessions_of("calibrate_1p1", [], STANDARD) if s.name.startswith("contexts without a rest")]
    phases = [phase for session in busy for phase in session.phases]
    assert [phase.concurrency for phase in phases] == [2, 6, 64]  # small steps, middle ones, two full batches
    for phase, seconds in zip(phases, (2, 3, 5), strict=True):
        tokens = sum(s.request.num_prompt_tokens for s in phase.submissions)
        assert seconds * 20_000 < tokens < seconds * 80_000  # 25 us each on an H200
        assert all(s.output_length == 1 for s in phase.submissions)
    assert not [s for s in sessions_of("calibrate_1p1", [], QUICK) if "without a rest" in s.name]


def test_bursts_of_prompts_come_after_rests_of_many_lengths_where_prompts_are_handed_over() -> None:
    (session,) = [s for s in sessions_of("calibrate_1p1", [], STANDARD) if s.name == "contexts after rests"]
    config = load_experiment(H200 / "calibrate_1p1.yaml", []).experiment
    cost = roofline(shape_of(config), device_of(config))

    def ms(*prompts: int) -> float:
        """On a device that takes a tenth longer than its data sheet says."""
        return 1.1 * cost.step_time(StepFeatures(0, 0, tuple((0, n, True) for n in prompts))) / UNITS_PER_S * 1e3

    at_once: dict[int, list[int]] = {}
    for submission in session.phases[0].submissions:
        assert submission.offset is not None
        assert submission.output_length == 1  # no KV leaves
        at_once.setdefault(submission.offset, []).append(submission.request.num_prompt_tokens)
    assert sum(map(sum, at_once.values())) <= 7000 * 45
    bursts = sorted(at_once.items())
    ended, rests, firsts, long = 0.0, [], set(), 0
    for (at, first), (meanwhile, others) in zip(bursts[::2], bursts[1::2], strict=True):
        assert len(first) == 1
        assert 0 < (meanwhile - at) / 1e9 < ms(*first)  # the others wait for it, and are one step
        assert 110 < ms(*first) + ms(*others) < 150  # a load that counts in full
        rest = at / 1e9 - ended
        ended = at / 1e9 + ms(*first) + ms(*others)
        rests.append(rest)
        firsts.add(first[0])
        long += rest > 90
    assert bursts[-1][0] / 1e12 < 7.2  # seconds in all
    assert long >= 5
    told = sorted(rest for rest in rests[1:] if rest < 90)
    assert {round(rest, 3) for rest in told} == set(range(2, 58, 5))
    assert len(told) == 3 * 12 - 1  # behind the last of them nothing comes
    assert min(firsts) < 260
    assert max(firsts) > 1900
    assert len(firsts) > 30  # hardly any two are alike


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.context_servers.scheduler.max_num_tokens=1900"],
        ["cluster.context_servers.kv_cache={tokens_per_block: 32, max_tokens: 11000}"],
    ],
    ids=["short steps", "little KV"],
)
def test_where_a_later_burst_does_not_fit_none_comes_after_a_rest(overrides: list[str]) -> None:
    """The first bursts would: they begin with shorter prompts."""
    assert "contexts after rests" not in {s.name for s in sessions_of("calibrate_1p1", overrides, STANDARD)}


def test_kv_leaves_all_the_time_in_one_session_without_a_rest() -> None:
    (session,) = [s for s in sessions_of("calibrate_1p1", [], STANDARD) if s.name == "hand-overs without a rest"]
    (phase,) = session.phases
    lengths = [s.request.num_prompt_tokens for s in phase.submissions]
    assert all(s.output_length == 2 for s in phase.submissions)
    assert 16 <= 8192 / (sum(lengths) / len(lengths)) <= 20  # prompts that fill a step
    assert phase.concurrency == 3 * 18  # while one step runs, the next one's have come
    assert 4.0 < sum(lengths) / 40_000 < 5.0  # seconds, of 25 us a token


def test_mixed_executors_rest_behind_loads_too_but_hand_nothing_over_and_a_quick_calibration_does_neither() -> None:
    mixed = [s.name for s in sessions_of("calibrate_mixed", [], STANDARD)]
    assert ("contexts after rests" in mixed, "hand-overs without a rest" in mixed) == (True, False)
    quick = [s.name for s in sessions_of("calibrate_1p1", [], QUICK)]
    assert not {"contexts after rests", "hand-overs without a rest"} & set(quick)


def test_steps_that_no_graph_runs_are_among_those_that_are_measured() -> None:
    """Context executors show them by telling of their layers, mixed ones by more prompts at once than a graph has room for."""
    apart = {s.name: s for s in sessions_of("calibrate_1p1", [], STANDARD)}
    mixed = {s.name: s for s in sessions_of("calibrate_mixed", [], STANDARD)}
    told, crowded = "contexts kernel by kernel", "more contexts than a graph holds"
    assert [name for name, s in apart.items() if s.orchestrator.generation_binding != "at_context_done"] == [told]
    assert all(s.orchestrator.generation_binding == "at_context_done" for s in mixed.values())
    lengths = {s.request.num_prompt_tokens for s in apart[told].phases[0].submissions}
    assert lengths
    assert max(lengths) <= CHUNK_GRAPH_ROWS[-1] // 2  # two that meet in a step are short, too
    assert crowded in mixed
    assert crowded not in apart  # 32 prompts at once, which a graph holds
    bursts: dict[int | None, list[int]] = {}
    for submission in mixed[crowded].phases[0].submissions:
        bursts.setdefault(submission.offset, []).append(submission.request.num_prompt_tokens)
    assert len(bursts) >= 2 * LEAST_SAMPLES
    for first, *others in bursts.values():
        assert first == 2048  # a step of its own, in which the others come
        assert len(others) > CHUNK_SLOTS
        assert sum(others) <= 256  # a third of what a device computes while the host launches
    assert not [
        s for s in sessions_of("calibrate_1p1", ["cluster.cache_transceiver.layerwise=false"], QUICK) if s.name == told
    ]


@pytest.mark.parametrize("name", ["calibrate_1p1", "calibrate_mixed"])
def test_sequences_of_some_sessions_share_prefixes_that_were_computed_before_they_come(name: str) -> None:
    sharing = [
        s for s in sessions_of(name, [], STANDARD) if any(e.enable_block_reuse for e in s.orchestrator.executors)
    ]
    cached, *sharing = sharing
    assert cached.name == "contexts behind cached tokens"
    assert [s.name.split(",")[0] for s in sharing] == [f"decodes that share {n} tokens" for n in (1024, 2048, 4096)]
    for session in sharing:
        before = {}
        prefix = int(session.name.split()[3]) // 32
        for submission in session.phases[0].submissions:
            request, kind = submission.request, submission.request.block_hashes[:prefix]
            assert len(request.block_hashes) == request.num_prompt_tokens // 32
            assert request.input_token_ids is not None
            tokens = before.setdefault(kind, request.input_token_ids[: 32 * prefix])
            assert tokens == request.input_token_ids[: 32 * prefix]  # equal names, equal tokens
        alone = [s for s in session.phases[0].submissions if s.output_length == 1]
        assert len(alone) == len(before)
        assert len(before) < len(session.phases[0].submissions) / 2


@pytest.mark.parametrize("name", ["calibrate_1p1", "calibrate_mixed"])
def test_prompts_behind_cached_kv_come_alone_and_several_at_once_after_what_they_share_was_computed(name: str) -> None:
    (session,) = [s for s in sessions_of(name, [], STANDARD) if s.name == "contexts behind cached tokens"]
    assert all(executor.enable_block_reuse for executor in session.orchestrator.executors)
    known: set[int] = set()
    at_once: dict[int | None, list[tuple[int, int]]] = {}
    for submission in session.phases[0].submissions:
        hashes = submission.request.block_hashes
        shared = sum(name in known for name in hashes) * 32
        assert hashes[: shared // 32] == tuple(name for name in hashes if name in known)  # a prefix, nothing behind it
        at_once.setdefault(submission.offset, []).append((shared, submission.request.num_prompt_tokens - shared))
        known.update(name for name in hashes if name > 0)
    first = [own for asks in at_once.values() for shared, own in asks if not shared]
    assert first == [1025, 3073, 8193]
    behind = {(asks[0][0], len(asks) - 1, asks[0][1]) for asks in at_once.values() if asks[0][0]}
    assert {shared for shared, _, _ in behind} == {1024, 3072, 8192}
    assert {count for _, count, _ in behind} == {1, 2, 3, 4, 8}
    assert {own for _, _, own in behind} >= {32, 128, 256, 512, 896}


def test_one_plan_is_the_same_every_time() -> None:
    assert sessions_of("calibrate_1p1", [], QUICK) == sessions_of("calibrate_1p1", [], QUICK)


# ---- prompts --------------------------------------------------------------------------------------------------------


def prompts_of(session: Session) -> list[tuple[int, ...]]:
    return [each.request.input_token_ids or () for phase in session.phases for each in phase.submissions]


@pytest.mark.parametrize("name", ["calibrate_1p1", "calibrate_qwen_mixed"])
def test_prompts_weigh_as_much_on_their_way_as_those_of_a_workload(name: str) -> None:
    """What a token takes on its way is measured, and an id above 127 is three to five bytes."""
    config = load_experiment(H200 / f"{name}.yaml", []).experiment
    shape = shape_of(config)

    def bytes_a_token(prompts: list[tuple[int, ...]]) -> float:
        drawn = list(chain.from_iterable(prompts))
        return len(msgspec.msgpack.encode(drawn)) / len(drawn)

    served = islice(Workload(config, vocab_size=shape.vocab_size), 50)
    wanted = bytes_a_token([planned.input_token_ids or () for planned in served])
    assert wanted > 3.9
    for session in sessions_of(name, [], QUICK):
        assert bytes_a_token(prompts_of(session)) == pytest.approx(wanted, rel=0.02), session.name
        assert 0.97 * shape.vocab_size < max(map(max, prompts_of(session))) < shape.vocab_size


def test_every_prompt_is_drawn_by_itself_but_for_the_prefixes_that_a_session_shares() -> None:
    def repeated(prompts: list[tuple[int, ...]]) -> int:
        """Runs of eight ids that are there more than once: none, by chance, in any number of prompts."""
        runs = Counter(ids[at : at + 8] for ids in prompts for at in range(len(ids) - 7))
        return sum(count > 1 for count in runs.values())

    sessions = {session.name: session for session in sessions_of("calibrate_1p1", [], QUICK)}
    alone = [ids for name in ("contexts in bursts", "serving, 6 at a time") for ids in prompts_of(sessions[name])]
    assert len(alone) > 30
    assert repeated(alone) == 0
    (sharing,) = [s for name, s in sessions.items() if name.startswith("decodes that share")]
    prefix = int(sharing.name.split()[3])
    kinds = {ids[:prefix] for ids in prompts_of(sharing)}
    assert 1 < len(kinds) < len(prompts_of(sharing)) / 2
    assert repeated([*kinds, *(ids[prefix:] for ids in prompts_of(sharing)), *alone]) == 0


def test_prompts_of_millions_of_tokens_hold_one_object_an_id() -> None:
    config = load_experiment(H200 / "calibrate_1p1.yaml", []).experiment
    prompts = [ids for session in sessions_of("calibrate_1p1", [], STANDARD) for ids in prompts_of(session)]
    assert sum(map(len, prompts)) > 5_000_000
    assert len({id(token) for ids in prompts for token in ids}) <= shape_of(config).vocab_size
