"""benchmarks/h200/heldout/run.sh: whatever fails, the rest goes on, is packed and told by the exit code.

The script is the real one; `python3` on its path is one that leaves what calibrations and runs would, but for archives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "benchmarks" / "h200" / "heldout"
# A calibration leaves sessions even where it ends well, so that it is seen what of them is packed.
PYTHON = """\
#!/usr/bin/env bash
case $1 in
*archive.py) exec "$REAL_PYTHON" "$@" ;;
*series.py)
    echo "$CUDA_VISIBLE_DEVICES ${*:2}" >>"$CALLS"
    mkdir -p "$3/run-$CUDA_VISIBLE_DEVICES" && echo rows >"$3/run-$CUDA_VISIBLE_DEVICES/requests.csv"
    [ "$CUDA_VISIBLE_DEVICES" != "$FAILING" ] || exit 3
    ;;
-m)
    output=$6
    name=$(basename "$output" .json)
    echo "$CUDA_VISIBLE_DEVICES $4 $name" >>"$CALLS"
    mkdir -p "${output%.json}.sessions" "${output%.json}.samples"
    echo session >"${output%.json}.sessions/session-0000.msgpack"
    [ "$name" != "$FAILING" ] || exit 3
    echo samples >"${output%.json}.samples/steps.parquet"
    echo profile >"$output"
    ;;
esac
"""


class Done:
    """The script, run with `python3` as above; `failing` names what of it fails: a profile, or the GPUs of a lane."""

    def __init__(self, folder: Path, *arguments: str, failing: str = "") -> None:
        self.output = folder / "output"
        stub, calls = folder / "bin" / "python3", folder / "calls"
        stub.parent.mkdir()
        stub.write_text(PYTHON)
        stub.chmod(0o755)
        calls.touch()
        environment = os.environ | {
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "CALLS": str(calls),
            "FAILING": failing,
            "TMPDIR": str(folder),
        }
        command = ["bash", str(HELD_OUT / "run.sh"), str(self.output), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        self.code, self.told, self.error = done.returncode, done.stdout, done.stderr
        self.calls = [line.split() for line in calls.read_text().splitlines()]

    def archived(self) -> dict[str, set[str]]:
        """The files in each archive."""
        found = {}
        for path in self.output.glob("*.tgz"):
            with tarfile.open(path) as tar:
                found[path.name] = {member.name.removeprefix("./") for member in tar if member.isfile()}
        return found


def profiles(*names: str) -> set[str]:
    return {f"{name}.json" for name in names} | {f"{name}.samples/steps.parquet" for name in names}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("calibrate", ("1p1", "mixed", "qwen_mixed")),
        ("calibrate4", ("1p1", "mixed", "qwen_mixed", "qwen", "mixed_tp2")),
        ("calibrate_lanes", ("1p1", "mixed", "mixed_b")),
    ],
)
def test_all_profiles_of_a_part_are_packed_without_the_sessions_that_they_are_made_of(
    tmp_path: Path, part: str, names: tuple[str, ...]
) -> None:
    done = Done(tmp_path, part)
    assert (done.code, done.error) == (0, "")
    assert sorted(name for _, _, name in done.calls) == sorted(names)
    assert done.archived() == {"profiles.tgz": profiles(*names)}
    assert [path.name for path in done.output.iterdir()] == ["profiles.tgz"]


@pytest.mark.parametrize("failing", ["1p1", "qwen", "mixed_tp2", "qwen_mixed"])
def test_where_one_calibration_fails_the_others_are_made_and_packed_and_the_sessions_of_the_failed_too(
    tmp_path: Path, failing: str
) -> None:
    done = Done(tmp_path, "calibrate4", failing=failing)
    assert done.code == 1
    assert f"calibration of {failing}: ended with 3" in done.told
    others = {"1p1", "mixed", "qwen_mixed", "qwen", "mixed_tp2"} - {failing}
    packed = done.archived()
    assert packed["profiles.tgz"] - {f"{failing}.samples/steps.parquet"} == profiles(*others)
    assert packed[f"{failing}.sessions-tables-0.tgz"] == {f"{failing}.sessions/session-0000.msgpack"}
    assert len(packed) == 2
    assert not (done.output / "profiles").exists()


@pytest.mark.parametrize("part", ["calibrateXYZ", "calibrate4_", "nothing"])
def test_an_unknown_part_is_refused_with_those_that_there_are(tmp_path: Path, part: str) -> None:
    done = Done(tmp_path, part)
    assert done.code == 2
    assert done.error.startswith(f"PART {part}; allowed: calibrate, calibrate4, calibrate_lanes, pair, ")
    assert (done.calls, done.archived()) == ([], {})


@pytest.mark.parametrize(
    ("part", "patterns", "without"),
    [
        ("pair", ["1p1_*"], ""),
        ("routers", ["2_mixed*"], ""),
        ("singles", ["1_mixed_*"], ""),
        ("single", ["1_mixed_*"], ""),
        ("lanes", ["1p1_*", "2_mixed*"], ""),
        ("four", ["4gpu_*"], ""),
        ("four_singles", ["1_mixed_*"], "1_mixed_queues"),
    ],
)
def test_a_part_runs_each_of_the_files_that_its_line_at_the_top_names_once(
    tmp_path: Path, part: str, patterns: list[str], without: str
) -> None:
    done = Done(tmp_path, part)
    assert done.code == 0
    given = [Path(word).stem for call in done.calls for word in call if word.endswith(".yaml")]
    wanted = {path.stem for pattern in patterns for path in HELD_OUT.glob(f"{pattern}.yaml")} - {without}
    assert sorted(given) == sorted(wanted)
    gpus = [gpu for call in done.calls for gpu in call[0].split(",")]
    assert len(gpus) == len(set(gpus)), "a GPU in two lanes at once"


def test_what_a_failed_lane_left_is_packed_with_what_the_other_has_run(tmp_path: Path) -> None:
    done = Done(tmp_path, "lanes", failing="2,3")
    assert done.code == 1
    assert "GPUs 2,3: ended with 3" in done.told
    names = {"heldout/run-0,1/requests.csv", "heldout/run-2,3/requests.csv"}
    assert done.archived() == {"heldout-tables-0.tgz": names}
