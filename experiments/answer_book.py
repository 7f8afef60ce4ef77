"""Answers of workers to tasks, kept in a folder as they come, so that what was killed goes on where it was.

A task is a function and a text; equal texts have equal answers, whoever computes them. So a text must hold all that the
answer depends on: measured costs and users' files change in place, and go in as digests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from .progress_bar import progress_bar
from .run_directory import write_atomically
from .sweep_workers import Pool, Task, completed


class AnswerBook:
    """`folder` must exist. Answers are JSON objects; one with a value under `error` is handed out and not kept."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def look_up(
        self, task: Task, texts: Sequence[str], title: str, failed: Callable[[str], str], unit: str = "tasks"
    ) -> list[str]:
        """The answer to each text; `failed` makes one of what an exception said, or a worker's death."""
        found: dict[str, str] = {}
        for text in dict.fromkeys(texts):
            path = self._path(text)
            if path.is_file():
                found[text] = path.read_text(encoding="utf-8")
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        with progress_bar(f"{title}: {len(texts)} {unit}, {self._pool.num_workers} workers") as progress:
            progress.update(len(found), len(found) + len(missing))
            for number, answer in completed(self._pool, task, missing):
                text = missing[number]
                if isinstance(answer, Exception):
                    found[text] = failed(str(answer) or type(answer).__name__)
                else:
                    found[text] = answer
                    if not json.loads(answer).get("error"):
                        write_atomically(self._path(text), answer + "\n")
                progress.update(len(found), len(set(texts)))
        return [found[text] for text in texts]

    def _path(self, text: str) -> Path:
        return self._folder / f"{sha256(text.encode()).hexdigest()[:32]}.json"
