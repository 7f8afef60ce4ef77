"""Profiles merged and pooled: every link and executor keeps its own samples, and none counts twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.devices import DEVICES
from disagg.core.overheads import LinkCost
from disagg.experiments.calibration_samples import (
    ClientSample,
    MessageSample,
    Samples,
    StepSample,
    TransferSample,
    pair_kind,
    read_samples,
    write_samples,
)
from disagg.experiments.errors import ConfigError
from disagg.experiments.measured_profile import LinkEntry, Profile
from disagg.experiments.profile_file import load_profile, save_profile
from disagg.experiments.profile_merge import merge_profiles, merged
from disagg.experiments.profile_refit import refit_profile
from tests.profile_examples import a_profile, entry

PS_PER_MS = 10**9
RATE = 10**9


def link(ms: float, transport: str = "mpi", **other: Any) -> LinkEntry:
    return LinkEntry(transport, 1, 1, 1, 1, 16, LinkCost(RATE, round(ms * PS_PER_MS)), (), **other)


def transfers(ms: float, source: int = 1, reader: int = 2, session: int = 0) -> list[TransferSample]:
    """That took `ms` beside their bytes, which go at `RATE`."""
    kv_bytes = a_profile().kv_bytes_per_token
    return [
        TransferSample(session, source, reader, n, n // 16, 1, round(ms * PS_PER_MS + n * kv_bytes * 1e12 / RATE), None)
        for n in (64, 128, 256, 512)
        for _ in range(8)
    ]


def calibrated(folder: Path, name: str, *links: LinkEntry, ms: float, **other: Any) -> Path:
    """One context and one generation executor; transfers and messages of `ms`, and steps and requests that took so too."""
    kinds = entry("context", executors=(1,)), entry("generation", executors=(2,))
    path = folder / f"{name}.json"
    save_profile(a_profile(name=name, **({"engines": kinds, "links": links} | other)), path)
    steps = [
        StepSample(0, 2, 1, i + 1, "following", "same", round(ms * PS_PER_MS), b, b * 100, 0, 0, 0, 0, 0, 0, 0, False)
        for i, b in enumerate((1, 2, 4, 8) * 4)
    ]
    said = [
        MessageSample(0, a, b, pair_kind(a, b), "Enqueue", round(ms * PS_PER_MS))
        for a, b in ((0, 1), (1, 0), (1, 2))
        for _ in range(10)
    ]
    clients = [ClientSample(0, True, round(ms * PS_PER_MS)) for _ in range(10)]
    write_samples(Samples(steps, said, transfers(ms), clients), path.with_suffix(".samples"))
    return path


def samples_of(path: Path) -> Samples:
    samples = read_samples(path.with_suffix(".samples"))
    assert samples is not None
    return samples


def fixed_ms(profile: Profile) -> list[float]:
    return [link.cost.fixed / PS_PER_MS for link in profile.links]


@pytest.mark.parametrize("apart", [{"transport": "host"}, {"throttle_gb_per_s": 5.0}])
@pytest.mark.parametrize("ends", [{"sources": (1,), "readers": (2,)}, {}])  # told, and from a time that did not tell
@pytest.mark.parametrize("pool", [False, True])
def test_links_of_equal_layouts_are_fitted_to_their_own_transfers(
    tmp_path: Path, apart: dict[str, Any], ends: dict[str, Any], pool: bool
) -> None:
    fast = calibrated(tmp_path, "fast", link(9, **ends), ms=9)
    slow = calibrated(tmp_path, "slow", link(90, **apart, **ends), ms=90)
    both = merge_profiles([fast, slow], tmp_path / "both.json", pool=pool)
    assert fixed_ms(both) == pytest.approx([9, 90], rel=1e-3)
    again = refit_profile(tmp_path / "both.json", tmp_path / "again.json")
    assert fixed_ms(again) == pytest.approx([9, 90], rel=1e-3)
    third = calibrated(tmp_path, "third", link(91, **apart, **ends), ms=91)
    three = merge_profiles([tmp_path / "both.json", third], tmp_path / "three.json", pool=True)
    assert fixed_ms(three) == pytest.approx([9, 90.5], rel=1e-3)
    if ends:
        assert [(x.sources, x.readers) for x in three.links] == [((1,), (2,)), ((3, 5), (4, 6))]


@pytest.mark.parametrize("told", [True, False])
def test_links_that_have_an_executor_in_common_are_fitted_apart(tmp_path: Path, told: bool) -> None:
    pairs = (1, 2), (1, 3), (4, 2)
    plain, into, out_of = (link(1, **({"sources": (a,), "readers": (b,)} if told else {})) for a, b in pairs)
    kinds = entry("context", executors=(1,)), entry("generation", executors=(2,))
    wider = (
        entry("generation", tensor_parallel_size=2, executors=(3,)),
        entry("context", tensor_parallel_size=2, executors=(4,)),
    )
    links = plain, replace(into, reader_tp=2), replace(out_of, source_tp=2)
    path = calibrated(tmp_path, "one", *links, ms=9, engines=kinds + wider)
    samples = samples_of(path)
    samples.transfers += transfers(40, 1, 3) + transfers(70, 4, 2)
    write_samples(samples, path.with_suffix(".samples"))
    assert fixed_ms(refit_profile(path, tmp_path / "again.json")) == pytest.approx([9, 40, 70], rel=1e-3)


def test_equal_links_are_pooled_and_unlike_blocks_refused(tmp_path: Path) -> None:
    paths = [calibrated(tmp_path, "one", link(9), ms=9), calibrated(tmp_path, "other", link(11), ms=11)]
    assert fixed_ms(merge_profiles(paths, tmp_path / "both.json", pool=True)) == pytest.approx([10], rel=1e-3)
    profiles = [a_profile(), a_profile(links=(replace(link(11), tokens_per_block=32),))]
    with pytest.raises(ConfigError, match=r"its link over mpi has tokens_per_block 32, that of an earlier profile 16"):
        merged(profiles, "both", pool=True)


def test_a_link_that_does_not_say_whose_samples_it_has_is_fitted_where_none_other_could_own_them(
    tmp_path: Path,
) -> None:
    alone = calibrated(tmp_path, "alone", link(1), ms=9)
    assert fixed_ms(refit_profile(alone, tmp_path / "again.json")) == pytest.approx([9], rel=1e-3)
    several = calibrated(tmp_path, "several", link(1), link(2, "host"), ms=9)
    assert fixed_ms(refit_profile(several, tmp_path / "again.json")) == [1, 2]
    pooled = merge_profiles([several, calibrated(tmp_path, "known", link(30), ms=30)], tmp_path / "p.json", pool=True)
    assert fixed_ms(pooled) == [1, 2]  # 30 ms are not what the first of them was measured with


def test_what_an_earlier_profile_has_leaves_no_transfers_behind_and_no_number_is_used_again(tmp_path: Path) -> None:
    paths = [calibrated(tmp_path, name, link(ms), ms=ms) for name, ms in (("a", 9), ("b", 90), ("c", 11))]
    merge_profiles(paths[:2], tmp_path / "ab.json")
    assert {(t.source, t.reader) for t in samples_of(tmp_path / "ab.json").transfers} == {(1, 2)}
    chained = merge_profiles([tmp_path / "ab.json", paths[2]], tmp_path / "abc.json", pool=True)
    found = samples_of(tmp_path / "abc.json")
    assert fixed_ms(chained) == pytest.approx([10], rel=1e-3)
    heard = [{m.sender for m in found.messages if m.latency_ps == ms * PS_PER_MS} - {0} for ms in (9, 90, 11)]
    assert heard == [{1}, {3}, {5}]  # all messages stay, each under its own name
    assert {step.executor for step in found.steps} == {2, 6}


def test_samples_of_a_former_merge_with_executors_that_no_entry_names_are_left_alone(tmp_path: Path) -> None:
    first, other = calibrated(tmp_path, "first", link(9), ms=9), calibrated(tmp_path, "other", link(11), ms=11)
    samples = samples_of(first)
    samples.transfers += transfers(90, 3, 4, session=7)
    write_samples(samples, first.with_suffix(".samples"))
    both = merge_profiles([first, other], tmp_path / "both.json", pool=True)
    assert fixed_ms(both) == pytest.approx([10], rel=1e-3)
    assert [engine.executors for engine in both.engines] == [(1, 5), (2, 6)]
    assert {s.session for s in samples_of(tmp_path / "both.json").steps} == {0, 8}


def test_pooled_profiles_share_the_delays_of_all_of_them(tmp_path: Path) -> None:
    paths = [calibrated(tmp_path, "one", link(9), ms=9), calibrated(tmp_path, "other", link(11), ms=11)]
    both = merge_profiles(paths, tmp_path / "both.json", pool=True)
    assert both.dispatch_delay_ps == 10 * PS_PER_MS
    assert both.messages.into_executor == 10 * PS_PER_MS
    assert both.device.message_latency_s == pytest.approx(10e-3)
    assert both.device.link_latency_s == pytest.approx(10e-3, rel=1e-3)
    assert both.device.link_bandwidth == both.links[0].cost.bytes_per_s == pytest.approx(RATE, rel=1e-3)
    assert both.device.link_efficiency == 1.0
    assert load_profile(tmp_path / "both.json") == both


def test_executors_whose_layers_are_cut_differently_are_not_pooled() -> None:
    first, other = (
        a_profile(engines=(entry("mixed", pipeline_parallel_size=2, layers_per_stage=layers),))
        for layers in ((2, 2), (3, 1))
    )
    with pytest.raises(
        ConfigError, match=re.escape("have layers_per_stage (3, 1), those of an earlier profile (2, 2)")
    ):
        merged([first, other], "both", pool=True)


def test_a_calibration_cannot_be_pooled_with_itself(tmp_path: Path) -> None:
    one, other = calibrated(tmp_path, "one", link(9), ms=9), calibrated(tmp_path, "other", link(11), ms=11)
    said = r"one\.samples: holds steps of executor 2 that .*one\.samples holds too; only different calibrations"
    with pytest.raises(ConfigError, match=said):
        merge_profiles([one, one], tmp_path / "twice.json", pool=True)
    merge_profiles([other, one], tmp_path / "both.json", pool=True)  # under another name and other numbers
    with pytest.raises(ConfigError, match=r"one\.samples: holds steps of executor 2 that .*both\.samples holds too"):
        merge_profiles([tmp_path / "both.json", one], tmp_path / "thrice.json", pool=True)
    assert not (tmp_path / "twice.json").exists()


def test_one_profile_of_several_is_of_the_latest_day_and_of_the_versions_of_all() -> None:
    def measured(day: int, commit: str | None, **versions: str) -> Profile:
        created = f"2026-11-{day}T00:00:00+00:00"
        device = replace(DEVICES["cpu-2core"], source=f"measured {created}")
        return a_profile(created=created, git_commit=commit, versions=versions, device=device)

    first, second = measured(22, "abc", torch="2.10", python="3.12"), measured(29, "def", torch="2.11", python="3.12")
    third = measured(24, None, torch="2.10", numpy="2.5")
    both = merged([merged([first, second], "two"), third], "both")
    assert both.created == "2026-11-29T00:00:00+00:00"
    assert both.device.source == "measured 2026-11-29T00:00:00+00:00"
    assert both.git_commit == "abc, def"
    assert both.versions == {"torch": "2.10, 2.11", "python": "3.12", "numpy": "2.5"}
    assert merged([third], "alone").git_commit is None


@pytest.mark.parametrize("efforts", [("quick", "standard"), ("standard", "quick")])
def test_a_quick_calibration_among_those_merged_makes_the_profile_quick(efforts: tuple[str, str]) -> None:
    profiles = [
        a_profile(engines=(entry(role),), links=(), effort=effort)
        for role, effort in zip(("context", "mixed"), efforts, strict=True)
    ]
    assert merged(profiles, "both").effort == "quick"
    assert merged(profiles[: efforts.index("quick")] + [a_profile()], "both").effort == "standard"
