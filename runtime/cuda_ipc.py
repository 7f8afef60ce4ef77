"""Another process's device memory in this one, and copies by copy engines: a few functions of the CUDA driver.

Through ctypes on libcuda.so.1, every return code checked. The primary context that torch uses must be current on the
calling thread (`use_device`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat
from typing import Any, Final

from .kv_runs import Run

# How many runs are handed to the copy engines at a time, the last of these again and again. They begin with what they
# have while the rest is being handed over: a copy of 2 MiB takes 5.5 µs, handing it over 1.5 to 3, 6 more each time, and
# between two hand-overs the engines rest for 4. These were 10 to 20 µs a request faster than growing by 2, and by 1.4.
SUBMISSIONS: Final = (2, 6, 16, 32)
SMALL: Final = 8  # runs that are handed over without letting other threads of the interpreter run meanwhile
AT_ONCE: Final = (SUBMISSIONS[-1],)  # where they are at work already
HANDLE_BYTES: Final = 64
_LAZY_ENABLE_PEER_ACCESS: Final = 1
_SOURCE_ORDER_STREAM: Final = 1
_PREFER_OVERLAP_WITH_COMPUTE: Final = 1


class CudaError(RuntimeError):
    """A call of the CUDA driver that failed, with its name and the driver's own words."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    )


def find_libcuda() -> str | None:
    """The name under which the driver's library can be loaded, or None."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


class Driver:
    """The driver of this process, for one thread. Raises CudaError where there is none. `library`: for tests."""

    def __init__(self, library: Any = None) -> None:
        name = find_libcuda() if library is None else ""
        if name is None:
            raise CudaError("libcuda.so.1 cannot be loaded: no NVIDIA driver is installed here")
        self._lib: Any = ctypes.CDLL(name) if library is None else library
        quick: Any = ctypes.PyDLL(name) if library is None else library  # its calls do not let the interpreter go
        pointer, size, address = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        # Bound once: what is looked up at every launch is looked up in cold caches.
        self._copy: Any = quick.cuMemcpyAsync
        for function in (self._copy, self._lib.cuMemcpyAsync):
            function.argtypes = (address, address, size, pointer)
        self._batch: Any = getattr(self._lib, "cuMemcpyBatchAsync", None)  # None: drivers before 12.8
        self._small_batch: Any = getattr(quick, "cuMemcpyBatchAsync", None)
        batches: list[Any] = [self._batch, self._small_batch] if self._batch is not None else []
        for function in batches:
            function.argtypes = (pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer)
        self._attributes = _CopyAttributes(_SOURCE_ORDER_STREAM, flags=_PREFER_OVERLAP_WITH_COMPUTE)
        self._first, self._failed = ctypes.c_size_t(0), ctypes.c_size_t()
        self._fixed = tuple(ctypes.addressof(each) for each in (self._attributes, self._first, self._failed))
        self._sources, self._goals, self._sizes = (address * 0)(), (address * 0)(), (size * 0)()

    def call(self, function: str, *args: Any) -> None:
        self.check(function, getattr(self._lib, function)(*args))

    def check(self, function: str, code: int) -> None:
        """Raises CudaError, with the driver's own words, for a code that is not 0."""
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(code, ctypes.byref(text))
        words = text.value.decode(errors="replace") if text.value else "unknown error"
        raise CudaError(f"{function} failed with {code}: {words}")

    # ---- memory of another process -----------------------------------------------------------------------------------

    def allocation_of(self, address: int) -> tuple[int, int]:
        """(first address, bytes) of the allocation that `address` lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return int(base.value), int(size.value)

    def export(self, address: int) -> bytes:
        """A handle with which another process of this host can open the allocation that `address` lies in."""
        handle = _IpcHandle()
        try:
            self.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        except CudaError as error:
            raise CudaError(
                f"{error}; memory of torch's expandable segments (PYTORCH_CUDA_ALLOC_CONF) cannot be shared so"
            ) from None
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """The address at which another process's allocation begins here."""
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"an IPC handle of {len(handle)} bytes; allowed: {HANDLE_BYTES}")
        address = ctypes.c_uint64()
        wanted = _IpcHandle((ctypes.c_ubyte * HANDLE_BYTES).from_buffer_copy(handle))
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), wanted, flags)
        return int(address.value)

    def close(self, address: int) -> None:
        """Undo an `open`."""
        self.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    # ---- copies ------------------------------------------------------------------------------------------------------

    def copy(self, destination: int, source: int, num_bytes: int, stream: int) -> None:
        """One copy in the order of `stream`; host memory must be pinned. Returns at once."""
        code = self._copy(destination, source, num_bytes, stream)
        if code:
            self.check("cuMemcpyAsync", code)

    def copy_runs(self, runs: Iterable[Run], stream: int, submissions: tuple[int, ...] = SUBMISSIONS) -> None:
        """Copy all runs in the order of `stream` (not the default one), by copy engines, and return at once.

        `submissions`: how many of them at a time, the last number for all that is left.
        """
        left = iter(runs)
        for most in chain(submissions, repeat(submissions[-1])):
            part = list(islice(left, most))
            if most > 1 and self._batch is not None:
                self._copy_batch(part, stream)
            else:
                for source, destination, size in part:
                    if most == 1:
                        self.copy(destination, source, size, stream)
                    else:
                        self.call("cuMemcpyAsync", destination, source, size, stream)
            if len(part) < most:
                return

    def _copy_batch(self, runs: Sequence[Run], stream: int) -> None:
        count = len(runs)
        if count > len(self._sizes):
            self._sources, self._goals = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
            self._sizes = (ctypes.c_size_t * count)()
        sources, goals, sizes = self._sources, self._goals, self._sizes  # the driver has read them when it returns
        for index, (source, goal, size) in enumerate(runs):
            sources[index], goals[index], sizes[index] = source, goal, size
        attributes, first, failed = self._fixed
        if count:
            # Taking the interpreter back from a busy thread may cost more than a small batch does; a large one may wait for
            # the device.
            batch = self._small_batch if count <= SMALL else self._batch
            code = batch(goals, sources, sizes, count, attributes, first, 1, failed, stream)
            if code:
                self.check("cuMemcpyBatchAsync", code)


def use_device(index: int) -> None:
    """Make torch's context of that GPU the current one of this thread."""
    import torch

    torch.cuda.set_device(index)
    torch.empty(1, device=f"cuda:{index}")


def device_uuid(index: int) -> bytes:
    """16 bytes that name the GPU, in every process."""
    import uuid

    import torch

    return uuid.UUID(str(torch.cuda.get_device_properties(index).uuid)).bytes
