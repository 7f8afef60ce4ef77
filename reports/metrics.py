"""What is measured of each request, from its row.

Instants are computed in integer picoseconds, so that a request's dispatch delay and stages sum to its e2e latency.
Requests of warm-up phases (`exclude_from_results`) count nowhere. Latencies are those of completed requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..policies.vocabulary import PS_PER_S, FinishReason
from .metric_table import STAGES
from .runs import Run, columns_of

if TYPE_CHECKING:
    import pandas as pd

COMPLETED: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)
_EXCLUDED: Final = "excluded"  # a column that the writer of run directories adds
INSTANTS: Final = (
    "arrival_s", "dispatch_s", "context_start_s", "first_token_s", "transfer_start_s", "kv_usable_s", "end_s"
)  # fmt: skip


def _to_ps(seconds: pd.Series[Any]) -> NDArray[np.int64]:
    """Instants in integer picoseconds; a missing one is the smallest int64."""
    values = seconds.to_numpy(np.float64, na_value=np.nan)
    missing = ~np.isfinite(values)
    instants: NDArray[np.int64] = np.rint(np.where(missing, 0.0, values) * PS_PER_S).astype(np.int64)
    instants[missing] = np.iinfo(np.int64).min
    return instants


def instants_ps(requests: pd.DataFrame) -> NDArray[np.int64]:
    """The seven instants of each request, (n, 7), in the order of `INSTANTS`.

    A missing instant, or one before its predecessor (early binding, a retry), is its predecessor's: that stage is 0.
    """
    instants = np.empty((7, len(requests)), dtype=np.int64)
    for i, name in enumerate(INSTANTS):
        instants[i] = _to_ps(requests[name])
    np.minimum(instants[1:6], instants[6], out=instants[1:6])
    np.maximum.accumulate(instants, axis=0, out=instants)
    return instants.T


def measure(requests: pd.DataFrame) -> pd.DataFrame:
    """One row a request, in order of arrival, with a column for each per-request metric; undefined values are NaN.

    Adds `completed`. `itl_s` is pooled and has no column.
    """
    order = np.lexsort((requests["request_id"].to_numpy(), requests["arrival_s"].to_numpy()))
    rows = requests.take(order).reset_index(drop=True)
    done = rows["finish_reason"].isin(COMPLETED).to_numpy() & rows["first_token_s"].notna().to_numpy()
    instants = instants_ps(rows)
    tokens = rows["num_output_tokens"].to_numpy(np.float64)

    def seconds(ps: NDArray[np.int64], known: NDArray[np.bool_] = done) -> NDArray[np.float64]:
        return np.where(known, ps / PS_PER_S, np.nan)

    arrival, dispatch, _, first_token, _, _, end = instants.T
    columns: dict[str, NDArray[Any]] = {
        "completed": done,
        "ttft_s": seconds(first_token - arrival),
        "e2e_latency_s": seconds(end - arrival),
        "dispatch_delay_s": seconds(dispatch - arrival, np.ones(len(rows), dtype=np.bool_)),
    }
    gaps = np.where(tokens > 1, tokens - 1, np.nan)
    columns["tpot_s"] = seconds(end - first_token) / gaps
    columns["normalized_latency_s"] = columns["e2e_latency_s"] / np.where(tokens > 0, tokens, np.nan)
    with np.errstate(divide="ignore"):
        rate = 1.0 / columns["tpot_s"]
    columns["output_tokens_per_s_per_user"] = np.where(np.isfinite(rate), rate, np.nan)
    for i, stage in enumerate(STAGES):
        columns[stage] = seconds(instants[:, i + 2] - instants[:, i + 1])
    moved = done & rows["transfer_start_s"].notna().to_numpy()
    overlap = np.zeros(len(rows))
    if "kv_transfer_overlap_s" in rows.columns:  # of a run recorded before there was any: none
        overlap = rows["kv_transfer_overlap_s"].fillna(0.0).to_numpy(np.float64)
    columns["kv_transfer_overlap_s"] = np.where(moved, overlap, np.nan)
    return rows.assign(**columns)


def measured(run: Run) -> pd.DataFrame:
    """`measure` of the run's requests without those of warm-up phases."""
    return measure(counted(run, columns_of("requests"))[0])


def counted(run: Run, names: Sequence[str]) -> tuple[pd.DataFrame, int]:
    """The requests that count, with the columns asked for; and how many do not."""
    requests = run.columns("requests", [*names, _EXCLUDED])
    left_out = requests["phase"].isin(run.warmup_phases)
    if _EXCLUDED in requests.columns:  # the burst with which a closed loop fills an idle cluster, too
        left_out |= requests[_EXCLUDED].fillna(False).astype(bool)
    num_left_out = int(left_out.sum())
    return (requests[~left_out] if num_left_out else requests), num_left_out


def meets_objectives(rows: pd.DataFrame, objectives: dict[str, float]) -> NDArray[np.bool_]:
    """Which requests meet all objectives, (n,).

    An undefined TPOT (one output token) meets its objective; a request that did not complete meets none.
    """
    met: NDArray[np.bool_] = rows["completed"].to_numpy(np.bool_)
    for key in ("ttft_s", "tpot_s", "e2e_latency_s"):
        if key in objectives:
            values = rows[key].to_numpy(np.float64)
            met = met & ((values <= objectives[key]) | np.isnan(values))
    return met


def window_s(rows: pd.DataFrame) -> tuple[float, float]:
    """The measured time: first intended send to last end, in seconds of the run's clock."""
    return (float(rows["arrival_s"].min()), float(rows["end_s"].max())) if len(rows) else (0.0, 0.0)
