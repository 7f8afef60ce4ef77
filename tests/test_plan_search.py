"""The search for a cluster finds what trying everything finds, simulates less for it, and says what it is sure of."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg.experiments.config import Experiment
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.plan import Search, _leave_out_hopeless, run_search
from disagg.experiments.plan_probe import _Decided, _Judge, probe
from disagg.experiments.plan_ranking import plain_search, rank
from disagg.experiments.plan_rates import at_rate, base_rate, grid_place, grid_rate
from disagg.experiments.plan_report import plan_lines
from disagg.experiments.plan_search import Found, highest_rate
from disagg.experiments.plan_space import routers_of, shapes_of
from disagg.experiments.plan_winner import write_winner
from disagg.experiments.profile_file import SHIPPED
from disagg.experiments.run_directory import RunDirectory
from disagg.experiments.run_point import NoProgress, run_points
from disagg.experiments.run_simulation import run_simulation
from disagg.experiments.streams import repeat_seed
from disagg.experiments.sweep_workers import open_pool
from disagg.experiments.workload import PlannedRequest
from disagg.policies.vocabulary import PS_PER_S

TEXT = """\
schema_version: 1
name: small
seed: 3
model: {id: llama-3.1-8b}
cluster:
  profile: spec:h200
  context_servers: {scheduler: {max_batch_size: 16}}
  generation_servers: {scheduler: {max_batch_size: 64}}
  cache_transceiver: {backend: mpi}
policy: {context_router: least_tokens, generation_router: least_kv}
workload:
  dataset: {type: synthetic, isl: {mean: 1024, stddev: 256}, osl: {type: uniform, min: 20, max: 60}}
  max_tokens: 64
  phases:
    - {name: warmup, type: concurrency, concurrency: 2, requests: 4, exclude_from_results: true}
    - {name: profiling, type: poisson, rate: 10, requests: 100}
slo: {ttft_ms: 120, tpot_ms: 9, attainment: 0.9}
plan: {max_gpus: 2, tensor_parallel_sizes: [1], routers: [round_robin], seeds: 2, tolerance: 0.1, horizon_s: 0.1}
"""


def load(folder: Path, *more: str) -> tuple[dict[str, Any], Experiment]:
    """The file's plain values and its experiment, both with `more` set."""
    file = folder / "experiment.yaml"
    file.write_text(TEXT)
    data: dict[str, Any] = {}
    base = load_experiment(file, more, edit=lambda document: data.update(deepcopy(document.data))).experiment
    return data, base


def search_in(folder: Path, *more: str) -> Search:
    data, base = load(folder, *more)
    (folder / "searches").mkdir(exist_ok=True)
    with open_pool("processes", 1) as pool:
        assert pool is not None
        return run_search(data, base, pool, folder / "searches")


def attainment(config: Experiment, folder: Path, number: int) -> float:
    """Of a whole run, as its report says: nothing is shared with the search."""
    (point,) = run_points(load_experiment(folder / "experiment.yaml"), folder / f"run{number}")
    config = config.model_copy(update={"plan": None})
    with RunDirectory(point) as writer:
        outcome = run_simulation(config, point, writer, NoProgress())
        object.__setattr__(point, "experiment", config)
        return float(writer.finish(outcome)["slo_attainment"])


def test_the_search_finds_what_trying_every_rate_of_every_candidate_finds(tmp_path: Path) -> None:
    search = search_in(tmp_path, "workload.phases.profiling.requests=60")
    ranks = rank(search)
    assert len(ranks) == len(search.entries) == 3  # 1 + 1, and one or two mixed
    tried: dict[str, list[float]] = {}
    number = 0
    for each in ranks:
        for repeat, found in enumerate(each.entry.finals):
            config = each.entry.candidate.experiment
            near = grid_place(found.rate, 0.1)
            best = 0.0
            for place in range(near - 3, near + 4):
                rate, number = grid_rate(place, 0.1), number + 1
                one = at_rate(config, rate, 10.0, horizon_s=0.1, seed=repeat_seed(config.seed, repeat))
                if attainment(one, tmp_path, number) >= 0.9:
                    best = rate
            tried.setdefault(each.entry.candidate.label, []).append(best / each.entry.num_gpus)
    means = {label: sum(values) / len(values) for label, values in tried.items()}
    assert ranks[0].entry.candidate.label == max(means, key=lambda label: means[label])
    for each in ranks:
        assert each.per_gpu.value == pytest.approx(means[each.entry.candidate.label], rel=0.1)


