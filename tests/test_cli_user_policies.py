"""What a user's own policy can do wrong, at load and in a run: an exit code, one line that names it, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.experiments import cli
from tests.test_cli_commands import TEXT

HEAD = "import sys\nfrom disagg.policies import ScoringPolicy\n\n\nclass Mine(ScoringPolicy):\n"


def disagg(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["disagg", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    code = exit_.value.code
    return code if isinstance(code, int) else 0


def experiment(tmp_path: Path, source: str) -> Path:
    (tmp_path / "mine.py").write_text(source)
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT.replace("router: round_robin", "router: 'mine.py:Mine'"))
    return file


IN_A_RUN = {
    "it divides by zero": (
        "    def score(self, request, executors):\n        return self._help(0)\n\n"
        "    def _help(self, d):\n        return 1 / d\n",
        "policy Mine (mine.py:10): ZeroDivisionError: division by zero",
    ),
    "it exits": (
        "    def score(self, request, executors):\n        sys.exit(0)\n",
        "policy Mine (mine.py:7): SystemExit: 0",
    ),
    "it fails within our code": (
        "    def score(self, request, executors):\n        return executors.no_such_column\n",
        "policy Mine (mine.py:7): AttributeError: ",
    ),
    "it fails when told of an end": (
        "    def score(self, request, executors):\n        return 0\n\n"
        "    def on_finished(self, *arguments):\n        raise KeyError('x')\n",
        "policy Mine (mine.py:10): KeyError: 'x'",
    ),
    "its score is nothing": ("    def score(self, request, executors):\n        pass\n", "Mine"),
}


@pytest.mark.parametrize("case", IN_A_RUN)
def test_a_policy_that_fails_in_a_simulation_is_named_by_class_and_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, told = IN_A_RUN[case]
    file = experiment(tmp_path, HEAD + source)
    output = tmp_path / "out"
    assert disagg(monkeypatch, "run", str(file), "--output", str(output)) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1, error
    assert not output.exists()


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)\n",
        HEAD + "    def __init__(self, *, rng):\n        sys.exit(0)\n",
    ],
)
def test_a_policy_file_that_exits_is_refused(
    command: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = experiment(tmp_path, source)
    assert disagg(monkeypatch, command, str(file)) == 2
    error = capsys.readouterr().err
    assert "mine.py:Mine" in error
    assert "SystemExit: 0" in error


def test_a_failure_of_our_own_is_not_blamed_on_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from disagg.simulator.cluster import SimulatedCluster

    def broken(self: SimulatedCluster) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(SimulatedCluster, "run", broken)
    file = experiment(tmp_path, HEAD + "    def score(self, request, executors):\n        return 0\n")
    monkeypatch.setattr("sys.argv", ["disagg", "run", str(file), "--output", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()
