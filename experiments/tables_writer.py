"""Rows of `core/tables.py` into Parquet files, a row group at a time."""

from __future__ import annotations

import types
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..core.tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow
from ..policies.vocabulary import PS_PER_S

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Row = RequestRow | StayRow | StepRow | TransferRow | DecisionRow
TABLES: Final[dict[str, type[Row]]] = {
    "requests": RequestRow,
    "steps": StepRow,
    "transfers": TransferRow,
    "decisions": DecisionRow,
    "stays": StayRow,
}
EXCLUDED: Final = "excluded"  # an extra column of requests.parquet: left out of results (warm-up, start burst)
_ROW_GROUP: Final = 32_768
_BATCH: Final = 1024  # rows made into columns at once, soon after they were made: they are in the processor's caches
_EXACT: Final = 1 << 53  # below it every integer is a float


class TableWriter:
    """One Parquet file (zstd) of rows of one type. `*_ps` columns become float seconds under the name with `_s`."""

    def __init__(self, path: Path, row_type: type[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._row_type = row_type
        self._schema = _schema(row_type)
        self._rows: list[Row | tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self._num_in_batches = 0
        self._num_written = 0
        words = [field.name for field in self._schema if pa.types.is_string(field.type)]
        # of numbers a dictionary costs more than it saves
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=words)

    @property
    def num_rows(self) -> int:
        return self._num_written + self._num_in_batches + len(self._rows)

    def write(self, row: Row | tuple[Any, ...]) -> None:
        """A row, or its values in the order of the schema, instants still in picoseconds."""
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self._gather()

    def close(self) -> None:
        self._gather()
        self._flush()
        self._writer.close()

    def _gather(self) -> None:
        if not self._rows:
            return
        self._batches.append(_batch_of(self._rows, self._row_type, self._schema))
        self._num_in_batches += len(self._rows)
        self._rows.clear()
        if self._num_in_batches >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._batches:
            return
        self._writer.write_table(pa.Table.from_batches(self._batches), self._num_in_batches)
        self._num_written += self._num_in_batches
        self._num_in_batches = 0
        self._batches.clear()


def frame_of(rows: Sequence[Row | tuple[Any, ...]], row_type: type[Row]) -> pd.DataFrame:
    """The table that reading the file of these rows gives; values as for `TableWriter.write`."""
    import pyarrow as pa

    schema = _schema(row_type)
    batches = [_batch_of(rows, row_type, schema)] if rows else []
    frame: pd.DataFrame = pa.Table.from_batches(batches, schema).to_pandas()
    return frame


def _batch_of(rows: Sequence[Row | tuple[Any, ...]], row_type: type[Row], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    is_instant = [field.name.endswith("_ps") for field in msgspec.structs.fields(row_type)]
    # one list and its slices: a tuple a row, were they kept, is work for the garbage collector
    values = list(chain.from_iterable(row if isinstance(row, tuple) else msgspec.structs.astuple(row) for row in rows))
    arrays = []
    for number, field in enumerate(schema):
        column = values[number :: len(schema)]
        if number < len(is_instant) and is_instant[number]:
            arrays.append(_seconds(column))
        else:
            arrays.append(pa.array(column, field.type))
    return pa.record_batch(arrays, schema=schema)


def column_name(field: str) -> str:
    """The stored name of a row's field."""
    return f"{field.removesuffix('_ps')}_s" if field.endswith("_ps") else field


def _seconds(picoseconds: Sequence[int | None]) -> pa.Array:
    """As Python divides integers: rounded once."""
    import pyarrow as pa

    instants = pa.array(picoseconds, pa.int64())
    missing = instants.is_null().to_numpy(zero_copy_only=False) if instants.null_count else None
    values = instants.fill_null(0).to_numpy() if instants.null_count else instants.to_numpy()
    return pa.array(seconds_of(values), pa.float64(), mask=missing)


def seconds_of(picoseconds: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each rounded once, as Python divides integers."""
    seconds: NDArray[np.float64] = picoseconds / np.float64(PS_PER_S)
    large = np.flatnonzero(np.abs(picoseconds) >= _EXACT)  # to be a float it would be rounded before the division is
    if not len(large):
        return seconds
    # 10^12 is 5^12 times a power of two. The quotient by 5^12 is a mantissa of 53 bits with what is left rounded to the
    # nearest; there are no ties, since 5^12 is odd.
    sign, values = np.sign(picoseconds[large]), np.abs(picoseconds[large])
    whole, left = np.divmod(values, 5**12)
    shift = 53 - np.frexp(whole.astype(np.float64))[1].astype(np.int64)  # at most 28, and left is below 2^28
    fraction, left = np.divmod(left << shift, 5**12)
    fraction += 2 * left > 5**12
    mantissa = (whole << shift) + fraction
    seconds[large] = sign * np.ldexp(mantissa.astype(np.float64), -shift - 12)
    return seconds


def _schema(row_type: type[Row]) -> pa.Schema:
    import pyarrow as pa

    hints = get_type_hints(row_type)
    fields = []
    for field in msgspec.structs.fields(row_type):
        hint, nullable = hints[field.name], False
        if get_origin(hint) in (types.UnionType,):
            members = [member for member in get_args(hint) if member is not type(None)]
            nullable = len(members) < len(get_args(hint))
            hint = members[0]
        if field.name.endswith("_ps"):
            kind = pa.float64()
        elif get_origin(hint) is tuple:
            kind = pa.list_(pa.int64())
        else:
            kind = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}[hint]
        fields.append(pa.field(column_name(field.name), kind, nullable=nullable))
    if row_type is RequestRow:
        fields.append(pa.field(EXCLUDED, pa.bool_(), nullable=False))
    return pa.schema(fields)
