"""One transfer of 1,024 tokens after a rest, each way in a world of two ranks of its own, under settings of UCX and of threads.

`python tests/gpu_programs/transfer_settings.py [NAME…]` prints a line for each, and when what happened. About 6 s each.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Sequence
from typing import Any

TRY = "DISAGG_TRY"  # what a world's ranks change before they begin
GET = {"UCX_RNDV_SCHEME": "get_zcopy", "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}
FEW = {"UCX_TLS": "self,sm,cuda_copy,cuda_ipc"}
WAYS: dict[str, tuple[str, str, dict[str, str]]] = {
    "cuda_ipc": ("cuda_ipc", "same", {}),
    "cuda_ipc, re-laid out": ("cuda_ipc", "relayout", {}),
    "mpi": ("mpi", "same", {}),
    "mpi, re-laid out": ("mpi", "relayout", {}),
    "mpi, the receiver gets": ("mpi", "same", GET),
    "mpi, the sender puts": ("mpi", "same", {"UCX_RNDV_SCHEME": "put_zcopy"}),
    "mpi, few, receiver gets": ("mpi", "same", {**FEW, **GET}),
    "cuda_ipc, one core": ("cuda_ipc", "same", {TRY: "pin"}),
    "cuda_ipc, never asleep": ("cuda_ipc", "same", {TRY: "hot"}),
    "cuda_ipc, both": ("cuda_ipc", "same", {TRY: "pin hot"}),
}


def measure(name: str, backend: str, variant: str, settings: dict[str, str]) -> None:
    from disagg.runtime import bench_transfer
    from disagg.runtime.launcher import LaunchError, launch
    from disagg.runtime.transport_facts import gather_facts

    def launch_here(program: str, args: Sequence[str], ranks: int, **options: Any) -> int:
        return launch(__file__, [program, *args], ranks, **options)

    began = time.monotonic()
    os.environ.update(settings)
    bench_transfer.launch = launch_here
    try:
        job = bench_transfer.TransferJob(backend, "cuda", variant, (1024,), 0, gather_facts().num_devices, 15)
        result = bench_transfer._in_world(job)
    except LaunchError as error:
        print(f"{name:24s} {error}", flush=True)
        return
    finally:
        for key in settings:
            del os.environ[key]
    times = "  ".join(f"{item.name} {item.seconds * 1e6:7.0f} µs" for item in result.measured if item.seconds < 1)
    print(f"{name:24s} {times}   ({time.monotonic() - began:.1f} s)", flush=True)
    for item in result.measured:
        if item.steps:
            print(f"    {item.name}:", "; ".join(f"{s.who} {s.what} {s.seconds * 1e6:.0f}" for s in item.steps))


def rank() -> None:
    from disagg.runtime.progress import Progress
    from disagg.runtime.progress_pace import Pace

    what = os.environ.get(TRY, "").split()
    if "hot" in what:
        Pace.rest = lambda self, busy, in_transfer, now: None if busy else 0.0  # type: ignore[method-assign]
    if "pin" in what:
        run, own = Progress._run, sorted(os.sched_getaffinity(0))

        def pinned(self: Progress) -> None:
            os.sched_setaffinity(0, {own[3 + 4 * self._world.rank]})  # of this thread alone
            run(self)

        Progress._run = pinned  # type: ignore[method-assign]
    program = sys.argv.pop(1)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_SIZE"):
        rank()
    else:
        for name, way in WAYS.items():
            if not sys.argv[1:] or name in sys.argv[1:]:
                measure(name, *way)
