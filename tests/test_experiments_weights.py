"""A folder of weights must hold the model that the file names: told from its config.json and safetensors headers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.core.model_shapes import PRESETS, ModelShape, hf_config, tensor_shapes
from disagg.experiments.errors import ConfigError
from disagg.experiments.experiment_file import load_experiment
from tests.test_cli_commands import TEXT

TINY = PRESETS["tiny-llama"]


@dataclass
class Checkpoint:
    folder: Path
    file: Path

    def write(self, shape: ModelShape = TINY, change: dict[str, Any] | None = None) -> bytearray:
        """A checkpoint of zeros; `change` replaces header entries, None leaves one out."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(hf_config(shape)))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in tensor_shapes(shape).items():
            first, end = end, end + 4 * math.prod(size)
            header[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [first, end]}
        for name, value in (change or {}).items():
            header[name] |= value or {}
            if value is None:
                header[f"{name}.of_another"] = header.pop(name)
        text = json.dumps(header).encode()
        raw = bytearray(len(text).to_bytes(8, "little") + text + bytes(end))
        (self.folder / "model.safetensors").write_bytes(raw)
        return raw

    def refused(self, told: str) -> None:
        for backend in ("simulation", "hardware"):
            with pytest.raises(ConfigError) as error:
                load_experiment(self.file, backend=backend)
            assert "model.weights: " in str(error.value)
            assert told in str(error.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    file = tmp_path / "experiment.yaml"
    file.write_text(TEXT.replace("{id: tiny-llama}", "{id: tiny-llama, weights: folder}"))
    return Checkpoint(tmp_path / "folder", file)


def test_weights_of_the_model_are_accepted_and_so_is_the_folder_as_the_model(checkpoint: Checkpoint) -> None:
    checkpoint.write()
    load_experiment(checkpoint.file)
    load_experiment(checkpoint.file, ["model.id=folder"])


def test_what_the_runtime_writes_is_accepted(checkpoint: Checkpoint) -> None:
    from disagg.runtime.weights import write_random_checkpoint

    write_random_checkpoint(checkpoint.folder, TINY)
    load_experiment(checkpoint.file)


def test_weights_of_another_model_are_refused_by_the_first_field(checkpoint: Checkpoint) -> None:
    checkpoint.write(replace(TINY, num_layers=3, vocab_size=300))
    checkpoint.refused("another model than model.id 'tiny-llama': its num_layers is 3, not 4")


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({NORM: None}, f"tensor {NORM} is missing; expected shape [128]"),
        ({EMBED: {"shape": [128, 512]}}, f"tensor {EMBED} has shape [128, 512], expected [512, 128]"),
        ({NORM: {"dtype": "I32"}}, "is stored as I32; allowed: F64, F32, BF16, F16"),
        ({NORM: {"dtype": "F16"}}, f"tensor {NORM} has 512 bytes"),
        ({NORM: {"shape": "many"}}, f"entry of tensor {NORM} is malformed"),
        ({NORM: {"data_offsets": [0, True]}}, "is malformed"),
    ],
)
def test_tensors_that_are_missing_or_of_another_shape_are_refused(
    change: dict[str, Any], told: str, checkpoint: Checkpoint
) -> None:
    checkpoint.write(change=change)
    checkpoint.refused(told)


def test_files_that_are_damaged_are_refused(checkpoint: Checkpoint) -> None:
    raw = checkpoint.write()
    file = checkpoint.folder / "model.safetensors"
    for damaged, told in (
        (raw[:-1], "cut short"),
        (raw[:100], "its header alone takes"),
        (raw[:4], "not a safetensors file"),
        (raw + b"x", "too long"),
        (b"\xff" * 100, "not a safetensors file"),
        ((4).to_bytes(8, "little") + b"nope", "not valid JSON"),
    ):
        file.write_bytes(damaged)
        checkpoint.refused(told)
    file.unlink()
    checkpoint.refused("found none")


def test_an_index_is_followed_and_never_out_of_the_folder(checkpoint: Checkpoint) -> None:
    checkpoint.write()
    (checkpoint.folder / "other.safetensors").write_bytes(b"")  # named by nobody
    index = checkpoint.folder / "model.safetensors.index.json"
    names = dict.fromkeys(tensor_shapes(TINY), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    load_experiment(checkpoint.file)
    for change, told in (
        ({NORM: "../model.safetensors"}, "is not the name of a safetensors file in the same folder"),
        ({NORM: "gone.safetensors"}, "there is no such file"),
    ):
        index.write_text(json.dumps({"weight_map": names | change}))
        checkpoint.refused(told)
    del names[NORM]
    index.write_text(json.dumps({"weight_map": names}))
    checkpoint.refused(f"tensor {NORM} is missing")


def test_a_folder_without_a_config_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.folder.mkdir()
    checkpoint.refused("which says what model the weights are")
