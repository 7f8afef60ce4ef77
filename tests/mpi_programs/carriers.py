"""Every way of carrying KV, on a machine without a GPU: only the device itself is played by host memory.

With `gpu-BACKEND` as the way it is a real one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from part_of_world import PartOfWorld

from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_runs import copy_in_host_memory
from disagg.runtime.mpi_world import MpiWorld
from disagg.runtime.progress import Progress
from disagg.runtime.transport import TransportCapabilities, make_transport
from disagg.runtime.transport_cuda_ipc import host_carrier
from disagg.runtime.transport_lane import InlineLane
from disagg.runtime.transport_mpi import MpiCarrier
from disagg.runtime.transport_staging import DeviceStager
from disagg.runtime.transport_worker import SegmentTransport

STAGING_BYTES = 1 << 12


def each_way(
    world: MpiWorld, ways: str, program: Callable[[MpiWorld, str], list[str]], told: Callable[[], str]
) -> None:
    """Run `program`, which returns errors, once for each of the comma-separated ways: loading torch takes longer than it does.

    Each has communicators of its own, so that none hears the one before. Prints `told()` after each that had no errors.
    """
    errors: list[str] = []
    for way in ways.split(","):
        own = PartOfWorld(world, world.size)
        found = program(own, way)
        own.finalize()
        if not found:
            print(f"rank {world.rank}, {way}: {told()}", flush=True)
        errors += [f"{way}: {error}" for error in found]
    if errors:
        sys.exit(f"rank {world.rank}: {errors[:3]}")


def device_of(way: str, rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if way.startswith("gpu-") else "cpu"


class SharedFile:
    """Pages in a file that peers map, in the place of device memory and its IPC handles."""

    def __init__(self, pages: KvPages) -> None:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        handle, name = tempfile.mkstemp(prefix="disagg-test-", dir=folder)
        os.close(handle)
        self.path = Path(name)
        size = pages.nbytes
        self.path.write_bytes(bytes(size))
        flat = torch.from_file(name, shared=True, size=pages.pool.numel(), dtype=pages.pool.dtype)
        pages.pool = flat.as_strided(pages.pool.shape, pages.pool.stride())  # the pool is a view of its memory
        self._maps: dict[int, Any] = {}

    def export(self, pages: KvPages) -> tuple[bytes, int, int, bytes]:
        return str(self.path).encode().ljust(64, b"\0"), pages.nbytes, 0, bytes(16)

    def open(self, handle: bytes, device: bytes) -> int:
        with open(handle.rstrip(b"\0").decode(), "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[address] = mapped
        return address

    def close(self, address: int) -> None:
        del self._maps[address]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def transport_of(way: str, progress: Progress, pages: KvPages, **options: Any) -> tuple[Any, SharedFile | None]:
    if way == "mpi" or way.startswith("gpu-"):
        return make_transport(way.removeprefix("gpu-"), progress, pages, **options), None
    if way == "peer_read":
        memory = SharedFile(pages)
        return SegmentTransport(progress, pages, host_carrier(memory), **options), memory

    def stager(desk: Any) -> DeviceStager:
        return DeviceStager(desk, InlineLane(), copy_in_host_memory, STAGING_BYTES, via_host=way == "staged_host")

    carrier = MpiCarrier(progress, stager, way, way, TransportCapabilities(False, True))
    return SegmentTransport(progress, pages, carrier, **options), None
