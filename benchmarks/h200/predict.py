"""Simulate experiment files and write down what they predict, to be committed before the hardware runs.

    python benchmarks/h200/predict.py --runs RUNS --output docs/benchmarks/fidelity/predictions.json FILE…

Each simulation goes to RUNS/<experiment's name>/simulated, which is what `disagg fidelity RUNS` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from disagg.experiments.cli_run import run_file
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_point import run_points

METRICS = (
    *("throughput", "mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "mean_tpot_s", "p50_tpot_s", "p99_tpot_s"),
    *("p50_e2e_latency_s", "p90_e2e_latency_s", "slo_attainment", "num_completed"),
)


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
        for point in run_points(loaded, target):
            summary = json.loads((point.directory / "summary.json").read_text(encoding="utf-8"))
            title = " ".join((point.experiment.name, point.name)).strip()
            predictions[title] = {name: summary[name] for name in METRICS}
            profiles.add(point.experiment.cluster.profile)
    data = {"profiles": sorted(profiles), "files": [str(file) for file in asked.files], "predictions": predictions}
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
