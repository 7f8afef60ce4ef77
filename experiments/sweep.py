"""The runs of a sweep: one after another or in parallel, and what is told of each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from .errors import EXIT_OK, EXIT_RUN_FAILED
from .progress_bar import progress_bar
from .run_directory import remove_abandoned
from .run_point import RunPoint
from .sweep_task import RunResult, result_of, simulate_task, task_of
from .sweep_workers import Pool, completed, num_cores
from .workload import phase_counts

WORTH_A_PROCESS: Final = (
    5_000  # requests: under about so many, all runs are over before a worker has loaded its libraries
)


class Tally:
    """Tells of every run as it ends, and of all that failed in the end."""

    def __init__(self, num_points: int, num_todo: int) -> None:
        self._num_points = num_points
        self._num_todo = num_todo
        self._num_ended = 0
        self._details_told = False
        self._failed: list[tuple[str, RunResult]] = []

    def label(self, point: RunPoint) -> str:
        """Of the run that ends next, or of the one that is about to begin where they run one after another."""
        return f"[{self._num_ended + 1}/{self._num_todo}] {point.title}"

    def tell(self, point: RunPoint, result: RunResult) -> None:
        label = self.label(point)
        self._num_ended += 1
        if result.exit_code != EXIT_OK:
            print(f"error: {label}: {result.message or 'the run failed'}; nothing was kept", file=sys.stderr)
            if result.details and not self._details_told:
                self._details_told = True  # once: what is wrong with one is wrong with many
                print(result.details, file=sys.stderr)
            self._failed.append((point.title, result))
            return
        failed = f", {result.num_failed} rejected or failed" if result.num_failed else ""
        print(f"{label}: {result.num_requests} requests{failed} -> {point.directory}")
        if result.num_failed:
            told = f"{result.num_failed} of {result.num_requests} requests were rejected or failed"
            print(f"warning: {label}: {told}", file=sys.stderr)
        if result.message:
            print(f"{label}: {result.message}")
        if result.no_summary:
            print(f"warning: {label}: no summary: {result.no_summary}", file=sys.stderr)
        sys.stdout.flush()

    def exit_code(self) -> int:
        """That of a single run, or 1 for a sweep in which any failed, with their list."""
        if not self._failed:
            return EXIT_OK
        if self._num_points == 1:
            return self._failed[0][1].exit_code
        print(
            f"error: {len(self._failed)} of {self._num_todo} runs failed; --resume tries them again:", file=sys.stderr
        )
        for title, result in sorted(self._failed, key=lambda item: item[0]):
            print(f"error:   {title}: {result.message or 'the run failed'}", file=sys.stderr)
        return EXIT_RUN_FAILED


def workers_for(todo: Sequence[RunPoint], asked: int | None) -> int:
    """How many processes: as asked, but no more than runs; by default one a core, none for little work."""
    if asked is not None:
        return max(1, min(asked, len(todo)))
    left = WORTH_A_PROCESS
    for point in todo:
        left -= sum(phase_counts(point.experiment))
        if left <= 0:
            return max(1, min(num_cores(), len(todo)))
    return 1


def run_in_parallel(
    pool: Pool, points: Sequence[RunPoint], todo: Sequence[RunPoint], *, overwrite: bool = False
) -> int:
    """Simulate `todo` on the pool's workers; returns the exit code. A run that fails, or whose worker dies, is told."""
    tally = Tally(len(points), len(todo))
    tasks = [task_of(point, overwrite=overwrite) for point in todo]
    with progress_bar(f"{len(todo)} runs, {pool.num_workers} workers") as progress:
        progress.update(0, len(todo))
        for count, (number, answer) in enumerate(completed(pool, simulate_task, tasks), start=1):
            if isinstance(answer, Exception):
                remove_abandoned(todo[number].directory.absolute())
                result = RunResult(EXIT_RUN_FAILED, message=str(answer) or type(answer).__name__)
            else:
                result = result_of(answer)
            tally.tell(todo[number], result)
            progress.update(count, len(todo))
    for point in todo:  # what a worker left that died with an earlier sweep while this one began
        remove_abandoned(point.directory.absolute())
    return tally.exit_code()
