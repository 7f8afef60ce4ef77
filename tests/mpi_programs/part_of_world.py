"""The first ranks of a world, as a world of their own."""

from __future__ import annotations

from disagg.runtime.mpi_world import MpiWorld


class PartOfWorld(MpiWorld):
    """The first ranks of a world, as a world of their own that can be left without leaving MPI."""

    def __init__(self, whole: MpiWorld, num_ranks: int) -> None:
        self.rank = whole.rank
        self.size = num_ranks
        self.control = whole.group(range(num_ranks))
        self.data = whole.group(range(num_ranks), tag=1)
        self.hostnames = whole.hostnames[:num_ranks]
        self.hostname = whole.hostname
        self.max_tag = whole.max_tag
        self.fault_tolerant = whole.fault_tolerant
        self._is_left = False

    def finalize(self, lost_ranks: bool = False, limit_s: float = 60.0) -> None:
        if lost_ranks:
            raise RuntimeError(f"rank {self.rank} lost a rank that was to live on")
        if not self._is_left:
            self._is_left = True
            self.control.Free()
            self.data.Free()
