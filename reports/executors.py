"""What each executor did over time, from its epochs: busy share, batch sizes, block states.

Block counts are recorded with each epoch; between two epochs the last ones stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from .runs import Run

Floats = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

_BLOCKS: Final = ("blocks_free", "blocks_reserved", "blocks_used", "blocks_held", "blocks_quarantined")
_STEPS: Final = ("executor", "epoch", "num_steps", "num_decodes", "start_s", "end_s", *_BLOCKS, "blocks_cached")


class Timeline(Struct, frozen=True):
    """One executor in `bins` of equal length: arrays (bins,). `edges_s` is (bins + 1,), seconds of the run's clock.

    `decodes` is the mean decode batch while a batch runs, times the busy share; `prefill_tokens_per_s` the rate at
    which prompts are computed; `held_share` and `occupied_share` are shares of the executor's blocks. Cached blocks,
    which anybody can have, are not occupied.
    """

    executor: int
    role: str
    edges_s: Floats
    busy: Floats
    decodes: Floats
    prefill_tokens_per_s: Floats
    held_share: Floats
    occupied_share: Floats


def by_executor(rows: pd.DataFrame) -> Iterator[tuple[int, Columns]]:
    """Each executor's rows in the order that they have, one executor after the other; each column as an array."""
    yield from _parts(rows, np.argsort(rows["executor"].to_numpy(np.int64), kind="stable"))


def _parts(rows: pd.DataFrame, order: NDArray[np.int64]) -> Iterator[tuple[int, Columns]]:
    """Each executor's rows in this `order`, in which one executor comes after the other.

    Arrays, not data frames, since a thousand executors have few rows each; one executor's at a time, since four have many.
    """
    columns = {str(name): rows[name].to_numpy() for name in rows.columns}
    ids, begins = np.unique(columns["executor"][order], return_index=True)
    for executor, begin, end in zip(ids.tolist(), begins, [*begins[1:], len(order)]):
        yield int(executor), {name: column[order[begin:end]] for name, column in columns.items()}


def _integral(times: Floats, values: Floats, at: Floats) -> Floats:
    """∫ of the step function that takes values[i] from times[i] on (0 before), evaluated at each of `at`."""
    area = np.concatenate(([0.0], np.cumsum(values[:-1] * np.diff(times))))
    index = np.searchsorted(times, at, side="right") - 1
    inside = np.maximum(index, 0)
    return np.where(index < 0, 0.0, area[inside] + values[inside] * (at - times[inside]))


def _running(start: Floats, end: Floats, values: Floats, at: Floats) -> Floats:
    """∫ of values[i] over [start[i], end[i]) and 0 elsewhere, evaluated at each of `at`; epochs do not overlap."""
    times = np.stack((start, np.maximum(end, start)), axis=1).ravel()
    levels = np.stack((values, np.zeros_like(values)), axis=1).ravel()
    # launch-ahead may record an epoch's start a hair before its predecessor's end
    return _integral(np.maximum.accumulate(times), levels, at)


def _epochs(rows: pd.DataFrame) -> Iterator[tuple[int, Columns]]:
    """Each executor's epochs in order of time; `blocks_free` counts the cached ones too."""
    keys = [rows[name].to_numpy() for name in ("epoch", "start_s", "executor")]
    for executor, part in _parts(rows, np.lexsort(keys)):
        columns = {name: column.astype(np.float64) for name, column in part.items()}
        cached = columns.setdefault("blocks_cached", np.zeros(len(columns["executor"])))  # in an old run: none
        columns["blocks_free"] = columns["blocks_free"] + cached
        yield executor, columns


def _total_blocks(columns: dict[str, Floats]) -> Floats:
    total: Floats = np.sum([columns[name] for name in _BLOCKS], axis=0)  # the cached are among the free
    return total


