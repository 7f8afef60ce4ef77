"""The winner as an experiment file, which runs in the simulator and on hardware."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from .config_loader import dump_yaml
from .errors import ExperimentError
from .experiment_file import load_experiment
from .plan import Search
from .plan_ranking import Rank
from .plan_rates import at_rate, base_rate
from .run_directory import write_atomically

WINNER = "winner.yaml"


def winner_data(search: Search, winner: Rank) -> dict[str, Any]:
    """Plain values of the winner's file: the user's own, with its cluster, its routers, and the rate that every seed met.

    Arrivals last as long as in the search, so that a simulation of the file finds what the search found.
    """
    candidate = winner.entry.candidate
    config = at_rate(candidate.experiment, winner.least_rate, base_rate(search.base), horizon_s=search.horizon_s)
    data = deepcopy(candidate.data)
    data["name"] = f"{search.base.name}-planned"
    data["repeats"] = len(search.seeds)
    for keys, phase in zip(data["workload"]["phases"], config.workload.phases, strict=True):
        for name in ("rate", "requests", "speedup"):
            value = getattr(phase, name, None)
            if value is not None and (name in keys or name == "speedup"):
                keys[name] = value
    return data


def write_winner(search: Search, winner: Rank, folder: Path) -> tuple[Path, list[str]]:
    """Write it, read it back as a simulation and as a run on hardware. Returns the path and what hardware objects to."""
    path = folder / WINNER
    head = (
        f"# Found by disagg plan: {winner.entry.candidate.label}; {winner.entry.num_gpus} GPUs.\n"
        f"# Every one of {len(search.seeds)} seeds met the objectives at {winner.least_rate:g} requests/s.\n"
    )
    if winner.outside:
        head += f"# {100 * winner.outside:.2g} % of its batches lie outside the measured range of the profile: extrapolated.\n"
    data = winner_data(search, winner)
    dataset = data["workload"]["dataset"]
    if isinstance(dataset.get("path"), str):  # relative to the folder of the file that it was read from
        beside = search.base.root / dataset["path"]
        dataset["path"] = str(beside) if beside.exists() else dataset["path"]
    _move_references(data, search.base.root)
    write_atomically(path, head + dump_yaml(data))
    load_experiment(path)
    try:
        load_experiment(path, backend="hardware")
    except ExperimentError as error:
        return path, list(error.problems)
    return path, []


def _move_references(data: dict[str, Any], root: Path) -> None:
    """Files that the experiment names relative to its folder, as absolute paths: the winner lies in another one."""
    model = data["model"]
    for key in ("id", "weights"):
        name = model.get(key)
        if isinstance(name, str) and (root / name).exists():
            model[key] = str((root / name).resolve())
    profile = data.get("cluster", {}).get("profile")
    if isinstance(profile, str) and (root / profile).is_file():
        data["cluster"]["profile"] = str((root / profile).resolve())

    def move(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: move(value) for key, value in node.items()}
        if isinstance(node, list):
            return [move(value) for value in node]
        if isinstance(node, str) and ".py:" in node:
            file, _, name = node.rpartition(":")
            return f"{(root / file).resolve()}:{name}" if (root / file).is_file() else node
        return node

    for key in ("policy", "cluster"):
        data[key] = move(data[key])
