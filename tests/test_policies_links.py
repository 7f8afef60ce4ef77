"""What a policy knows of a link: its rate, its latency, and what the orchestrator has put on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg.core.event_log import replay
from disagg.core.links import Links
from disagg.core.prediction import LinkTimes, PredictionConfig, step_times
from disagg.experiments.cluster import cluster_of
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_simulation import link_costs
from disagg.policies.links import Link
from disagg.policies.registry import load
from tests.policy_views import fleet_of
from tests.simulation_helpers import COST, World, executors, named
from tests.test_device_kinds import EXPERIMENT

NEAR, FAR = LinkTimes(1e12, 70, 2.0), LinkTimes(0.25e12, 70, 2.0)  # a byte takes 1 ps and 4


def test_a_link_is_known_by_its_ends_and_in_one_direction() -> None:
    view = fleet_of("cgg", domains="aab", links=(NEAR, FAR)).at(0)
    assert view.link(1, 2) == Link(1e12, 70, 2.0, 0.0, 100)
    assert view.link(1, 3) == view.link(3, 1) == Link(0.25e12, 70, 2.0, 0.0, 100)
    assert view.link(1, 2).transfer_time(10) == pytest.approx(70 + 20 + 1000)
    assert view.link(1, 3).transfer_time(10) == pytest.approx(70 + 20 + 4000)
    assert view.link(2, 2).transfer_time(10) == view.link(0, 2).transfer_time(10) == 0  # here already; nobody's


def test_what_was_sent_is_in_flight_until_the_link_has_carried_it() -> None:
    fleet = fleet_of("cg", links=(NEAR, NEAR))
    fleet.links.sent(1, 2, 10, 0)  # 1,000 bytes: 1,000 ps
    fleet.links.sent(1, 2, 5, 400)  # 600 of them and 500 more
    assert fleet.at(400).link(1, 2).bytes_in_flight == pytest.approx(1100)
    assert fleet.at(1000).link(1, 2).bytes_in_flight == pytest.approx(500)
    assert fleet.at(1000).link(1, 2).transfer_time(1) == pytest.approx(70 + 2 + 500 + 100)
    assert fleet.at(1500).link(1, 2).bytes_in_flight == fleet.at(9000).link(1, 2).bytes_in_flight == 0
    assert fleet.at(400).link(2, 1).bytes_in_flight == 0


def test_where_nothing_is_known_of_links_a_transfer_takes_no_time() -> None:
    assert fleet_of("cg").at(0).link(1, 2).transfer_time(10**6) == 0


@pytest.mark.parametrize("binding", ["at_context_done", "at_arrival"])
def test_the_core_counts_generation_phases_whose_kv_must_travel(binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine prompts at once: each that is handed over finds more on the link, and a replay the same."""
    seen: list[float] = []

    class Looks(load("least_kv", "routing")):  # type: ignore[misc]
        def route_context(self, request: Any, fleet: Any) -> Any:
            seen.append(fleet.link(1, 2).bytes_in_flight)
            return super().route_context(request, fleet)

    slow = LinkTimes(1e6)
    prediction = PredictionConfig(
        (step_times(COST, 256, 4),), (0, 0), links=(slow, slow), link_kind_of=(0, 0), kv_bytes_per_token=10
    )
    world = World(executors("cg"), router=named(monkeypatch, Looks), prediction=prediction, generation_binding=binding)
    for i in range(1, 10):
        world.submit(i, i * 10**8, 100, 5)
    world.run()
    assert seen[0] == 0
    assert max(seen) > 1000  # more than one request's
    assert seen == sorted(seen)  # 1,000 bytes take a millisecond, and the next comes in a tenth
    before = list(seen)
    seen.clear()
    assert replay(b"".join(world.logs[0])) == len(world.frames(0))
    assert seen == before


def test_a_simulated_link_between_domains_is_capped_and_its_prediction_says_so(tmp_path: Path) -> None:
    file = tmp_path / "kinds.yaml"
    text = EXPERIMENT.replace("{role: context}", "{role: context, domain: a}").replace(
        "{role: generation}", "{role: generation, domain: a}"
    )
    file.write_text(text.replace("backend: cuda_ipc", "backend: cuda_ipc, across_domains_gb_per_s: 25"))
    config = load_experiment(file, ()).points[0].experiment
    cluster = cluster_of(config)
    cost = link_costs(config, {e.id: e for e in cluster.executors})
    assert [cost(1, 3).bytes_per_s, cost(1, 4).bytes_per_s, cost(2, 3).bytes_per_s, cost(2, 4).bytes_per_s] == [
        450e9 * 0.87, 25e9, 25e9, 300e9 * 0.87
    ]  # fmt: skip
    assert cluster.prediction is not None
    links = Links(cluster.prediction, cluster.executors)
    for source in (1, 2):
        for reader in (3, 4):
            known = links.between(source, reader, 0)
            assert (known.bytes_per_s, known.latency) == (cost(source, reader).bytes_per_s, cost(source, reader).fixed)
            assert known.bytes_per_token == 131_072
