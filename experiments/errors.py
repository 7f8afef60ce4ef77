"""What can go wrong before and during a run, and the exit code that tells a shell which it was."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

EXIT_OK: Final = 0
EXIT_RUN_FAILED: Final = 1
EXIT_CONFIGURATION: Final = 2
EXIT_RESOURCES: Final = 3
EXIT_TIMEOUT: Final = 124
EXIT_INTERRUPTED: Final = 130


class ExperimentError(Exception):
    """A failure told to the user in one line per cause, without a traceback."""

    exit_code: int = EXIT_RUN_FAILED

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: tuple[str, ...] = problems


class ConfigError(ExperimentError):
    """The experiment file, an option or an input file is wrong; nothing was run or written."""

    exit_code = EXIT_CONFIGURATION


class ResourceError(ExperimentError):
    """The experiment is well-formed and does not fit the machine, the model's memory or the MPI world."""

    exit_code = EXIT_RESOURCES


class CalibrationFailedError(ExperimentError):
    """The cluster did not get through; what had ended by then is kept for --resume."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` when one of `allowed` is close to `word`, otherwise the empty string."""
    matches = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
