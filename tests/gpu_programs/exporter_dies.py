"""What happens to a process that reads another's device memory when that one is killed in mid-read.

Two processes, no MPI: the parent exports (device 0), a child reads in a loop (device 1, or 0 if there is one only) and
reports what it sees on its standard output. Prints one line a finding; exits with 0 whatever is found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch

from disagg.core.kv_layout import KvLayout
from disagg.runtime.kv_kernels import copy_rows
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPool
from disagg.runtime.transport_cuda_ipc import CudaMemory

LAYOUT = KvLayout(1, 1, (32,), 8, 128, "bfloat16")
NUM_BLOCKS, SIZE = 2048, 16  # 4 GiB: a pass takes about 11 ms over NVLink


def export() -> None:
    pages = KvPages(LAYOUT, 0, NUM_BLOCKS, SIZE, "cuda:0")
    pages.pool.fill_(1.0)
    torch.cuda.synchronize()
    handle, _, offset, _ = CudaMemory(torch.device("cuda:0")).export(pages)
    print(handle.hex(), offset, flush=True)
    time.sleep(600)


def read() -> None:
    index = 1 if torch.cuda.device_count() > 1 else 0
    device = torch.device(f"cuda:{index}")
    torch.cuda.set_device(device)
    exporter = subprocess.Popen([sys.executable, __file__, "export"], stdout=subprocess.PIPE, text=True)
    try:
        assert exporter.stdout is not None
        words = exporter.stdout.readline().split()
        base = CudaMemory(device).open(bytes.fromhex(words[0]), bytes(16))
        own = KvPages(LAYOUT, 0, NUM_BLOCKS, SIZE, device)
        source = KvPool(base + int(words[1]), (0, 32), (0, 8), NUM_BLOCKS, SIZE, 256)
        table = torch.randperm(NUM_BLOCKS, dtype=torch.int32).to(device)
        target = KvPool.of(own)
        copy = KvCopy(
            source.place((0, 32), (0, 8), 0, table.data_ptr()),
            target.place((0, 32), (0, 8), 0, table.data_ptr()),
            32,
            8,
            NUM_BLOCKS * SIZE,
            256,
        )
        copy_rows(copy)
        torch.cuda.synchronize()
        print(f"before: copied right: {bool((own.pool == 1.0).all())}", flush=True)
        for _ in range(200):  # two seconds of reading
            copy_rows(copy)
        time.sleep(0.1)
        os.kill(exporter.pid, signal.SIGKILL)
        killed = time.monotonic()
        exporter.wait()
        print("the exporter was killed while the reader's kernels ran", flush=True)
        torch.cuda.synchronize()
        print(f"the reader's kernels ended {time.monotonic() - killed:.2f} s later without an error", flush=True)
        print(f"what was read after that is right: {bool((own.pool == 1.0).all())}", flush=True)
        copy_rows(copy)
        torch.cuda.synchronize()
        print("a kernel begun after the death ended without an error", flush=True)
    except RuntimeError as error:
        print(f"the reader saw {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
    finally:
        if exporter.poll() is None:
            exporter.kill()
    try:
        print(f"the reader's device works: {float(torch.ones(8, device=device).sum()) == 8.0}", flush=True)
    except RuntimeError as error:
        print(f"the reader's device does not work any more: {str(error).partition(chr(10))[0]}", flush=True)


def main() -> None:
    if sys.argv[1:] == ["export"]:
        export()
        return
    if sys.argv[1:] == ["read"]:
        read()
        return
    reader = subprocess.run([sys.executable, __file__, "read"], timeout=100, check=False)
    print(f"the reader ended with {reader.returncode}", flush=True)


main()
