"""docs/write-a-policy.md, executed from top to bottom: files are written, commands run, checks hold."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "write-a-policy.md"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_every_block_of_the_page_does_what_the_page_says(
    tmp_path: Path, disagg: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    num_checks = num_commands = 0
    for number, (language, text) in enumerate(blocks()):
        named = re.match(r"# file: (\S+)\n", text)
        if named:
            Path(named[1]).write_text(text)
        elif language == "python":
            Path(f"check_{number}.py").write_text(text)
            runpy.run_path(f"check_{number}.py")
            num_checks += text.count("assert ")
        else:
            assert language == "console", f"what to do with a block of {language}?"
            for command, *told in (part.splitlines() for part in text.split("$ ")[1:]):
                program, *arguments = shlex.split(command)
                assert program == "disagg"
                assert disagg(*arguments) == 0, capsys.readouterr().err
                output = capsys.readouterr().out
                assert [line for line in told if line not in output] == [], command
                num_commands += 1
    assert num_checks >= 6
    assert num_commands >= 10


def test_every_policy_of_the_page_is_used_by_a_command() -> None:
    text = PAGE.read_text()
    for file, source in ((re.match(r"# file: (\S+\.py)\n", block), block) for _, block in blocks()):
        if file:
            (name,) = re.findall(r"^class (\w+)", source, re.M)
            assert f"{file[1]}:{name}" in text