def test_a_simulation_ended_early_answers_as_the_whole_run_does_with_less_work(tmp_path: Path) -> None:
    _, base = load(tmp_path)
    known = {}
    for number, rate in enumerate((5.0, 20.0, 30.0, 40.0, 60.0, 200.0)):
        config = at_rate(base, rate, 10.0)
        verdict = probe(config, rate)
        assert verdict.is_met == (attainment(config, tmp_path, number) >= 0.9)
        known[rate] = verdict.num_known
        if not verdict.is_met:
            assert sum(verdict.missed.values()) == 11  # one more than may miss, and nothing after it
            assert verdict.why in ("TTFT", "TPOT")
    assert known[200.0] < 40 < 90 <= known[5.0]


def test_bisection_finds_the_edge_from_wherever_it_starts_in_few_steps() -> None:
    draw = random.Random(1)
    for _ in range(300):
        edge, start, tolerance = draw.randint(-200, 200), draw.randint(-200, 200), draw.choice([0.02, 0.05, 0.3])
        asked: list[int] = []

        def is_met(place: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(place)
            return place <= edge

        within = abs(edge - start) < 200 * 0.02 / tolerance
        found = highest_rate(is_met, start, tolerance)
        if within:
            assert found == (edge, edge + 1)
        assert len(asked) == len(set(asked)) <= 22


def test_what_is_met_at_no_rate_or_at_any_ends_too() -> None:
    assert highest_rate(lambda place: False, 0, 0.1)[0] is None
    met, missed = highest_rate(lambda place: True, 0, 0.1)
    assert missed is None
    assert grid_rate(met or 0, 0.1) == pytest.approx(1000, rel=0.1)


def test_a_tight_objective_wants_phases_apart_and_a_loose_one_wants_them_together(tmp_path: Path) -> None:
    best = {}
    for name, objectives in {
        "tight": "{ttft_ms: 1000, tpot_ms: 6, attainment: 0.9}",
        "loose": "{ttft_ms: 1000, tpot_ms: 60, attainment: 0.9}",
    }.items():
        (tmp_path / name).mkdir()
        more = ("plan.max_gpus=3", "plan.min_gpus=3", "plan.seeds=1", "workload.phases.profiling.requests=200")
        ranks = rank(search_in(tmp_path / name, f"slo={objectives}", *more))
        best[name] = ranks[0].entry
        assert {each.entry.role for each in ranks} == {"disaggregated", "mixed"}
    assert best["tight"].candidate.shape.label == "2 context tp1 + 1 generation tp1"
    assert best["loose"].role == "mixed"


def test_screening_leaves_the_winner_in(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    more = ("plan.max_gpus=3", "plan.routers=[round_robin, random]", "workload.phases.profiling.requests=50")
    screened = search_in(tmp_path / "a", *more)
    whole = search_in(tmp_path / "b", *more, "plan.exhaustive=true")
    assert any(entry.left_out for entry in screened.entries)
    assert not any(entry.left_out for entry in whole.entries)
    assert rank(screened)[0].entry.candidate.label == rank(whole)[0].entry.candidate.label
    assert screened.num_probes < whole.num_probes


# ---- parts ----------------------------------------------------------------------------------------------------------


def judge_of(backlog: Any, num_requests: int = 600) -> _Judge:
    """A judge that has seen arrivals every 10 ms with so many requests in the cluster at each."""
    from disagg.experiments.config import Slo

    judge = _Judge(Slo(e2e_ms=1e9), num_requests)
    judge.num_sent = num_requests
    judge._latencies = [PS_PER_S * 10, 100]
    judge._backlog = [(number * PS_PER_S // 100, backlog(number)) for number in range(num_requests)]
    return judge


def test_a_backlog_that_grows_all_the_time_is_told_from_one_that_fluctuates() -> None:
    draw = random.Random(5)
    for _ in range(50):
        stable = judge_of(lambda number: 20 + draw.randint(-8, 8))
        growing = judge_of(lambda number: 20 + number // 8 + draw.randint(-8, 8))
        filling = judge_of(lambda number: min(number, 60) + draw.randint(0, 5))
        assert not stable.is_saturated()
        assert growing.is_saturated()
        assert not filling.is_saturated()


def test_an_overdue_request_is_a_miss_before_it_ends_and_only_once() -> None:
    from disagg.experiments.config import Slo

    judge = _Judge(Slo(ttft_ms=100, tpot_ms=10, attainment=0.5), 4)
    for number in range(4):
        judge.sent(PlannedRequest(number, "", 0, 8, 11, 16))
    judge.first_token(0, PS_PER_S // 20)
    judge.look(PS_PER_S // 10)
    assert judge.missed == {}
    with pytest.raises(_Decided):  # three have no token after 100 ms; two may miss
        judge.look(PS_PER_S // 10 + 1)
    assert judge.missed == {"ttft": 3}
    with pytest.raises(_Decided):
        judge.look(PS_PER_S)  # the other one was to end 100 ms after its first token
    assert judge.missed == {"ttft": 3, "tpot": 1}
    judge.look(2 * PS_PER_S)
    assert judge.num_known == 4


def test_arrivals_of_one_seed_at_two_rates_are_scaled_copies_and_the_horizon_only_adds(tmp_path: Path) -> None:
    from disagg.experiments.workload import Workload

    _, base = load(tmp_path)
    assert base_rate(base) == 10.0
    slow = [r.offset for r in Workload(at_rate(base, 5.0, 10.0)) if not r.excluded]
    fast = [r.offset for r in Workload(at_rate(base, 50.0, 10.0, horizon_s=10)) if not r.excluded]
    assert (len(slow), len(fast)) == (100, 500)
    assert [a / b for a, b in zip(slow, fast) if a and b] == pytest.approx([10.0] * 100, rel=1e-6)


def test_the_space_is_every_split_of_the_gpus(tmp_path: Path) -> None:
    _, base = load(tmp_path, "plan={max_gpus: 4, tensor_parallel_sizes: [1, 2], mixed_max_num_tokens: [512, 2048]}")
    assert base.plan is not None
    shapes = shapes_of(base.plan, base)
    labels = [shape.label for shape in shapes]
    assert len(set(labels)) == len(labels)
    # (1,1): 6 splits of up to 4 into two; (1,2), (2,1): 2 each; (2,2): 1; mixed: (4 of tp1 + 2 of tp2) x 2 budgets
    assert sum(shape.role == "disaggregated" for shape in shapes) == 6 + 2 + 2 + 1
    assert sum(shape.role == "mixed" for shape in shapes) == 12
    assert max(shape.num_gpus for shape in shapes) == 4
    assert routers_of(base.plan, base, "mixed") == [
        {"mixed_router": {"name": "least_requests"}},
        {"router": {"name": "round_robin"}},
    ]


def found(rate: float) -> Found:
    verdict = {
        "rate": rate,
        "is_met": True,
        "attainment": 0.95,
        "num_requests": 1,
        "num_known": 1,
        "missed": {"ttft": 1},
        "num_outside": 0,
        "num_batches": 1,
    }
    return Found(rate, verdict, verdict | {"is_met": False}, 1, 1, 1)


@pytest.mark.parametrize(
    ("others", "is_apart"),
    [
        ([9.0, 9.9, 8.2], True),  # always a tenth less
        ([9.5, 11.8, 8.4], False),  # now more, now less
        ([9.95, 10.95, 8.95], False),  # always less, by less than two rates are apart
    ],
)
def test_candidates_are_told_apart_only_where_seeds_agree(others: list[float], is_apart: bool, tmp_path: Path) -> None:
    search = search_in(tmp_path, "plan.max_gpus=1", "plan.tolerance=0.02", "plan.seeds=1")
    (entry,) = search.entries
    best = type(entry)(entry.candidate, entry.arithmetic, finals=[found(rate) for rate in (10.0, 11.0, 9.0)])
    other = type(entry)(entry.candidate, entry.arithmetic, finals=[found(rate) for rate in others])
    ranks = rank(Search(search.base, search.plan, search.lengths, 1.0, (0, 1, 2), (other, best), ()))
    assert ranks[0].entry is best
    assert ranks[1].is_apart == is_apart
    assert ranks[0].limits == ("TTFT",)


def test_more_than_rate_matching_says_is_told_so_and_no_interval_is_negative(tmp_path: Path) -> None:
    search = search_in(tmp_path, "plan.max_gpus=1", "plan.tolerance=0.02", "plan.seeds=1")
    (entry,) = search.entries
    assert entry.role == "mixed"
    entry.arithmetic = replace(entry.arithmetic, matched_rate=5.0, matched_rate_per_gpu=5.0)
    entry.finals = [found(rate) for rate in (1.0, 20.0)]
    ranks = rank(search)
    assert ranks[0].per_gpu.low == 0.0
    text = "\n".join(plan_lines(search, ranks, None))
    assert "0 … 131" in text  # 10.5 + 12.7 x 9.5
    assert "1 of 1 do more than rate matching says, which is no bound" in text


def test_rate_matching_leaves_out_no_mixed_shape(tmp_path: Path) -> None:
    search = search_in(tmp_path, "plan.seeds=1")
    entries = list(search.entries)
    for entry in entries:
        rate = 10.0 if entry is next(e for e in entries if e.role == entry.role) else 1.0
        entry.arithmetic, entry.left_out = replace(entry.arithmetic, matched_rate_per_gpu=rate), ""
    entries += [type(entry)(entry.candidate, replace(entry.arithmetic, matched_rate_per_gpu=4.9)) for entry in entries]
    _leave_out_hopeless(entries)
    assert {entry.role for entry in entries if entry.left_out} == {"disaggregated"}


def test_a_cluster_whose_steps_lie_beyond_what_the_profile_measured_is_marked_and_written_so(tmp_path: Path) -> None:
    """A profile of steps of up to 1,024 rows: prompts in parts of 512 are within it, whole ones of 1,500 are not."""
    shipped = msgspec.json.decode((SHIPPED / "h200-llama-3.1-8b.json").read_bytes())
    for engine in shipped["engines"]:
        engine["measured"] = dict.fromkeys(engine["measured"], 10**9) | {"rows": 1024}
    (tmp_path / "small.json").write_bytes(msgspec.json.encode(shipped))
    more = (
        "cluster.profile=small.json",
        "cluster.cache_transceiver.backend=auto",
        "plan={roles: mixed, max_gpus: 1, tensor_parallel_sizes: [1], seeds: 1, tolerance: 0.3, horizon_s: 0.1,"
        " mixed_max_num_tokens: [512, 2048]}",
        "workload.dataset.isl={mean: 1500, stddev: 1}",
        "workload.phases.profiling.requests=40",
        "slo={ttft_ms: 2000, tpot_ms: 100, attainment: 0.9}",
    )
    search = search_in(tmp_path, *more)
    ranks = {each.entry.candidate.shape.label: each for each in rank(search)}
    measured, extrapolated = ranks["1 mixed tp1, 512 tokens"], ranks["1 mixed tp1, 2048 tokens"]
    assert measured.outside == 0
    assert 0 < extrapolated.outside < 1
    lines = plan_lines(search, list(ranks.values()), None)
    place = list(ranks.values()).index(extrapolated) + 1
    (note,) = [line for line in lines if line.startswith("* extrapolated")]
    assert f"{100 * extrapolated.outside:.2g} % of {place})" in note
    marked = [line for line in lines[5:7] if "* " in line]
    assert len(marked) == 1
    assert "2048 tokens" in marked[0]
    assert ("ms (extrapolated)" in "\n".join(lines)) is (place == 1)  # of the best one's fullest step
    plain = plain_search(search, list(ranks.values()))
    shares = [each["batches_outside_measured_range"] for each in plain["ranking"]]
    assert shares == [each.outside for each in ranks.values()]
    path, _ = write_winner(search, extrapolated, tmp_path)
    assert "lie outside the measured range of the profile" in path.read_text()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["slo=null"], "needs objectives"),
        (["workload.phases.profiling={name: p, type: concurrency, concurrency: 4, requests: 100}"], "is a closed loop"),
        (["plan.tensor_parallel_sizes=[5]", "plan.max_gpus=10"], "no cluster of the space can be built"),
        (["plan.min_gpus=3"], "no cluster has 3 to 2 GPUs"),
    ],
)
def test_what_cannot_be_searched_is_refused(more: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        search_in(tmp_path, *more)


def test_results_are_json(tmp_path: Path) -> None:
    search = search_in(tmp_path, "plan.seeds=1")
    plain = plain_search(search, rank(search))
    assert json.loads(json.dumps(plain)) == plain
