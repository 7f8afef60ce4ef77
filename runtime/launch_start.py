"""Watching the ranks of an MPI world come together: until all have joined, a death would hang the others in MPI.

Only processes of this machine are watched, and only on Linux. Knows nothing of what the ranks do.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

JOINED: Final = "joined"  # a file that is there once every rank has reached MpiWorld
LEFT: Final = "left-"  # with the number of a rank that ended by itself, not by a signal
_LOOK_S: Final = 0.25
_MISSING_S: Final = 4.0  # mpiexec starts all ranks of a host at about the same time


class StartError(RuntimeError):
    """An MPI world whose ranks never came together: `ranks` died, or (none) the time was up.

    They are more than one only where all were found dead at once; one of them was the first.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Start:
    """Ranks leave marks in `scratch`. `num_ranks` None: others are on other hosts, and nobody here knows how many."""

    def __init__(self, scratch: Path, num_ranks: int | None, limit_s: float | None) -> None:
        self._scratch = scratch
        self._num_ranks = num_ranks
        self._limit_s = limit_s
        self._began = self._last_new = time.monotonic()
        self._last_look = 0.0
        self._seen: dict[int, int] = {}  # process id: rank
        self._handles: dict[int, int] = {}  # process id: a descriptor that tells of its end at once
        self._has_handles = True  # of all that were seen

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def wait(self, process: subprocess.Popen[bytes], limit_s: float) -> None:
        """Until `process` ends, or one of the ranks, or the time is up.

        Who died first is known only to who looks at once: the death of one rank soon brings others about.
        """
        handle = _handle_of(process.pid)
        if handle is None:
            wait_quietly(process, limit_s)
            return
        try:
            poller = select.poll()
            for descriptor in (handle, *self._handles.values()):
                poller.register(descriptor, select.POLLIN)
            poller.poll(limit_s * 1000)
        finally:
            os.close(handle)
        wait_quietly(process, 0)

    def is_over(self, session: int, now: float) -> bool:
        """Whether there is nothing to watch any more. Raises StartError."""
        if not self._has_handles and now - self._last_look < _LOOK_S:
            return False  # to look through all processes costs too much to do it all the time
        dead = self._dead(session)
        # looked at after the processes: who left in order, or joined and then died, has left its mark by now
        if (self._scratch / JOINED).exists() or (self._scratch / "exit").exists():
            return True
        gone = sorted(rank for pid, rank in dead.items() if not self._has_left(pid, rank))
        if gone:
            raise _died(gone)
        if now - self._last_look < _LOOK_S:
            return False
        self._last_look = now
        for pid in set(session_members(session)) - self._seen.keys():
            rank = rank_of(pid)
            if rank is not None:
                self._seen[pid] = rank
                handle = _handle_of(pid)
                if handle is None:  # not Linux, or it is gone already
                    self._has_handles = False
                else:
                    self._handles[pid] = handle
                self._last_new = now
        if self._seen and self._num_ranks is not None and now - self._last_new > _MISSING_S:
            for rank in range(self._num_ranks):  # one that was killed before anybody looked
                if rank not in self._seen.values() and not (self._scratch / f"{LEFT}{rank}").exists():
                    raise _died([rank])
        if self._limit_s is not None and now - self._began > self._limit_s:
            raise StartError(f"the ranks did not come together as an MPI world within {self._limit_s:g} s")
        return False

    def _dead(self, session: int) -> dict[int, int]:
        """Ranks by process id that were seen and are no more."""
        if not self._has_handles:
            alive = set(session_members(session))
            return {pid: rank for pid, rank in self._seen.items() if pid not in alive}
        poller = select.poll()
        for handle in self._handles.values():
            poller.register(handle, select.POLLIN)
        ended = {handle for handle, _ in poller.poll(0)}
        return {pid: self._seen[pid] for pid, handle in self._handles.items() if handle in ended}

    def _has_left(self, pid: int, rank: int) -> bool:
        """Whether a rank that is no more ended by itself; if so, nobody waits for its end any more."""
        if not (self._scratch / f"{LEFT}{rank}").exists():
            return False
        if pid in self._handles:
            os.close(self._handles.pop(pid))
        return True


def _died(ranks: Sequence[int]) -> StartError:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return StartError(f"{who} died while the MPI world was starting", ranks)


def wait_quietly(process: subprocess.Popen[bytes], limit_s: float) -> None:
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        pass


def _handle_of(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where there is none to be had."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def rank_of(pid: int) -> int | None:
    """The rank that a process is, if it was started by mpiexec itself."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        launched_by = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        return None
    if not launched_by.startswith(("mpiexec", "prte", "mpirun")):
        return None  # a child of a rank may come and go
    for entry in entries:
        key, _, value = entry.partition(b"=")
        if key == b"OMPI_COMM_WORLD_RANK" and value.isdigit():
            return int(value)
    return None


def session_members(session: int) -> list[int]:
    """Ids of the living processes of a session (on Linux; elsewhere none are found)."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()  # the command in parentheses may hold anything
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(entry.parent.name))
    return members
