"""The progress thread between real processes: order, independence of busy ranks, and the death of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.runtime.launcher import launch
from tests.warm_world import warm_world

PROGRAMS = Path(__file__).parent / "mpi_programs"

pytestmark = pytest.mark.mpi


def test_each_pair_of_ranks_keeps_its_order() -> None:
    assert warm_world().run("tests.mpi_programs.ordering", [], 4).count("6000 frames in order") == 4


def test_a_rank_busy_in_python_does_not_stall_its_peers_transfers() -> None:
    assert "while rank 0 was busy" in warm_world().run("tests.mpi_programs.busy_rank", [], 2)


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_dead_rank_is_reported_once_and_survived(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(str(PROGRAMS / "killed_rank.py"), (how,), 4, timeout_s=120) == 0
    seconds = [float(line.split()[-2]) for line in capfd.readouterr().out.splitlines() if "survived" in line]
    assert len(seconds) == 3
    assert max(seconds) < 2.9  # by MPI, not by its silence of 3 s


def test_a_rank_that_falls_silent_is_given_up_and_survived(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(str(PROGRAMS / "killed_rank.py"), ("stop",), 4, timeout_s=120, linger_s=1.0) == 0
    captured = capfd.readouterr()
    assert captured.out.count("survived") == 3
    assert "were killed" in captured.err  # the stopped process was not left behind
