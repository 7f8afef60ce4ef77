"""Columns of a file of samples: of the types that its kind of sample has, whole, and within what a measurement can give.

What it lets through can be fitted. Knows Parquet tables and the fields of structs, and not what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from .errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_TYPES: Final = {int: "whole numbers of up to 64 bits", bool: "true or false", str: "words"}
_OF_ANY_SIGN: Final = ("delay_ps",)  # between two clocks, of which either may be ahead


def checked_rows(
    table: pa.Table, kind: type[Struct], words: Mapping[str, Sequence[str]], path: Path
) -> list[dict[str, Any]]:
    """The rows of `table` by names of fields of `kind`; a field with a default that the table lacks is left out of them.

    `words`: those that a column of them may hold. Raises ConfigError with `path` and the column for one that is lacking, of
    another type, has no value somewhere, or one that is negative where only the default of its field may be.
    """
    missing = [field.name for field in fields(kind) if field.name not in table.column_names]
    lacking = [field.name for field in fields(kind) if field.required and field.name in missing]
    if lacking:
        raise ConfigError(f"{path}: has no column {', '.join(lacking)}")
    types = get_type_hints(kind)
    found: dict[str, list[Any]] = {}
    for field in fields(kind):
        # a field that came later, with a default, is not in older files
        if field.name not in missing:
            place = f"{path}: column {field.name}"
            found[field.name] = _checked(table.column(field.name), types[field.name], _least(field), place)
    for name, allowed in words.items():
        strange = sorted(set(found[name]) - set(allowed))
        if strange:
            raise ConfigError(f"{path}: column {name} has {strange[0]!r}; allowed: {', '.join(allowed)}")
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _least(field: FieldInfo) -> int | None:
    """A default that is negative stands for what is not told."""
    if field.name in _OF_ANY_SIGN:
        return None
    return min(0, field.default) if type(field.default) is int else 0


def _checked(column: pa.ChunkedArray, wanted: Any, least: int | None, place: str) -> list[Any]:
    import pyarrow as pa

    types, may_lack = pa.types, wanted == int | None
    wanted = int if may_lack else wanted
    is_of_type = {
        int: types.is_integer(column.type),
        bool: types.is_boolean(column.type),
        str: types.is_string(column.type) or types.is_large_string(column.type),
    }[wanted]
    if column.null_count and not may_lack:
        raise ConfigError(f"{place} has {column.null_count} rows without a value; allowed: {_TYPES[wanted]}")
    if not is_of_type and not types.is_null(column.type):  # of no rows, or of none with a value
        raise ConfigError(f"{place} is of type {column.type}; allowed: {_TYPES[wanted]}")
    if wanted is int and not types.is_null(column.type):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise ConfigError(f"{place} holds numbers beyond 64 bits; allowed: {_TYPES[int]}") from None
    values: list[Any] = column.to_pylist()
    lowest = min((value for value in values if value is not None), default=0) if wanted is int else 0
    if least is not None and lowest < least:
        raise ConfigError(f"{place} has {lowest}; allowed: {least} or more")
    return values
