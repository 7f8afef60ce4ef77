"""Simulate experiment files and write down what they predict, to be committed before the hardware runs.

    python benchmarks/h200/predict.py --runs RUNS --output docs/benchmarks/fidelity/predictions.json FILE…

Each simulation goes to RUNS/<experiment's name>/simulated, which is what `disagg fidelity RUNS` reads; `--intervals` reads
the file, in which each prediction has the interval of as many simulations with noise. They take most of the time: with
`--no-intervals` the file is there in a minute, while a machine waits, and the intervals can follow; the rest stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from disagg.experiments.cli_run import run_file
from disagg.experiments.errors import ConfigError, ExperimentError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.noise import Noise
from disagg.experiments.prediction_intervals import predict_points, predictions_data, title_of
from disagg.experiments.run_point import RunPoint, run_points
from disagg.reports.prediction_intervals import predicted

# What is to be told from chance is fixed before hardware runs, so these do not follow the command's defaults.
DRAWS = 40  # two lie beyond each bound
JITTER = 0.011  # of each epoch: steps with chunks of one file run twice; steps of decodes alone differ by 0.003
ERROR = 0.01  # of each executor and kind of step, all run long: what the cost model itself is off
NOISE = Noise(DRAWS, JITTER, ERROR)


def points_of(file: Path, runs: Path) -> list[RunPoint]:
    """The simulated runs of an experiment file."""
    loaded = load_experiment(file, (), backend="simulation")
    return run_points(loaded, runs / loaded.experiment.name / "simulated")


def simulate(runs: Path, file: Path) -> int:
    """Simulate an experiment file; the exit code."""
    loaded = load_experiment(file, (), backend="simulation")
    return run_file(file, backend="simulation", output=runs / loaded.experiment.name / "simulated", overwrite=True)


def without_intervals(points: list[RunPoint]) -> dict[str, Any]:
    """The metrics of simulated runs by title."""
    summaries = {title_of(point, points): (point.directory / "summary.json").read_text() for point in points}
    return {title: dict(predicted(json.loads(text), ()).values) for title, text in summaries.items()}


def check(files: list[Path], runs: Path, output: Path) -> None:
    """Raises ExperimentError for what would else be found out in the midst of simulations, or behind them."""
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}")
    for file in files:
        points_of(file, runs)


def predict(files: list[Path], runs: Path, output: Path, *, with_intervals: bool) -> int:
    """Simulate and write `output`; the exit code. Raises ExperimentError, for files that are wrong before anything is run."""
    check(files, runs, output)
    with ProcessPoolExecutor() as pool:
        for code in pool.map(partial(simulate, runs), files):
            if code:
                return code
    predictions: dict[str, Any] = {}
    profiles: set[str] = set()
    for file in files:
        points = points_of(file, runs)
        if with_intervals:
            predictions |= {title: each.plain() for title, each in predict_points(points, NOISE).items()}
        else:
            predictions |= without_intervals(points)
        profiles |= {point.experiment.cluster.profile for point in points}
    data = predictions_data(files, profiles, NOISE if with_intervals else None, predictions)
    output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-intervals", action="store_true")
    asked = parser.parse_args()
    try:
        return predict(asked.files, asked.runs, asked.output, with_intervals=not asked.no_intervals)
    except ExperimentError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
