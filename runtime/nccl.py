"""NCCL through its C interface, for the ranks of one executor.

torch.distributed has the same calls, but wants a rendezvous of its own; MPI has already brought these ranks together,
and a communicator made from a broadcast id is all that is needed. Every call is put on the current CUDA stream, which
may be recording a graph.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI

    from .peer_reduce import PeerReduce

_UNIQUE_ID_BYTES: Final = 128
_SUM: Final = 0
_DTYPES: Final = {
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}  # ncclDataType_t


class NcclError(RuntimeError):
    """NCCL is missing, or one of its calls failed."""


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _UNIQUE_ID_BYTES)]


def _library() -> Any:
    """libnccl as torch has loaded it, or else the one of the `nvidia-nccl` wheel."""
    names = ["libnccl.so.2"]
    try:
        import nvidia.nccl

        names += [str(path) for root in nvidia.nccl.__path__ for path in Path(root).glob("lib/libnccl.so.2")]
    except ImportError:
        pass
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.ncclGetErrorString.restype = ctypes.c_char_p
        library.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int]
        size, kind, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        library.ncclAllReduce.argtypes = [pointer, pointer, size, kind, kind, pointer, pointer]
        library.ncclAllGather.argtypes = [pointer, pointer, size, kind, pointer, pointer]
        library.ncclBroadcast.argtypes = [pointer, pointer, size, kind, ctypes.c_int, pointer, pointer]
        for name in ("ncclSend", "ncclRecv"):
            getattr(library, name).argtypes = [pointer, size, kind, ctypes.c_int, pointer, pointer]
        library.ncclCommDestroy.argtypes = [pointer]
        library.ncclCommAbort.argtypes = [pointer]
        return library
    raise NcclError("libnccl.so.2 is not here; it comes with torch's CUDA wheels (nvidia-nccl)")


class NcclCommunicator:
    """A communicator over the ranks of `comm`, whose present CUDA devices take part. Collective over `comm`.

    Tensors are contiguous and on that device. Raises NcclError.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._nccl = _library()
        self.size: Final = comm.Get_size()
        self.rank: Final = comm.Get_rank()
        unique = _UniqueId()
        if self.rank == 0:
            self._check(self._nccl.ncclGetUniqueId(ctypes.byref(unique)))
        raw = np.frombuffer(bytearray(unique), dtype=np.uint8)
        comm.Bcast(raw, root=0)
        unique = _UniqueId.from_buffer_copy(raw.tobytes())
        self._comm = ctypes.c_void_p()
        self._check(self._nccl.ncclCommInitRank(ctypes.byref(self._comm), self.size, unique, self.rank))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum into x."""
        self._check(
            self._nccl.ncclAllReduce(
                x.data_ptr(), x.data_ptr(), x.numel(), _DTYPES[x.dtype], _SUM, self._comm, _stream()
            )
        )
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in rank order."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._check(
            self._nccl.ncclAllGather(x.data_ptr(), out.data_ptr(), x.numel(), _DTYPES[x.dtype], self._comm, _stream())
        )
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The root's x, in x."""
        kind = _DTYPES[x.dtype]
        self._check(self._nccl.ncclBroadcast(x.data_ptr(), x.data_ptr(), x.numel(), kind, root, self._comm, _stream()))
        return x

    def send(self, x: Tensor, peer: int) -> None:
        self._check(self._nccl.ncclSend(x.data_ptr(), x.numel(), _DTYPES[x.dtype], peer, self._comm, _stream()))

    def recv(self, x: Tensor, peer: int) -> Tensor:
        self._check(self._nccl.ncclRecv(x.data_ptr(), x.numel(), _DTYPES[x.dtype], peer, self._comm, _stream()))
        return x

    def abort(self) -> None:
        """End what is in flight with an error; the communicator is of no use afterwards."""
        if self._comm:
            self._nccl.ncclCommAbort(self._comm)
            self._comm = ctypes.c_void_p()

    def _check(self, code: int) -> None:
        if code:
            raise NcclError(f"NCCL: {self._nccl.ncclGetErrorString(code).decode(errors='replace')}")


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class NcclCollectives:
    """`Collectives` on the device: nothing is staged through the host, and all but `broadcast_tokens` fits in a graph.

    Collective over `comm`, the executor's communicator, whose ranks have taken their devices. `peers`, where they can
    reach each other's memory: sums of few rows; `description`: how they sum, in words.
    """

    def __init__(self, comm: MPI.Comm, tp: int, peers: PeerReduce | None = None, description: str = "NCCL") -> None:
        size, rank = comm.Get_size(), comm.Get_rank()
        if tp < 1 or size % tp:
            raise ValueError(f"the executor's {size} ranks are not a multiple of tensor_parallel_size {tp}")
        self.peers: Final = peers
        self.description: Final = description
        self._tp = tp
        self._rank = rank
        self._last_stage = size - tp
        self._whole = NcclCommunicator(comm)
        if tp == size:
            self._stage = self._whole
        else:
            stage = comm.Split(rank // tp, rank % tp)
            self._stage = NcclCommunicator(stage)
            stage.Free()

    def tp_all_reduce(self, x: Tensor) -> Tensor:
        return x if self._tp == 1 else self._stage.all_reduce(x.contiguous())

    def tp_all_gather(self, x: Tensor) -> Tensor:
        if self._tp == 1:
            return x
        return torch.cat(list(self._stage.all_gather(x.contiguous())), dim=-1)

    def send_hidden(self, x: Tensor) -> None:
        self._whole.send(x.contiguous(), self._rank + self._tp)

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._whole.recv(
            torch.empty((num_tokens, hidden_size), dtype=dtype, device=device), self._rank - self._tp
        )

    def broadcast_device_tokens(self, tokens: Tensor) -> Tensor:
        """The int64 tokens of the last stage's first rank, in place, on every rank of the executor."""
        return tokens if self._last_stage == 0 else self._whole.broadcast(tokens, self._last_stage)

    def broadcast_tokens(self, tokens: Tensor | None, num_tokens: int) -> list[int]:
        if tokens is None:
            tokens = torch.empty(num_tokens, dtype=torch.int64, device=torch.cuda.current_device())
        elif tokens.numel() != num_tokens:
            raise ValueError(f"expected {num_tokens} tokens to broadcast, not {tokens.numel()}")
        return [int(token) for token in self._whole.broadcast(tokens, self._last_stage).tolist()]

    def free(self) -> None:
        """Nothing: NCCL's communicators go with their process (destroying them is collective, and hangs after a death)."""

    def revoke(self) -> None:
        """End every call of this rank with an error."""
        if self.peers is not None:
            self.peers.stop()
        self._whole.abort()
        if self._stage is not self._whole:
            self._stage.abort()
