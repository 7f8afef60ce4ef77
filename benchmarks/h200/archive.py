"""Pack run directories into archives of bounded size: their tables first, then as many event logs as there is room for.

    python benchmarks/h200/archive.py RUNS OUTPUT --most-mb 15 --most-archives 7

Event logs of runs on hardware hold every prompt's token ids and hardly shrink: they are what is left out, run by run, and
told. A table for which there is no room, or which no archive can hold, is an error. Nothing is removed.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_LEVEL = 6
_HELD = 1 << 20  # bytes that the compressor may still hold
_CHUNK = 1 << 20
_HEADERS = 4096  # of a file and of an archive


class Parts:
    """Archives `name`-0.tgz, `name`-1.tgz, … in a folder, each closed before it grows beyond `most_bytes`."""

    def __init__(self, folder: Path, name: str, most_bytes: int) -> None:
        self._folder = folder
        self._name = name
        self._most_bytes = most_bytes
        self._tar: tarfile.TarFile | None = None
        self.paths: list[Path] = []

    def add(self, file: Path, name: str, most_archives: int) -> bool:
        """Whether there was room for `file`, in the last archive or in another one, of `most_archives` in all."""
        needed = _at_most(file.stat().st_size)
        if needed > self._most_bytes:  # then how far it shrinks decides
            needed = _at_most(_compressed_size(file))
        if self._tar is None or self._size() + needed > self._most_bytes:
            if needed > self._most_bytes or len(self.paths) >= most_archives:
                return False
            self.close()
            self.paths.append(self._folder / f"{self._name}-{len(self.paths)}.tgz")
            self._tar = tarfile.open(self.paths[-1], "w:gz", compresslevel=_LEVEL)  # noqa: SIM115
        self._tar.add(file, name)
        return True

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _size(self) -> int:
        return self.paths[-1].stat().st_size + _HELD


def _at_most(num_bytes: int) -> int:
    """What so many bytes take in an archive, should they not shrink (further)."""
    return num_bytes + num_bytes // 1000 + _HEADERS


def _compressed_size(file: Path) -> int:
    compressor, size = zlib.compressobj(_LEVEL), 0
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK):
            size += len(compressor.compress(chunk))
    return size + len(compressor.flush())


def files_of(runs: Path, *, logs: bool) -> Iterator[tuple[Path, str]]:
    for file in sorted(runs.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.name.startswith("events.") == logs:
            yield file, str(file.relative_to(runs.parent))


def pack(files: Iterable[tuple[Path, str]], parts: Parts, most_archives: int) -> list[str]:
    """Names of the files that found no room."""
    left_out = [name for file, name in files if not parts.add(file, name, most_archives)]
    parts.close()
    return left_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--most-mb", type=float, default=15.0)
    parser.add_argument("--most-archives", type=int, default=7)
    asked = parser.parse_args()
    if not asked.runs.is_dir():
        print(f"error: {asked.runs}: no such folder", file=sys.stderr)
        return 2
    asked.output.mkdir(parents=True, exist_ok=True)
    most_bytes = int(asked.most_mb * 1e6)
    tables = Parts(asked.output, f"{asked.runs.name}-tables", most_bytes)
    missing = pack(files_of(asked.runs, logs=False), tables, asked.most_archives)
    logs = Parts(asked.output, f"{asked.runs.name}-logs", most_bytes)
    all_logs = list(files_of(asked.runs, logs=True))
    without = pack(all_logs, logs, asked.most_archives - len(tables.paths))
    for path in (*tables.paths, *logs.paths):
        print(f"{path.stat().st_size / 1e6:7.1f} MB  {path}")
    if without:
        print(f"event logs left out: {len(without)} of {len(all_logs)}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        print(f"error: no room for the tables {missing[0]}{more}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
