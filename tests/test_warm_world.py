"""The world that tests share tells of what goes wrong in it, and is not used again then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm_world import WarmWorld, WarmWorldError

pytestmark = pytest.mark.mpi
PROGRAM = "tests.runtime_programs.as_told"


@pytest.fixture
def world() -> Iterator[WarmWorld]:
    made = WarmWorld(2)
    yield made
    if made.is_there:
        made.close()
    assert not made.path.exists()


@pytest.mark.parametrize(
    ("how", "said", "timeout_s"),
    [
        ("fails", r"rank 1 failed: ValueError: on purpose\n(.*\n)*Traceback", 60.0),
        ("is killed", "rank 0 failed: Exception: MPI_ERR_PROC_FAILED", 60.0),
        ("stays away", "it did not end in time", 0.5),
    ],
)
def test_what_goes_wrong_on_a_rank_is_told_and_ends_the_world(
    world: WarmWorld, how: str, said: str, timeout_s: float
) -> None:
    assert world.run(PROGRAM, ["is well"], 2) == "rank 0 of 2 is well\nrank 1 of 2 is well\n"
    assert world.run(PROGRAM, ["fails"], 1) == "rank 0 of 1 is well\n"  # of the first rank alone
    rank_0 = int((world.path / "pid").read_text())
    with pytest.raises(WarmWorldError, match=said):
        world.run(PROGRAM, [how], 2, timeout_s)
    assert not world.is_there
    assert not Path(f"/proc/{rank_0}").exists()
