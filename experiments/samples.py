"""Reading the data set that TensorRT-LLM's benchmarks take: `{"samples": [{"input_ids": […], "output_len": N}, …]}`.

Its samples have tokens and output lengths and no times, so they need a phase that makes its own arrivals.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from .errors import ConfigError

MAX_FILE_BYTES: Final = 1 << 30

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]


class Sample(msgspec.Struct, frozen=True):
    """One prompt, and how many tokens its output has."""

    input_ids: tuple[TokenId, ...]
    output_len: int


class _File(msgspec.Struct, frozen=True):
    samples: list[Sample]


def read_samples(path: Path) -> Iterator[tuple[int, Sample]]:
    """Samples with their numbers, from 1. Raises ConfigError naming the file and what is wrong in it."""
    status = path.stat()
    return enumerate(_read(path, status.st_mtime_ns, status.st_size), start=1)


@lru_cache(maxsize=2)  # a workload is gone through several times: checked, counted, sent
def _read(path: Path, mtime_ns: int, size: int) -> list[Sample]:
    if size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {size} bytes; allowed: at most {MAX_FILE_BYTES}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).samples
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
