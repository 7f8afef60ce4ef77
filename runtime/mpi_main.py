"""The outermost frame of a rank: runs a module and ends the process so that the other ranks notice.

`python -m disagg.runtime.mpi_main MODULE ARGS…` is what the launcher starts on every rank. Under ULFM a rank that exits
with a status other than 0 and without MPI_Finalize is noticed by nobody, and hangs the others in theirs (Open MPI
5.0.11); one that a signal killed is noticed within 0.1 s. So a failed rank kills itself, and a failed rank 0 aborts
the world, whose exit status is then its own.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from .launch_start import LEFT
from .launcher import EXIT_INTERRUPTED, die_with_parent_setter, inside_mpi, leave_status


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end this process with what it returns (None is 0), raises or passes to `sys.exit`."""
    try:
        code = main() or 0
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            code = ending.code or 0
        else:
            print(ending.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this rank with `code`, whatever state MPI is in."""
    from .mpi_world import abort_world, finalize_mpi, mpi_is_active

    world = inside_mpi()
    is_rank0 = world is None or world.rank == 0
    sys.stdout.flush()
    sys.stderr.flush()
    if is_rank0:
        leave_status("exit", code)
    elif world is not None:
        leave_status(f"{LEFT}{world.rank}", code)
    if mpi_is_active():
        if code == 0:
            finalize_mpi()
        elif is_rank0:
            abort_world(code)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout.flush()
    # Not sys.exit: a thread that still waits for a dead peer would keep the process alive.
    os._exit(code)


def _run_module(module: str) -> None:
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> NoReturn:
    if len(sys.argv) < 2:
        print("usage: python -m disagg.runtime.mpi_main MODULE [ARGS…]", file=sys.stderr)
        os._exit(2)
    die_with_parent = die_with_parent_setter()
    if die_with_parent is not None:
        die_with_parent()  # mpiexec killed outright would leave its ranks behind
    world = inside_mpi()
    if world is None or world.rank == 0:
        leave_status("pid", os.getpid())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` leaves it ignored in all descendants
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    run_rank(lambda: _run_module(module))


if __name__ == "__main__":
    main()
