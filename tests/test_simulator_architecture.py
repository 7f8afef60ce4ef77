"""The documents say what the code does: the diagram is the table's, and every test that a page names exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.core import commands, events
from disagg.core.life_cycle import mermaid
from tests.simulation_helpers import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SEED = (ROOT / "docs" / "seed.md").read_text(encoding="utf-8")


def test_the_life_cycle_diagram_is_drawn_from_the_table() -> None:
    shown = re.search(
        r"<!-- life cycle: begin -->\n```mermaid\n(.*?)\n```\n<!-- life cycle: end -->", ARCHITECTURE, re.S
    )
    assert shown is not None
    assert shown[1] == mermaid()


def test_the_diagram_is_printed_on_demand() -> None:
    command = [sys.executable, "-m", "disagg.core.life_cycle"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == mermaid() + "\n"


def test_every_event_and_command_of_the_cores_is_on_the_page() -> None:
    unions = (events.ExecutorEvent, events.OrchestratorEvent, commands.ExecutorCommand, commands.OrchestratorCommand)
    names = {kind.__name__ for union in unions for kind in union.__args__}
    assert len(names) > 20
    assert not {name for name in names if f"`{name}`" not in ARCHITECTURE and f"`{name}(" not in ARCHITECTURE}


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_seed_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", SEED)
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if test not in functions_of(ROOT / "tests" / f"{file}.py")]
    assert not missing


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")) + ["CONTRIBUTING.md"]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git which folders are part of the repository")
def test_each_folder_beyond_those_that_were_asked_for_has_a_decision() -> None:
    decisions = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "decisions").glob("*.md"))
    asked_for = {"runtime", "simulator", "policies", "experiments", "tests", "reports"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line} - asked_for
    assert {"core", "disagg", "docs", ".ci"} <= folders
    assert not {folder for folder in folders if f"# `{folder}/`" not in decisions}
