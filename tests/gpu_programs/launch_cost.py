"""What the host pays to launch one read of 1,024 tokens from the other GPU, and how much more after a rest.

Medians in microseconds, from a thread as the transport has one: right after another read, after 1 and 5 ms asleep, after 5 ms
of looking, and while another thread of the interpreter computes without pause. First the parts of one launch, each by
itself; then ways of handing the runs to the copy engines, and the kernel with its tables: from the host's call to the end
seen by the host, and (in brackets) until the call returned. A last table has eight reads called one after the other, as
with eight transfers in flight. Less than 40 s.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg.core.kv_layout import KvLayout
from disagg.runtime.cuda_ipc import AT_ONCE, SUBMISSIONS, Driver
from disagg.runtime.kv_kernels import read_rows
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool
from disagg.runtime.kv_runs import runs_of
from disagg.runtime.transport_tables import TableRing

LAYERS, HEADS, TOKENS, ROW_BYTES = 32, 8, 1024, 256
IN_FLIGHT = 8
REPEATS, SKIPPED = 24, 3
WAYS: dict[str, tuple[int, ...]] = {
    "one batch": (1 << 10,),
    "as the transport": SUBMISSIONS,
    "one, then all": (1, 1 << 10),
    "1 1 2 4 8 ...": (1, 1, 2, 4, 8, 16, 32),
    "1 2 4 8 16 ...": (1, 2, 4, 8, 16, 32),
    "2 6 16 32": (2, 6, 16, 32),
    "4 12 48": (4, 12, 48),
    "1 1 1 1 4 8 16 32": (1, 1, 1, 1, 4, 8, 16, 32),
    "eights": (8,),
    "one by one": (1,),
}


def look(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


busy = threading.Event()  # the main thread computes


def beside_a_busy_thread() -> None:
    busy.set()
    time.sleep(0.001)


RESTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "1 ms asleep": lambda: time.sleep(0.001),
    "5 ms asleep": lambda: time.sleep(0.005),
    "5 ms looking": lambda: look(0.005),
    "busy beside": beside_a_busy_thread,
}


class Reader:
    """Two pools in blocks of `size` tokens, the reader's on the second GPU, and a stream to read on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.device = torch.device("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
        layout = KvLayout(1, 1, (LAYERS,), HEADS, ROW_BYTES // 2, "bfloat16")
        count = 2 * IN_FLIGHT * TOKENS // size
        self.pages = [KvPages(layout, 0, count, size, device) for device in ("cuda:0", self.device)]
        self.pools = [KvPool.of(pages) for pages in self.pages]
        torch.zeros(16, device=self.device).to("cuda:0").to(self.device)  # gives either context access to its peer
        torch.cuda.set_device(self.device)
        self.stream: Any = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.handle = int(self.stream.cuda_stream)
        self.driver, self.ring = Driver(), TableRing(self.device, self.handle)
        orders = [torch.randperm(count).tolist() for _ in range(2)]
        each = TOKENS // size
        self.tables = [[order[at : at + each] for order in orders] for at in range(0, IN_FLIGHT * each, each)]

    def copy(self, tables: tuple[int, int] = (0, 0)) -> KvCopy:
        places = [pool.place((0, LAYERS), (0, HEADS), 0, at) for pool, at in zip(self.pools, tables, strict=True)]
        return KvCopy(places[0], places[1], LAYERS, HEADS, TOKENS, ROW_BYTES)

    def by_engines(self, submissions: tuple[int, ...], slot: int = 0) -> None:
        self.driver.copy_runs(runs_of(self.copy(), *self.tables[slot]), self.handle, submissions)

    def by_kernel(self, slot: int = 0) -> None:
        made = self.ring.put(*self.tables[slot])
        theirs, own = made.addresses
        read_rows(self.copy((theirs, own)))
        made.release()

    def plain(self, num_bytes: int = TOKENS * LAYERS * 2 * HEADS * ROW_BYTES) -> None:
        self.driver.copy(self.pools[1].address, self.pools[0].address, num_bytes, self.handle)

    def timed(self, work: Callable[[], None], rest: Callable[[], None]) -> tuple[float, float]:
        """Median microseconds (until the end was seen, until the call returned)."""
        found = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            rest()
            start = time.perf_counter_ns()
            work()
            called = time.perf_counter_ns()
            event: Any = torch.cuda.Event()
            event.record(self.stream)
            while not event.query():
                pass
            found.append(((time.perf_counter_ns() - start) / 1e3, (called - start) / 1e3))
            busy.clear()
        whole, called_us = zip(*found[SKIPPED:], strict=True)
        return statistics.median(whole), statistics.median(called_us)

    def check(self) -> None:
        """Every way carries the bytes that it should."""
        theirs, own = self.tables[0]
        self.pages[0].pool.normal_()
        want = self.pages[0].pack(theirs, TOKENS, (0, LAYERS), (0, HEADS)).to(self.device)
        works = {name: (lambda s=sizes: self.by_engines(s)) for name, sizes in WAYS.items()}
        for name, work in {**works, "kernel": self.by_kernel}.items():
            self.pages[1].pool.zero_()
            torch.cuda.synchronize()
            work()
            torch.cuda.synchronize()
            if not self.pages[1].pack(own, TOKENS, (0, LAYERS), (0, HEADS)).equal(want):
                raise SystemExit(f"{name}: other bytes arrived than were read")


def parts(reader: Reader) -> None:
    print(f"\nparts of one launch, blocks of {reader.size} tokens, all runs in one batch")
    print("rest            places  runs  submit  record  seen  tables  kernel")
    for name, rest in RESTS.items():
        found = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            rest()
            at = [time.perf_counter_ns()]
            copy = reader.copy()
            at.append(time.perf_counter_ns())
            runs = list(runs_of(copy, *reader.tables[0]))
            at.append(time.perf_counter_ns())
            reader.driver.copy_runs(runs, reader.handle, (1 << 10,))
            at.append(time.perf_counter_ns())
            event: Any = torch.cuda.Event()
            event.record(reader.stream)
            at.append(time.perf_counter_ns())
            while not event.query():
                pass
            at.append(time.perf_counter_ns())
            torch.cuda.synchronize()
            rest()
            at.append(time.perf_counter_ns())
            made = reader.ring.put(*reader.tables[0])
            at.append(time.perf_counter_ns())
            read_rows(reader.copy((made.addresses[0], made.addresses[1])))
            at.append(time.perf_counter_ns())
            made.release()
            busy.clear()
            found.append([(b - a) / 1e3 for i, (a, b) in enumerate(itertools.pairwise(at)) if i != 5])
        middle = [statistics.median(column) for column in zip(*found[SKIPPED:], strict=True)]
        print(f"{name:14s} " + "  ".join(f"{value:6.1f}" for value in middle))


def ways(reader: Reader) -> None:
    print(f"\none read, blocks of {reader.size} tokens: end seen (call returned)")
    print(f"{'':20s}" + "".join(f"{name:>18s}" for name in RESTS))
    works: dict[str, Callable[[], None]] = {
        "plain copy": reader.plain,
        **{name: (lambda s=sizes: reader.by_engines(s)) for name, sizes in WAYS.items()},
        "kernel, tables": reader.by_kernel,
        "plain copy again": reader.plain,
    }
    for name, work in works.items():
        cells = [reader.timed(work, rest) for rest in RESTS.values()]
        print(f"{name:20s}" + "".join(f"{whole:10.0f} ({called:5.0f})" for whole, called in cells))


def in_flight(reader: Reader) -> None:
    print(f"\n{IN_FLIGHT} reads called one after the other, blocks of {reader.size} tokens: end seen (calls returned)")

    def all_by(first: tuple[int, ...], later: tuple[int, ...]) -> Callable[[], None]:
        def work() -> None:
            for slot in range(IN_FLIGHT):
                reader.by_engines(later if slot else first, slot)

        return work

    works: dict[str, Callable[[], None]] = {
        "plain copies": lambda: [reader.plain() for _ in range(IN_FLIGHT)] and None,
        "one batch each": all_by((1 << 10,), (1 << 10,)),
        "as the transport": all_by(SUBMISSIONS, AT_ONCE),
        "all growing": all_by(SUBMISSIONS, SUBMISSIONS),
        "one by one": all_by((1,), (1,)),
    }
    for name, work in works.items():
        whole, called = reader.timed(work, RESTS["5 ms asleep"])
        print(f"{name:20s}{whole:10.0f} ({called:5.0f})")


def measure() -> None:
    for size in (16, 32):
        reader = Reader(size)
        reader.check()
        if size == 32:
            parts(reader)
        ways(reader)
        in_flight(reader)
        del reader


if __name__ == "__main__":
    sys.setswitchinterval(1e-4)  # as in an executor
    thread = threading.Thread(target=measure)
    thread.start()
    while thread.is_alive():
        if busy.wait(0.5):
            look(0.0002)