def timelines(run: Run, executors: Sequence[int], start_s: float, end_s: float, bins: int = 200) -> list[Timeline]:
    """Each executor's epochs between two instants, averaged in `bins` of equal length."""
    edges = np.linspace(start_s, max(end_s, start_s + 1e-9), bins + 1)
    nothing = np.zeros(bins)
    found = {
        executor: _timeline(executor, run.roles.get(executor, "idle"), columns, edges)
        for executor, columns in _epochs(run.columns("steps", (*_STEPS, "num_chunk_tokens")))
        if executor in executors
    }
    return [
        found.get(e) or Timeline(e, run.roles.get(e, "idle"), edges, nothing, nothing, nothing, nothing, nothing)
        for e in executors
    ]


def _timeline(executor: int, role: str, c: dict[str, Floats], edges: Floats) -> Timeline:
    width = edges[1] - edges[0]
    duration = np.maximum(c["end_s"] - c["start_s"], 1e-12)
    total = np.maximum(_total_blocks(c), 1.0)

    def running(values: Floats) -> Floats:
        return np.asarray(np.diff(_running(c["start_s"], c["end_s"], values, edges)) / width, dtype=np.float64)

    def standing(values: Floats) -> Floats:
        return np.asarray(np.diff(_integral(c["start_s"], values, edges)) / width, dtype=np.float64)

    return Timeline(
        executor,
        role,
        edges,
        np.clip(running(np.ones_like(duration)), 0.0, 1.0),
        running(c["num_decodes"]),
        running(c["num_chunk_tokens"] / duration),
        standing(c["blocks_held"] / total),
        standing(1.0 - c["blocks_free"] / total),
    )


def executor_summaries(run: Run, start_s: float, end_s: float) -> dict[str, Any]:
    """Busy share, occupancy and held blocks of each executor in the measured time, and their means over executors."""
    length = end_s - start_s
    window = np.array([start_s, end_s])
    found: dict[int, dict[str, Any]] = {}
    for executor, columns in _epochs(run.columns("steps", _STEPS)):
        num_begun = int(columns["start_s"].searchsorted(end_s, side="right"))
        c = {name: column[:num_begun] for name, column in columns.items()}
        if len(c["start_s"]) and length > 0:
            total = _total_blocks(c)
            mean_of = {
                name: float(np.diff(_integral(c["start_s"], c[name], window))[0]) / length
                for name in ("blocks_free", "blocks_held")
            }
            covered = min(length, max(0.0, end_s - max(start_s, float(c["start_s"][0]))))
            used_s = covered / length * float(total[-1]) - mean_of["blocks_free"]
            busy = float(np.diff(_running(c["start_s"], c["end_s"], np.ones_like(c["start_s"]), window))[0]) / length
            seen = c["end_s"] >= start_s
            num_steps = float(c["num_steps"][seen].sum())
            decoding = float((c["num_decodes"] * c["num_steps"])[seen].sum())
            found[executor] = {
                "num_steps": int(num_steps),
                "num_blocks": int(total[-1]),
                "busy_share": min(1.0, busy),
                "mean_kv_occupancy": used_s / float(total[-1]) if total[-1] else None,
                "max_kv_occupancy": float(np.max((1.0 - c["blocks_free"] / np.maximum(total, 1.0))[seen], initial=0.0)),
                "mean_blocks_held": mean_of["blocks_held"],
                "max_blocks_held": int(np.max(c["blocks_held"][seen], initial=0.0)),
                "mean_num_decodes": decoding / max(num_steps, 1.0),
            }
    nothing = {"num_steps": 0, "busy_share": 0.0}
    entries = [{"id": executor, "role": role, **found.get(executor, nothing)} for executor, role in run.roles.items()]
    active = [entry for entry in entries if "num_blocks" in entry]
    occupancy = [entry["mean_kv_occupancy"] for entry in active if entry["mean_kv_occupancy"] is not None]
    return {
        "executors": entries,
        "busy_share": float(np.mean([entry["busy_share"] for entry in entries])) if entries else None,
        "kv_occupancy": float(np.mean(occupancy)) if occupancy else None,
        "blocks_held": float(sum(entry["mean_blocks_held"] for entry in active)) if active else None,
    }
