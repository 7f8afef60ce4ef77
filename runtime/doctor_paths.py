"""How fast each path of this machine is, beside what its hardware should give: a copy, timed several times over.

Rates are in GB/s, 1e9 bytes a second. A copy on a device counts its bytes twice, as read and as written.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from ..core.devices import DEVICES
from .doctor_facts import GpuFacts, MachineFacts
from .launch_start import StartError
from .launcher import LaunchError, launch

_REPEATS: Final = 10
_DEVICE_BYTES: Final = 1 << 30
_HOST_BYTES: Final = 64 << 20
_MPI_S: Final = 60.0
RESULT: Final = "paths.json"


class PathRow(Struct, frozen=True):
    """One path. `expected` None: nothing says what it should give. `problem`: it could not be measured."""

    name: str
    measured: float | None
    unit: str
    expected: float | None = None
    expected_from: str = ""
    problem: str | None = None

    @property
    def ratio(self) -> float | None:
        if self.measured is None or not self.expected:
            return None
        return self.measured / self.expected


def measure_paths(facts: MachineFacts) -> list[PathRow]:
    """Every path that this machine has."""
    memory = _host_copy()
    rows = [memory, *_mpi(facts, memory.measured)]
    for gpu in facts.gpus:
        rows += _device(gpu)
    for gpu in facts.gpus:
        rows += [_peer(gpu, peer, facts.gpus) for peer in range(len(facts.gpus)) if peer != gpu.index]
    return rows


def _host_copy() -> PathRow:
    import numpy as np

    source, target = np.ones(_HOST_BYTES, np.uint8), np.empty(_HOST_BYTES, np.uint8)
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return PathRow("host memory, one core's copy", _HOST_BYTES / min(seconds) / 1e9, "GB/s")


def _mpi(facts: MachineFacts, host_rate: float | None) -> list[PathRow]:
    """Two ranks on this machine: a large message, and a small one's time one way."""
    names = ("MPI host message, 64 MiB", "MPI host message, 8 bytes, one way")
    if facts.mpiexec is None:
        return [PathRow(name, None, unit, problem=facts.mpiexec_problem) for name, unit in zip(names, ("GB/s", "µs"))]
    with tempfile.TemporaryDirectory(prefix="disagg-doctor-") as folder:
        try:
            code = launch(
                f"{__package__}.doctor_main", [folder], 2, timeout_s=_MPI_S, fault_tolerant=False, start_limit_s=_MPI_S
            )
            measured = json.loads((Path(folder) / RESULT).read_text())
        except (LaunchError, StartError) as error:
            return [PathRow(name, None, unit, problem=str(error)) for name, unit in zip(names, ("GB/s", "µs"))]
        except (OSError, ValueError):
            text = f"a world of two ranks ended with exit code {code}; what it printed is above"
            return [PathRow(name, None, unit, problem=text) for name, unit in zip(names, ("GB/s", "µs"))]
    return [
        PathRow(names[0], float(measured["gb_per_s"]), "GB/s", host_rate, "one copy in host memory"),
        PathRow(names[1], float(measured["latency_us"]), "µs"),
    ]


# ---- devices --------------------------------------------------------------------------------------------------------


def _timed_on_device(copy: Callable[[], Any], device: int) -> float:
    """The shortest of several runs, in seconds, by the device's own clock."""
    import torch

    with torch.cuda.device(device):
        copy()
        torch.cuda.synchronize()
        best = float("inf")
        for _ in range(_REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            copy()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _device(gpu: GpuFacts) -> list[PathRow]:
    import torch

    names = [f"cuda:{gpu.index} {what}" for what in ("memory copy", "from pinned host memory", "to pinned host memory")]
    spec = next((device for name, device in DEVICES.items() if name in gpu.name.lower()), None)
    try:
        here = torch.device("cuda", gpu.index)
        source = torch.empty(_DEVICE_BYTES, dtype=torch.uint8, device=here)
        target = torch.empty_like(source)
        pinned = torch.empty(_DEVICE_BYTES // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: pinned.numel()]
        inside = 2 * _DEVICE_BYTES / _timed_on_device(lambda: target.copy_(source), gpu.index) / 1e9
        to_device = pinned.numel() / _timed_on_device(lambda: part.copy_(pinned, non_blocking=True), gpu.index) / 1e9
        to_host = pinned.numel() / _timed_on_device(lambda: pinned.copy_(part, non_blocking=True), gpu.index) / 1e9
    except RuntimeError as error:  # torch has no one name for what a device refuses
        problem = str(error).strip().partition("\n")[0]
        return [PathRow(name, None, "GB/s", problem=problem) for name in names]
    memory = None if spec is None else spec.memory_bandwidth / 1e9
    return [
        PathRow(names[0], inside, "GB/s", memory, "" if spec is None else f"specification of {spec.name}"),
        PathRow(names[1], to_device, "GB/s", gpu.pcie_gb_per_s, gpu.pcie),
        PathRow(names[2], to_host, "GB/s", gpu.pcie_gb_per_s, gpu.pcie),
    ]


def _peer(gpu: GpuFacts, peer: int, gpus: tuple[GpuFacts, ...]) -> PathRow:
    """A copy from `gpu` to `peer`."""
    import torch

    name = f"cuda:{gpu.index} to cuda:{peer}"
    expected, source = peer_rate(gpu, gpus[peer])
    try:
        here = torch.empty(_DEVICE_BYTES, dtype=torch.uint8, device=f"cuda:{gpu.index}")
        there = torch.empty(_DEVICE_BYTES, dtype=torch.uint8, device=f"cuda:{peer}")
        seconds = _timed_on_device(lambda: there.copy_(here), gpu.index)
    except RuntimeError as error:
        return PathRow(name, None, "GB/s", expected, source, str(error).strip().partition("\n")[0])
    return PathRow(name, _DEVICE_BYTES / seconds / 1e9, "GB/s", expected, source)


def peer_rate(source: GpuFacts, target: GpuFacts) -> tuple[float | None, str]:
    """GB/s one way that a copy between them should give at most, and what says so."""
    if target.index in source.peers and source.nvlink_gb_per_s and target.nvlink_gb_per_s:
        return min(source.nvlink_gb_per_s, target.nvlink_gb_per_s), "NVLink, sum of links"
    rates = [gpu.pcie_gb_per_s for gpu in (source, target) if gpu.pcie_gb_per_s is not None]
    if len(rates) == 2:
        return min(rates), "PCIe" if target.index in source.peers else "PCIe, through host memory"
    return None, ""
