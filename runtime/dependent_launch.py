"""Programmatic dependent launch: a kernel begins while the one before it in the stream ends, and waits for it inside."""

from __future__ import annotations

import os
from dataclasses import fields
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def wait_for_kernel_before(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """To be called before anything is read or written. The kernel behind may be launched from then on."""
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()


@cache
def overlaps() -> dict[str, Any]:
    """The arguments of a launch that may overlap the kernel before: on Hopper and later, unless DISAGG_PDL is 0."""
    if (
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability()[0] < 9
        or os.environ.get("DISAGG_PDL") == "0"
    ):
        return {"PDL": False}
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return {"PDL": False}
    if "launch_pdl" not in {field.name for field in fields(CUDAOptions)}:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
