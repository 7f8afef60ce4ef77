"""`make demo`: four policies on a simulated H200 cluster, two on this machine in both worlds, and one report of all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import EXIT_OK, ExperimentError

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m disagg.experiments.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the runs and of report.html")
    parser.add_argument("--skip-hardware", action="store_true", help="leave the MPI runs out")
    options = parser.parse_args(arguments)
    runs = [("demo.yaml", "simulation", "demo"), ("demo_cpu.yaml", "simulation", "cpu-simulation")]
    if not options.skip_hardware:
        runs.append(("demo_cpu.yaml", "hardware", "cpu-hardware"))
    try:
        return _run(runs, options.output)
    except ExperimentError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code


def _run(runs: list[tuple[str, str, str]], output: Path) -> int:
    from .cli_report import report_runs
    from .cli_run import run_file

    for file, backend, folder in runs:
        print(f"{file} ({backend})")
        target = output / folder
        code = run_file(HERE / file, backend=backend, output=target, overwrite=target.exists())
        if code != EXIT_OK:
            return code
    report_runs([output / folder for _, _, folder in runs], output / "report.html")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
