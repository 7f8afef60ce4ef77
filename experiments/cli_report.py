"""Commands about finished runs: report, replay."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .errors import ConfigError, ExperimentError


def report_runs(runs: list[Path], output: Path) -> None:
    """Write the comparing page of `runs` to `output`. Raises ConfigError for folders that hold no run."""
    from ..reports.page import write_report
    from ..reports.runs import ReportError

    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run}: there is no such folder of runs")
    try:
        write_report(runs, output)
    except ReportError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {output}")


def replay_run(run_dir: Path, *, as_json: bool) -> None:
    """Replay every `events.*` of `run_dir`. Raises ConfigError for none, ExperimentError (1) for a difference."""
    from ..core.event_log import EventLogError, ReplayDifference, replay

    logs = sorted(path for path in run_dir.glob("events.*") if path.is_file())
    if not logs:
        raise ConfigError(f"{run_dir}: holds no event log (events.*)")
    results: dict[str, dict[str, object]] = {}
    for log in logs:
        try:
            results[log.name] = {"frames": replay(log.read_bytes()), "equal": True}
        except ReplayDifference as difference:
            results[log.name] = {"equal": False, "difference": str(difference)}
        except EventLogError as error:
            results[log.name] = {"equal": False, "difference": f"unreadable: {error}"}
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        for name, result in results.items():
            told = f"{result['frames']} events, equal" if result["equal"] else f"DIFFERS: {result['difference']}"
            print(f"{name}: {told}")
    sys.stdout.flush()
    different = [name for name, result in results.items() if not result["equal"]]
    if different:
        raise ExperimentError(f"replay differs in {', '.join(different)}")
