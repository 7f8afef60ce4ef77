"""Pictures of profiles show what the fit saw, and the whole of what the profile says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from disagg.core.overheads import LaunchGaps, LinkCost
from disagg.experiments.calibration_samples import FIRST, Samples, StepSample, TransferSample, as_arrays, read_samples
from disagg.experiments.measured_profile import EngineEntry, LinkEntry, Profile
from disagg.experiments.profile_cost import measured_cost
from disagg.experiments.profile_file import load_profile, profile_path
from disagg.experiments.profile_plots import fitted_ns, fitted_steps, limits_of, transfers_of, write_plots
from disagg.experiments.profile_show import print_profile
from tests.profile_examples import a_profile, entry

MS = 10**9


def prompts(before: str, step: int, rest_ps: int = -1, ms: int = 100) -> StepSample:
    """A step with one prompt of 64 tokens."""
    return StepSample(
        0, 1, step, 1, FIRST, before, ms * MS, 0, 0, 1, 64, 2080, 0, 1, 0, 0, False, longest_cached=0, rest_ps=rest_ps
    )


def said_ns(entry: EngineEntry, samples: list[StepSample]) -> list[float]:
    profile = a_profile(engines=(entry,))
    found: list[float] = fitted_ns(measured_cost(profile, entry, 8), entry, as_arrays(samples)).tolist()
    return found


def test_a_step_of_no_time_makes_no_axis_of_nine_decades() -> None:
    measured = np.array([0.0, 4.0, 5.0, 6.0, 1000.0])
    assert limits_of(np.full(5, 5.0), measured) == pytest.approx((3.6, 6.6))
    assert limits_of(np.full(3, 5.0), np.zeros(3)) == pytest.approx((0.9, 1.1))  # nothing to be seen: any will do


def test_what_the_profile_says_of_a_step_under_a_load_is_longer_by_it_and_its_gap_is_not() -> None:
    load = LaunchGaps(
        chunk_after_idle=7 * MS,
        chunk_after_chunk=7 * MS,
        millionths_under_load=100_000,
        load_after=200 * MS,
        load_drain=10,
    )
    loaded = entry("context", gaps=load)
    cool = entry("context", gaps=replace(load, millionths_under_load=0))
    steps = [
        prompts("idle", 1),
        prompts("chunk", 2),  # behind 100 ms of 200: half of it
        prompts("chunk", 3),
        prompts("chunk", 4),
        prompts("idle", 5, rest_ps=10 * MS),  # which take 100 ms of the load, of which 200 ms count
    ]
    own = said_ns(cool, steps)[0] - 7e6
    assert own > 0
    wanted = [7e6 + own * factor for factor in (1, 1.05, 1.1, 1.1, 1.05)]
    assert said_ns(loaded, steps) == pytest.approx(wanted, rel=1e-9)


def test_a_load_lengthens_no_decodes_beside_it() -> None:
    load = LaunchGaps(millionths_under_load=100_000, load_after=200 * MS)
    decode = StepSample(0, 1, 9, 2, "following", "same", 2 * MS, 4, 400, 0, 0, 0, 0, 0, 0, 0, False)
    mixed, cool = entry("mixed", gaps=load), entry("mixed", gaps=LaunchGaps())
    steps = [prompts("idle", 1), prompts("chunk", 2), prompts("chunk", 3), decode]
    assert said_ns(mixed, steps)[3] == said_ns(cool, steps)[3]
    assert said_ns(mixed, steps)[2] == pytest.approx(1.1 * said_ns(cool, steps)[2])


@pytest.mark.parametrize("role", ["context", "mixed"])
def test_the_picture_of_steps_with_chunks_has_the_bias_that_the_table_tells(role: str, tmp_path: Path) -> None:
    """The table's is of what is left when the farthest are left out; without the load the sum is off by 4 to 5 %."""
    path = profile_path("h200-llama-3.1-8b", tmp_path)
    profile, samples = load_profile(path), read_samples(path.with_suffix(".samples"))
    assert samples is not None
    of_role = next(e for e in profile.engines if e.title == f"{role} tp 1 pp 1")
    columns = as_arrays(fitted_steps(of_role, samples))
    chunked = columns["num_chunks"] > 0
    fitted = fitted_ns(measured_cost(profile, of_role, of_role.max_batch_size), of_role, columns)[chunked]
    measured = columns["duration_ps"][chunked] / 1000
    told = next(r for r in of_role.residuals if r.family == "steps with chunks")
    near = np.argsort(np.abs(measured / fitted - 1))[: len(measured) - told.num_outliers]
    assert fitted[near].sum() / measured[near].sum() - 1 == pytest.approx(told.bias, abs=0.002)


