"""A compiled Triton kernel of integers alone, launched by one call of the driver.

Triton's own way from Python to the driver costs 50 µs, and 140 after a rest, of which the driver needs 5: what a KV
transfer launches once and waits for.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final

_SLOT: Final = 8  # bytes of a number here, whatever the kernel reads of it: all that there are for are little-endian
_WARP: Final = 32
# Pointers that Triton appends to the parameters, at most so many: null where a kernel needs none of what they are for.
_HIDDEN: Final = 4


class DirectLaunch:
    """`compiled` as Triton gives it, on the current device. `sizes`: bytes of each number that it takes, in order.

    Raises ValueError for a kernel that cannot be launched so, RuntimeError where the driver refuses. Any thread may call it
    that has the device's context. `library`: for tests.
    """

    def __init__(self, compiled: Any, sizes: Sequence[int], library: Any = None) -> None:
        from .cuda_ipc import Driver, find_libcuda

        name = find_libcuda() if library is None else ""
        if name is None:
            raise ValueError("there is no CUDA driver")
        # Its calls do not let the interpreter go: to take it back from a busy thread may cost more than a launch.
        self._lib: Any = ctypes.PyDLL(name) if library is None else library
        self._driver = Driver(library)
        metadata = compiled.metadata
        if getattr(metadata, "num_ctas", 1) != 1 or any(
            getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")
        ):
            raise ValueError("a kernel with clusters or scratch memory")
        self._compiled = compiled  # Triton unloads the module of one that nobody has any more
        self._function = ctypes.c_void_p(int(compiled.function))
        self._threads, self._shared = _WARP * int(metadata.num_warps), int(metadata.shared)
        self._check_sizes(sizes)
        self._layout = struct.Struct(f"<{len(sizes)}q")
        self._numbers = (ctypes.c_char * (_SLOT * (len(sizes) + _HIDDEN)))()
        start = ctypes.addressof(self._numbers)
        self._parameters = (ctypes.c_void_p * (len(sizes) + _HIDDEN))(
            *(start + _SLOT * index for index in range(len(sizes) + _HIDDEN))
        )
        unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
        self._launch: Any = self._lib.cuLaunchKernel
        self._launch.argtypes = (pointer, *(unsigned,) * 7, pointer, pointer, pointer)
        self._lock = threading.Lock()  # of the numbers

    def _check_sizes(self, sizes: Sequence[int]) -> None:
        """That the kernel takes just these numbers, then pointers."""
        found: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        ask = getattr(self._lib, "cuFuncGetParamInfo", None)
        if ask is None:
            raise ValueError("a CUDA driver before 12.4")
        while ask(self._function, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)) == 0:
            found.append(int(size.value))
            if len(found) > len(sizes) + _HIDDEN:
                break
        hidden = len(found) - len(sizes)
        if not 0 <= hidden <= _HIDDEN or found != [*sizes, *(_SLOT,) * hidden]:
            raise ValueError(f"a kernel with parameters of {found} bytes")

    def __call__(self, num_programs: int, stream: int, numbers: Sequence[int]) -> None:
        with self._lock:
            self._layout.pack_into(self._numbers, 0, *numbers)  # the driver has read them when it returns
            code = self._launch(
                self._function, num_programs, 1, 1, self._threads, 1, 1, self._shared, stream, self._parameters, None
            )
        if code:
            self._driver.check("cuLaunchKernel", code)
