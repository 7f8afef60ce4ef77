"""The compiled copy of the package does what the source does, to the byte. Skipped where it was not built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.experiments import compiled
from tests.simulation_helpers import random_world

ROOT = Path(__file__).resolve().parent.parent
COPY = Path(os.environ.get("DISAGG_COMPILED", ROOT / "build" / "compiled"))


def test_random_worlds_leave_the_same_logs_compiled_and_not() -> None:
    try:
        built_from = (COPY / compiled.SOURCES).read_text()
    except OSError:
        pytest.skip("nothing was compiled: make compiled")
    if built_from != compiled.digest_of_sources():
        pytest.skip("the compiled copy is of other sources: make compiled")
    command = [sys.executable, "-P", "-c", _PROGRAM, "0", "40"]
    path = os.pathsep.join((str(COPY), str(ROOT)))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{seed} {random_world(seed).run().digest()}" for seed in range(40)]


_PROGRAM = """
import disagg.core.executor as executor
if executor.__file__.endswith(".py"):
    raise SystemExit(f"{executor.__file__} is not compiled")
from tests.simulation_helpers import main
main()
"""
