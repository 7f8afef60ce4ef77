"""What the host pays to launch one read of 1,024 tokens from the other GPU, and how much more after a rest.

Medians in microseconds, from a thread as the transport has one: each step by itself, right after another, after rests of
0.2, 1 and 5 ms asleep, and after 5 ms of looking.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable

import torch

from disagg.core.kv_layout import KvLayout
from disagg.runtime.cuda_ipc import Driver
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool
from disagg.runtime.kv_runs import runs_of
from disagg.runtime.transport_tables import TableRing

NUM_BLOCKS, SIZE, TOKENS = 1024, 32, 1024
REPEATS = 25


def measure() -> None:
    own_device = torch.device("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    layout = KvLayout(1, 1, (32,), 8, 128, "bfloat16")
    theirs, own = (KvPages(layout, 0, NUM_BLOCKS, SIZE, device) for device in ("cuda:0", own_device))
    probe = torch.zeros(16, device="cuda:0").to(own_device)  # gives this context access to its peer
    torch.cuda.set_device(own_device)
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    driver, ring = Driver(), TableRing(own_device)
    tables = [torch.randperm(NUM_BLOCKS)[: TOKENS // SIZE].tolist() for _ in range(2)]
    pools = [KvPool.of(theirs), KvPool.of(own)]

    def one(rest: Callable[[], None]) -> list[float]:
        torch.cuda.synchronize()
        rest()
        at = [time.perf_counter_ns()]
        places = [pool.place((0, 32), (0, 8), 0, 0) for pool in pools]
        copy = KvCopy(places[0], places[1], 32, 8, TOKENS, 256)
        at.append(time.perf_counter_ns())
        runs = runs_of(copy, tables[0], tables[1])
        at.append(time.perf_counter_ns())
        driver.copy_runs(runs, int(stream.cuda_stream))
        at.append(time.perf_counter_ns())
        event = torch.cuda.Event()
        event.record(stream)
        at.append(time.perf_counter_ns())
        while not event.query():
            pass
        at.append(time.perf_counter_ns())
        ring.put(tables[0], tables[1]).release()
        at.append(time.perf_counter_ns())
        total = at[5] - at[0]
        return [(b - a) / 1e3 for a, b in itertools.pairwise(at)] + [total / 1e3]

    def plain(rest: Callable[[], None]) -> float:
        import ctypes

        torch.cuda.synchronize()
        rest()
        begun = time.perf_counter_ns()
        args = [ctypes.c_uint64(pools[1].address), ctypes.c_uint64(pools[0].address), ctypes.c_size_t(TOKENS << 17)]
        driver.call("cuMemcpyAsync", *args, ctypes.c_void_p(int(stream.cuda_stream)))
        event = torch.cuda.Event()
        event.record(stream)
        while not event.query():
            pass
        return (time.perf_counter_ns() - begun) / 1e3

    def look(seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass

    rests: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "0.2 ms asleep": lambda: time.sleep(0.0002),
        "1 ms asleep": lambda: time.sleep(0.001),
        "5 ms asleep": lambda: time.sleep(0.005),
        "5 ms looking": lambda: look(0.005),
    }
    print("rest            places  runs  batch  record  seen  (tables)  whole   plain copy")
    for name, rest in rests.items():
        found = [one(rest) for _ in range(REPEATS)][3:]
        middle = [statistics.median(column) for column in zip(*found, strict=True)]
        copied = statistics.median([plain(rest) for _ in range(REPEATS)][3:])
        print(f"{name:14s} " + "  ".join(f"{value:6.1f}" for value in middle) + f"  {copied:8.1f}")
    del probe


if __name__ == "__main__":
    thread = threading.Thread(target=measure)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
