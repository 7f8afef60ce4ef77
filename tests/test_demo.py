"""What the demo and the README promise of a simulated run, shown on the demo's own files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DISAGG = Path(sys.executable).with_name("disagg")
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mpi4py", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make demo` without its MPI runs, on fewer requests."""
    folder = tmp_path_factory.mktemp("demo")
    few = ("--set", "repeats=3", "--set", "workload.phases.profiling.requests=800")
    run(DISAGG, "run", ROOT / "experiments" / "demo.yaml", "--output", folder / "demo", *few, cwd=folder)
    return folder


def mean_ttft(folder: Path, policy: str) -> list[float]:
    runs = sorted((folder / "demo" / f"router={policy}").iterdir())
    return [json.loads((path / "summary.json").read_text())["mean_ttft_s"] for path in runs]


def test_the_demo_s_policies_differ_as_theory_says(demo: Path) -> None:
    tokens, requests = mean_ttft(demo, "least_tokens"), mean_ttft(demo, "least_requests")
    blind = mean_ttft(demo, "round_robin"), mean_ttft(demo, "random")
    assert len(tokens) == 3
    for repeat in range(3):  # common random numbers: compared repeat by repeat
        assert tokens[repeat] < requests[repeat] < min(times[repeat] for times in blind)
        assert tokens[repeat] < 0.75 * min(times[repeat] for times in blind)


def test_each_run_directory_of_the_demo_holds_a_whole_summary(demo: Path) -> None:
    summaries = [json.loads(path.read_text()) for path in demo.glob("demo/*/*/summary.json")]
    assert len(summaries) == 12
    assert all(summary["num_completed"] == 800 and "error" not in summary for summary in summaries)


def test_simulation_and_report_need_neither_torch_nor_mpi(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def blocked(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "disagg.experiments.cli", *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    probe = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in probe.stderr
    simulated = blocked("run", ROOT / "experiments" / "demo_cpu.yaml", "--output", "runs")
    assert simulated.returncode == 0, simulated.stderr
    reported = blocked("report", "runs", "--output", "report.html")
    assert reported.returncode == 0, reported.stderr
    refused = blocked("run", ROOT / "experiments" / "demo_cpu.yaml", "--output", "real", "--backend", "hardware")
    assert refused.returncode == 2
    assert "pip install" in refused.stderr


@pytest.mark.traces
@pytest.mark.skipif("DISAGG_TRACES" not in os.environ, reason="DISAGG_TRACES names no folder of public traces")
def test_the_azure_2023_conversation_trace_runs_whole(tmp_path: Path) -> None:
    run(DISAGG, "init", "--template", "trace", "--output", "azure.yaml", cwd=tmp_path)
    run(DISAGG, "run", "azure.yaml", "--output", "run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_requests"] + summary["num_excluded"] == 19_366
    assert summary["num_failed"] == 0
