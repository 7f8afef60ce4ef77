"""The public API over real processes: the programs check themselves and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.runtime.launcher import launch

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "runtime_programs"


def run(program: str, num_ranks: int, *args: str, output: Path) -> tuple[int, str]:
    with output.open("wb") as stdout:
        code = launch(
            str(PROGRAMS / program), args, num_ranks, env={"PYTHONPATH": str(ROOT)}, timeout_s=120, stdout=stdout
        )
    return code, output.read_text(errors="replace")


@pytest.mark.parametrize("how", ["drain", "fail"])
def test_an_orchestrator_routes_awaits_streams_cancels_and_shuts_down(tmp_path: Path, how: str) -> None:
    assert run("orchestrated.py", 4, how, output=tmp_path / "output") == (0, "all is well\n")


def test_executors_without_an_orchestrator_serve_all_types_and_the_user_hands_over(tmp_path: Path) -> None:
    code, output = run("led.py", 3, output=tmp_path / "output")
    assert code == 0
    assert sorted(output.splitlines()) == ["rank 0 is well", "rank 1 is well"]
