"""One thread a process; without a GPU, Triton in its interpreter; and what tests of the command line share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests and their ranks are as many processes as there are cores, or more: threads that spin beside them cost seven times
# the CPU time of the models' small products. Read when torch and numpy are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the warm world comes first: of several workers, which begin with a part each, one starts it then."""
    items.sort(key=lambda item: not _is_of_the_warm_world(item))


def _is_of_the_warm_world(item: pytest.Item) -> bool:
    names = vars(getattr(item, "module", object)).values()
    return any(getattr(value, "__module__", None) == "tests.warm_world" for value in names)


def pytest_collection_finish() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        from tests.quick_interpreter import make_quick

        make_quick()


def pytest_sessionfinish() -> None:
    if (warm := sys.modules.get("tests.warm_world")) is not None:
        warm.close_warm_world()


@pytest.fixture
def disagg(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process: its exit code for these arguments."""
    from disagg.experiments import cli

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr("sys.argv", ["disagg", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return code if isinstance(code, int) else 0

    return call
