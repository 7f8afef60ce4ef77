"""Whether a folder of weights holds the model that the experiment names: its config.json and the safetensors headers.

Only headers are read - eight bytes that give their length, then JSON - so that a bad checkpoint is refused before any
process starts, and without torch.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from msgspec.structs import fields

from ..core.model_shapes import ModelError, ModelShape, tensor_shapes

_INDEX: Final = "model.safetensors.index.json"
_MOST_HEADER_BYTES: Final = 64 << 20
_ELEMENT_BYTES: Final = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def check_same_shape(shape: ModelShape, found: ModelShape, model: str, folder: Path) -> None:
    """ModelError names the first field in which the weights' own shape differs; a name is none."""
    for each in fields(ModelShape):
        wanted, given = getattr(shape, each.name), getattr(found, each.name)
        if each.name != "name" and wanted != given:
            raise ModelError(
                f"{folder} holds another model than model.id '{model}': its {each.name} is {given}, not {wanted};"
                " allowed: the same folder as model.id, or weights of that model"
            )


def check_tensors(shape: ModelShape, folder: Path) -> None:
    """ModelError for the first tensor of the model that is missing or of another shape, or file that is cut short."""
    try:
        paths = [*sorted(folder.glob("*.safetensors")), folder / _INDEX]
        stats = [(path, path.stat()) for path in paths if path.exists()]
        problem = _problem(shape, folder, tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None
    if problem is not None:
        raise ModelError(problem)


@lru_cache(maxsize=64)
def _problem(shape: ModelShape, folder: Path, files: tuple[tuple[str, int, int], ...]) -> str | None:
    """What is wrong; cached by size and time of the files, for the points of a sweep."""
    try:
        _check(shape, folder, [name for name, _, _ in files if name != _INDEX])
    except ModelError as error:
        return str(error)
    return None


def _check(shape: ModelShape, folder: Path, names: list[str]) -> None:
    expected = tensor_shapes(shape)
    index = folder / _INDEX
    if index.is_file():
        file_of = _weight_map(index)
    elif len(names) == 1:
        file_of = dict.fromkeys(expected, names[0])
    else:
        raise ModelError(
            f"{folder}: expected one *.safetensors file or {_INDEX}, found {', '.join(names[:8]) or 'none'}"
        )
    headers: dict[str, dict[str, Any]] = {}
    for name, wanted in expected.items():
        file = file_of.get(name)
        if file is None:
            raise ModelError(f"{index}: tensor {name} is missing; expected shape {list(wanted)}")
        if file not in headers:
            headers[file] = _header(folder / file)
        tensor = headers[file].get(name)
        if tensor is None:
            raise ModelError(f"{folder / file}: tensor {name} is missing; expected shape {list(wanted)}")
        if tensor["shape"] != list(wanted):
            raise ModelError(f"{folder / file}: tensor {name} has shape {tensor['shape']}, expected {list(wanted)}")
        if tensor["dtype"] not in _ELEMENT_BYTES:
            raise ModelError(
                f"{folder / file}: tensor {name} is stored as {tensor['dtype']}; allowed: {', '.join(_ELEMENT_BYTES)}"
            )


def _weight_map(index: Path) -> dict[str, str]:
    with index.open("rb") as file:
        mapping = _json(file.read(_MOST_HEADER_BYTES + 1), index).get("weight_map")
    if not isinstance(mapping, dict):
        raise ModelError(f"{index}: no weight_map")
    for name in mapping.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in the same folder")
    return mapping


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, each entry with a dtype, a shape and offsets that fit together and the file."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file, and {_INDEX} names it")
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MOST_HEADER_BYTES:
            raise ModelError(f"{path}: not a safetensors file")
        if size < 8 + length:
            raise ModelError(f"{path}: cut short: {size} bytes, and its header alone takes {8 + length}")
        header = _json(file.read(length), path)
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in header.items():
        match tensor:
            case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(first), int(last)]} if all(
                type(each) is int and each >= 0 for each in (*sizes, first, last)
            ):
                stored = _ELEMENT_BYTES.get(dtype)
                if stored is not None and last - first != stored * math.prod(sizes):
                    raise ModelError(
                        f"{path}: tensor {name} has {last - first} bytes, which its shape {sizes} does not"
                    )
                end = max(end, last)
            case _:
                raise ModelError(f"{path}: the header's entry of tensor {name} is malformed")
    if size != 8 + length + end:
        words = "cut short" if size < 8 + length + end else "too long"
        raise ModelError(f"{path}: {words}: {size} bytes, and its header says {8 + length + end}")
    return header


def _json(raw: bytes, path: Path) -> dict[str, Any]:
    if len(raw) > _MOST_HEADER_BYTES:
        raise ModelError(f"{path}: larger than {_MOST_HEADER_BYTES} bytes")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not valid JSON, or not a safetensors header") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return values
