"""Simulate experiment files and write down what they predict, to be committed before the hardware runs.

    python benchmarks/h200/predict.py --runs RUNS --output docs/benchmarks/fidelity/predictions.json FILE…

Each simulation goes to RUNS/<experiment's name>/simulated, which is what `disagg fidelity RUNS` reads; `--intervals` reads
the file, in which each prediction has the interval of as many simulations with noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from disagg.experiments.cli_run import run_file
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.noise import Noise
from disagg.experiments.prediction_intervals import predict_points, predictions_data
from disagg.experiments.run_point import run_points

# What is to be told from chance is fixed before hardware runs, so these do not follow the command's defaults.
DRAWS = 40  # two lie beyond each bound
JITTER = 0.011  # of each epoch: steps with chunks of one file run twice; steps of decodes alone differ by 0.003
ERROR = 0.01  # of each executor and kind of step, all run long: what the cost model itself is off
NOISE = Noise(DRAWS, JITTER, ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    predictions: dict[str, Any] = {}
    profiles: set[str] = set()
    for file in asked.files:
        loaded = load_experiment(file, (), backend="simulation")
        target = asked.runs / loaded.experiment.name / "simulated"
        code = run_file(file, backend="simulation", output=target, overwrite=True)
        if code:
            return code
        points = run_points(loaded, target)
        drawn = predict_points(points, NOISE)
        predictions |= {title: prediction.plain() for title, prediction in drawn.items()}
        profiles |= {point.experiment.cluster.profile for point in points}
    data = predictions_data(asked.files, profiles, NOISE, predictions)
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
