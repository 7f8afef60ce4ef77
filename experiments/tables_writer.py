"""Rows of `core/tables.py` into Parquet files, a row group at a time."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args, get_origin, get_type_hints

import msgspec

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


class TableWriter:
    """One Parquet file (zstd) of rows of one type. `*_ps` columns become float seconds under the name with `_s`."""

    def __init__(self, path: Path, row_type: type[Row]) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self.num_rows = 0
        self._row_type = row_type
        self._schema = _schema(row_type)
        self._rows: list[Row | tuple[Any, ...]] = []
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, row: Row | tuple[Any, ...]) -> None:
        """A row, or its values in the order of the schema, instants still in picoseconds."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        self._writer.write_batch(_batch_of(self._rows, self._row_type, self._schema))
        self._rows.clear()


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
    values = [row if isinstance(row, tuple) else msgspec.structs.astuple(row) for row in rows]
    arrays = []
    for number, (field, column) in enumerate(zip(schema, zip(*values, strict=True), strict=True)):
        if number < len(is_instant) and is_instant[number]:
            arrays.append(_seconds(column))
        else:
            arrays.append(pa.array(column, field.type))
    return pa.record_batch(arrays, schema=schema)


def column_name(field: str) -> str:
    """The stored name of a row's field."""
    return f"{field.removesuffix('_ps')}_s" if field.endswith("_ps") else field


def _seconds(picoseconds: Sequence[int | None]) -> pa.Array:
    """As Python divides integers: rounded once. Those below 2^53 are exact as floats, so that one division does it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    instants = pa.array(picoseconds, pa.int64())
    ends = pc.min_max(instants).as_py()
    if ends["max"] is not None and max(ends["max"], -ends["min"]) >= 1 << 53:
        return pa.array([None if value is None else value / PS_PER_S for value in picoseconds], pa.float64())
    return pc.divide(instants.cast(pa.float64()), float(PS_PER_S))


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
