"""One transfer of 1,024 tokens after a rest, each way in a world of two ranks of its own; by `mpi` under settings of UCX.

`python tests/gpu_programs/transfer_settings.py [NAME…]` prints a line for each, and when what happened. About 6 s each.
"""

from __future__ import annotations

import os
import sys
import time

from disagg.runtime import bench_transfer
from disagg.runtime.bench_transfer import TransferJob
from disagg.runtime.launcher import LaunchError

GET = {"UCX_RNDV_SCHEME": "get_zcopy", "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}
FEW = {"UCX_TLS": "self,sm,cuda_copy,cuda_ipc"}
WAYS: dict[str, tuple[str, str, dict[str, str]]] = {
    "cuda_ipc": ("cuda_ipc", "same", {}),
    "cuda_ipc, re-laid out": ("cuda_ipc", "relayout", {}),
    "mpi": ("mpi", "same", {}),
    "mpi, re-laid out": ("mpi", "relayout", {}),
    "mpi, the receiver gets": ("mpi", "same", GET),
    "mpi, the sender puts": ("mpi", "same", {"UCX_RNDV_SCHEME": "put_zcopy"}),
    "mpi, few transports": ("mpi", "same", FEW),
    "mpi, few, receiver gets": ("mpi", "same", {**FEW, **GET}),
}


def measure(name: str, backend: str, variant: str, settings: dict[str, str]) -> None:
    began = time.monotonic()
    os.environ.update(settings)
    try:
        result = bench_transfer._in_world(TransferJob(backend, "cuda", variant, (1024,), 0, 2, 15))
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


if __name__ == "__main__":
    for name, way in WAYS.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            measure(name, *way)
