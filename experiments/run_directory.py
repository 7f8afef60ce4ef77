"""What a run leaves behind, written so that it is there whole or not at all.

A run is written into a hidden folder beside its target, flushed to the disk, and renamed into place at the end. A run
that is killed leaves only such a hidden folder, which the next run of the same target removes.

A single run (no sweep, one repeat) is the output folder itself; otherwise each run is `OUTPUT/<point>/<repeat>/`, and
`OUTPUT/sweep.json` lists the points.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from ..core.tables import RequestRow
from .config_loader import dump_yaml
from .errors import ConfigError
from .manifest import configuration_hash, manifest_of
from .run_point import RunOutcome, RunPoint
from .tables_writer import TABLES, Row, TableWriter
from .timeline import write_timeline

MANIFEST: Final = "manifest.json"
SWEEP: Final = "sweep.json"


class RunDirectory:
    """The writer of one run. Use as a context manager: what is not finished when it is left is discarded.

    `finish` alone makes the target appear. With `overwrite` an earlier run there is replaced in that moment.
    """

    def __init__(self, point: RunPoint, *, overwrite: bool = False) -> None:
        self.point = point
        self.target = point.directory.absolute()
        self._overwrite = overwrite
        self.started = datetime.now(UTC)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.target)
        self.path = self.target.parent / f".{self.target.name}.partial-{os.getpid()}"
        self._tables: dict[str, TableWriter] = {}
        self._open = True
        try:
            self.path.mkdir()
            for name, kind in TABLES.items():  # the first one loads libraries, which gives time to be interrupted
                self._tables[name] = TableWriter(self.path / f"{name}.parquet", kind)
        except BaseException:
            self.discard()
            raise
        self.write_of = {TABLES[name]: table.write for name, table in self._tables.items()}  # by a row's type, as it is

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open:
            self.discard()

    def write(self, row: Row, *, phase: str | None = None, excluded: bool = False) -> None:
        """Add a row to its table. For a `RequestRow`, `phase` and `excluded` come from its planned request."""
        if type(row) is RequestRow:
            values = msgspec.structs.astuple(row)
            filled = (values[0], row.phase if phase is None else phase, *values[2:], excluded)
            self.write_of[RequestRow](filled)
        else:
            self.write_of[type(row)](row)

    def events_path(self, name: str) -> Path:
        """Where to write the event log `events.<name>`, for a runner that streams it."""
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"'{name}' cannot end a file name; allowed: e.g. orchestrator.msgpack")
        return self.path / f"events.{name}"

    def add_events(self, name: str, data: bytes) -> None:
        """Keep an event log, byte for byte, as `events.<name>`."""
        self.events_path(name).write_bytes(data)

    def discard(self) -> None:
        """Leave nothing."""
        self._open = False
        for table in self._tables.values():
            try:
                table.close()
            except (OSError, ValueError):
                continue
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, outcome: RunOutcome) -> dict[str, Any]:
        """Write the rest, flush everything to the disk, move the run into place. Returns the summary.

        A summary that cannot be computed does not cost the run: `summary.json` then holds only `error`.
        """
        config = self.point.experiment
        (self.path / "config.yaml").write_text(dump_yaml(config.expanded()), encoding="utf-8")
        for table in self._tables.values():
            table.close()
        num_rows = {name: table.num_rows for name, table in self._tables.items()}
        manifest = manifest_of(self.point, outcome, self.started, num_rows)
        write_json(self.path / MANIFEST, manifest)
        roles = {int(executor["id"]): str(executor["role"]) for executor in manifest["executors"]}
        write_timeline(self.path, self.path / "trace.json", roles)
        summary = _summarise(self.path)
        write_json(self.path / "summary.json", summary)
        for file in sorted(self.path.iterdir()):
            _flush(file)
        _flush(self.path)
        self._move_into_place()
        self._open = False
        return summary

    def _move_into_place(self) -> None:
        replaced: Path | None = None
        if self.target.exists() and any(self.target.iterdir()):
            if not self._overwrite:
                raise ConfigError(f"{self.target} was filled while this run went on; nothing was overwritten")
            replaced = self.target.parent / f".{self.target.name}.replaced-{os.getpid()}"
            self.target.rename(replaced)
        self.path.rename(self.target)
        _flush(self.target.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)


# ---- an output folder before a run ----------------------------------------------------------------------------------


def prepare_output(
    points: Sequence[RunPoint], output: Path, *, overwrite: bool = False, resume: bool = False, can_resume: bool = True
) -> list[RunPoint]:
    """Check `output` and return the runs still to be done, all but with `resume`. Writes only a sweep's `sweep.json`.

    `can_resume`: whether the command has an option for it, which is named then.

    Raises ConfigError for a folder that is not empty without `overwrite` or `resume`, for one that holds something other
    than runs, and, resuming, for finished runs of another configuration.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output {output}: {'' if path == output else f'{path} '}is not a folder")
    single = len(points) == 1 and points[0].directory == output
    if output.exists() and any(output.iterdir()):
        if not (overwrite or resume):
            options = "--resume, --overwrite" if can_resume else "--overwrite"
            raise ConfigError(f"--output {output}: is not empty; allowed: {options}, or another folder")
        if not (output / MANIFEST).is_file() and not (output / SWEEP).is_file():
            raise ConfigError(f"--output {output}: holds files and no run of disagg; it is left alone")
        if overwrite and not single:
            shutil.rmtree(output)
        if resume and single != (output / MANIFEST).is_file():
            raise ConfigError(f"--output {output}: holds another kind of run (single or sweep); --resume cannot go on")
    todo = [point for point in points if not (resume and _is_finished(point))]
    if not single:
        output.mkdir(parents=True, exist_ok=True)
        listing = {
            "experiment": points[0].experiment.name,
            "backend": points[0].experiment.backend,
            "runs": [
                {
                    "directory": str(p.directory.relative_to(output)),
                    "values": p.values,
                    "repeat": p.repeat,
                    "seed": p.seed,
                }
                for p in points
            ],
        }
        write_atomically(output / SWEEP, json.dumps(listing, indent=2, default=str) + "\n")
    return todo


def check_folder(folder: Path) -> None:
    """Raises ConfigError for what is no folder at all."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")


def _is_finished(point: RunPoint) -> bool:
    path = point.directory / MANIFEST
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    wanted = {
        "configuration_hash": configuration_hash(point.experiment),
        "seed": point.seed,
        "backend": point.experiment.backend,
    }
    for key, value in wanted.items():
        found = manifest.get(key) if isinstance(manifest, dict) else None
        if found != value:
            raise ConfigError(
                f"{point.directory}: holds a finished run of another {key.replace('_', ' ')}; --resume goes on with equal"
                " runs only (allowed: --overwrite, or another --output)"
            )
    return True


def remove_abandoned(target: Path) -> None:
    """Remove what killed runs left beside `target`, if their processes are gone."""
    if not target.parent.is_dir():
        return
    for kind in ("partial", "replaced"):
        prefix = f".{target.name}.{kind}-"
        for path in target.parent.iterdir():
            if path.name.startswith(prefix):
                pid = path.name.removeprefix(prefix)
                if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
                    shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _summarise(path: Path) -> dict[str, Any]:
    from ..reports.summary import summarise

    try:
        return dict(summarise(path))
    except Exception as error:  # the run took hours; a metric that fails must not cost it
        return {"error": f"{type(error).__name__}: {error}"}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace the text of `path` in one step: readers see the old text or the new."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically_into(path, write)


def write_atomically_into(path: Path, write: Callable[[Path], object]) -> None:
    """The same of whatever `write` makes of the path that it is given."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    write(temporary)
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
