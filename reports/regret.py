"""What the decisions of a policy cost in hindsight, from rows of `regret.parquet`: how much, at which stage, for whom.

The regret of a decision is the latency of all requests together, in seconds, that the best other executor would have saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct

from .statistics import Estimate, t_interval

if TYPE_CHECKING:
    from .runs import Run

REGRET_TABLE: Final = "regret.parquet"
NUM_WORST: Final = 5
FEW_DECISIONS: Final = 10  # of fewer nothing is said about where they lose
_LONG: Final = 0.75  # quantile of the sampled prompts from which one counts as long


class RegretSummary(Struct, frozen=True):
    """Of the sampled decisions of one policy. Means are of seconds a decision; `stages` and `prompts` by name, None
    without a decision there. `worst` holds the rows of the largest regrets, largest first.
    """

    num_decisions: int
    share_best: float
    mean: Estimate
    stages: dict[str, float | None]
    prompts: dict[str, float | None]
    worst: tuple[dict[str, Any], ...]

    @property
    def mean_text(self) -> str:
        e = self.mean
        interval = f" [{max(e.low, 0.0):.3f}, {e.high:.3f}]" if e.low is not None and e.high is not None else ""
        return f"{e.value or 0.0:.3f} s{interval}"

    @property
    def where(self) -> str:
        """The stage and the prompts on which most is lost, in words; empty where that may be nothing or decisions are few."""
        if self.num_decisions < FEW_DECISIONS or not self.mean.excludes_zero:
            return ""
        words = []
        for parts, text in ((self.stages, "{} stage"), (self.prompts, "{} prompts")):
            known = {name: value for name, value in parts.items() if value is not None}
            if len(known) > 1:
                words.append(text.format(max(known, key=lambda name: known[name])))
        return ", ".join(words)


def summarise_regret(rows: Sequence[Mapping[str, Any]]) -> RegretSummary:
    """Raises ValueError without rows."""
    if not rows:
        raise ValueError("there are no decisions")
    regrets = np.array([row["regret_s"] for row in rows], dtype=np.float64)
    lengths = np.array([row["num_prompt_tokens"] for row in rows])
    stages = np.array([row["stage"] for row in rows])
    is_long = lengths >= np.quantile(lengths, _LONG, method="higher")

    def mean(chosen: Any) -> float | None:
        return float(regrets[chosen].mean()) if chosen.any() else None

    worst = sorted((row for row in rows if row["regret_s"] > 0), key=lambda row: -row["regret_s"])[:NUM_WORST]
    return RegretSummary(
        len(rows),
        float((regrets == 0).mean()),
        t_interval(regrets),
        {name: mean(stages == name) for name in ("context", "generation")},
        {"long": mean(is_long), "short": mean(~is_long)},
        tuple(dict(row) for row in worst),
    )


def regret_of(run: Run) -> RegretSummary | None:
    """Of a run directory; None where its decisions were not looked at. Raises ReportError for an unreadable table."""
    import pandas as pd
    import pyarrow as pa

    from .runs import ReportError

    path = run.path / REGRET_TABLE
    if not path.is_file():
        return None
    try:
        rows = pd.read_parquet(path).to_dict("records")
        return summarise_regret([{str(key): value for key, value in row.items()} for row in rows])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ReportError(f"{path}: is not a readable table of regrets: {error}") from error
