"""Folders that live as long as one launcher, and are swept by a later one if it was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

_PREFIX: Final = "disagg-mpi-"
_LOCK: Final = ".lock"
_YOUNG_S: Final = 60.0  # a folder this young may not have been locked yet


class ScratchFolder:
    """A new folder inside `parent`, removed on exit. A lock, not a process id, tells whether its owner lives: ids mean
    nothing between containers that share a `parent`.
    """

    def __init__(self, parent: Path) -> None:
        sweep(parent)
        self.path: Final = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock: Final = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path, young_s: float = _YOUNG_S) -> None:
    """Remove the folders that killed launchers of this user left in `parent`."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < young_s or not folder.is_dir():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(lock)
