"""The noise under which a prediction is drawn again: how many times, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .errors import ConfigError

DRAWS: Final = 40  # two of them lie beyond each bound at 5 and 95 %, so that no bound is a single draw's
JITTER: Final = 0.011  # by which steps with chunks of two runs on H200s differ; of decodes alone, by 0.003
ERROR: Final = 0.01  # what a fitted cost model is off (decision 26)
MOST_DRAWS: Final = 10_000
MOST_SHARE: Final = 0.5


@dataclass(frozen=True)
class Noise:
    """`jitter` and `error` are the keys `step_jitter` and `step_error` of a cluster: standard deviations, as shares.

    Raises ConfigError for what is no noise, naming the option of `disagg interval`.
    """

    draws: int = DRAWS
    jitter: float = JITTER
    error: float = ERROR

    def __post_init__(self) -> None:
        if not 2 <= self.draws <= MOST_DRAWS:
            raise ConfigError(f"--draws {self.draws}: must be 2 to {MOST_DRAWS}")
        for name, share in (("jitter", self.jitter), ("error", self.error)):
            if not 0 <= share <= MOST_SHARE:  # of a NaN neither is true
                raise ConfigError(f"--{name} {share:g}: must be a share of 0 to {MOST_SHARE}")
        if not self.jitter and not self.error:
            raise ConfigError("--jitter 0 --error 0: every draw would be the same; allowed: one of them above 0")
