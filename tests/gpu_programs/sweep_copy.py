"""How tile, warps and the number of programs change the copy kernel's rate between two GPUs (or within one).

Prints one line a configuration: rate, and its part of a plain copy of the same 134 MB in this run.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from disagg.core.kv_layout import KvLayout
from disagg.runtime.cuda_ipc import Driver
from disagg.runtime.kv_kernels import copy_rows
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool
from disagg.runtime.transport_cuda_ipc import CudaMemory

EXPORTER = Path(__file__).with_name("exporter_dies.py")
NUM_BLOCKS, SIZE, TOKENS = 2048, 16, 1024


def seconds(work: Callable[[], None]) -> float:
    found = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # so that launching is not what is timed
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found[2:])


def main() -> None:
    device = torch.device(f"cuda:{1 if torch.cuda.device_count() > 1 else 0}")
    torch.cuda.set_device(device)
    exporter = subprocess.Popen([sys.executable, str(EXPORTER), "export"], stdout=subprocess.PIPE, text=True)
    try:
        assert exporter.stdout is not None
        handle, offset = exporter.stdout.readline().split()
        base = CudaMemory(device).open(bytes.fromhex(handle), bytes(16)) + int(offset)
        own = KvPages(KvLayout(1, 1, (32,), 8, 128, "bfloat16"), 0, NUM_BLOCKS, SIZE, device)
        tables = [torch.randperm(NUM_BLOCKS, dtype=torch.int32).to(device) for _ in range(2)]
        source = KvPool(base, (0, 32), (0, 8), NUM_BLOCKS, SIZE, 256)
        places = [
            pool.place((0, 32), (0, 8), 0, table.data_ptr())
            for pool, table in zip((source, KvPool.of(own)), tables, strict=True)
        ]
        copy = KvCopy(places[0], places[1], 32, 8, TOKENS, 256)
        size = 2 * 32 * 8 * TOKENS * 256
        stream = torch.cuda.current_stream().cuda_stream
        args = [ctypes.c_uint64(own.pool.data_ptr()), ctypes.c_uint64(base), ctypes.c_size_t(size)]
        driver = Driver()
        plain = seconds(lambda: driver.call("cuMemcpyAsync", *args, ctypes.c_void_p(stream)))
        print(f"plain copy of {size / 1e6:.0f} MB: {plain * 1e6:.0f} us, {size / plain / 1e9:.0f} GB/s", flush=True)
        rows = []
        for tile, warps, programs in itertools.product(
            (16, 32, 64, 128), (4, 8, 16), (66, 132, 264, 528, 1056, 1 << 30)
        ):
            took = seconds(
                lambda tile=tile, warps=warps, programs=programs: copy_rows(
                    copy, tile=tile, num_warps=warps, max_programs=programs
                )
            )
            rows.append((took, tile, warps, programs))
        for took, tile, warps, programs in sorted(rows):
            print(
                f"tile {tile:4d} warps {warps:2d} programs {programs:10d}: {took * 1e6:6.0f} us "
                f"{size / took / 1e9:4.0f} GB/s, {plain / took:.3f} of the plain copy",
                flush=True,
            )
    finally:
        exporter.kill()


main()
