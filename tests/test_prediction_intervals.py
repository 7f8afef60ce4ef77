"""Predictions with an interval: noise that leaves the load alone, draws that can be made again, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from disagg.experiments.config import Experiment
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.noise import Noise
from disagg.experiments.prediction_intervals import drawn, predict_points, quiet
from disagg.experiments.profile_file import save_profile
from disagg.experiments.run_point import run_points
from disagg.experiments.simulated_rows import SimulatedRows, simulate_rows, simulate_summary
from disagg.reports.prediction_intervals import METRICS, predicted, read_predictions
from disagg.reports.run_errors import differing_keys
from disagg.reports.runs import Run
from tests.profile_examples import a_profile
from tests.test_simulator_overheads import EXPERIMENT

TEXT = """\
schema_version: 1
name: drawn
seed: 7
model: {id: tiny-llama}
cluster:
  profile: spec:cpu-2core
  mixed_servers: {num_instances: 2, kv_cache: {max_tokens: 4096}}
policy: {router: least_tokens}
workload:
  dataset: {type: synthetic, isl: {type: lognormal, mean: 200, stddev: 300, max: 2000}, osl: 8}
  max_tokens: 8
  phases:
    - {name: warmup, type: poisson, rate: 300, requests: 3, exclude_from_results: true}
    - {name: profiling, type: poisson, rate: 300, requests: 20}
