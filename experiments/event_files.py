"""The event files of a run directory: one log per core, and the step times of a hardware run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ..core.commands import ORCHESTRATOR
from .errors import ConfigError

STEP_ENDS: Final = "events.step-ends.bin"
_ORCHESTRATOR_LOG: Final = "orchestrator.msgpack"
_EXECUTOR_LOG: Final = "executor-"

_step_ends = msgspec.msgpack.Decoder(list[tuple[int, int, list[int]]])


def log_name(core: int) -> str:
    """The event log of one core is `events.<this>`."""
    return _ORCHESTRATOR_LOG if core == ORCHESTRATOR else f"{_EXECUTOR_LOG}{core}.msgpack"


def read_logs(run_dir: Path) -> dict[int, bytes]:
    """The event log of each core, by rank. ConfigError if there are none."""
    logs: dict[int, bytes] = {}
    for path in sorted(run_dir.glob("events.*.msgpack")):
        name = path.name.removeprefix("events.")
        if name == _ORCHESTRATOR_LOG:
            logs[ORCHESTRATOR] = path.read_bytes()
        elif name.startswith(_EXECUTOR_LOG):
            logs[int(name.removeprefix(_EXECUTOR_LOG).removesuffix(".msgpack"))] = path.read_bytes()
    if ORCHESTRATOR not in logs:
        raise ConfigError(f"{run_dir}: holds no event logs (events.*.msgpack)")
    return logs


def encode_step_ends(step_ends: Mapping[tuple[int, int], Sequence[int]]) -> bytes:
    """For each (executor, epoch) the instants, in picoseconds, at which its steps were reported."""
    return msgspec.msgpack.encode([(executor, epoch, list(ends)) for (executor, epoch), ends in step_ends.items()])


def read_step_ends(run_dir: Path) -> dict[tuple[int, int], list[int]]:
    try:
        rows = _step_ends.decode((run_dir / STEP_ENDS).read_bytes())
    except msgspec.DecodeError as error:
        raise ConfigError(f"{run_dir / STEP_ENDS}: {error}") from None
    return {(executor, epoch): ends for executor, epoch, ends in rows}


def launch_of(run_dir: Path) -> dict[int, tuple[int, int, bool]]:
    """(steps_per_grant, pipeline_depth, plan_ahead) of each executor, from the manifest."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    return {
        int(executor["id"]): (
            int(executor["steps_per_grant"]),
            int(executor["pipeline_depth"]),
            bool(executor.get("plan_ahead", False)),
        )
        for executor in manifest["executors"]
    }
