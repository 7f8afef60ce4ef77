"""Pack run directories into archives of bounded size: their tables first, then as many event logs as there is room for.

    python benchmarks/h200/archive.py RUNS OUTPUT --most-mb 15 --most-archives 7

Event logs of runs on hardware hold every prompt's token ids and hardly shrink: they are what is left out, run by run, and
told. Nothing is removed.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path


class Parts:
    """Archives `name`-0.tgz, `name`-1.tgz, … in a folder, each closed before it grows beyond `most_bytes`."""

    def __init__(self, folder: Path, name: str, most_bytes: int) -> None:
        self._folder = folder
        self._name = name
        self._most_bytes = most_bytes
        self._tar: tarfile.TarFile | None = None
        self.paths: list[Path] = []

    def add(self, file: Path, name: str) -> None:
        if self.is_full_for(file):
            self.close()
        if self._tar is None:
            self.paths.append(self._folder / f"{self._name}-{len(self.paths)}.tgz")
            self._tar = tarfile.open(self.paths[-1], "w:gz", compresslevel=6)  # noqa: SIM115
        self._tar.add(file, name)

    def is_full_for(self, file: Path) -> bool:
        """Whether `file`, should it not shrink at all, needs another archive."""
        return self._tar is not None and self._size() + file.stat().st_size > self._most_bytes

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _size(self) -> int:
        return self.paths[-1].stat().st_size + (1 << 20)  # what the compressor still holds


def files_of(runs: Path, *, logs: bool) -> Iterator[tuple[Path, str]]:
    for file in sorted(runs.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.name.startswith("events.") == logs:
            yield file, str(file.relative_to(runs.parent))


def pack(files: Iterable[tuple[Path, str]], parts: Parts, most_archives: int) -> list[str]:
    """Names of the files that found no room."""
    left_out = []
    for file, name in files:
        if parts.is_full_for(file) and len(parts.paths) >= most_archives:
            left_out.append(name)
        else:
            parts.add(file, name)
    parts.close()
    return left_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--most-mb", type=float, default=15.0)
    parser.add_argument("--most-archives", type=int, default=7)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    most_bytes = int(asked.most_mb * 1e6)
    tables = Parts(asked.output, f"{asked.runs.name}-tables", most_bytes)
    missing = pack(files_of(asked.runs, logs=False), tables, asked.most_archives)
    room = asked.most_archives - len(tables.paths)
    logs = Parts(asked.output, f"{asked.runs.name}-logs", most_bytes)
    without = pack(files_of(asked.runs, logs=True), logs, room) if room > 0 else ["all event logs"]
    for path in (*tables.paths, *logs.paths):
        print(f"{path.stat().st_size / 1e6:7.1f} MB  {path}")
    if without:
        print(f"event logs left out: {len(without)} files")
    if missing:
        print(f"error: no room for {len(missing)} files of tables: {missing[0]}, …", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
