"""Files that `--set` names: found from the working folder, where whoever types it is, and kept so that runs replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg.experiments.cluster import profile_of as measured_of
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.forced_routes import experiment_of
from disagg.experiments.profile_file import save_profile
from disagg.experiments.set_paths import from_working_folder
from disagg.reports.runs import Run
from tests.profile_examples import EXPERIMENT, a_profile


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment file in a folder of its own, seen from a working folder beside it."""
    for name in ("files", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "files" / "experiment.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    save_profile(a_profile(name="beside the file"), tmp_path / "files" / "measured.json")
    return path


def profile_of(file: Path, *overrides: str) -> str:
    return load_experiment(file, overrides).experiment.cluster.profile


def test_a_profile_that_set_names_is_found_from_the_working_folder(file: Path) -> None:
    save_profile(a_profile(), Path("mine.json"))
    assert profile_of(file, "cluster.profile=mine.json") == str(Path("mine.json").resolve())
    assert profile_of(file, "cluster.profile=./mine.json") == str(Path("mine.json").resolve())
    group = "cluster.generation_servers.profile=mine.json"
    generation = load_experiment(file, [group]).experiment.cluster.generation_servers
    assert generation is not None
    assert generation.profile == str(Path("mine.json").resolve())


def test_of_two_files_of_one_name_set_means_the_one_in_the_working_folder_and_a_file_its_neighbour(file: Path) -> None:
    save_profile(a_profile(name="in the working folder"), Path("measured.json"))
    assert profile_of(file) == "./measured.json"
    assert profile_of(file, "cluster.profile=measured.json") == str(Path("measured.json").resolve())


def test_what_is_not_in_the_working_folder_is_found_from_the_folder_of_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile_of(file, "cluster.profile=measured.json") == "measured.json"
    monkeypatch.chdir(file.parent)
    assert profile_of(file, "cluster.profile=measured.json") == "measured.json"
    with pytest.raises(ConfigError, match=r"no profile [^ ]*files/none\.json; allowed"):  # one place, told once
        profile_of(file, "cluster.profile=none.json")


def test_a_profile_that_is_in_neither_folder_is_refused_with_both(file: Path) -> None:
    tried = r"=x.json: cluster.profile: there is no profile .*/here/x\.json and no .*/files/x\.json; allowed: a file "
    with pytest.raises(ConfigError, match=tried):
        profile_of(file, "cluster.profile=x.json")


def test_each_profile_of_a_sweep_that_set_gives_is_found_too(file: Path) -> None:
    for name in ("a.json", "b.json"):
        save_profile(a_profile(), Path(name))
    points = load_experiment(file, ["sweep={cluster.profile: [a.json, b.json, measured.json]}"]).points
    wanted = [str(Path("a.json").resolve()), str(Path("b.json").resolve()), "measured.json"]
    assert [point.experiment.cluster.profile for point in points] == wanted


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("workload.dataset.path", "there.csv", "HERE/there.csv"),
        ("workload.dataset", {"type": "trace", "path": "there.csv"}, {"type": "trace", "path": "HERE/there.csv"}),
        ("workload.dataset.path", "elsewhere.csv", "elsewhere.csv"),
        ("model.weights", "there", "HERE/there"),
        ("model.weights", "random", "random"),
        ("model.id", "tiny-llama", "tiny-llama"),
        ("policy.router", "mine.py:Mine", "HERE/mine.py:Mine"),
        ("policy.router", {"name": "mine.py:Mine", "most": 3}, {"name": "HERE/mine.py:Mine", "most": 3}),
        ("policy.router", "other.py:Mine", "other.py:Mine"),
        ("cluster.profile", "spec:cpu-2core", "spec:cpu-2core"),
        ("cluster.profile", "there", "there"),  # the name of a shipped one
        ("name", "there", "there"),
        ("seed", 3, 3),
    ],
)
def test_other_files_are_found_from_the_working_folder_and_words_stay_words(
    file: Path, key: str, value: Any, found: Any
) -> None:
    here = Path.cwd()
    for name in ("there", "random", "tiny-llama"):
        (here / name).mkdir()
    for name in ("there.csv", "mine.py"):
        (here / name).touch()
    assert str(from_working_folder(key, value, file.parent, "--set")).replace(str(here), "HERE") == str(found)


def test_a_run_with_such_a_profile_is_replayed_from_any_folder(
    file: Path, disagg: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_profile(a_profile(name="mine"), Path("mine.json"))
    assert disagg("run", file, "--set", "cluster.profile=mine.json", "--output", "out") == 0
    run = Run(Path("out").resolve())
    monkeypatch.chdir(tmp_path)
    used = measured_of(experiment_of(run))
    assert used is not None
    assert used.name == "mine"
