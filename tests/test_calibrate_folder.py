"""What a calibration that does not get through leaves behind: everything that was there before, and nothing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("mpi4py")

from disagg.core.cost import roofline
from disagg.experiments import calibrate as calibrating
from disagg.experiments.calibrate import calibrate
from disagg.experiments.calibration_plan import QUICK, plan_sessions
from disagg.experiments.cluster import device_of, shape_of
from disagg.experiments.errors import CalibrationFailedError, ConfigError, ResourceError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.measured_profile import Profile
from disagg.experiments.profile_file import load_profile, save_profile
from disagg.runtime.hardware_run import HardwareRunError
from disagg.runtime.session_series import SessionResult, result_file
from tests.profile_examples import EXPERIMENT, a_profile

TOO_MUCH = "cluster.generation_servers.kv_cache.max_tokens=2000000000"


ALSO_SLOW = "cluster.cache_transceiver.across_domains_gb_per_s=1"
OTHER_KIND = "cluster.generation_servers.profile=cpu-2core-tiny"


class Place:
    """A finished profile with its samples, and calibrations that would replace it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.output = folder / "gpus.v1.json"
        self.sample = folder / "gpus.v1.samples" / "steps.parquet"
        self.sessions = folder / "gpus.v1.sessions"
        self.file = folder / "experiment.yaml"
        self.file.write_text(EXPERIMENT.replace("./measured.json", "spec:cpu-2core"), encoding="utf-8")
        self._patch = patch

    def finish(self) -> None:
        save_profile(a_profile(), self.output)
        self.sample.parent.mkdir()
        self.sample.write_bytes(b"samples")

    def calibrate(self, *overrides: str, **options: Any) -> Profile:
        config = load_experiment(self.file, overrides, backend="hardware").experiment
        return calibrate(config, self.output, now=datetime(2026, 11, 22, tzinfo=UTC), quick=True, **options)

    def leaves(self, results: dict[int, bytes] | None = None) -> None:
        """The next series writes these results, and then its cluster breaks, or (with some) all is said to have run."""

        def series(spec: Any, sessions: Any, folder: Path, **options: Any) -> None:
            for number, data in (results or {}).items():
                (folder / result_file(number)).write_bytes(data)
            if not results:
                raise HardwareRunError("rank 1 went away")

        self._patch.setattr(calibrating, "run_series", series)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_overwrite_takes_nothing_away_on_a_machine_that_cannot_run_the_cluster(place: Place) -> None:
    place.finish()
    place.sessions.mkdir()
    with pytest.raises(ResourceError, match="the KV caches need"):
        place.calibrate(TOO_MUCH, overwrite=True)
    assert load_profile(place.output) == a_profile()
    assert place.sample.read_bytes() == b"samples"
    assert place.sessions.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [(OTHER_KIND, "executors name cpu-2core-tiny beside"), (ALSO_SLOW, "across_domains_gb_per_s makes two")],
)
def test_a_cluster_of_two_kinds_is_not_calibrated_as_one(place: Place, change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        place.calibrate(change)
    assert not place.sessions.exists()


def test_overwrite_keeps_the_old_profile_while_the_new_one_is_not_there_and_can_be_resumed(place: Place) -> None:
    place.finish()
    place.leaves()
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(CalibrationFailedError, match="rank 1 went away; --resume goes on"):
            place.calibrate(**options)
        assert load_profile(place.output) == a_profile()
        assert place.sample.read_bytes() == b"samples"
    with pytest.raises(ConfigError, match="exists; allowed: --overwrite"):
        place.calibrate()


def test_resume_alone_replaces_no_profile(place: Place) -> None:
    place.leaves()
    with pytest.raises(CalibrationFailedError, match="rank 1 went away"):
        place.calibrate()
    with pytest.raises(ConfigError, match="did not end; allowed: --resume"):
        place.calibrate()
    place.finish()
    with pytest.raises(ConfigError, match="exists; allowed: --overwrite"):
        place.calibrate(resume=True)


def test_a_machine_that_cannot_run_the_cluster_gets_no_folder(place: Place) -> None:
    with pytest.raises(ResourceError, match="the KV caches need"):
        place.calibrate(TOO_MUCH)
    assert not place.sessions.exists()


def on(name: str, place: Place, patch: pytest.MonkeyPatch, **options: Any) -> str:
    """Calibrate on a device of this name, in vain; the name that the folder of sessions tells then."""
    patch.setattr(calibrating, "device_name", lambda _: name)
    with pytest.raises(CalibrationFailedError):
        place.calibrate(**options)
    told: str = json.loads((place.sessions / "about.json").read_bytes())["device_name"]
    return told


def test_the_device_is_named_anew_until_a_session_has_ended_on_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.leaves()
    assert on("unknown GPU", place, monkeypatch) == "unknown GPU"
    assert on("NVIDIA H200", place, monkeypatch, resume=True) == "NVIDIA H200"
    (place.sessions / result_file(0)).write_bytes(b"")
    assert on("NVIDIA H200", place, monkeypatch, resume=True) == "NVIDIA H200"


def test_sessions_that_are_left_run_on_no_other_device_than_those_before_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.leaves()
    on("NVIDIA H200", place, monkeypatch)
    (place.sessions / result_file(0)).write_bytes(b"")
    monkeypatch.setattr(calibrating, "device_name", lambda _: "NVIDIA A100")
    held = (
        r"holds sessions of NVIDIA H200, and here is NVIDIA A100: .*; allowed: --resume on NVIDIA H200, or --overwrite"
    )
    with pytest.raises(ConfigError, match=held):
        place.calibrate(resume=True)
    assert on("NVIDIA A100", place, monkeypatch, overwrite=True) == "NVIDIA A100"


def test_where_only_the_fit_is_missing_any_device_may_make_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.leaves()
    on("NVIDIA H200", place, monkeypatch)
    config = load_experiment(place.file, (), backend="hardware").experiment
    for number in range(len(plan_sessions(config, roofline(shape_of(config), device_of(config)), QUICK))):
        (place.sessions / result_file(number)).write_bytes(b"")  # damaged: the fit comes to say so
    place.leaves({0: b""})
    assert on("NVIDIA A100", place, monkeypatch, resume=True) == "NVIDIA H200"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x86\xa4name\xa2\xff\xff",
        msgspec.msgpack.encode(SessionResult("cut", 1.0, {0: b"no log"}, {}, {}, [])),
    ],
)
def test_a_damaged_session_is_named_in_one_line(place: Place, data: bytes) -> None:
    place.leaves({0: data})
    with pytest.raises(CalibrationFailedError, match=r"session-0000.msgpack is damaged: .*--resume runs session"):
        place.calibrate()
    assert (place.sessions / result_file(0)).read_bytes() == data