def test_steps_that_told_of_their_layers_are_shown_where_the_fit_took_them() -> None:
    context = entry("context", executors=(1,))
    assert context.chunks is not None
    early = replace(prompts("idle", 1), sends_early=True)
    samples = Samples(steps=[early, prompts("idle", 2), prompts("nothing", 3)])
    assert [step.epoch for step in fitted_steps(context, samples)] == [2]
    graphs = replace(context, chunks=replace(context.chunks, graphs=True))
    assert [step.epoch for step in fitted_steps(graphs, samples)] == [1, 2]


def linked() -> tuple[Profile, Samples]:
    """A profile of two links, and a transfer over each."""
    engines = (
        entry("context", executors=(1,)),
        entry("generation", executors=(2,)),
        entry("generation", executors=(3,), tensor_parallel_size=2),
    )
    links = (
        LinkEntry("mpi", 1, 1, 1, 1, 16, LinkCost(1e9, 2 * MS), ()),
        LinkEntry("cuda_ipc", 1, 1, 2, 1, 16, LinkCost(2e9, 3 * MS), (), throttle_gb_per_s=12.5),
    )
    transfers = [TransferSample(0, 1, reader, 100 * reader, 7, 1, 5 * MS, None) for reader in (2, 3, 3)]
    return a_profile(engines=engines, links=links), Samples(transfers=transfers)


def test_each_link_is_drawn_with_its_own_transfers(tmp_path: Path) -> None:
    profile, samples = linked()
    (first, is_first), (second, is_second) = (transfers_of(profile, link, samples) for link in profile.links)
    assert [t.reader for t in first] == [2]
    assert [t.reader for t in second] == [3, 3]
    assert is_first
    assert is_second
    assert write_plots(profile, samples, tmp_path) == [tmp_path / "transfers.png"]


def test_of_links_of_equal_layouts_each_has_its_own_transfers_if_it_says_between_which_executors() -> None:
    profile, samples = linked()
    fast = LinkEntry("mpi", 1, 1, 1, 1, 16, LinkCost(1e9, 2 * MS), ())
    engines = (entry("context", executors=(1,)), entry("generation", executors=(2, 3)))
    silent = replace(profile, engines=engines, links=(fast, replace(fast, throttle_gb_per_s=5.0)))
    for link in silent.links:
        own, is_told = transfers_of(silent, link, samples)
        assert (len(own), is_told) == (3, False)
    told = replace(
        silent,
        links=tuple(replace(e, sources=(1,), readers=(n,)) for e, n in zip(silent.links, (2, 3), strict=True)),
    )
    found = [transfers_of(told, link, samples) for link in told.links]
    assert [([t.reader for t in own], is_told) for own, is_told in found] == [([2], True), ([3, 3], True)]


def test_what_is_shown_of_a_link_names_its_throttle(capsys: pytest.CaptureFixture[str]) -> None:
    print_profile(linked()[0])
    shown = capsys.readouterr().out
    assert "KV over mpi, tp 1 pp 1 to tp 1 pp 1: 2.000 ms" in shown
    assert "KV over cuda_ipc, tp 1 pp 1 to tp 2 pp 1, throttled to 12.5 GB/s: 3.000 ms" in shown
