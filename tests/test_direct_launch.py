"""What reaches the driver of a kernel launched without Triton; the driver here reads the numbers as a kernel does."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.runtime.cuda_ipc import CudaError
from disagg.runtime.direct_launch import DirectLaunch

STREAM, FUNCTION = 7, 99


class HostDriver:
    """A kernel with parameters of these sizes."""

    def __init__(self, sizes: tuple[int, ...], code: int = 0) -> None:
        self.launches: list[tuple[tuple[int, ...], list[int]]] = []

        def parameter(function: Any, index: Any, offset: Any, size: Any) -> int:
            if index.value >= len(sizes):
                return 1
            size._obj.value = sizes[index.value]
            return 0

        def launch(function: Any, *args: Any) -> int:
            assert function.value == FUNCTION
            kinds = {8: ctypes.c_int64, 4: ctypes.c_int32}
            numbers = [kinds[size].from_address(args[8][index]).value for index, size in enumerate(sizes)]
            self.launches.append((args[:8], numbers))
            return code

        self.cuFuncGetParamInfo = parameter
        self.cuLaunchKernel = launch
        self.cuMemcpyAsync = lambda *args: 0

    def cuGetErrorString(self, code: int, text: Any) -> None:
        pass


def kernel(**metadata: int) -> SimpleNamespace:
    return SimpleNamespace(function=FUNCTION, metadata=SimpleNamespace(num_warps=4, shared=512, **metadata))


def test_every_number_is_read_as_it_was_given_and_pointers_that_triton_appends_are_null() -> None:
    library = HostDriver((8, 4, 4, 8, 8, 8))
    launch = DirectLaunch(kernel(), (8, 4, 4, 8), library)
    for numbers in ((1 << 45, 17, -3, 0), (5, (1 << 31) - 1, 0, -(1 << 50))):
        launch(24, STREAM, numbers)
        shape, found = library.launches.pop()
        assert shape == (24, 1, 1, 128, 1, 1, 512, STREAM)
        assert found == [*numbers, 0, 0]


def test_a_kernel_stays_loaded_while_it_can_be_launched() -> None:
    class Compiled:  # Triton's unloads its module when nobody has it any more
        function = FUNCTION
        metadata = SimpleNamespace(num_warps=4, shared=0)

    compiled = Compiled()
    kept = weakref.ref(compiled)
    launch = DirectLaunch(compiled, (8,), HostDriver((8,)))
    del compiled
    assert kept() is not None
    del launch
    assert kept() is None


@pytest.mark.parametrize("sizes", [(8, 8), (8,), (8, 4, 4), (8, 4, *(8,) * 5), ()])
def test_a_kernel_that_takes_other_numbers_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parameters of"):
        DirectLaunch(kernel(), (8, 4), HostDriver(sizes))


@pytest.mark.parametrize("metadata", [{"num_ctas": 2}, {"global_scratch_size": 1}, {"profile_scratch_size": 8}])
def test_a_kernel_that_needs_more_than_numbers_is_refused(metadata: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="clusters or scratch"):
        DirectLaunch(kernel(**metadata), (8,), HostDriver((8,)))


def test_what_the_driver_refuses_is_told_by_name() -> None:
    launch = DirectLaunch(kernel(), (8,), HostDriver((8,), code=700))
    with pytest.raises(CudaError, match="cuLaunchKernel failed with 700"):
        launch(1, STREAM, (3,))


PARAMETERS = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from disagg.runtime import kv_kernels as kernels

function = kernels._copy_rows
kinds = {name: "i64" if size == 8 else "i32" for name, size in zip(kernels._NUMBERS, kernels._SIZES, strict=True)}
constants = dict(WORDS=64, COLUMNS=64, WORD_BYTES=4, ALIGN=16, TILE=64, SRC_PAGED=True, DST_PAGED=True)
places = {(function.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(function, {name: kinds.get(name, "constexpr") for name in function.arg_names}, places)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
print(*(int(bits) // 8 for bits in re.findall(r"\\.param \\.u(\\d+) ", made.asm["ptx"])))
print(*kernels._SIZES)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_copy_kernel_as_triton_compiles_it_takes_the_numbers_that_it_is_given() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0"}  # of a process of its own: here it may be interpreted
    found = subprocess.run([sys.executable, "-c", PARAMETERS], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    sizes, given = ([int(size) for size in line.split()] for line in found.stdout.splitlines())
    assert sizes[: len(given)] == given
    assert set(sizes[len(given) :]) <= {8}, "Triton appends what is no pointer"
