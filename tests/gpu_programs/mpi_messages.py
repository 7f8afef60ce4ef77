"""How fast MPI over UCX carries 128 MiB between two GPUs, in one message and in many that are in flight together.

`python tests/gpu_programs/mpi_messages.py` starts its two ranks itself.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

TOTAL = 128 << 20
REPEATS = 12


def ranks() -> None:
    import torch
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    pool = torch.zeros(TOTAL, dtype=torch.uint8, device=device)
    for size in (1 << 20, 4 << 20, 16 << 20, 32 << 20, 128 << 20):
        parts = [pool[at : at + size] for at in range(0, TOTAL, size)]
        whole, posted = [], []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            comm.Barrier()
            start = time.perf_counter()
            if rank == 0:
                requests = [comm.Isend([part, MPI.BYTE], 1, 7) for part in parts]
            else:
                requests = [comm.Irecv([part, MPI.BYTE], 0, 7) for part in parts]
            posted.append(time.perf_counter() - start)
            MPI.Request.Waitall(requests)
            whole.append(time.perf_counter() - start)
        if rank == 1:
            seconds = statistics.median(whole[2:])
            print(
                f"{len(parts):4d} messages of {size >> 20:4d} MiB: {seconds * 1e6:8.0f} µs, "
                f"{TOTAL / seconds / 1e9:6.1f} GB/s, posted after {statistics.median(posted[2:]) * 1e6:6.0f} µs",
                flush=True,
            )


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_SIZE"):
        ranks()
    else:
        from disagg.runtime.launcher import launch
        from disagg.runtime.transport_world import over_ucx

        needs = over_ucx()
        sys.exit(
            launch(__file__, [], 2, pml=needs.pml, fault_tolerant=needs.fault_tolerant, env=needs.env, timeout_s=120)
        )
