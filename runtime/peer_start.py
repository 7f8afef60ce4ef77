"""How the ranks of an executor find out whether they can sum through each other's memory, and open it.

All decide alike: what one rank cannot, none does, and each knows the reason. What has been opened is tried once with
known numbers before anything rests on it.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from .cuda_ipc import HANDLE_BYTES, CudaError, Driver, device_uuid
from .kv_pages import TORCH_DTYPES
from .model_place import Place
from .peer_reduce import ATTENDED, EMBEDDED, GATED, PeerLayout, PeerReduce, most_rows

if TYPE_CHECKING:
    from mpi4py import MPI

SWITCH: Final = "DISAGG_PEER_REDUCE"  # "0": all is summed by NCCL; else few rows through peers' memory, where it can be
_NATIVE_ATOMICS: Final = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_TEXT_BYTES: Final = 256
_PROBE_LOOKS: Final = 1 << 22  # a few seconds
_TRIALS: Final = 6


def is_wanted() -> bool:
    """Whether the switch leaves it on."""
    return os.environ.get(SWITCH) != "0"


def pair_problem(own: int, peer: int) -> str | None:
    """Why GPU `own` of this process cannot meet GPU `peer` in its memory, or None."""
    value = ctypes.c_int(0)
    try:
        Driver().call(
            "cuDeviceGetP2PAttribute", ctypes.byref(value), _NATIVE_ATOMICS, ctypes.c_int(own), ctypes.c_int(peer)
        )
    except CudaError as error:
        return str(error)
    return None if value.value else f"cuda:{own} and cuda:{peer} are not joined by NVLink"


def host_sums(gpus: Sequence[int]) -> str:
    """How the ranks of an executor on these GPUs of this process would sum, in words."""
    if not is_wanted():
        return f"NCCL: {_off()}"
    for own in gpus:
        for peer in gpus:
            problem = None if own == peer else pair_problem(own, peer)
            if problem is not None:
                return f"NCCL: {problem}"
    return "few rows through peer memory, more by NCCL"


def _off() -> str:
    return f"{SWITCH} is 0"


def peer_reduce(comm: MPI.Comm, place: Place, device: torch.device) -> tuple[PeerReduce | None, str]:
    """The sums of this rank and how the executor sums, in words. Collective over `comm`, the executor's ranks.

    `device` is current. None where some rank cannot, with the reason of the first of them.
    """
    problem = _problem_alone(comm, place)
    problem = _agreed(comm, problem) or _agreed(comm, _problem_with_peers(comm, device))
    made: PeerReduce | None = None
    if problem is None:
        made, problem = _open(comm, place, device)
    if problem is not None or made is None:
        return None, f"NCCL: {problem}"
    return made, f"peer memory up to {made.max_rows} rows, then NCCL"


def _problem_alone(comm: MPI.Comm, place: Place) -> str | None:
    if not is_wanted():
        return _off()
    if place.tp != comm.Get_size():
        return "the executor has pipeline stages"
    dtype = TORCH_DTYPES[place.shape.dtype]
    if place.shape.hidden_size * dtype.itemsize % 16:
        return f"rows of {place.shape.hidden_size} x {place.shape.dtype} are no multiple of 16 bytes"
    return None


def _problem_with_peers(comm: MPI.Comm, device: torch.device) -> str | None:
    """All on one host, and each GPU that this process sees joined with its own."""
    hosts = _gather(comm, socket.gethostname().encode(), _TEXT_BYTES)
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuids = _gather(comm, device_uuid(index), 16)
    if len(set(hosts)) > 1:
        return "the executor's ranks are on several hosts"
    seen = {device_uuid(i): i for i in range(torch.cuda.device_count())}
    for uuid in uuids:
        if uuid in seen and seen[uuid] != index:
            problem = pair_problem(index, seen[uuid])
            if problem is not None:
                return problem
    return None


def _open(comm: MPI.Comm, place: Place, device: torch.device) -> tuple[PeerReduce | None, str | None]:
    """The sums, tried; or why not. Some rank may fail at any step, and all must still take part in the next."""
    hidden, dtype = place.shape.hidden_size, TORCH_DTYPES[place.shape.dtype]
    layout = PeerLayout(place.tp, hidden, dtype, most_rows(place.tp, hidden, dtype))
    problem: str | None = None
    own = bytes(HANDLE_BYTES + 8)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    try:
        driver = Driver()
        base, _ = driver.allocation_of(memory.data_ptr())
        own = driver.export(base) + (memory.data_ptr() - base).to_bytes(8, "little")
    except CudaError as error:
        problem = str(error)
    torch.cuda.synchronize(device)  # the counters are zero before anybody counts
    everyone = _gather(comm, own, HANDLE_BYTES + 8)
    problem = _agreed(comm, problem)
    if problem is not None:
        return None, problem
    addresses = []
    try:
        for rank, each in enumerate(everyone):
            if rank == place.tp_rank:
                addresses.append(memory.data_ptr())
            else:
                start = driver.open(each[:HANDLE_BYTES])
                addresses.append(start + int.from_bytes(each[HANDLE_BYTES:], "little"))
    except CudaError as error:
        problem = str(error)
    problem = _agreed(comm, problem)
    if problem is not None:
        return None, problem
    made = PeerReduce(layout, memory, addresses, place.tp_rank)
    problem = _agreed(comm, _tried(comm, made, device))
    return (None, problem) if problem is not None else (made, None)


def _tried(comm: MPI.Comm, made: PeerReduce, device: torch.device) -> str | None:
    """What is wrong with the sums, if anything."""
    layout = made.layout
    rows, rank = min(2, layout.max_rows), comm.Get_rank()
    residual, out = (torch.zeros(rows, layout.hidden_size, dtype=layout.dtype, device=device) for _ in range(2))
    weight = torch.ones(layout.hidden_size, dtype=layout.dtype, device=device)

    def total(trial: int) -> None:
        which = (EMBEDDED, ATTENDED, GATED)[trial % 3]
        made.slot(which, rows).fill_(float(rank + 1 + trial))
        made.add_rms_norm(which, residual, weight, 1e-6, out)

    problem: str | None = None
    try:
        with made.limited(0):  # compiled by each rank in its own time, while none waits
            total(0)
            torch.cuda.synchronize(device)
    except Exception as error:  # of whatever kind a compiler has
        problem = _failed(error)
    problem = _agreed(comm, problem)  # all have come so far
    if problem is not None:
        return problem
    try:
        made.forgive()
        residual.zero_()
        with made.limited(_PROBE_LOOKS):
            for trial in range(_TRIALS):
                total(trial)
            torch.cuda.synchronize(device)
        made.check()
        ranks = layout.tp * (layout.tp + 1) // 2
        expected = sum(ranks + trial * layout.tp for trial in range(_TRIALS))
        if not bool((residual == expected).all()):
            problem = f"a trial through peers' memory summed to {residual.flatten()[0]} instead of {expected}"
    except Exception as error:
        problem = _failed(error)
    return problem


def _failed(error: Exception) -> str:
    words = str(error).strip().partition("\n")[0]
    return f"a trial through peers' memory failed: {words or type(error).__name__}"


# ---- words between ranks ---------------------------------------------------------------------------------------------


def _gather(comm: MPI.Comm, own: bytes, size: int) -> list[bytes]:
    """`own` of every rank, as bytes of that size, zeros at the end."""
    from mpi4py import MPI

    everyone: Any = bytearray(size * comm.Get_size())
    comm.Allgather([own[:size].ljust(size, b"\0"), MPI.BYTE], [everyone, MPI.BYTE])
    return [bytes(everyone[i * size : (i + 1) * size]) for i in range(comm.Get_size())]


def _agreed(comm: MPI.Comm, problem: str | None) -> str | None:
    """The problem of the first rank that has one, on all ranks."""
    for text in _gather(comm, (problem or "").encode(), _TEXT_BYTES):
        words = text.rstrip(b"\0").decode(errors="replace")
        if words:
            return words
    return None
