"""Trace readers: exact times, clear errors, prefix hashes that agree where prompts do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disagg.experiments.errors import ConfigError
from disagg.experiments.traces import block_hashes, read_trace, summarise_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def azure(tmp_path: Path, *lines: str, newline: str = "\r\n") -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes(newline.join(lines).encode())
    return path


def mooncake(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_azure_times_keep_their_100_ns_digits(tmp_path: Path) -> None:
    path = azure(tmp_path, HEADER, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951691,396,109")
    first, second = read_trace("azure", path)
    assert second.at - first.at == 4_314_579_100_000
    assert (first.num_prompt_tokens, first.num_output_tokens, first.hash_ids) == (374, 44, ())


def test_the_2024_form_with_a_zone_and_without_a_fraction_is_read(tmp_path: Path) -> None:
    path = azure(
        tmp_path, HEADER, "2024-05-10 23:59:59.999999+00:00,10,2", "2024-05-11 00:00:00+00:00,11,3", newline="\n"
    )
    first, second = read_trace("azure", path)
    assert second.at - first.at == 1_000_000


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    path = mooncake(
        tmp_path,
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}',
        '{"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [0], "more": 1}',
    )
    first, second = read_trace("mooncake", path)
    assert second.at - first.at == 3 * 10**12
    assert first.hash_ids == (0, 7)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["Time,In,Out"], ":1: the header must be TIMESTAMP"),
        ([HEADER, "2023-11-16 18:15:46.68,374"], ":2: 2 fields; allowed: 3"),
        ([HEADER, "2023-11-16 18:15:46.68,374,4,4"], ":2: 4 fields"),
        ([HEADER, "2023-11-16 18:15:46.68,-4,4"], ":2: ContextTokens must be a whole number, not '-4'"),
        ([HEADER, "2023-11-16 18:15:46.68,4,4.5"], ":2: GeneratedTokens must be a whole number, not '4.5'"),
        ([HEADER, "2023-11-16 18:15:46.68,0,4"], ":2: input length 0"),
        ([HEADER, "2023-11-16 18:15:46.68,4,99999999999"], ":2: output length 99999999999"),
        ([HEADER, "yesterday,4,4"], ":2: TIMESTAMP must look like"),
        ([HEADER, "2023-13-16 18:15:46.68,4,4"], ":2: TIMESTAMP must look like"),
        ([HEADER, "2023-11-16 18:15:46,4,4", "2023-11-16 18:15:45,4,4"], ":3: goes back in time"),
    ],
)
def test_a_malformed_azure_line_is_named_by_number_and_cause(tmp_path: Path, lines: list[str], told: str) -> None:
    path = azure(tmp_path, *lines)
    with pytest.raises(ConfigError) as error:
        list(read_trace("azure", path))
    assert f"{path}{told}" in str(error.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "truncated"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": ["x"]}', "hash_ids"),
        ('{"timestamp": 0, "output_length": 5}', "input_length"),
        ('{"timestamp": 0, "input_length": 1.5, "output_length": 5}', "input_length"),
        ('{"timestamp": -1, "input_length": 600, "output_length": 5}', "timestamp -1"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 0}', "output length 0"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2, 3]}', "3 hash_ids for 600"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [-1, 2]}', "a hash id is not"),
        ("[1, 2]", "array"),
        (
            '{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [9, 0]}',
            "hash id 0 follows 9 here and none before",
        ),
    ],
)
def test_a_malformed_mooncake_line_is_named_by_number_and_cause(tmp_path: Path, line: str, told: str) -> None:
    path = mooncake(tmp_path, '{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": [0]}', line)
    with pytest.raises(ConfigError) as error:
        list(read_trace("mooncake", path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert told in str(error.value)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(HEADER.encode() + b"\n\xff,1,1\n")
    with pytest.raises(ConfigError, match=r":2: not UTF-8 \(byte 0xff\)"):
        list(read_trace("azure", path))


def test_a_malformed_line_past_the_rows_that_are_asked_for_does_not_matter(tmp_path: Path) -> None:
    path = azure(tmp_path, HEADER, "2023-11-16 18:15:46,4,4", "nonsense")
    assert summarise_trace("azure", path, 1).num_rows == 1
    with pytest.raises(ConfigError, match=":3:"):
        summarise_trace("azure", path, None)


@pytest.mark.parametrize("tokens_per_block", [1, 16, 32, 48, 512, 1024])
def test_equal_prefixes_have_equal_hashes_and_others_do_not(tokens_per_block: int) -> None:
    one = block_hashes((0, 5, 9), 1500, tokens_per_block)
    other = block_hashes((0, 5, 11), 1500, tokens_per_block)
    shared = 1024 // tokens_per_block
    assert one[:shared] == other[:shared]
    assert not set(one[shared:]) & set(other[shared:])
    assert len(set(one)) == len(one) == 1500 // tokens_per_block


def test_a_partial_last_block_has_no_hash() -> None:
    assert len(block_hashes((3,), 31, 32)) == 0
    assert len(block_hashes((3,), 32, 32)) == 1
    assert len(block_hashes((3,), 63, 32)) == 1


def test_hashes_fit_a_signed_64_bit_column() -> None:
    hashes = block_hashes(tuple(range(1000)), 512_000, 32)
    assert len(set(hashes)) == 16_000
    assert all(0 <= value < 1 << 63 for value in hashes)


TRACES = os.environ.get("DISAGG_TRACES")


@pytest.mark.traces
@pytest.mark.skipif(not TRACES, reason="DISAGG_TRACES is not set")
def test_the_public_traces_are_read_whole() -> None:
    folder = Path(TRACES or "")
    azure_rows = summarise_trace("azure", folder / "AzureLLMInferenceTrace_conv.csv", None)
    assert azure_rows.num_rows == 19_366
    assert azure_rows.duration == 3_501_721_937_000_000  # 18:15:46.6805900 to 19:14:08.4025270
    assert summarise_trace("mooncake", folder / "mooncake_conversation_trace.jsonl", None).num_rows == 12_031
