"""Put rows that `disagg bench … --out FILE.json` left into docs/benchmarks/h200.json.

    python benchmarks/h200/rows.py FILE.json --machine "2 × H200" [--replace "mpi, "]

A row takes the place of the row of its name. With `--replace` all rows whose names begin so go first: some names are there
twice, and some are of ways that are no more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "h200.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--replace", metavar="PREFIX")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(PAGE.read_text())
    new = [_told(row, asked.machine) for row in json.loads(asked.file.read_text())]
    at = len(rows)
    if asked.replace is not None:
        at = next((i for i, row in enumerate(rows) if row["name"].startswith(asked.replace)), at)
        rows = [row for row in rows if not row["name"].startswith(asked.replace)]
        rows[at:at] = new
    else:
        places = {row["name"]: i for i, row in enumerate(rows)}
        for row in new:
            if row["name"] in places:
                rows[places[row["name"]]] = row
            else:
                rows.append(row)
    PAGE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(new)} rows of {asked.file} are in {PAGE.name}, {len(rows)} in all")
    return 0


def _told(row: dict[str, Any], machine: str) -> dict[str, Any]:
    """As the page has it: four digits, a day, and no path of the machine."""
    numbers = {
        key: float(f"{row[key]:.4g}") if row[key] is not None else None for key in ("measured", "ceiling", "ratio")
    }
    command = re.sub(r" --out \S+", "", row["command"])
    return row | numbers | {"command": command, "date": row["date"][:10], "machine": machine}


if __name__ == "__main__":
    sys.exit(main())
