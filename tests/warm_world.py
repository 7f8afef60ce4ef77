"""One MPI world for many tests: its ranks load PyTorch once, and then run one program after another.

Starting a rank takes two seconds of a core, most of these programs much less. Every program has communicators of its own, as
large as it asks for. Not for tests of how worlds start and end, nor of ranks that die: those start their own.
"""

from __future__ import annotations

import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from disagg.runtime import hardware_run
from disagg.runtime.executor_spec import HardwareSpec, check_spec
from disagg.runtime.hardware_run import Fault, HardwareResult, LoadPhase
from disagg.runtime.launcher import launch
from disagg.runtime.orchestrator_job import JOB, RESULT, Job, decode_outcome, encode

ROOT = Path(__file__).parent.parent
NUM_RANKS = 7  # the largest cluster of these tests: an orchestrator and six ranks of executors
ENDED = "ended"  # the pipe on which ranks tell of each program's end, and the launcher of the world's
WELL = "well"
_LEAVE_S = 30.0


class WarmWorldError(AssertionError):
    """A program failed, or did not end, on some rank; the text holds what the ranks said."""


class WarmWorld:
    """Ranks that wait in a read of a pipe of their own, without a look at MPI: they take no time of the cores."""

    def __init__(self, num_ranks: int = NUM_RANKS) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="disagg-test-world-")
        self.path = Path(self._folder.name)
        self.num_ranks = num_ranks
        self._count = 0
        self._told = b""  # of a line that has not come to its end
        self._pipes: list[int] = []
        for name in [*map(str, range(num_ranks)), ENDED]:
            os.mkfifo(self.path / name)
            # both ways, so that opening waits for nobody and a reader sees no end of file
            self._pipes.append(os.open(self.path / name, os.O_RDWR))
        self._thread = threading.Thread(target=self._launch, name="warm world", daemon=True)
        self._thread.start()

    @property
    def is_there(self) -> bool:
        return self._thread.is_alive()

    def _launch(self) -> None:
        with (self.path / "output").open("wb") as output:
            launch(
                str(ROOT / "tests" / "runtime_programs" / "warm_ranks.py"),
                [str(self.path)],
                self.num_ranks,
                env={"PYTHONPATH": str(ROOT)},
                linger_s=1.0,
                stdout=output,
                stderr=output,
            )
        with (self.path / ENDED).open("w") as ended:
            ended.write("the world ended\n")

    def run(self, program: str, args: Sequence[str], num_ranks: int, timeout_s: float = 120.0) -> str:
        """What the first `num_ranks` ranks print in `main(world, args)` of the module `program`, one after the other.

        Raises WarmWorldError.
        """
        self._count += 1
        outputs = [self.path / f"{self._count}.{rank}" for rank in range(num_ranks)]
        for pipe, output in zip(self._pipes, outputs):
            output.touch()
            os.write(pipe, "\t".join([output.name, str(num_ranks), program, *args]).encode() + b"\n")
        deadline = time.monotonic() + timeout_s
        for _ in range(num_ranks):
            line = self._next_line(deadline)
            if line != WELL:
                self.close(is_broken=True)
                said = "".join(path.read_text(errors="replace") for path in (self.path / "output", *outputs))
                self._folder.cleanup()
                raise WarmWorldError(f"{program} {' '.join(args)}: {line}\n{said}")
        return "".join(output.read_text(errors="replace") for output in outputs)

    def _next_line(self, deadline: float) -> str:
        """What a rank, or the launcher, says next."""
        while b"\n" not in self._told:
            if not select.select([self._pipes[-1]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return "it did not end in time"
            self._told += os.read(self._pipes[-1], 1 << 12)
        line, _, self._told = self._told.partition(b"\n")
        return line.decode()

    def close(self, is_broken: bool = False) -> None:
        """Send the ranks home, or kill them where they do not listen."""
        if not is_broken:
            for pipe in self._pipes[:-1]:
                os.write(pipe, b"\n")
            self._thread.join(_LEAVE_S)
        if self.is_there and (self.path / "pid").exists():
            os.kill(int((self.path / "pid").read_text()), signal.SIGKILL)  # of rank 0: the launcher ends the others
            self._thread.join(_LEAVE_S)
        for pipe in self._pipes:
            os.close(pipe)
        if not is_broken:
            self._folder.cleanup()


_world: WarmWorld | None = None


def warm_world() -> WarmWorld:
    """This process's, started when it is first asked for, and again after a program has broken it."""
    global _world
    if _world is None or not _world.is_there:
        _world = WarmWorld()
    return _world


def close_warm_world() -> None:
    """At the end of the tests."""
    global _world
    if _world is not None and _world.is_there:
        _world.close()
    _world = None


def run_cluster(
    spec: HardwareSpec,
    phases: Sequence[LoadPhase],
    *,
    warm_up: int = 1,
    faults: Sequence[Fault] = (),
    timeout_s: float = 120.0,
) -> HardwareResult:
    """As `hardware_run.run_cluster`, on ranks that are there already; with `faults`, which kill ranks, on new ones."""
    if faults:
        result = hardware_run.run_cluster(spec, phases, warm_up=warm_up, faults=faults, timeout_s=timeout_s)
        assert isinstance(result, HardwareResult)
        return result
    roster = check_spec(spec)
    world = warm_world()
    folder = Path(tempfile.mkdtemp(dir=world.path))
    (folder / JOB).write_bytes(encode(Job(spec, tuple(phases), int(warm_up))))
    world.run("tests.runtime_programs.one_run", [str(folder)], roster.num_ranks, timeout_s)
    outcome = decode_outcome((folder / RESULT).read_bytes())
    assert isinstance(outcome, HardwareResult)
    return outcome
