"""Predictions with intervals: every point of an experiment once without noise, and many times with other noise.

All simulations of a point have the same requests, arrivals and policies' chance; they stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.model_shapes import ModelError
from ..policies.interfaces import PolicyError
from ..reports.prediction_intervals import METRICS, Prediction, predicted
from .config import Experiment
from .errors import ConfigError, ExperimentError
from .noise import Noise
from .progress_bar import progress_bar
from .run_point import RunPoint
from .run_simulation import noise_seed, outside_text
from .simulated_rows import simulate_rows, summary_of_rows
from .streams import repeat_seed
from .sweep import workers_for
from .sweep_task import experiment_from, plain_of
from .sweep_workers import completed, open_pool


def quiet(config: Experiment) -> Experiment:
    """The experiment without noise."""
    return _with(config, step_jitter=0.0, step_error=0.0)


def drawn(config: Experiment, noise: Noise, number: int) -> Experiment:
    """The experiment with the noise of draw `number` (from 0) in place of its own."""
    seed = repeat_seed(noise_seed(config), number)
    return _with(config, step_jitter=noise.jitter, step_error=noise.error, noise_seed=seed)


def _with(config: Experiment, **keys: Any) -> Experiment:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=keys)})


def title_of(point: RunPoint, points: Sequence[RunPoint]) -> str:
    """As the fidelity page names it: the experiment, its sweep's point, and the seed where there are repeats."""
    title = f"{point.experiment.name} {point.name}".strip()
    return f"{title} seed {point.seed}" if any(each.repeat for each in points) else title


def predict_points(
    points: Sequence[RunPoint], noise: Noise, workers: int | None = None, warn: Callable[[str], None] = lambda _: None
) -> dict[str, Prediction]:
    """The prediction of each run of an experiment by title. Raises ExperimentError, naming the run that fails.

    `warn` is told of each run whose steps lie outside what its profile was measured for.
    """
    each = 1 + noise.draws
    configs = [
        config
        for point in points
        for config in (
            quiet(point.experiment),
            *(drawn(point.experiment, noise, number) for number in range(noise.draws)),
        )
    ]
    owners = [point for point in points for _ in range(each)]
    summaries: dict[int, dict[str, float | None]] = {}
    outside: dict[int, tuple[int, int]] = {}
    with open_pool("processes", workers_for(owners, workers)) as pool:
        if pool is None:
            return {}
        with progress_bar(f"{len(configs)} simulations, {pool.num_workers} workers") as progress:
            progress.update(0, len(configs))
            for number, answer in completed(pool, summary_task, [json.dumps(plain_of(config)) for config in configs]):
                if isinstance(answer, Exception):
                    raise _told(answer, owners[number]) from answer
                summaries[number], outside[number] = json.loads(answer)
                progress.update(len(summaries), len(configs))
    found: dict[str, Prediction] = {}
    for start, point in zip(range(0, len(configs), each), points, strict=True):
        title, draws = title_of(point, points), range(start + 1, start + each)
        found[title] = predicted(summaries[start], [summaries[number] for number in draws])
        if outside[start][0]:
            warn(f"{title}: {outside_text(*outside[start])}")
        elif (most := max(outside[number] for number in draws))[0]:  # noise alone led there
            warn(f"{title}: {outside_text(*most)} in a draw")
    return found


def predictions_data(
    files: Sequence[Path], profiles: set[str], noise: Noise | None, predictions: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """A file of predictions, as `reports.prediction_intervals` has it. `predictions`: plain, by title; without intervals
    where `noise` is None.
    """
    drawn = {} if noise is None else {"draws": noise.draws, "jitter": noise.jitter, "error": noise.error}
    return {
        "profiles": sorted(profiles),
        "files": [str(file) for file in files],
        **drawn,
        "predictions": dict(predictions),
    }


def summary_task(text: str) -> str:
    """A worker's deed: one simulation; its metrics, and its batches outside what was measured, as JSON."""
    config = experiment_from(json.loads(text))
    rows = simulate_rows(config)
    summary = summary_of_rows(config, rows)
    return json.dumps(({key: summary[key] for key in METRICS}, rows.batches_outside))


def _told(error: Exception, point: RunPoint) -> ExperimentError:
    if isinstance(error, ExperimentError):
        return type(error)(*(f"{point.title}: {problem}" for problem in error.problems))
    kind = ConfigError if isinstance(error, ModelError | PolicyError) else ExperimentError
    return kind(f"{point.title}: {str(error) or type(error).__name__}")