slo: {ttft_ms: 50, tpot_ms: 9}
"""
GIVEN = ["request_id", "phase", "num_prompt_tokens", "max_tokens", "num_output_tokens", "arrival_s"]
FEW = Noise(draws=6)


def written(folder: Path, more: str = "") -> Path:
    file = folder / "drawn.yaml"
    file.write_text(TEXT + more)
    return file


def config_of(folder: Path, *sets: str) -> Experiment:
    return load_experiment(written(folder), [f"cluster.{each}" for each in sets]).experiment


def requests(config: Experiment) -> pd.DataFrame:
    return simulate_rows(config).requests.sort_values("request_id", ignore_index=True)


# ---- the noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["step_jitter", "step_error"])
def test_another_noise_seed_changes_times_and_no_request(tmp_path: Path, key: str) -> None:
    one, other = (requests(config_of(tmp_path, f"{key}=0.1", f"noise_seed={seed}")) for seed in (1, 2))
    pd.testing.assert_frame_equal(one[GIVEN], other[GIVEN])
    assert not one["end_s"].equals(other["end_s"])
    again = requests(config_of(tmp_path, f"{key}=0.1", "noise_seed=1"))
    pd.testing.assert_frame_equal(one, again)


def test_without_a_seed_of_its_own_noise_has_the_experiment_s(tmp_path: Path) -> None:
    noise = "step_jitter=0.1", "step_error=0.1"
    found = requests(config_of(tmp_path, *noise))
    pd.testing.assert_frame_equal(found, requests(config_of(tmp_path, *noise, "noise_seed=7")))
    assert not found.equals(requests(config_of(tmp_path, *noise, "noise_seed=8")))


def test_a_seed_of_no_noise_changes_nothing(tmp_path: Path) -> None:
    assert requests(config_of(tmp_path, "noise_seed=3")).equals(requests(config_of(tmp_path)))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("step_error=-0.1", "cluster.step_error: must be at least 0"),
        ("step_error=0.6", "cluster.step_error: must be at most 0.5"),
        ("noise_seed=-1", "cluster.noise_seed: must be at least 0"),
        ("noise_seed=1.5", "cluster.noise_seed: must be a whole number"),
    ],
)
def test_a_noise_that_cannot_be_is_refused_by_its_key(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    assert disagg("validate", written(tmp_path), "--set", f"cluster.{setting}") == 2
    assert told in capsys.readouterr().err


def test_runs_that_differ_in_noise_alone_are_runs_of_one_configuration(
    tmp_path: Path, disagg: Callable[..., int]
) -> None:
    noise = ("--set", "cluster.step_error=0.02", "--set", "cluster.noise_seed=4")
    assert disagg("run", written(tmp_path), "--output", tmp_path / "quiet") == 0
    assert disagg("run", written(tmp_path), "--output", tmp_path / "noisy", *noise) == 0
    assert differing_keys(Run(tmp_path / "quiet"), Run(tmp_path / "noisy")) == []


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_a_prediction_is_what_a_run_without_noise_summarises(tmp_path: Path, disagg: Callable[..., int]) -> None:
    assert disagg("run", written(tmp_path), "--output", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    noisy = load_experiment(written(tmp_path), ["cluster.step_jitter=0.2"])
    (found,) = predict_points(run_points(noisy, tmp_path), FEW).values()
    assert found.values == {key: summary[key] for key in METRICS}


def test_a_draw_can_be_made_again_by_the_keys_of_the_file(tmp_path: Path) -> None:
    keys = "step_jitter=0.011", "step_error=0.01", "noise_seed=9"
    assert drawn(config_of(tmp_path, "noise_seed=7"), FEW, 2) == config_of(tmp_path, *keys)
    assert drawn(config_of(tmp_path), FEW, 2) == config_of(tmp_path, *keys), "the experiment's seed is 7, too"
    assert quiet(config_of(tmp_path, "step_jitter=0.1", "step_error=0.1")) == config_of(tmp_path)


def test_intervals_are_those_of_the_draws_and_of_no_other_run(tmp_path: Path) -> None:
    sweep = "sweep: {policy.router: [round_robin, least_tokens]}\n"
    points = run_points(load_experiment(written(tmp_path, sweep)), tmp_path)
    found = predict_points(points, Noise(draws=2, jitter=0.1, error=0.1))
    for point, prediction in zip(points, found.values(), strict=True):
        draws = [simulate_summary(drawn(point.experiment, Noise(2, 0.1, 0.1), number)) for number in range(2)]
        assert prediction == predicted(simulate_summary(point.experiment), draws)


def test_the_bounds_of_every_figure_are_percentiles_of_its_draws_and_further_apart_by_more_noise(
    tmp_path: Path,
) -> None:
    (point,) = points = run_points(load_experiment(written(tmp_path)), tmp_path)
    (found,) = predict_points(points, FEW).values()
    draws = [simulate_summary(drawn(point.experiment, FEW, number)) for number in range(FEW.draws)]
    assert set(found.intervals) == set(METRICS)
    for key, each in found.intervals.items():
        low, median, high = np.percentile([draw[key] for draw in draws], [5, 50, 95])
        assert (each.low, each.median, each.high) == (low, median, high), key
    assert found.intervals["mean_ttft_s"].low < found.intervals["mean_ttft_s"].high
    (wider,) = predict_points(points, Noise(draws=6, jitter=0.1, error=0.1)).values()
    for key in ("mean_ttft_s", "mean_tpot_s", "p50_e2e_latency_s"):
        narrow, wide = found.intervals[key], wider.intervals[key]
        assert wide.high - wide.low > narrow.high - narrow.low


def test_bounds_are_percentiles_of_the_draws_and_what_a_draw_lacks_has_none() -> None:
    draws: list[dict[str, Any]] = [{"mean_ttft_s": float(i), "throughput": None if i == 3 else 1.0} for i in range(41)]
    found = predicted({"mean_ttft_s": 50.0}, draws)
    assert found.intervals.keys() == {"mean_ttft_s"}
    interval = found.intervals["mean_ttft_s"]
    assert (interval.low, interval.median, interval.high) == (2.0, 20.0, 38.0)
    assert [interval.holds(value) for value in (1.9, 2.0, 38.0, 38.1)] == [False, True, True, False]
    assert found.values["mean_ttft_s"] == 50.0, "which may lie outside"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_tells_each_run_by_the_name_that_the_fidelity_page_has_for_it_and_leaves_no_run(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, "sweep: {policy.router: [round_robin, least_tokens]}\nrepeats: 2\n")
    assert disagg("interval", file, "--draws", "3", "--json", "--output", tmp_path / "found.json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "found.json").read_text())
    assert (told["draws"], told["jitter"], told["error"]) == (3, 0.011, 0.01)
    assert list(told["predictions"]) == [
        f"drawn router={router} seed {seed}" for router in ("round_robin", "least_tokens") for seed in (7, 8)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"drawn.yaml", "found.json"}
    assert {title: each.plain() for title, each in read_predictions(tmp_path / "found.json").items()} == told[
        "predictions"
    ]


def test_the_answer_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for workers in ("1", "2"):
        assert disagg("interval", written(tmp_path), "--draws", "3", "--json", "--workers", workers) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_the_command_prints_a_line_per_metric(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("interval", written(tmp_path), "--draws", "3", "--set", "slo=null") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 draws with a step jitter of 1.10 % and a step error of 1.00 %."
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[3:-1]] for line in lines if "|" in line}
    assert cells["metric"] == ["predicted", "median", "5 %", "95 %"]
    assert cells["completed"] == ["20.0"] * 4
    assert cells["SLO attainment"] == ["–"] * 4, "there are no objectives"
    _, median, low, high = map(float, cells["mean TTFT"])
    assert low < median < high


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_warns_of_steps_outside_what_was_measured_as_a_run_does(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    save_profile(a_profile(), tmp_path / "measured.json")
    file = tmp_path / "outside.yaml"
    options = ("--draws", "2", *(("--json",) if as_json else ()))
    file.write_text(EXPERIMENT.replace("requests: 20", "requests: 5"))
    assert disagg("interval", file, *options) == 0
    assert capsys.readouterr().err == ""
    file.write_text(EXPERIMENT.replace("isl: 100", "isl: 600").replace("requests: 20", "requests: 5"))
    assert disagg("run", file, "--output", tmp_path / "run") == 0
    (told,) = re.findall(r"warning: (\d+ of \d+ batches lie outside .*)", capsys.readouterr().out)
    assert disagg("interval", file, *options) == 0
    printed = capsys.readouterr()
    name = load_experiment(file).experiment.name
    assert printed.err == f"warning: {name}: {told}\n"
    assert not as_json or json.loads(printed.out)["predictions"].keys() == {name}


def test_a_draw_that_alone_leaves_what_was_measured_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise moves arrivals between steps, and so makes batches that there are none of without it."""
    answers = iter([(0, 9), (2, 8), (1, 7)])

    def simulated(config: Experiment) -> SimulatedRows:
        return replace(simulate_rows(config), batches_outside=next(answers))

    monkeypatch.setattr("disagg.experiments.prediction_intervals.simulate_rows", simulated)
    told: list[str] = []
    points = run_points(load_experiment(written(tmp_path)), tmp_path)
    predict_points(points, Noise(draws=2), 1, told.append)
    assert told == ["drawn: 2 of 8 batches lie outside the measured range of the profile in a draw"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--draws", "1"), "--draws 1: must be 2 to 10000"),
        (("--draws", "10001"), "--draws 10001: must be 2 to 10000"),
        (("--jitter", "-0.1"), "--jitter -0.1: must be a share of 0 to 0.5"),
        (("--error", "nan"), "--error nan: must be a share of 0 to 0.5"),
        (("--error", "0.6"), "--error 0.6: must be a share of 0 to 0.5"),
        (("--jitter", "0", "--error", "0"), "every draw would be the same"),
        (("--output", "found.txt"), "--output found.txt: must end in .json"),
        (("--output", "nowhere/found.json"), "--output nowhere/found.json: its folder does not exist"),
        (("--workers", "0"), "--workers 0: must be 1 to 1024"),
        (("--set", "backend=hardware"), "is for hardware and names no measured profile"),
        (("--set", "policy.router=least_tokenz"), "did you mean 'least_tokens'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    assert disagg("interval", written(tmp_path), *options) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_policy_that_fails_is_told_with_the_run_that_it_failed_in(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(
        "from disagg.policies.routing import RoundRobin\n\n\nclass Bad(RoundRobin):\n"
        "    def route_context(self, request, fleet):\n        raise ZeroDivisionError('none left')\n"
    )
    assert disagg("interval", written(tmp_path), "--draws", "2", "--set", "policy.router=bad.py:Bad") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: drawn repeat 0: ")
    assert "none left" in error
    assert error.count("\n") == 1
