"""Kendall's tau over the pairs of policies that hardware tells apart, on cases that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.reports.error_text import ranking_text
from disagg.reports.ranking import metric_key, rank_pairs, rank_trees, tau_of
from disagg.reports.runs import ReportError
from tests.test_reports_runs import MS, config_of, request, write_run


def verdicts(simulated: dict[str, list[float]], measured: dict[str, list[float]]) -> dict[str, str]:
    return {pair.a + pair.b: pair.verdict for pair in rank_pairs(simulated, measured)}


def one(values: dict[str, float]) -> dict[str, list[float]]:
    return {policy: [value] for policy, value in values.items()}


def test_equal_orders_have_tau_1_and_reversed_ones_minus_1() -> None:
    measured = one({"a": 10, "b": 20, "c": 40})
    assert tau_of(rank_pairs(one({"a": 1, "b": 2, "c": 3}), measured)) == 1.0
    assert tau_of(rank_pairs(one({"a": 3, "b": 2, "c": 1}), measured)) == -1.0


def test_pairs_that_hardware_cannot_tell_apart_are_ties_and_left_out() -> None:
    measured = one({"a": 100, "b": 109, "c": 150})
    simulated = one({"a": 3, "b": 2, "c": 9})  # wrong about a and b, which are 9 % apart
    assert verdicts(simulated, measured) == {"ab": "tie", "ac": "agree", "bc": "agree"}
    assert tau_of(rank_pairs(simulated, measured)) == 1.0


def test_ten_percent_of_the_smaller_value_are_enough_to_count() -> None:
    assert verdicts(one({"a": 1, "b": 2}), one({"a": 100, "b": 110})) == {"ab": "agree"}
    assert verdicts(one({"a": 1, "b": 2}), one({"a": 100, "b": 109.9})) == {"ab": "tie"}


def test_one_swap_among_four_policies_gives_two_thirds() -> None:
    measured = one({"a": 10, "b": 20, "c": 40, "d": 80})
    simulated = one({"a": 2, "b": 1, "c": 3, "d": 4})
    assert tau_of(rank_pairs(simulated, measured)) == pytest.approx((5 - 1) / 6)


def test_a_difference_within_the_spread_of_repeats_is_a_tie() -> None:
    measured = {"a": [10.0, 20.0], "b": [14.0, 14.0], "c": [30.0, 40.0]}
    simulated = one({"a": 1, "b": 2, "c": 3})
    # a − b is −4 and +6: its mean 1 is less than its spread 10; c − a is 20 both times
    assert verdicts(simulated, measured) == {"ab": "tie", "ac": "agree", "bc": "agree"}
    pairs = {pair.a + pair.b: pair for pair in rank_pairs(simulated, measured)}
    assert pairs["ab"].spread == 10.0
    assert pairs["ac"].spread == 0.0


def test_policies_that_are_equal_in_simulation_count_as_neither_right_nor_wrong() -> None:
    measured = one({"a": 10, "b": 20, "c": 40})
    pairs = rank_pairs(one({"a": 1, "b": 1, "c": 3}), measured)
    assert [pair.verdict for pair in pairs] == ["disagree", "agree", "agree"]
    assert tau_of(pairs) == pytest.approx(2 / 3)


def test_where_everything_is_a_tie_there_is_no_tau() -> None:
    assert tau_of(rank_pairs(one({"a": 1, "b": 2}), one({"a": 100, "b": 101}))) is None


def test_policies_must_be_the_same_on_both_sides() -> None:
    with pytest.raises(ValueError, match="cannot be ranked"):
        rank_pairs(one({"a": 1, "b": 2}), one({"a": 1, "c": 2}))


# ---- from folders of runs -------------------------------------------------------------------------------------------


def tree(path: Path, backend: str, ends_ms: dict[str, int], rates: tuple[float, ...] = (8.0,)) -> Path:
    for rate in rates:
        for policy, end in ends_ms.items():
            values = {"policy.context_router.name": policy} | ({"workload.rate": rate} if len(rates) > 1 else {})
            manifest = {"point": f"{policy},{rate}", "values": values}
            row = request(end_ps=end * MS)
            write_run(path / f"{policy}-{rate:g}", config_of(policy, rate, backend), manifest, requests=[row])
    return path


def test_a_sweep_over_policies_is_ranked_and_every_pair_listed(tmp_path: Path) -> None:
    simulated = tree(tmp_path / "s", "simulation", {"one": 90, "two": 100, "three": 300})
    measured = tree(tmp_path / "h", "hardware", {"one": 120, "two": 110, "three": 400})
    (ranking,) = rank_trees(simulated, [measured], metric_key("mean_e2e_latency"))
    assert ranking.tau == 1.0
    assert (len(ranking.pairs), ranking.num_apart) == (3, 2)
    assert not ranking.is_enough
    assert ranking.best_agrees  # simulation would choose one, which ties with the best
    text = ranking_text(ranking)
    assert all(f"{pair.a} : {pair.b}" in text for pair in ranking.pairs)
    assert "tie (9.1 % apart)" in text


def test_routers_that_differ_only_in_their_order_are_ranked_as_two_policies(tmp_path: Path) -> None:
    kinds = ("context", "generation", "mixed")
    trees = []
    for backend in ("simulation", "hardware"):
        for number, names in enumerate((("one", "one", "two"), ("one", "two", "two"))):
            values = {f"policy.{kind}_router.name": name for kind, name in zip(kinds, names)}
            rows = [request(end_ps=(100 + 100 * number) * MS)]
            write_run(
                tmp_path / backend / str(number), config_of("one", 8.0, backend), {"values": values}, requests=rows
            )
        trees.append(tmp_path / backend)
    (ranking,) = rank_trees(trees[0], trees[1:], "mean_e2e_latency_s")
    assert [(pair.a, pair.b) for pair in ranking.pairs] == [("one, one, two", "one, two, two")]


def test_what_is_swept_beside_policies_makes_rankings_of_their_own(tmp_path: Path) -> None:
    trees = [
        tree(tmp_path / backend, backend, {"one": 100, "two": 200}, (2.0, 4.0))
        for backend in ("simulation", "hardware")
    ]
    found = rank_trees(trees[0], trees[1:], metric_key("p50_e2e_latency_s"))
    assert [ranking.condition for ranking in found] == ["workload.rate=2", "workload.rate=4"]


def test_a_second_tree_of_hardware_runs_makes_ties_of_what_it_contradicts(tmp_path: Path) -> None:
    simulated = tree(tmp_path / "s", "simulation", {"one": 100, "two": 200})
    measured = [
        tree(tmp_path / "h1", "hardware", {"one": 100, "two": 150}),
        tree(tmp_path / "h2", "hardware", {"one": 150, "two": 140}),
    ]
    assert rank_trees(simulated, measured[:1], "mean_e2e_latency_s")[0].tau == 1.0
    (ranking,) = rank_trees(simulated, measured, "mean_e2e_latency_s")
    assert ranking.tau is None
    assert ranking.pairs[0].why == "within the spread of repeats"


def test_a_ranking_needs_two_policies_in_both_worlds_and_a_metric_that_exists(tmp_path: Path) -> None:
    trees = [tree(tmp_path / backend, backend, {"one": 100}) for backend in ("simulation", "hardware")]
    with pytest.raises(ReportError, match="sweep over a policy's name"):
        rank_trees(trees[0], trees[1:], "mean_ttft_s")
    assert metric_key("slo_attainment") == "slo_attainment"
    for name in ("ttft", "mean_speed", "p50_throughput"):
        with pytest.raises(ReportError, match="is no metric"):
            metric_key(name)
