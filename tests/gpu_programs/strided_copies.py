"""Whether copy engines could re-lay out heads: one 3-D copy a block, of rows that lie apart, from the other GPU.

Half of the heads of blocks of so many tokens go into blocks of four times as many tokens that hold all heads: 67 MB, in
rows of 2 to 32 KiB. Device time beside one plain copy of as many bytes, and what a call costs the host. Less than 20 s.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg.runtime.cuda_ipc import Driver

LAYERS_KV, HEADS, ALL_HEADS, BLOCKS_IN_ONE = 64, 4, 8, 4
TOTAL = 64 << 20
_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


def _end(prefix: str) -> list[tuple[str, Any]]:
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    return [
        *((f"{prefix}_{name}", size) for name in ("x", "y", "z", "lod")),
        (f"{prefix}_type", ctypes.c_int),
        (f"{prefix}_host", pointer),
        (f"{prefix}_device", ctypes.c_uint64),
        (f"{prefix}_array", pointer),
        (f"{prefix}_reserved", pointer),
        (f"{prefix}_pitch", size),
        (f"{prefix}_height", size),
    ]


class Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D_v2."""

    _fields_ = (
        *_end("src"),
        *_end("dst"),
        *((name, ctypes.c_size_t) for name in ("width", "height", "depth")),
    )


def device_us(work: Callable[[], None]) -> tuple[float, float]:
    """Medians: (on the device, of the host's calls)."""
    found = []
    for _ in range(10):
        start: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000)  # so that launching is not what is timed
        start.record()
        begun = time.perf_counter()
        work()
        called = time.perf_counter() - begun
        end.record()
        end.synchronize()
        found.append((start.elapsed_time(end) * 1e3, called * 1e6))
    device, host = zip(*found[2:], strict=True)
    return statistics.median(device), statistics.median(host)


def main() -> None:
    own = torch.device(f"cuda:{1 if torch.cuda.device_count() > 1 else 0}")
    torch.cuda.set_device(own)
    driver = Driver()
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        handle = int(stream.cuda_stream)
        source = torch.randint(0, 255, (TOTAL,), dtype=torch.uint8, device="cuda:0")
        flat = torch.zeros(TOTAL, dtype=torch.uint8, device=own)
        source.copy_(flat.copy_(source))  # gives either context access to its peer
        torch.cuda.synchronize()
        plain, _ = device_us(lambda: driver.copy(flat.data_ptr(), source.data_ptr(), TOTAL, handle))
        print(f"one plain copy of {TOTAL >> 20} MiB: {plain:7.0f} us, {TOTAL / plain / 1e3:5.0f} GB/s", flush=True)
        for width in (2048, 4096, 8192, 16384, 32768):
            theirs = source.view(-1, LAYERS_KV, HEADS, width)
            num_blocks = theirs.shape[0]
            mine = torch.zeros(
                num_blocks // BLOCKS_IN_ONE,
                LAYERS_KV,
                ALL_HEADS,
                BLOCKS_IN_ONE,
                width,
                dtype=torch.uint8,
                device=own,
            )
            calls = []
            for block in range(num_blocks):
                into = mine[block // BLOCKS_IN_ONE, 0, HEADS, block % BLOCKS_IN_ONE].data_ptr()
                calls.append(
                    Copy3D(
                        src_type=_DEVICE,
                        src_device=theirs[block].data_ptr(),
                        src_pitch=width,
                        src_height=HEADS,
                        dst_type=_DEVICE,
                        dst_device=into,
                        dst_pitch=width * BLOCKS_IN_ONE,
                        dst_height=ALL_HEADS,
                        width=width,
                        height=HEADS,
                        depth=LAYERS_KV,
                    )
                )
            pointers = [ctypes.byref(each) for each in calls]
            last = ctypes.c_void_p(handle)

            def work(pointers: list[Any] = pointers, last: Any = last) -> None:
                for pointer in pointers:
                    driver.call("cuMemcpy3DAsync_v2", pointer, last)

            took, called = device_us(work)
            want = theirs.view(-1, BLOCKS_IN_ONE, LAYERS_KV, HEADS, width).permute(0, 2, 3, 1, 4).to(own)
            right = mine[:, :, HEADS:].equal(want) and not bool(mine[:, :, :HEADS].any())
            print(
                f"rows of {width:6d} bytes, {num_blocks:4d} copies: {took:7.0f} us, {TOTAL / took / 1e3:5.0f} GB/s, "
                f"{plain / took:.2f} of the plain copy; {called / num_blocks:5.1f} us a call; bytes right: {right}",
                flush=True,
            )


if __name__ == "__main__":
    main()
