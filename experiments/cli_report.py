"""Commands about finished runs: report, replay, conform."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .errors import ConfigError, ExperimentError
from .run_directory import check_folder


def report_runs(runs: list[Path], output: Path) -> None:
    """Write the comparing page of `runs` to `output`. Raises ConfigError for folders that hold no run."""
    from ..reports.page import write_report
    from ..reports.runs import ReportError

    for run in runs:
        check_folder(run)
    try:
        write_report(runs, output)
    except ReportError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {output}")


def replay_run(run_dir: Path, *, as_json: bool) -> None:
    """Replay every `events.*` of `run_dir`. Raises ConfigError for none, ExperimentError (1) for a difference."""
    from ..core.event_log import EventLogError, ReplayDifference, replay

    check_folder(run_dir)
    logs = sorted(path for path in run_dir.glob("events.*.msgpack") if path.is_file())
    if not logs:
        raise ConfigError(f"{run_dir}: holds no event log (events.*.msgpack)")
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


def conform_run(run_dir: Path, *, as_json: bool) -> None:
    """Simulate the hardware run in `run_dir` on its own times.

    Raises ConfigError where logs or step times are missing, ExperimentError (1) with the first difference.
    """
    from ..core.event_log import EventLogError
    from ..simulator.recorded import ConformanceDifference, Recording, conform
    from .event_files import STEP_ENDS, launch_of, read_logs, read_step_ends

    check_folder(run_dir)
    logs = read_logs(run_dir)
    if not (run_dir / STEP_ENDS).is_file():
        raise ConfigError(f"{run_dir}: holds no {STEP_ENDS}: only hardware runs can be conformed to")
    try:
        compared = conform(Recording(logs, read_step_ends(run_dir)), launch_of(run_dir))
    except EventLogError as error:
        raise ConfigError(f"{run_dir}: {error}") from error
    except ConformanceDifference as difference:
        if as_json:
            print(json.dumps({"equal": False, "difference": str(difference)}, indent=2))
        raise ExperimentError(f"the simulator left the hardware's path: {difference}") from difference
    if as_json:
        print(json.dumps({"equal": True, "instants": compared}, indent=2))
    else:
        print(f"{compared} instants, equal routes and batches")
