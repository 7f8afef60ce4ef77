"""The compiled copy of the package does what the source does, to the byte. Skipped where it was not built, but for CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from disagg.experiments import compiled, compiled_training
from disagg.experiments.config import validate_mapping
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.load_source import LoadSource
from disagg.experiments.run_point import NoProgress
from disagg.experiments.run_simulation import build_cluster
from disagg.experiments.simulated_load import SimulatedLoad
from disagg.experiments.workload import Workload
from tests.simulation_helpers import random_world

ROOT = Path(__file__).resolve().parent.parent
COPY = Path(os.environ.get("DISAGG_COMPILED", ROOT / "build" / "compiled"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled copy; in CI, where a C compiler is, one that is made for the purpose."""
    if (COPY / compiled.SOURCES).is_file() and (COPY / compiled.SOURCES).read_text() == compiled.digest_of_sources():
        return COPY
    if not os.environ.get("CI"):
        pytest.skip("nothing was compiled of these sources: make compiled")
    if not shutil.which("cc") or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("there is no C compiler, or no header of Python, to compile with")
    folder = tmp_path_factory.mktemp("copy") / "compiled"
    compiled.build(folder, opt_level=0)
    return folder


@pytest.mark.timeout(900)  # half a minute of one core, which several whole suites at once make minutes of
def test_random_worlds_leave_the_same_logs_compiled_and_not(copy: Path) -> None:
    command = [sys.executable, "-P", "-c", _PROGRAM, "0", "40"]
    path = os.pathsep.join((str(copy), str(ROOT)))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{seed} {random_world(seed).run().digest()}" for seed in range(40)]


# beyond what random worlds are: pools of numpy columns, whose numbers policies answer with, and every way to draw a load
_LOADS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "40 executors": (20, {"isl": 900, "osl": 30}, {"type": "poisson", "rate": 90}),
    "sessions": (
        1,
        {
            "isl": {"type": "uniform", "min": 20, "max": 400},
            "osl": {"type": "lognormal", "mean": 20, "stddev": 9, "max": 60},
            "sessions": {"turns": 3, "concurrent": 2},
            "shared_prefixes": {"groups": 3, "length": 64},
        },
        {"type": "gamma", "rate": 9, "burstiness": 0.5},
    ),
    "a closed loop": (1, {"isl": 100, "osl": 20}, {"type": "concurrency", "concurrency": 3}),
}


def rows_of(load: str) -> str:
    """A digest of every row of a small experiment."""
    number, dataset, phase = _LOADS[load]
    servers = {"num_instances": number, "kv_cache": {"enable_block_reuse": load == "sessions"}}
    config = validate_mapping(
        {
            "schema_version": 1,
            "name": "compiled",
            "seed": 1,
            "model": {"id": "llama-3.1-8b"},
            "cluster": {
                "profile": "h200-llama-3.1-8b",
                "context_servers": servers,
                "generation_servers": servers,
                "cache_transceiver": {"backend": "auto"},
            },
            "policy": {"context_router": "least_tokens", "generation_router": "least_kv"},
            "workload": {
                "dataset": {"type": "synthetic", **dataset},
                "max_tokens": 64,
                "phases": [{"name": "all", "requests": 40, **phase}],
            },
        },
        {},
    )
    rows: list[Any] = []
    users = SimulatedLoad(LoadSource(Workload(config)), config, NoProgress())
    cluster = build_cluster(config, records=rows.append, delivered=users.delivered)
    users.start(cluster)
    cluster.run()
    return f"{load}: {len(rows)} rows, {blake2b(repr(rows).encode()).hexdigest()}"


@pytest.mark.timeout(900)
def test_experiments_leave_the_same_rows_compiled_and_not(copy: Path) -> None:
    path = os.pathsep.join((str(copy), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ROWS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [rows_of(load) for load in _LOADS]


def test_a_folder_that_holds_anything_but_a_copy_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "thesis" / "chapter.tex"
    kept.parent.mkdir()
    kept.write_text("words")
    monkeypatch.setattr(sys, "argv", ["compiled", "--output", str(kept.parent)])
    assert compiled.main() == 2
    assert f"{kept.parent} holds files, and no compiled copy" in capsys.readouterr().err
    assert kept.read_text() == "words"


@pytest.mark.parametrize("left", [None, compiled.SOURCES, compiled.BEGUN])
def test_an_empty_folder_and_an_earlier_copy_are_made_anew(
    left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left is not None:
        (tmp_path / left).touch()
        (tmp_path / "old").touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)  # the compiler
    monkeypatch.setattr(compiled, "_has_gcc", lambda: True)
    compiled.build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disagg", "mypy.ini", "setup.py", compiled.SOURCES]


def test_a_copy_is_compiled_by_loads_that_are_there_and_run() -> None:
    files = compiled_training.training_files()
    assert {path.stem for path in files} >= {"sessions", "shared_prefixes", "aggregated", "disaggregated"}
    for path in files:
        assert load_experiment(path).experiment.backend == "simulation"
    small = load_experiment(files[-1], ["workload.phases.1.requests=20"]).experiment
    assert compiled_training.simulate(small) > 20


_COMPILED = """
import disagg.core.executor as executor
if executor.__file__.endswith(".py"):
    raise SystemExit(f"{executor.__file__} is not compiled")
"""
_PROGRAM = (
    _COMPILED
    + """
from tests.simulation_helpers import main
main()
"""
)
_ROWS = (
    _COMPILED
    + """
from tests.test_compiled import _LOADS, rows_of
for load in _LOADS:
    print(rows_of(load))
"""
)
