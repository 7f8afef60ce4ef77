"""A sweep of 200 points killed (SIGKILL) at a random moment and resumed leaves what an undisturbed one leaves.

    python benchmarks/sweep_killed.py [--file benchmarks/sweep_200.yaml] [--kills 1] [--workers 2] [--seed N] [--json]

Runs the sweep whole, then again in another folder: killed once a random number of runs is there (`--kills` times), and taken up
by `--resume`. Compares every file byte for byte, but for the clock in manifest.json, and the table that is printed at
the end. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def command(file: Path, output: Path, workers: int, *more: str) -> list[str]:
    base = [sys.executable, "-m", "disagg.experiments.cli", "run", str(file), "--output", str(output)]
    return [*base, "--workers", str(workers), *more]


def finished(output: Path) -> int:
    return len(list(output.glob("*/*/manifest.json")))


def contents(folder: Path) -> dict[str, Any]:
    """Every file, by its name; of manifests all but when they were written."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data: Any = path.read_bytes()
            if path.name == "manifest.json":
                data = json.loads(data)
                del data["started_at"], data["wall_time_s"]
            found[str(path.relative_to(folder))] = data
    return found


def table(printed: str) -> list[str]:
    """The lines of the table at the end: all after the header, without the time that it took."""
    lines = [line.split() for line in printed.splitlines()]
    return [" ".join(words) for words in lines if words and "=" in words[0] and not words[0].startswith("[")]


def whole(file: Path, output: Path, workers: int, *more: str) -> tuple[list[str], float]:
    began = time.monotonic()
    done = subprocess.run(command(file, output, workers, *more), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the sweep ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return table(done.stdout), time.monotonic() - began


def killed(file: Path, output: Path, workers: int, after: int, *more: str) -> int:
    """Start it, kill it once `after` runs are there, and wait until its workers are gone too. How many runs are there then."""
    process = subprocess.Popen(
        command(file, output, workers, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while finished(output) < after:
        if process.poll() is not None:
            raise SystemExit(f"the sweep ended with {process.returncode} before it could be killed")
        time.sleep(0.005)
    process.kill()
    process.wait()
    while any(output.glob("*/.*.partial-*")):  # workers see that they are orphans, and discard what they had begun
        time.sleep(0.05)
    return finished(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=HERE / "sweep_200.yaml")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of the moments; default: another one each time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    with tempfile.TemporaryDirectory(prefix="disagg-sweep-") as folder:
        undisturbed, disturbed = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        expected, wall_s = whole(options.file, undisturbed, options.workers)
        num_runs = finished(undisturbed)
        if num_runs < options.kills + 2:
            parser.error(f"{options.file} makes {num_runs} runs; --kills: fewer than that less one")
        moments = sorted(random.Random(seed).sample(range(1, num_runs - 1), options.kills))
        left = []
        for after in moments:
            left.append(killed(options.file, disturbed, options.workers, after, *(["--resume"] if left else [])))
        found, _ = whole(options.file, disturbed, options.workers, "--resume")
        files = [contents(each) for each in (undisturbed, disturbed)]
        different = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    result = {
        "runs": num_runs,
        "seed": seed,
        "finished_at_each_kill": left,
        "files": len(files[0]),
        "files_that_differ": len(different),
        "same_table": found == expected and bool(expected),
        "undisturbed_wall_s": round(wall_s, 1),
    }
    if different:
        print(f"different: {', '.join(different[:5])}{' …' if len(different) > 5 else ''}", file=sys.stderr)
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    sys.exit(1 if different or not result["same_table"] else 0)


if __name__ == "__main__":
    main()
