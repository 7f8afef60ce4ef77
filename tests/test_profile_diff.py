"""Profiles side by side: links by what they are, sides by what tells them apart, and names wherever a profile is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.overheads import LinkCost
from disagg.experiments.measured_profile import LinkEntry, Profile
from disagg.experiments.profile_diff import diff_profiles
from disagg.experiments.profile_file import load_profile, save_profile
from tests.profile_examples import a_profile

SHIPPED = "h200-qwen2.5-7b"


def links(ms: float) -> tuple[LinkEntry, ...]:
    """Of one transport: plain, throttled twice, and into another layout; each takes the time of the one before it twice."""
    plain = LinkEntry("mpi", 1, 1, 1, 1, 16, LinkCost(10**15, round(ms * 10**9)), ())
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"throttle_gb_per_s": 5.0},
        {"throttle_gb_per_s": 0.5},
        {"reader_tp": 2},
    )
    return tuple(
        replace(plain, cost=replace(plain.cost, fixed=plain.cost.fixed << i), **kind) for i, kind in enumerate(kinds)
    )


def families(first: Profile, second: Profile) -> dict[str, float]:
    told = diff_profiles(first, second)["families"]
    return {name: family["mean"] for name, family in told.items() if name.startswith("transfers")}


def test_links_are_compared_with_those_of_equal_layouts_and_throttle_each_under_a_name_of_its_own() -> None:
    first, second = a_profile(links=links(8)), a_profile(links=tuple(reversed(links(12))))
    plain = "transfers over mpi, tp 1 pp 1 to tp 1 pp 1"
    assert families(first, second) == pytest.approx(
        {
            plain: 0.5,
            f"{plain}, throttled to 5 GB/s": 0.5,
            f"{plain}, throttled to 0.5 GB/s": 0.5,
            "transfers over mpi, tp 1 pp 1 to tp 2 pp 1": 0.5,
        },
        rel=1e-2,
    )
    alone = a_profile(links=links(8)[:1])
    assert list(families(alone, alone)) == ["transfers over mpi"]
    assert families(alone, a_profile(links=links(8)[1:2])) == {}


@pytest.fixture
def told(disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `disagg profile …` prints; of errors, where it is to end with another code than 0."""

    def run(*arguments: object, code: int = 0) -> str:
        assert disagg("profile", *arguments) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return run


def test_sides_of_one_name_are_told_apart_by_day_or_by_file(tmp_path: Path, told: Callable[..., str]) -> None:
    first, second, later = (tmp_path / f"{name}.json" for name in ("first", "second", "later"))
    save_profile(a_profile(), first)
    save_profile(a_profile(), second)
    save_profile(a_profile(created="2026-11-29T00:00:00+00:00"), later)
    head = told("diff", first, later).splitlines()[0]
    assert head == (
        "measured (a processor, measured 2026-11-29T00:00:00+00:00) over"
        " measured (a processor, measured 2026-11-22T00:00:00+00:00)"
    )
    head = told("diff", first, second).splitlines()[0]
    assert head == f"measured (a processor, {second}) over measured (a processor, {first})"
    save_profile(a_profile(name="another"), second)
    head = told("diff", first, second).splitlines()[0]
    assert head == "another (a processor) over measured (a processor)"


def test_profiles_of_other_models_and_devices_are_compared_with_a_remark(
    tmp_path: Path, told: Callable[..., str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    own = a_profile().measured_for
    save_profile(a_profile(), first)
    save_profile(a_profile(measured_for=replace(own, model="llama", dtype="float16", device_name="another")), second)
    lines = told("diff", first, second).splitlines()
    assert lines[1:3] == [
        "note: measured with different models: llama in float16, and tiny-llama in float32",
        "note: measured on different devices: another (cpu), and a processor (cpu)",
    ]
    assert len(json.loads(told("diff", first, second, "--json"))["remarks"]) == 2
    assert "note: " not in told("diff", first, first)
    other_shape = a_profile(measured_for=replace(own, shape_hash="0"))
    assert diff_profiles(a_profile(), other_shape)["remarks"] == [
        "measured with different models: tiny-llama in float32, and tiny-llama in float32, in other shapes"
    ]


@pytest.mark.parametrize("limit", ["nan", "-1", "inf"])
def test_a_limit_that_is_no_share_is_refused(limit: str, told: Callable[..., str]) -> None:
    said = told("diff", SHIPPED, SHIPPED, f"--limit={limit}", code=2)
    assert f"--limit {limit}: must be a share of 0 or more" in said
    told("diff", SHIPPED, SHIPPED, "--limit=0")


def test_a_shipped_profile_is_merged_and_fitted_again_by_its_name(tmp_path: Path, told: Callable[..., str]) -> None:
    name = "cpu-2core-tiny"
    for command in ("merge", "refit"):
        output = tmp_path / f"{command}.json"
        told(command, name, "--output", output)
        assert load_profile(output).engines[0].title == "context tp 1 pp 1"
        assert output.with_suffix(".samples").is_dir()
        assert "unknown profile 'cpu-2core'" in told(command, "cpu-2core", "--output", output, "--overwrite", code=2)
