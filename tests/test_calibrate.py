"""The whole loop on real MPI processes: calibrate, simulate on the profile, run, and see how far apart they are.

Errors are printed, not asserted: they say how quiet this machine was. What is asserted is that the loop closes, that what
was measured is in the profile, and that the run on hardware can be replayed and conforms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("mpi4py")

from disagg.experiments import calibrate as calibrating
from disagg.experiments.calibration_samples import FIRST, FOLLOWING, Samples, read_samples
from disagg.experiments.errors import CalibrationFailedError, ConfigError
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.measured_profile import Profile
from disagg.experiments.profile_file import load_profile
from disagg.runtime.hardware_run import HardwareRunError

pytestmark = pytest.mark.mpi

EXPERIMENT = """
schema_version: 1
name: cpu-loop
seed: 3
model: {id: tiny-llama, dtype: float32, weights: random, seed: 0}
device: cpu
cluster:
  profile: "spec:cpu-2core"
  context_servers:
    scheduler: {max_batch_size: 4, max_num_tokens: 256}
    kv_cache: {tokens_per_block: 16, max_tokens: 4096}
  generation_servers:
    scheduler: {max_batch_size: 8}
    kv_cache: {tokens_per_block: 16, max_tokens: 8192}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {type: uniform, min: 20, max: 300}, osl: {type: uniform, min: 2, max: 12}}
  max_tokens: 16
  phases:
    - {name: warmup, type: poisson, rate: 15, requests: 4, exclude_from_results: true}
    - {name: profiling, type: poisson, rate: 15, requests: 30}
"""


class Loop:
    """A calibration that was cut short once, and went on."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "experiment.yaml"
        self.file.write_text(EXPERIMENT, encoding="utf-8")
        self.output = folder / "measured.json"
        config = load_experiment(self.file, backend="hardware").experiment
        self.told: list[str] = []

        def calibrated(**options: Any) -> Profile:
            return calibrating.calibrate(
                config,
                self.output,
                now=datetime(2026, 11, 22, tzinfo=UTC),
                quick=True,
                told=lambda done, total, name: self.told.append(name),
                **options,
            )

        whole = calibrating.run_series

        def cut_short(spec: Any, sessions: Any, results: Path, **options: Any) -> None:
            whole(spec, sessions[:2], results, **options)
            raise HardwareRunError("rank 1 went away")

        self.output.write_text("an older profile", encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibrating, "run_series", cut_short)
            with pytest.raises(CalibrationFailedError, match=r"went away; --resume goes on"):
                calibrated(overwrite=True)
        self.kept = self.output.read_text(encoding="utf-8")
        self.told_before = list(self.told)
        sessions = self.output.with_suffix(".sessions")
        self.before = {path.name: path.read_bytes() for path in sessions.glob("session-*")}
        with pytest.raises(ConfigError, match="exists; allowed: --overwrite"):
            calibrated()
        self.profile = calibrated(resume=True)
        self.sessions_left = sessions.exists()
        samples = read_samples(calibrating.samples_folder(self.output))
        assert samples is not None
        self.samples: Samples = samples


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop(tmp_path_factory.mktemp("calibrate"))


@pytest.mark.timeout(240)
def test_a_calibration_that_was_cut_short_goes_on_after_what_had_ended(loop: Loop) -> None:
    assert len(loop.before) == 2
    assert loop.told[: len(loop.told_before)] == loop.told_before
    assert loop.told[2:] == [name for name in loop.told if name not in loop.told_before]
    assert loop.profile.num_sessions == len(loop.told)
    assert not loop.sessions_left
    assert loop.kept == "an older profile"  # until there was a new one
    assert {step.session for step in loop.samples.steps} == set(range(loop.profile.num_sessions))


@pytest.mark.timeout(240)
def test_the_profile_holds_what_the_cluster_was_driven_through(loop: Loop) -> None:
    profile = load_profile(loop.output)
    assert profile == loop.profile
    assert profile.created.startswith("2026-11-22")
    context, generation = profile.engines
    assert (context.role, generation.role) == ("context", "generation")
    assert context.chunks is not None
    assert context.decode is None
    assert generation.decode is not None
    assert generation.measured.decodes >= 4  # many at once, though nothing computed their contexts
    assert context.measured.rows == 256
    assert context.measured.cached_tokens >= 256  # prompts longer than a step
    assert context.measured.chunks >= 2
    assert profile.links[0].transport == "mpi"
    assert (profile.links[0].sources, profile.links[0].readers) == ((1,), (2,))
    assert profile.links[0].residuals[0].num_samples >= 3
    assert min(profile.messages.into_executor, profile.messages.from_executor) > 0
    assert profile.messages.between_executors > 0
    batches = {step.num_decodes for step in loop.samples.steps if step.kind == FOLLOWING and not step.num_chunks}
    assert batches >= {1, 2, 4}
    shared = [step for step in loop.samples.steps if step.num_shared_kv and step.kind == FOLLOWING]
    assert max(step.num_decodes for step in shared) >= 2
    assert all(step.num_shared_kv < step.num_kv_tokens for step in shared)
    assert {step.before for step in loop.samples.steps if step.kind == FIRST} >= {"idle", "decode", "chunk"}
    assert all(step.duration_ps >= 0 for step in loop.samples.steps)  # 0: a host that was held up saw two end at once


@pytest.mark.timeout(240)
def test_simulation_on_the_profile_beside_the_run_that_it_predicts(
    loop: Loop, disagg: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("--set", f"cluster.profile={loop.output}")
    assert disagg("run", loop.file, *named, "--output", tmp_path / "simulated") == 0
    assert disagg("run", loop.file, *named, "--backend", "hardware", "--output", tmp_path / "measured") == 0
    assert disagg("replay", tmp_path / "measured") == 0
    assert disagg("conform", tmp_path / "measured") == 0
    simulated, measured = (json.loads((tmp_path / d / "summary.json").read_text()) for d in ("simulated", "measured"))
    capsys.readouterr()
    for metric in ("mean_ttft_s", "mean_tpot_s", "p50_e2e_latency_s", "mean_kv_transfer_time_s", "mean_decode_time_s"):
        with capsys.disabled():
            error = simulated[metric] / measured[metric] - 1
            print(
                f"\n{metric}: simulated {simulated[metric] * 1e3:.2f} ms, measured {measured[metric] * 1e3:.2f} ms",
                end="",
            )
            print(f", error {error:+.1%}", end="")
    assert simulated["num_completed"] == measured["num_completed"] == 30


@pytest.mark.timeout(240)
def test_a_profile_is_shown_with_its_residuals_plotted_and_compared_with_itself(
    loop: Loop, disagg: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disagg("profile", "show", loop.output, "--plots", tmp_path / "plots") == 0
    told = capsys.readouterr().out
    assert "cpu-loop: tiny-llama (float32) on" in told
    assert re.search(r"decode steps +\d+ +\d+ +\d+ +[\d.]+%", told)
    assert re.search(r"steps with chunks +\d+ +\d+", told)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"context-tp-1-pp-1.png", "generation-tp-1-pp-1.png", "transfers.png"}
    assert disagg("profile", "show", loop.output, "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "cpu-loop"
    assert disagg("profile", "diff", loop.output, loop.output, "--limit", "0.02") == 0
    assert "+0.0%" in capsys.readouterr().out


@pytest.mark.timeout(240)
def test_a_finished_profile_is_not_replaced_unless_asked(loop: Loop, disagg: Callable[..., int]) -> None:
    assert disagg("calibrate", loop.file, "--quick", "--output", loop.output) == 2
