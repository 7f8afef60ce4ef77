"""Device specifications for the roofline: what data sheets say, and what share of it was seen to be reached."""

from __future__ import annotations

from typing import Final

from msgspec import Struct


class Device(Struct, frozen=True):
    """Peaks are per device: `flops` in FLOP/s (dense bf16; fp32 on a CPU), `memory_bandwidth` and `link_bandwidth` in
    bytes/s (the link one way). The efficiencies are the shares of the peaks that large kernels reach.
    `step_overhead_s` is the fixed cost of a step (launches, scheduling), `layer_overhead_s` that of one layer,
    `link_latency_s` that of one transfer, `message_latency_s` that of one control message between processes.
    """

    name: str
    flops: float
    memory_bandwidth: float
    memory_bytes: int
    link_bandwidth: float
    flops_efficiency: float = 0.66
    memory_efficiency: float = 0.88
    link_efficiency: float = 0.87
    step_overhead_s: float = 150e-6
    layer_overhead_s: float = 0.0
    link_latency_s: float = 20e-6
    message_latency_s: float = 50e-6
    source: str = ""


DEVICES: Final[dict[str, Device]] = {
    device.name: device
    for device in (
        Device(
            "h200",
            flops=989e12,
            memory_bandwidth=4.8e12,
            memory_bytes=141 * 10**9,
            link_bandwidth=450e9,
            source="NVIDIA H200 data sheet; efficiencies from GEMMs at 660 TFLOP/s, copies at 4.22 TB/s and 393 GB/s",
        ),
        Device(
            "h100",
            flops=989e12,
            memory_bandwidth=3.35e12,
            memory_bytes=80 * 10**9,
            link_bandwidth=450e9,
            source="NVIDIA H100 SXM data sheet; efficiencies as on H200, unmeasured",
        ),
        Device(
            "a100",
            flops=312e12,
            memory_bandwidth=2.039e12,
            memory_bytes=80 * 10**9,
            link_bandwidth=300e9,
            source="NVIDIA A100 80 GB SXM data sheet; efficiencies as on H200, unmeasured",
        ),
        Device(
            "cpu-2core",
            flops=60e9,
            memory_bandwidth=12e9,
            memory_bytes=2 * 10**9,
            link_bandwidth=3e9,
            flops_efficiency=0.5,
            memory_efficiency=0.7,
            link_efficiency=0.8,
            step_overhead_s=0.8e-3,
            layer_overhead_s=0.35e-3,
            link_latency_s=3e-3,
            message_latency_s=1.2e-3,
            source="one core a rank of a 2-core x86 virtual machine, small model in fp32; set by hand from a first run",
        ),
    )
}
