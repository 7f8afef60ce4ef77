"""A run that is cut short - by Ctrl-C or by its time - says so, exits with its own code and leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disagg.experiments import cli, cli_run
from disagg.experiments.config import Experiment
from disagg.experiments.run_directory import RunDirectory
from disagg.experiments.run_point import Progress, RunOutcome, RunPoint
from tests.test_cli_commands import TEXT

LONG = TEXT.replace("requests: 10", "requests: 10000000")


def start(file: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "disagg.experiments.cli", "run", str(file), "--output", str(output), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a shell's `&` leaves SIGINT ignored in all descendants
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(folder: Path, pattern: str) -> None:
    until = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("sweep", ["", "sweep: {seed: [1, 2]}\n"])
def test_ctrl_c_ends_a_simulation_at_once_and_leaves_nothing_half_written(sweep: str, tmp_path: Path) -> None:
    file, output = tmp_path / "experiment.yaml", tmp_path / "out"
    file.write_text(LONG + sweep)
    process = start(file, output, "--workers", "1")
    try:
        wait_for(tmp_path, "out/seed=1/.0.partial-*" if sweep else ".out.partial-*")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines() == ["interrupted"]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["experiment.yaml", *(["out", "out/seed=1", "out/sweep.json"] if sweep else [])]


def test_a_run_that_was_interrupted_stops_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []

    def interrupted(config: Experiment, point: RunPoint, writer: RunDirectory, progress: Progress) -> RunOutcome:
        begun.append(point.seed)
        return RunOutcome(0, exit_code=130, message="the run left no result; its exit code was 130")

    monkeypatch.setattr(cli_run, "runner_of", lambda backend: interrupted)
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT + "sweep: {seed: [1, 2, 3]}\n")
    monkeypatch.setattr("sys.argv", ["disagg", "run", str(file), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 130
    assert begun == [1]
    assert "interrupted: [1/3] seed=1 repeat 0" in capsys.readouterr().err


def test_a_simulation_is_given_up_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(LONG)
    arguments = ["disagg", "run", str(file), "--output", str(tmp_path / "out"), "--timeout"]
    for seconds, code, told in (("0.5", 124, "timed out after 0.5 s"), ("0", 2, "must be more than 0 seconds")):
        monkeypatch.setattr("sys.argv", [*arguments, seconds])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == code
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_real_run_is_given_up_after_its_time(tmp_path: Path) -> None:
    file, output = tmp_path / "experiment.yaml", tmp_path / "out"
    small = LONG.replace("10000000", "500").replace("isl: 100", "isl: 20")
    file.write_text(small.replace("mixed_servers: {}", "mixed_servers: {kv_cache: {max_tokens: 4096}}"))
    process = start(file, output, "--backend", "hardware", "--timeout", "5")
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 124
    assert "timed out after 5 s; nothing was kept" in error
    assert list(tmp_path.iterdir()) == [file]
