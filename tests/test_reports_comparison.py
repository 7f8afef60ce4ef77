from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg.reports.case_labels import LONGEST, policy_labels
from disagg.reports.comparison import (
    agreement,
    compare_policies,
    estimate,
    match_backends,
    metric_errors,
    rank_agreement,
    sections_of,
)
from disagg.reports.runs import Run
from tests.test_reports_runs import MS, config_of, request, serve, write_run


def run_of(path: Path, policy: str, backend: str = "simulation", rate: float = 8.0, **options: float) -> Run:
    seed = int(options.get("seed", 42))
    tables = serve(policy, rate=rate, **options)  # type: ignore[arg-type]
    manifest = {"configuration_hash": f"{policy}-{rate}", "repeat": seed if seed < 10 else 0}
    return Run(write_run(path, config_of(policy, rate, backend, seed=seed), manifest, **tables))


def test_runs_are_labelled_by_the_router_that_varies_and_the_key_that_is_swept(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / f"{policy}-{rate}", policy, rate=rate, num_requests=8)
        for policy in ("round_robin", "least_tokens")
        for rate in (2.0, 4.0)
    ]
    (section,) = sections_of(runs)
    assert section.policies == ["round_robin", "least_tokens"]
    assert section.conditions == ["rate=2", "rate=4"]
    assert section.swept == ("rate", [2.0, 4.0])


def test_one_policy_alone_is_named_by_its_routers(tmp_path: Path) -> None:
    (section,) = sections_of([run_of(tmp_path / "run", "round_robin", num_requests=8)])
    assert section.policies == ["round_robin + least_kv"]
    assert section.conditions == [""]


def test_varying_parameters_and_files_of_users_show_in_the_label(tmp_path: Path) -> None:
    runs = []
    for i, (name, d) in enumerate([("mine/p.py:Shortest", 2), ("mine/p.py:Shortest", 3), ("random", None)]):
        config = config_of()
        config["policy"]["context_router"] = {"name": name} | ({"d": d} if d else {})
        runs.append(Run(write_run(tmp_path / str(i), config, requests=[request()])))
    (section,) = sections_of(runs)
    assert section.policies == ["Shortest (d=2)", "Shortest (d=3)", "random"]


ROLE_CHANGES = [{"at_s": at, "executor": 3, "role": "context"} for at in (2.0, 4.0)]
SECTIONS: list[dict[str, Any]] = [
    {"router": {"name": router}, "roles": roles}
    for router in ("mixed_pool", "least_tokens")
    for roles in (
        None,
        {"name": "mixed_pool"},
        {"name": "mixed_pool", "max_kv": 0.5},
        {"name": "scheduled", "changes": ROLE_CHANGES},
        {"name": "scheduled", "changes": ROLE_CHANGES[:1]},
        {"name": "scheduled", "changes": [ROLE_CHANGES[0] | {"at_s": 3.0}]},
    )
]


def test_different_policies_never_share_a_label_and_no_label_is_long(tmp_path: Path) -> None:
    runs = [
        Run(write_run(tmp_path / str(i), config_of() | {"policy": section}, requests=[request()]))
        for i, section in enumerate([*SECTIONS, *SECTIONS])
    ]
    (section,) = sections_of(runs)
    labels = [case.policy for case in section.cases]
    assert labels[: len(SECTIONS)] == labels[len(SECTIONS) :] == section.policies
    assert len(set(labels)) == len(SECTIONS)
    assert labels[:2] == ["mixed_pool + roles none", "mixed_pool + roles mixed_pool"]
    assert all(len(label) <= LONGEST + 2 for label in labels)
    assert "at_s=4" in section.full_names[labels[3]]


