"""How the ranks of one executor talk inside a step: sums and gathers over tp, hidden states over pp, tokens to all.

Every rank calls the same methods in the same order, from one thread of its own; another thread may make MPI progress
meanwhile (MPI_THREAD_MULTIPLE). Control messages do not come this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI

    from .peer_reduce import PeerReduce

_HIDDEN_TAG: Final = 1


class Collectives(Protocol):
    """Ranks are numbered pp_rank · tp + tp_rank."""

    @property
    def peers(self) -> PeerReduce | None:
        """Sums of few rows through the other ranks' memory, where that can be had."""

    @property
    def description(self) -> str:
        """How ranks sum, in words."""

    def tp_all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks of this stage, same shape and dtype; `x` may be overwritten."""

    def tp_all_gather(self, x: Tensor) -> Tensor:
        """The `x` of all ranks of this stage, of equal shapes, joined along the last dimension in rank order."""

    def send_hidden(self, x: Tensor) -> None:
        """Hand hidden states to the same tp rank of the next stage."""

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The hidden states [num_tokens, hidden_size] from the same tp rank of the stage before."""

    def broadcast_tokens(self, tokens: Tensor | None, num_tokens: int) -> list[int]:
        """The int64 `tokens` of the last stage's first rank (None elsewhere), on every rank of the executor."""


class SingleRank:
    """An executor of one rank: nobody to talk to."""

    peers: Final = None
    description: Final = "one rank"

    def tp_all_reduce(self, x: Tensor) -> Tensor:
        return x

    def tp_all_gather(self, x: Tensor) -> Tensor:
        return x

    def send_hidden(self, x: Tensor) -> None:
        raise RuntimeError("an executor of one rank has no next pipeline stage")

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise RuntimeError("an executor of one rank has no pipeline stage before it")

    def broadcast_tokens(self, tokens: Tensor | None, num_tokens: int) -> list[int]:
        if tokens is None or tokens.numel() != num_tokens:
            raise RuntimeError(f"expected {num_tokens} tokens to broadcast, not {tokens}")
        return [int(token) for token in tokens.tolist()]


class MpiCollectives:
    """Over the executor's own communicator, which nothing else may use for point-to-point messages.

    Collective over `comm`: every rank constructs it. Buffers only. Tensors of other devices are staged
    through host memory, which is right everywhere and fast nowhere: a device's own collectives replace this class.
    """

    peers: Final = None
    description: Final = "MPI"

    def __init__(self, comm: MPI.Comm, tp: int) -> None:
        from mpi4py import MPI

        size, rank = comm.Get_size(), comm.Get_rank()
        if tp < 1 or size % tp:
            raise ValueError(f"the executor's {size} ranks are not a multiple of tensor_parallel_size {tp}")
        self._sum, self._in_place = MPI.SUM, MPI.IN_PLACE
        self._comm = comm
        self._tp = tp
        self._rank = rank
        self._stage = comm.Split(rank // tp, rank % tp)

    def tp_all_reduce(self, x: Tensor) -> Tensor:
        if self._tp == 1:
            return x
        # Half precision is summed in float32: MPI knows no bfloat16, and one rounding is better than tp - 1.
        total = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
        self._stage.Allreduce(self._in_place, total.numpy(), op=self._sum)
        return total.to(device=x.device, dtype=x.dtype)

    def tp_all_gather(self, x: Tensor) -> Tensor:
        if self._tp == 1:
            return x
        mine = _on_host(x)
        gathered = torch.empty((self._tp, *mine.shape), dtype=mine.dtype)
        self._stage.Allgather(_bytes(mine), _bytes(gathered))
        return torch.cat(list(gathered), dim=-1).to(x.device)

    def send_hidden(self, x: Tensor) -> None:
        self._comm.Send(_bytes(_on_host(x)), dest=self._rank + self._tp, tag=_HIDDEN_TAG)

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        hidden = torch.empty((num_tokens, hidden_size), dtype=dtype)
        self._comm.Recv(_bytes(hidden), source=self._rank - self._tp, tag=_HIDDEN_TAG)
        return hidden.to(device)

    def broadcast_tokens(self, tokens: Tensor | None, num_tokens: int) -> list[int]:
        buffer = np.empty(num_tokens, dtype=np.int64)
        if tokens is not None:
            if tokens.numel() != num_tokens:
                raise ValueError(f"expected {num_tokens} tokens to broadcast, not {tokens.numel()}")
            buffer[:] = tokens.detach().to("cpu").numpy()
        self._comm.Bcast(buffer, root=self._comm.Get_size() - self._tp)
        return [int(token) for token in buffer.tolist()]

    def free(self) -> None:
        """Give the stage's communicator back. Collective over the stage."""
        self._stage.Free()

    def revoke(self) -> None:
        """End every call of every rank here with an error: what a rank does that gives a step up (needs ULFM)."""
        self._stage.Revoke()
        self._comm.Revoke()


def _on_host(x: Tensor) -> Tensor:
    return x.detach().to("cpu").contiguous()


def _bytes(x: Tensor) -> Any:
    """A contiguous host tensor of any dtype as its bytes: NumPy has no bfloat16."""
    return x.view(-1).view(torch.uint8).numpy()
