"""Reading public production traces, one row at a time.

Azure LLM inference traces (CSV, 2023 and 2024), BurstGPT (CSV) and Mooncake traces (JSONL). All hold arrival, prompt
length and output length; Mooncake adds ids of 512-token prefix blocks. Rows must stand in order of time. The data set of
TensorRT-LLM's benchmarks has tokens instead of times, ShareGPT texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from ..policies.vocabulary import PS_PER_MS
from .config_workload import TraceDataset
from .errors import ConfigError
from .samples import read_samples
from .segments import Segment, mixed_hashes
from .sharegpt import read_turns

TRACES_VARIABLE: Final = "DISAGG_TRACES"
SOURCES: Final = {
    "azure": "https://github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_*.csv (CC-BY 4.0)",
    "burstgpt": "https://github.com/HPMLL/BurstGPT, data/BurstGPT_*.csv (CC-BY 4.0)",
    "sharegpt": "any file in ShareGPT's form, e.g. ShareGPT_V3_unfiltered_cleaned_split.json",
    "tensorrt_llm": "benchmarks/cpp/prepare_dataset.py of https://github.com/NVIDIA/TensorRT-LLM",
    "mooncake": "https://github.com/kvcache-ai/Mooncake, FAST25-release/traces/*.jsonl (Apache-2.0)",
}
HASH_ID_TOKENS: Final = 512  # tokens that one hash id of a Mooncake trace stands for
_MOST_TOKENS: Final = 1 << 24
_MOST_LINE: Final = 1 << 24  # characters
_AZURE_HEADER: Final = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_BURSTGPT_COLUMNS: Final = ("Timestamp", "Request tokens", "Response tokens")
_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?(?:Z|[+-]00:?00)?", re.ASCII
)
_SECONDS: Final = re.compile(r"(\d{1,9})(?:\.(\d{0,18}))?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1)


class TraceRow(msgspec.Struct, frozen=True):
    """One request of a trace. `at` is picoseconds since an origin of the trace's own."""

    at: int
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()  # of the prompt, where the data set has them
    segments: tuple[Segment, ...] = ()  # what the prompt is made of, where the data set says so
    session: str | None = None
    traffic_class: str = ""
    priority: float | None = None


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: int | float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def trace_path(dataset: TraceDataset, root: Path) -> Path:
    """The trace's file: from `root`, else from $DISAGG_TRACES. Raises ConfigError naming where it can be had."""
    given = Path(dataset.path)
    folder = os.environ.get(TRACES_VARIABLE)
    candidates = [root / given] + ([Path(folder) / given] if folder and not given.is_absolute() else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if candidate.is_dir():
            raise ConfigError(f"{candidate} is a folder; allowed: a trace file, e.g. from {SOURCES[dataset.type]}")
    searched = " and ".join(str(candidate) for candidate in candidates)
    hint = "" if folder else f", and {TRACES_VARIABLE} is not set to a folder of traces"
    raise ConfigError(f"there is no trace file {searched}{hint}; its public source: {SOURCES[dataset.type]}")


def read_trace(kind: str, path: Path) -> Iterator[TraceRow]:
    """Rows of `path` in order. Raises ConfigError with file, line and cause at the first malformed line."""
    reader = _READERS[kind]
    before: int | None = None
    for number, row in reader(path):
        for name, value in (("input", row.num_prompt_tokens), ("output", row.num_output_tokens)):
            if not 1 <= value <= _MOST_TOKENS:
                raise ConfigError(f"{path}:{number}: {name} length {value}; allowed: 1 to {_MOST_TOKENS} tokens")
        if before is not None and row.at < before:
            raise ConfigError(f"{path}:{number}: goes back in time; rows must stand in order of their timestamps")
        before = row.at
        yield row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(_MOST_LINE):
                number += 1
                if len(raw) == _MOST_LINE:
                    raise ConfigError(f"{path}:{number}: line longer than {_MOST_LINE} bytes")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
                yield number, text
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _azure_rows(path: Path) -> Iterator[tuple[int, TraceRow]]:
    for number, text in _lines(path):
        fields = text.split(",")
        if number == 1:
            if fields != _AZURE_HEADER:
                raise ConfigError(f"{path}:1: the header must be {','.join(_AZURE_HEADER)}, not {text[:100]!r}")
            continue
        if not text.strip():
            continue
        if len(fields) != 3:
            raise ConfigError(f"{path}:{number}: {len(fields)} fields; allowed: 3 ({', '.join(_AZURE_HEADER)})")
        lengths = []
        for name, field in zip(_AZURE_HEADER[1:], fields[1:], strict=True):
            if not (field.isascii() and field.isdigit() and len(field) <= 12):
                raise ConfigError(f"{path}:{number}: {name} must be a whole number, not {field[:40]!r}")
            lengths.append(int(field))
        at = _picoseconds(fields[0])
        if at is None:
            raise ConfigError(
                f"{path}:{number}: TIMESTAMP must look like 2023-11-16 18:15:46.6805900, not {fields[0][:40]!r}"
            )
        yield number, TraceRow(at, lengths[0], lengths[1])


def _picoseconds(text: str) -> int | None:
    """Exact: the 100 ns digits are more than a float or a datetime keeps."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction = match.groups()
    try:
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second))
    except ValueError:
        return None
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 10**12 + int((fraction or "").ljust(12, "0"))


def _mooncake_rows(path: Path) -> Iterator[tuple[int, TraceRow]]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    preceding: dict[int, int | None] = {}  # of each hash id, the one that it follows: it names the prefix up to its end
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:  # covers malformed JSON and wrong or missing fields
            raise ConfigError(f"{path}:{number}: {error}") from None
        if not 0 <= line.timestamp <= 1e15:
            raise ConfigError(f"{path}:{number}: timestamp {line.timestamp} ms is not between 0 and 1e15")
        full = line.input_length // HASH_ID_TOKENS
        if line.hash_ids and not full <= len(line.hash_ids) <= full + 1:
            raise ConfigError(
                f"{path}:{number}: {len(line.hash_ids)} hash_ids for {line.input_length} prompt tokens; "
                f"allowed: one per {HASH_ID_TOKENS} tokens"
            )
        if any(not 0 <= each < 1 << 63 for each in line.hash_ids):
            raise ConfigError(f"{path}:{number}: a hash id is not between 0 and 2^63 - 1")
        last = None
        for each in line.hash_ids:
            if preceding.setdefault(each, last) != last:
                raise ConfigError(
                    f"{path}:{number}: hash id {each} follows {'none' if last is None else last} here and"
                    f" {'none' if preceding[each] is None else preceding[each]} before; allowed: ids of whole prefixes,"
                    " each of which follows the same one everywhere"
                )
            last = each
        at = (
            int(line.timestamp) * PS_PER_MS
            if line.timestamp == int(line.timestamp)
            else round(line.timestamp * PS_PER_MS)
        )
        yield number, TraceRow(at, line.input_length, line.output_length, tuple(line.hash_ids))


def _sample_rows(path: Path) -> Iterator[tuple[int, TraceRow]]:
    for number, sample in read_samples(path):
        yield number, TraceRow(0, len(sample.input_ids), sample.output_len, token_ids=sample.input_ids)


def _burstgpt_rows(path: Path) -> Iterator[tuple[int, TraceRow]]:
    """Requests that failed there have no response tokens: they are left out."""
    places: dict[str, int] = {}
    for number, text in _lines(path):
        fields = text.split(",")
        if number == 1:
            places = {name.strip(): place for place, name in enumerate(fields)}
            missing = [name for name in _BURSTGPT_COLUMNS if name not in places]
            if missing:
                raise ConfigError(f"{path}:1: the header has no column {', '.join(missing)}: {text[:100]!r}")
            continue
        if not text.strip():
            continue
        if len(fields) != len(places):
            raise ConfigError(f"{path}:{number}: {len(fields)} fields; allowed: {len(places)}, as the header has")
        lengths = []
        for name in _BURSTGPT_COLUMNS[1:]:
            field = fields[places[name]].strip()
            if not (field.isascii() and field.isdigit() and len(field) <= 12):
                raise ConfigError(f"{path}:{number}: {name} must be a whole number, not {field[:40]!r}")
            lengths.append(int(field))
        field = fields[places["Timestamp"]].strip()
        match = _SECONDS.fullmatch(field)
        if match is None:
            raise ConfigError(f"{path}:{number}: Timestamp must be seconds such as 5 or 5.25, not {field[:40]!r}")
        at = int(match[1]) * 10**12 + int((match[2] or "")[:12].ljust(12, "0"))
        session = fields[places["Session ID"]].strip() if "Session ID" in places else ""
        traffic_class = fields[places["Log Type"]].strip() if "Log Type" in places else ""
        if lengths[1]:
            yield number, TraceRow(at, lengths[0], lengths[1], session=session or None, traffic_class=traffic_class)


def _sharegpt_rows(path: Path) -> Iterator[tuple[int, TraceRow]]:
    for number, turn in read_turns(path):
        num_prompt_tokens = sum(part.num_tokens for part in turn.segments)
        yield (
            number,
            TraceRow(0, num_prompt_tokens, turn.num_output_tokens, segments=turn.segments, session=turn.session),
        )


_READERS: Final = {
    "azure": _azure_rows,
    "burstgpt": _burstgpt_rows,
    "mooncake": _mooncake_rows,
    "sharegpt": _sharegpt_rows,
    "tensorrt_llm": _sample_rows,
}


# ---- prefix blocks --------------------------------------------------------------------------------------------------


def block_hashes(hash_ids: tuple[int, ...], num_prompt_tokens: int, tokens_per_block: int) -> tuple[int, ...]:
    """Hashes of the prompt's full blocks of `tokens_per_block`; a partial last block has none.

    A hash id names the whole prefix up to its end, so a block is named by the id that holds its last token and by where
    in that id it ends: equal prefixes give equal hashes at every block size.
    """
    num_blocks = min(num_prompt_tokens, len(hash_ids) * HASH_ID_TOKENS) // tokens_per_block
    if num_blocks == 0:
        return ()
    last_tokens = np.arange(1, num_blocks + 1, dtype=np.int64) * tokens_per_block - 1
    ids = np.asarray(hash_ids, dtype=np.uint64)[last_tokens // HASH_ID_TOKENS]
    mixed = ids * np.uint64(HASH_ID_TOKENS) + (last_tokens % HASH_ID_TOKENS).astype(np.uint64)
    return mixed_hashes(mixed)  # a bijection: different (id, end) never collide below 2^55 ids


# ---- what a trace holds as a whole ----------------------------------------------------------------------------------


class TraceSummary(msgspec.Struct, frozen=True):
    """`output_counts`: how many rows have each output length, by length."""

    num_rows: int
    duration: int  # picoseconds from the first row to the last
    output_counts: dict[int, int]


def summarise_trace(kind: str, path: Path, num_rows: int | None) -> TraceSummary:
    """Read the first `num_rows` rows (None: all), so that a malformed line is found before anything runs."""
    status = path.stat()
    return _summarise(kind, path, num_rows, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32)
def _summarise(kind: str, path: Path, num_rows: int | None, mtime_ns: int, size: int) -> TraceSummary:
    counts: dict[int, int] = {}
    rows = 0
    first = last = 0
    for row in islice(read_trace(kind, path), num_rows):
        if rows == 0:
            first = row.at
        last = row.at
        rows += 1
        counts[row.num_output_tokens] = counts.get(row.num_output_tokens, 0) + 1
    return TraceSummary(rows, last - first, counts)
