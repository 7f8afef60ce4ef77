"""`disagg interval`: what an experiment file predicts, each figure with the interval that it scatters in."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..reports.error_text import percent, prediction_table
from .cli_run import check_workers
from .config_loader import Document
from .errors import ConfigError
from .experiment_file import LoadedExperiment, load_experiment
from .noise import Noise
from .prediction_intervals import predict_points, predictions_data
from .run_directory import write_atomically
from .run_point import run_points


def interval_file(
    file: Path,
    noise: Noise,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    as_json: bool = False,
    output: Path | None = None,
) -> None:
    """Print the prediction of each run of `file` with its intervals, and write them to `output` (.json).

    Raises ExperimentError, before the first simulation for whatever is wrong with the file or the options.
    """
    check_workers(workers, "processes")
    if output is not None:
        if output.suffix != ".json":
            raise ConfigError(f"--output {output}: must end in .json")
        if output.is_dir() or not output.parent.is_dir():
            raise ConfigError(f"--output {output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}")
    loaded = _load(file, overrides)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    points = run_points(loaded, Path())
    found = predict_points(points, noise, workers, lambda told: print(f"warning: {told}", file=sys.stderr))
    profiles = {point.experiment.cluster.profile for point in points}
    plain = {title: prediction.plain() for title, prediction in found.items()}
    text = json.dumps(predictions_data([file], profiles, noise, plain), indent=1)
    if output is not None:
        write_atomically(output, text + "\n")
    if as_json:
        print(text)
        return
    shares = [percent(share, signed=False) for share in (noise.jitter, noise.error)]
    print(f"{noise.draws} draws with a step jitter of {shares[0]} and a step error of {shares[1]}.")
    for title, prediction in found.items():
        print(f"\n{title}\n\n{prediction_table(prediction)}")
    if output is not None:
        print(f"\nwrote {output}")


def _load(file: Path, overrides: Sequence[str]) -> LoadedExperiment:
    """Simulated, whatever the file's backend. Raises ConfigError for hardware that no profile was measured on."""
    is_for_hardware = False

    def simulated(document: Document) -> None:
        nonlocal is_for_hardware
        is_for_hardware = document.data.get("backend") == "hardware"
        document.set("backend", "simulation", "disagg interval")

    loaded = load_experiment(file, overrides, edit=simulated)
    if is_for_hardware and any(point.experiment.cluster.profile.startswith("spec:") for point in loaded.points):
        raise ConfigError(
            f"{file}: is for hardware and names no measured profile: a specification's error is not that of a fit;"
            " allowed: --set cluster.profile=NAME (`disagg list profiles`), or backend: simulation"
        )
    return loaded
