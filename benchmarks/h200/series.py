"""Run many experiment files on hardware one after another, on a warm cluster where neighbours share one.

    python benchmarks/h200/series.py --runs RUNS --label hardware-1 --label hardware-2 benchmarks/h200/heldout/1p1_*.yaml

Each run goes to RUNS/<experiment's name>/<label>, once for each label, which is what `disagg fidelity RUNS` reads; what
is there already is skipped. Runs on equal clusters are put next to each other. After `--until` seconds no further
cluster is started.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from disagg.experiments.errors import ExperimentError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_hardware import run_hardware
from disagg.experiments.run_point import NoProgress, RunPoint, run_points
from disagg.experiments.run_warm import by_cluster, run_warm, warm_groups
from disagg.experiments.sweep import Tally
from disagg.experiments.sweep_task import try_one


def points_of(files: list[Path], overrides: list[str], runs: Path, labels: list[str]) -> list[RunPoint]:
    """All runs of all files, once for each label. Raises ExperimentError for a file that is wrong."""
    points: list[RunPoint] = []
    for label in labels:
        for file in files:
            loaded = load_experiment(file, overrides, backend="hardware")
            points += run_points(loaded, runs / loaded.experiment.name / label)
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--label", action="append", dest="labels")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=V")
    parser.add_argument("--until", type=float, default=float("inf"), metavar="SECONDS")
    asked = parser.parse_args()
    try:
        points = points_of(asked.files, asked.overrides, asked.runs, asked.labels or ["hardware-1"])
    except ExperimentError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    began = time.monotonic()
    todo = [point for point in by_cluster(points) if not (point.directory / "manifest.json").exists()]
    tally = Tally(len(points), len(todo))
    for group in warm_groups(todo):
        if time.monotonic() - began > asked.until:
            print(f"left out for want of time: {', '.join(point.title for point in group)}")
            continue
        print(f"{time.monotonic() - began:6.1f} s: a cluster for {len(group)} runs", flush=True)
        if len(group) == 1:
            tally.tell(group[0], try_one(run_hardware, group[0], NoProgress()))
        elif not run_warm(group, tally.tell, NoProgress()):
            return 130
    print(f"{time.monotonic() - began:6.1f} s in all")
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
