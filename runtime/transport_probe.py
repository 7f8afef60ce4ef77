"""Whether MPI really takes device memory here, seen by sending some and looking at what arrived.

Facts come first: over the wrong point-to-point layer a device pointer is not an error but the end of the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .transport import TransportError
from .transport_facts import cuda_mpi_problem

if TYPE_CHECKING:
    from mpi4py import MPI

_SIZES = (64, 1 << 22)  # one that goes eagerly, one by rendezvous


def check_cuda_mpi(device: torch.device, pml: str) -> None:
    """This rank's MPI takes buffers of `device`: by facts, then by a message to itself. Raises TransportError."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    problem = cuda_mpi_problem(pml, maps)
    if problem is not None:
        raise TransportError(problem)
    from mpi4py import MPI

    exchange(MPI.COMM_SELF, 0, 0, device)


def exchange(communicator: MPI.Comm, to: int, source: int, device: torch.device) -> None:
    """Send pseudo-random bytes of `device` to rank `to` and compare what rank `source` sends. Raises TransportError.

    Every rank of a ring calls, with its neighbours.
    """
    from mpi4py import MPI

    byte: Any = MPI.BYTE
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        for size in _SIZES:
            sent = _pattern(size, communicator.Get_rank(), device)
            got = torch.zeros_like(sent)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            communicator.Sendrecv([_buffer(sent), byte], to, 0, [_buffer(got), byte], source, 0)
            if not torch.equal(got, _pattern(size, source, device)):
                raise TransportError(
                    f"{size} bytes of {device} arrived damaged over MPI from rank {source}; choose"
                    " cache_transceiver.backend cuda_ipc or host"
                )


def _pattern(size: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(device)


def _buffer(tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