def test_routers_that_swap_places_or_share_a_name_are_told_apart() -> None:
    def labels(*routers: tuple[str, str, str]) -> list[str]:
        kinds = ("context_router", "generation_router", "mixed_router")
        policies = [dict(zip(kinds, ({"name": name} for name in names))) for names in routers]
        return policy_labels(policies, [f"policy.{kind}.name" for kind in kinds])[0]

    assert labels(("a", "a", "a"), ("b", "b", "b")) == ["a", "b"]
    assert labels(("a", "b", "b"), ("b", "a", "a")) == ["a + b", "b + a"]
    assert labels(("a", "a", "b"), ("a", "b", "b"), ("a", "a", "b")) == ["a + b A", "a + b B", "a + b A"]


def test_conditions_go_by_the_size_of_their_numbers(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / str(rate), "random", rate=rate, num_requests=8) for rate in (10.0, 2.5, 5.0)]
    (section,) = sections_of(runs)
    assert section.conditions == ["rate=2.5", "rate=5", "rate=10"]


def test_experiments_get_a_section_each(tmp_path: Path) -> None:
    runs = [Run(write_run(tmp_path / name, config_of(name=name), requests=[request()])) for name in ("a", "b")]
    assert [section.name for section in sections_of(runs)] == ["a", "b"]


def test_a_policy_that_balances_better_is_best_and_tells_itself_apart(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / p, p, num_requests=500, rate=9.0) for p in ("round_robin", "least_tokens")]
    (section,) = sections_of(runs)
    (cells,) = compare_policies({p: section.select(policy=p) for p in section.policies}, ["mean_ttft_s"])
    by_policy = {cell.policy: cell for cell in cells}
    assert by_policy["least_tokens"].is_best
    assert by_policy["round_robin"].distinguishable is True
    assert "paired by request" in by_policy["round_robin"].difference.method


def test_equal_runs_are_not_distinguishable(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / p, p, num_requests=100) for p in ("least_tokens", "least_requests")]
    (section,) = sections_of(runs)
    (cells,) = compare_policies({p: section.select(policy=p) for p in section.policies}, ["mean_e2e_latency_s"])
    assert [cell.distinguishable for cell in cells] == [None, False]


def test_repeats_are_paired_by_seed(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / f"{p}{s}", p, num_requests=150, rate=9.0, seed=s)
        for p in ("round_robin", "least_tokens")
        for s in range(4)
    ]
    (section,) = sections_of(runs)
    (cells,) = compare_policies({p: section.select(policy=p) for p in section.policies}, ["p90_ttft_s"])
    worse = next(cell for cell in cells if not cell.is_best)
    assert not any(cell.estimate.too_few for cell in cells)
    few = estimate(section.select(policy="round_robin")[:2], "slo_attainment")
    assert few.too_few
    assert few.low is not None
    assert few.low >= 0
    assert worse.policy == "round_robin"
    assert worse.estimate.n == 4
    assert worse.difference.method == "paired by seed, t over repeats"


def test_runs_of_other_requests_are_not_paired(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", "round_robin", num_requests=60)
    other = Run(write_run(tmp_path / "b", config_of("random"), **serve("random", num_requests=60, seed=43)))
    (section,) = sections_of([one, other])
    (cells,) = compare_policies({p: section.select(policy=p) for p in section.policies}, ["mean_ttft_s"])
    assert [cell.difference for cell in cells] == [None, None]


def test_p99_of_few_requests_is_not_judged(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / p, p, num_requests=100) for p in ("round_robin", "least_tokens")]
    (section,) = sections_of(runs)
    (cells,) = compare_policies({p: section.select(policy=p) for p in section.policies}, ["p99_ttft_s"])
    assert all(cell.estimate.too_few for cell in cells)
    assert all(cell.distinguishable is None for cell in cells)


# ---- simulation beside hardware -------------------------------------------------------------------------------------


def hashed(path: Path, backend: str, configuration: str, end_ms: int = 146, **changes: object) -> Run:
    row = request(end_ps=end_ms * MS, **changes)
    return Run(write_run(path, config_of(backend=backend), {"configuration_hash": configuration}, requests=[row]))


