"""The `disagg` command: what it loads, what it prints, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from disagg.core.tables import RequestRow
from disagg.experiments import cli, cli_run
from disagg.experiments.config import Experiment
from disagg.experiments.errors import ResourceError
from disagg.experiments.run_directory import RunDirectory
from disagg.experiments.run_point import Progress, RunOutcome, RunPoint
from disagg.experiments.workload import Workload

FORBIDDEN = ("pandas", "torch", "matplotlib", "scipy", "simpy", "mpi4py", "pyarrow")
TEXT = """\
schema_version: 1
name: run
seed: 42
model: {id: tiny-llama}
cluster: {profile: "spec:cpu-2core", mixed_servers: {}}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: 100, osl: 10}
  max_tokens: 16
  phases: [{name: profiling, type: poisson, rate: 8, requests: 10}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(TEXT)
    return path


def finish_all(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
    """A world in which every request is served in 10 ms."""
    workload = Workload(config)
    for planned in workload:
        at = planned.offset or 0
        token, end = at + 10**9, at + 10**10
        row = RequestRow(
            planned.id, "", "", None, planned.num_prompt_tokens, planned.max_tokens, planned.num_output_tokens,
            "stop", None, 1, 1, 1, at, at, at, token, token, token, end,
        )  # fmt: skip
        writer.write(row, phase=planned.phase, excluded=planned.excluded)
        progress.update(planned.id + 1, workload.num_requests)
    return RunOutcome(workload.num_requests)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def use(runner: Any) -> None:
        monkeypatch.setattr(cli_run, "runner_of", lambda backend: runner)

    return use


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["validate", "FILE"], ["list", "policies"]])
def test_heavy_libraries_are_not_loaded(arguments: list[str], file: Path) -> None:
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    code = (
        "import sys\n"
        f"sys.argv = ['disagg', *{arguments!r}]\n"
        "from disagg.experiments.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit_:\n    assert not exit_.code, exit_.code\n"
        f"print('LOADED', [name for name in {FORBIDDEN!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_help_does_not_load_the_config_models_either() -> None:
    code = (
        "import sys\nsys.argv = ['disagg', '--help']\nfrom disagg.experiments.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', [name for name in ('pydantic', 'yaml', 'numpy', 'rich') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_run_ends_in_a_run_directory(
    file: Path, tmp_path: Path, disagg: Callable[..., int], world: Callable[[Any], None]
) -> None:
    world(finish_all)
    assert disagg("run", file, "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_requests"] == 10


def test_a_dry_run_shows_the_cluster_and_writes_nothing(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("run", file, "--output", tmp_path / "out", "--dry-run", "--seed", "5") == 0
    out = capsys.readouterr().out
    assert "executor 1: mixed" in out
    assert f"{tmp_path / 'out'} (seed 5)" in out
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_output_folder_is_refused_before_anything_runs(
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    world: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    world(finish_all)
    assert disagg("run", file, "--output", tmp_path / "out") == 0
    assert disagg("run", file, "--output", tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert disagg("run", file, "--output", tmp_path / "out", "--resume") == 0
    assert "1 of 1 runs are finished already" in capsys.readouterr().out
    assert disagg("run", file, "--output", tmp_path / "out", "--overwrite") == 0


def test_an_output_below_a_file_is_refused(
    file: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("run", file, "--output", file / "x" / "y") == 2
    assert f"--output {file / 'x' / 'y'}: {file} is not a folder" in capsys.readouterr().err


def test_requests_that_failed_are_counted_in_a_warning(
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    world: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def some_fail(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
        return replace(finish_all(config, point, writer, progress), num_failed=3)

    world(some_fail)
    assert disagg("run", file, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err == "warning: [1/1] run repeat 0: 3 of 10 requests were rejected or failed\n"


def test_a_flag_for_hardware_is_not_ignored_without_a_word_in_a_simulation(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("run", file, "--output", tmp_path / "out", "--cold", "--dry-run") == 0
    assert "--cold has no effect in a simulation" in capsys.readouterr().err


def test_a_load_whose_tokens_fill_the_memory_is_refused_on_hardware_only(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(TEXT.replace("requests: 10", "requests: 200001"))
    assert disagg("validate", file) == 0
    assert disagg("run", file, "--output", tmp_path / "out", "--backend", "hardware") == 3
    assert "workload.phases: 200001 requests" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_more_kv_than_the_device_holds_is_a_warning(
    file: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for max_tokens, told in ((1 << 31, "mixed_servers.kv_cache.max_tokens: 2147483648 KV tokens are more"), (8192, "")):
        file.write_text(TEXT.replace("mixed_servers: {}", f"mixed_servers: {{kv_cache: {{max_tokens: {max_tokens}}}}}"))
        assert disagg("validate", file) == 0
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == bool(told)


@pytest.mark.parametrize(("kind", "told"), [("folder", "t.csv is a folder"), ("empty", "t.csv: holds no rows")])
def test_a_trace_that_holds_nothing_is_named(
    kind: str, told: str, file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    if kind == "folder":
        trace.mkdir()
    else:
        trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    file.write_text(TEXT.replace("{type: synthetic, isl: 100, osl: 10}", "{type: azure, path: t.csv}"))
    assert disagg("validate", file) == 2
    error = capsys.readouterr().err
    assert "workload.dataset.path: " in error
    assert told in error


def test_a_sweep_goes_on_after_a_run_that_failed_and_says_so_in_its_exit_code(
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    world: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def second_fails(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
        if point.values["seed"] == 2:
            return RunOutcome(10, exit_code=1, message="the link broke")
        return finish_all(config, point, writer, progress)

    world(second_fails)
    file.write_text(TEXT + "sweep: {seed: [1, 2, 3]}\n")
    assert disagg("run", file, "--output", tmp_path / "out") == 1
    assert "[2/3] seed=2 repeat 0: the link broke; nothing was kept" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seed=1", "seed=2", "seed=3", "sweep.json"]
    assert list((tmp_path / "out" / "seed=2").iterdir()) == []
    world(finish_all)
    assert disagg("run", file, "--output", tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "seed=2" / "0" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (TimeoutError("no answer in 60 s"), 124),
        (ResourceError("4 ranks are needed"), 3),
        (MemoryError(), 3),
    ],
)
def test_what_ends_a_run_shows_in_the_exit_code_and_leaves_nothing(
    error: BaseException,
    code: int,
    file: Path,
    tmp_path: Path,
    disagg: Callable[..., int],
    world: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def breaks(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
        raise error

    world(breaks)
    assert disagg("run", file, "--output", tmp_path / "out") == code
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_expand_prints_a_file_that_is_valid(
    file: Path, tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("expand", file) == 0
    expanded = tmp_path / "expanded.yaml"
    expanded.write_text(capsys.readouterr().out)
    assert "report_interval_ms: 10.0" in expanded.read_text()
    assert disagg("validate", expanded) == 0


def test_schema_and_lists_are_json_on_demand(disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert disagg("schema") == 0
    assert "properties" in json.loads(capsys.readouterr().out)
    for what, name in (("policies", "least_tokens"), ("profiles", "spec:h200"), ("models", "llama-3.1-8b")):
        assert disagg("list", what, "--json") == 0
        assert name in {row["name"] for row in json.loads(capsys.readouterr().out)}
        assert disagg("list", what, "--format", "text") == 0
        assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "polices"], "did you mean 'policies'"),
        (["list", "policies", "--format", "xml"], "must be text or json"),
        (["init", "--template", "agregated"], "did you mean 'aggregated'"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["report", "nowhere"], "there is no such folder"),
        (["replay", "nowhere"], "nowhere: there is no such folder"),
        (["conform", "nowhere"], "nowhere: there is no such folder"),
        (["regret", "nowhere"], "nowhere: there is no such folder"),
        (["replay", "."], "holds no event log"),
        (["run"], "Missing argument"),
        (["flee"], "No such command"),
    ],
)
def test_a_wrong_call_exits_with_2_and_says_what_is_allowed(
    arguments: list[str], told: str, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg(*arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_init_writes_a_valid_file_once(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert disagg("init", "--template", "instances", "--output", path) == 0
    assert disagg("validate", path) == 0
    assert disagg("init", "--output", path) == 2
    assert "exists; allowed: --overwrite" in capsys.readouterr().err


def test_a_damaged_event_log_fails_the_replay(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.orchestrator.msgpack").write_bytes(b"\xff" * 10)
    assert disagg("replay", tmp_path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["events.orchestrator.msgpack"]["equal"] is False


def test_every_command_that_prints_json_takes_the_long_word_for_it_too() -> None:
    def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield name, command
        for word, each in getattr(command, "commands", {}).items():
            yield from commands(each, f"{name} {word}")

    found = dict(commands(get_command(cli.app), "disagg"))
    printing = [name for name, each in found.items() if any("--json" in option.opts for option in each.params)]
    assert {"disagg bench engine", "disagg calibrate", "disagg doctor"} <= set(printing)
    for name in printing:
        assert any("--format" in option.opts for option in found[name].params), name
