"""`python -m disagg.experiments.compiled_training`: what a copy is compiled for, a second time, by what has run.

The scenarios that come with the package, but for those that need a trace, and its two templates of clusters are simulated once:
executors apart and mixed, prefixes, sessions, loads light and heavy. What matters is how often code runs beside other
code, so a few seconds of it are enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from .config import Experiment
from .experiment_file import load_experiment
from .load_source import LoadSource
from .run_point import NoProgress
from .run_simulation import build_cluster
from .simulated_load import SimulatedLoad
from .workload import Workload

_HERE: Final = Path(__file__).resolve().parent
TEMPLATES: Final = ("aggregated.yaml", "disaggregated.yaml")


def training_files() -> list[Path]:
    """The experiment files that are simulated."""
    scenarios = [
        path for path in sorted((_HERE / "scenarios").glob("*.yaml")) if "DISAGG_TRACES" not in path.read_text()
    ]
    return [*scenarios, *(_HERE / "templates" / name for name in TEMPLATES)]


def simulate(config: Experiment) -> int:
    """Run it to its end on virtual time, rows kept in memory; how many rows there were."""
    rows: list[Any] = []
    load = SimulatedLoad(LoadSource(Workload(config)), config, NoProgress())
    cluster = build_cluster(config, records=rows.append, delivered=load.delivered)
    load.start(cluster)
    cluster.run()
    return len(rows)


def main() -> None:
    for path in training_files():
        for point in load_experiment(path).points[:1]:
            simulate(point.experiment)


if __name__ == "__main__":
    main()