def test_a_damaged_description_of_the_cluster_is_named(place: Place) -> None:
    place.leaves({0: msgspec.msgpack.encode(SessionResult("first", 1.0, {}, {}, {}, []))})
    with pytest.raises(CalibrationFailedError, match="holds sessions and no cluster"):
        place.calibrate()
    (place.sessions / "cluster").write_bytes(b"\xc1")
    with pytest.raises(CalibrationFailedError, match=r"sessions/cluster: .*; start again with --overwrite"):
        place.calibrate(resume=True)


@pytest.mark.parametrize("name", ["gpus.v1", "gpus", "gpus.JSON", ".json"])
def test_a_profile_is_written_to_a_json_file_only(
    place: Place, disagg: Callable[..., int], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.finish()
    output = place.output.with_name(name)
    assert disagg("calibrate", place.file, "--quick", "--output", output) == 2
    assert disagg("profile", "merge", place.output, "--output", output) == 2
    told = capsys.readouterr().err
    assert told.count("allowed: a file name that ends in .json") == 2
    assert not output.exists()


def test_a_folder_is_refused_as_a_profile_before_anything_is_measured(
    place: Place, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.finish()
    folder, below = place.output.with_name("dir.json"), place.file / "gpus.json"
    folder.mkdir()
    monkeypatch.setattr(calibrating, "calibrate", lambda *_, **__: pytest.fail("it measures"))
    for output, told in ((folder, "dir.json: is a folder; allowed"), (below, "experiment.yaml is no folder; allowed")):
        for call in (
            ("calibrate", place.file, "--quick", "--overwrite"),
            ("profile", "merge", place.output, "--overwrite"),
            ("profile", "refit", place.output, "--overwrite"),
        ):
            assert disagg(*call, "--output", output) == 2
            assert told in capsys.readouterr().err
    assert not list(folder.iterdir())
