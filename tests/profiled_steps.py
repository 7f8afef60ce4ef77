"""Work on a device as a profile would tell of it, for the tests of what is read out of profiles."""

from __future__ import annotations

from disagg.runtime.kernel_intervals import DeviceWork

TO_HOST, TO_DEVICE = "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)"


def two_kernels(start: float) -> list[DeviceWork]:
    """A step: two kernels of 10 µs with 2 µs between them, and the copy of the tokens 1 µs later."""
    return [
        DeviceWork(start, start + 10, "gemm"),
        DeviceWork(start + 12, start + 22, "_argmax_merge"),
        DeviceWork(start + 23, start + 24, TO_HOST),
    ]


# two steps of a plan 8 µs apart, 100 µs for a new plan, a step of it
SERVING = [*two_kernels(0), *two_kernels(30), DeviceWork(120, 121, TO_DEVICE), *two_kernels(152)]
