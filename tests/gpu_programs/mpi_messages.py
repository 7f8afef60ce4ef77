"""How fast MPI over UCX carries 128 MiB between two GPUs, in one message and in many that are in flight together.

Then what the calls cost that give it 64 MiB, by how it is told of them and after what, and what a sleep costs.
`python tests/gpu_programs/mpi_messages.py` starts its two ranks itself.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

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

    calls(comm, rank, pool[: TOTAL // 2])
    if rank == 0:
        sleeps()


def calls(comm: Any, rank: int, part: Any) -> None:
    from mpi4py import MPI

    ways: dict[str, Callable[[], Any]] = {
        "a tensor": lambda: part,
        "an address": lambda: MPI.buffer.fromaddress(part.data_ptr(), part.numel()),
    }
    for way, message in ways.items():
        for rest in (0.0, 0.005):
            for late in (0, 1):  # which rank begins 2 ms after the other
                called, whole = [], []
                for _ in range(REPEATS):
                    comm.Barrier()
                    time.sleep(rest)
                    if rank == late:
                        until = time.perf_counter() + 0.002
                        while time.perf_counter() < until:
                            comm.Iprobe()
                    start = time.perf_counter()
                    begin = comm.Isend if rank == 0 else comm.Irecv
                    request = begin([message(), MPI.BYTE], 1 - rank, 7)
                    called.append(time.perf_counter() - start)
                    while not request.Test():
                        pass
                    whole.append(time.perf_counter() - start)
                found = [statistics.median(each[2:]) * 1e6 for each in (called, whole)]
                others = comm.gather(found, root=0)
                if rank == 0:
                    print(
                        f"64 MiB as {way:10s} after {rest * 1e3:.0f} ms, the {('sender', 'reader')[late]} last: "
                        f"sender's call {others[0][0]:4.0f} µs, reader's {others[1][0]:4.0f}, "
                        f"to its end seen by whoever was last {others[late][1]:4.0f}",
                        flush=True,
                    )


def sleeps() -> None:
    from disagg.runtime.progress_pace import Bell, wake_promptly

    wake_promptly()
    bell = Bell()
    for micros in (5, 20, 40, 100):
        found = []
        for _ in range(300):
            start = time.perf_counter()
            bell.wait(micros * 1e-6)
            found.append((time.perf_counter() - start) * 1e6)
        print(
            f"a sleep of {micros:3d} µs: median {statistics.median(found):5.0f}, 9th decile {sorted(found)[270]:5.0f}"
        )
    for what, after in {"blocks": 0.0, "goes on for 100 µs": 1e-4}.items():
        rung, woken = [], []
        done = threading.Event()

        def sleeper(woken: list[float] = woken, done: threading.Event = done) -> None:
            for _ in range(200):
                bell.wait(1.0)
                woken.append(time.perf_counter())
                done.set()

        thread = threading.Thread(target=sleeper)
        thread.start()
        for _ in range(200):
            time.sleep(0.002)
            done.clear()
            rung.append(time.perf_counter())
            bell.ring()
            while time.perf_counter() < rung[-1] + after:
                pass
            done.wait()
        thread.join()
        late = statistics.median(b - a for a, b in zip(rung, woken, strict=True)) * 1e6
        print(f"a thread woken by one that {what}: {late:5.0f} µs until it runs", flush=True)


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