def test_only_equal_configurations_are_matched(tmp_path: Path) -> None:
    simulated = [hashed(tmp_path / "s1", "simulation", "one"), hashed(tmp_path / "s2", "simulation", "two")]
    measured = [hashed(tmp_path / "h1", "hardware", "one"), hashed(tmp_path / "h3", "hardware", "three")]
    (section,) = sections_of([*simulated, *measured])
    (pair,) = match_backends(section.cases)
    assert (pair.simulation.run, pair.hardware.run) == (simulated[0], measured[0])


def test_runs_without_a_hash_or_with_another_seed_are_never_matched(tmp_path: Path) -> None:
    for name, manifest in (("none", {"configuration_hash": None}), ("seed", {"configuration_hash": "x"})):
        runs = [
            Run(
                write_run(
                    tmp_path / name / backend,
                    config_of(backend=backend, seed=i),
                    manifest | ({"seed": 1} if name == "none" else {}),
                    requests=[request()],
                )
            )
            for i, backend in enumerate(("simulation", "hardware"))
        ]
        (section,) = sections_of(runs)
        assert match_backends(section.cases) == []


def test_errors_are_relative_to_hardware(tmp_path: Path) -> None:
    runs = [hashed(tmp_path / "s", "simulation", "c", 180), hashed(tmp_path / "h", "hardware", "c", 200)]
    (section,) = sections_of(runs)
    errors = {error.key: error for error in metric_errors(match_backends(section.cases))}
    assert errors["mean_e2e_latency_s"].relative.value == pytest.approx(-0.1)
    assert errors["mean_e2e_latency_s"].absolute == pytest.approx(-0.020)
    assert errors["throughput"].relative.value == pytest.approx(200 / 180 - 1)
    assert errors["mean_ttft_s"].relative.value == 0.0


def test_an_error_against_zero_is_absolute_only(tmp_path: Path) -> None:
    runs = [
        hashed(tmp_path / "s", "simulation", "c"),
        hashed(tmp_path / "h", "hardware", "c", transfer_start_ps=51 * MS),
    ]
    (section,) = sections_of(runs)
    errors = {error.key: error for error in metric_errors(match_backends(section.cases))}
    assert errors["mean_queue_time_gen_s"].relative.value is None
    assert errors["mean_queue_time_gen_s"].absolute == pytest.approx(0.005)


def test_route_agreement_is_the_share_of_requests_on_the_same_executors(tmp_path: Path) -> None:
    ours = [request(i, context_executor=1, generation_executor=3) for i in range(4)]
    theirs = [
        request(i, context_executor=1 + (i == 0), generation_executor=3 + (i == 1), first_token_ps=51 * MS)
        for i in range(4)
    ]
    runs = [
        Run(write_run(tmp_path / backend, config_of(backend=backend), {"configuration_hash": "c"}, requests=rows))
        for backend, rows in (("simulation", ours), ("hardware", theirs))
    ]
    (section,) = sections_of(runs)
    found = agreement(match_backends(section.cases)[0])
    assert found is not None
    assert (found.same_context, found.same_generation, found.same_route) == (0.75, 0.75, 0.5)
    assert found.median_ttft_error == 0.0


def test_rank_agreement_sees_a_reversed_order(tmp_path: Path) -> None:
    runs = []
    for policy, simulated, real in (("a", 100, 220), ("b", 120, 210), ("c", 140, 200)):
        for backend, end in (("simulation", simulated), ("hardware", real)):
            config, manifest = config_of(policy, backend=backend), {"configuration_hash": policy}
            row = request(end_ps=end * MS)
            runs.append(Run(write_run(tmp_path / policy / backend, config, manifest, requests=[row])))
    (section,) = sections_of(runs)
    ranks = rank_agreement(match_backends(section.cases), ["mean_e2e_latency_s", "mean_ttft_s"])
    assert ranks == {"mean_e2e_latency_s": -1.0}
