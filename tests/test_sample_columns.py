"""Files of samples: what is no measurement is refused by file and column, before anything is fitted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from disagg.experiments.calibration_samples import (
    ClientSample,
    MessageSample,
    Samples,
    StepSample,
    TransferSample,
    pair_kind,
    read_samples,
    write_samples,
)
from disagg.experiments.errors import ConfigError

STEP = StepSample(0, 1, 3, 1, "first", "idle", 5, 4, 400, 0, 0, 0, 0, 0, 4, 0, False)
SAMPLES = Samples(
    steps=[STEP, replace(STEP, step=2, duration_ps=0)],  # a host that was held up saw two end at once
    messages=[MessageSample(0, 0, 1, pair_kind(0, 1), "Enqueue", 7)],
    transfers=[TransferSample(0, 1, 2, 16, 1, 1, 9, None), TransferSample(0, 1, 2, 16, 1, 1, 9, 11)],
    clients=[ClientSample(0, True, -3)],
)


def changed(folder: Path, table: str, column: str, values: Any) -> None:
    """The file of `table` with other values in one column: a list, or an Arrow array."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{table}.parquet"
    read = pq.read_table(path)
    pq.write_table(read.set_column(read.column_names.index(column), column, pa.array(values)), path)


def test_samples_come_back_as_they_were_written_with_nothing_where_nothing_was_told(tmp_path: Path) -> None:
    for samples in (SAMPLES, Samples(), replace(SAMPLES, transfers=SAMPLES.transfers[:1])):
        write_samples(samples, tmp_path)
        assert read_samples(tmp_path) == samples


@pytest.mark.parametrize(
    ("table", "column", "values", "said"),
    [
        ("steps", "duration_ps", [5, -1], "duration_ps has -1; allowed: 0 or more"),
        ("steps", "duration_ps", [5, None], "duration_ps has 1 rows without a value; allowed: whole numbers"),
        ("steps", "duration_ps", [None, None], "duration_ps has 2 rows without a value"),
        ("steps", "duration_ps", [5.0, float("nan")], "duration_ps is of type double; allowed: whole numbers"),
        ("steps", "duration_ps", ["5", "6"], "duration_ps is of type string; allowed: whole numbers of up to 64 bits"),
        ("steps", "num_pairs", np.array([1, 2**63], np.uint64), "num_pairs holds numbers beyond 64 bits"),
        ("steps", "in_transfer", [0, 1], "in_transfer is of type int64; allowed: true or false"),
        ("steps", "kind", [b"first", b"first"], "kind is of type binary; allowed: words"),
        ("steps", "before", ["idle", "lunch"], "before has 'lunch'; allowed: nothing, idle, decode, chunk, same"),
        ("steps", "rest_ps", [-1, -2], "rest_ps has -2; allowed: -1 or more"),
        ("steps", "num_shared_kv", [0, -1], "num_shared_kv has -1; allowed: 0 or more"),
        ("messages", "latency_ps", [-7], "latency_ps has -7; allowed: 0 or more"),
        ("messages", "pair", ["one to another"], "pair has 'one to another'; allowed: orchestrator to executor, "),
        ("transfers", "taken_ps", [-1, None], "taken_ps has -1; allowed: 0 or more"),
        ("clients", "delay_ps", [None], "delay_ps has 1 rows without a value"),
    ],
)
def test_what_is_no_sample_is_refused_by_file_and_column(
    tmp_path: Path, table: str, column: str, values: Any, said: str
) -> None:
    write_samples(SAMPLES, tmp_path)
    changed(tmp_path, table, column, values)
    with pytest.raises(ConfigError) as error:
        read_samples(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / table}.parquet: column {said}")


def test_other_types_of_the_same_values_are_read(tmp_path: Path) -> None:
    import pyarrow as pa

    write_samples(SAMPLES, tmp_path)
    changed(tmp_path, "steps", "duration_ps", pa.array([5, 0], pa.uint32()))
    changed(tmp_path, "steps", "before", pa.array(["idle", "idle"], pa.large_string()))
    assert read_samples(tmp_path) == SAMPLES
