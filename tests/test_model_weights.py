from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg.core.model_shapes import ModelError, tensor_shapes
from disagg.runtime.model_place import Place
from disagg.runtime.weights import (
    ModelWeights,
    load_weights,
    needed_weight_bytes,
    random_weights,
    read_shape,
    write_random_checkpoint,
)
from tests.tiny_models import SHAPES

LAYOUTS = [(1, 1, None), (2, 1, None), (4, 1, None), (8, 1, None), (1, 2, (3, 1)), (2, 3, (1, 2, 1))]


def same(a: ModelWeights, b: ModelWeights) -> bool:
    pairs = list(zip(a.tensors(), b.tensors(), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "llama", SHAPES["llama"], seed=3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tp", "pp", "layers"), LAYOUTS)
def test_a_rank_reads_from_the_checkpoint_what_it_would_draw_and_no_more(
    name: str, tp: int, pp: int, layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    shape = SHAPES[name]
    write_random_checkpoint(tmp_path, shape, seed=3)
    for rank in range(tp * pp):
        place = Place.of(shape, tp, pp, rank, layers)
        weights = load_weights(tmp_path, place)
        assert same(weights, random_weights(place, seed=3))
        storage = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.tensors()
        }
        assert sum(storage.values()) == weights.nbytes == needed_weight_bytes(place)


def test_the_slices_of_all_ranks_make_up_the_full_tensors(folder: Path) -> None:
    shape = SHAPES["llama"]
    full = load_file(folder / "model.safetensors")
    ranks = [random_weights(Place.of(shape, 2, 1, rank), seed=3) for rank in range(2)]
    at = "model.layers.2."
    assert torch.equal(torch.cat([w.layers[2].o for w in ranks], dim=1), full[at + "self_attn.o_proj.weight"])
    assert torch.equal(torch.cat([w.layers[2].down for w in ranks], dim=1), full[at + "mlp.down_proj.weight"])
    gates = [w.layers[2].gate_up.chunk(2)[0] for w in ranks]
    assert torch.equal(torch.cat(gates), full[at + "mlp.gate_proj.weight"])
    heads = torch.cat([w.head for w in ranks if w.head is not None])
    assert torch.equal(heads[: shape.vocab_size], full["lm_head.weight"])
    assert not heads[shape.vocab_size :].any()


def test_seeds_and_tensors_differ() -> None:
    shape = SHAPES["llama"]
    one, other = random_weights(Place.of(shape), 3), random_weights(Place.of(shape), 4)
    assert not torch.equal(one.layers[0].o, other.layers[0].o)
    assert not torch.equal(one.layers[0].o, one.layers[1].o)


def test_a_tied_model_holds_its_table_once_per_stage_that_needs_it() -> None:
    shape = SHAPES["qwen2"]
    whole = random_weights(Place.of(shape), 3)
    assert whole.head is whole.embedding
    first, last = (random_weights(Place.of(shape, 1, 2, rank), 3) for rank in range(2))
    assert first.head is None
    assert last.embedding is None
    assert first.embedding is not None
    assert last.head is not None
    assert torch.equal(first.embedding, last.head)


def test_shape_and_dtype_are_read_from_the_folder(folder: Path) -> None:
    assert read_shape(folder) == SHAPES["llama"]
    assert read_shape(folder, "other", "bfloat16") == msgspec.structs.replace(
        SHAPES["llama"], name="other", dtype="bfloat16"
    )


def test_weights_are_cast_to_the_shapes_dtype(folder: Path) -> None:
    place = Place.of(read_shape(folder, dtype="bfloat16"))
    weights = load_weights(folder, place)
    assert {tensor.dtype for tensor in weights.tensors()} == {torch.bfloat16}
    assert weights.nbytes == needed_weight_bytes(place)


def test_a_checkpoint_in_several_files_is_read_through_its_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    place = Place.of(SHAPES["llama"], 2, 1, 1)
    assert same(load_weights(folder, place), random_weights(place, 3))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named_even_to_a_rank_that_does_not_hold_it(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is missing.*\[90, 64\]"):
        load_weights(folder, Place.of(SHAPES["llama"], 1, 2, 0))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    with pytest.raises(ModelError, match=r"k_proj\.weight has shape \[64, 64\], expected \[32, 64\]"):
        load_weights(folder, Place.of(SHAPES["llama"]))


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32, 64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match="stored as I8; allowed: BF16"):
        load_weights(folder, Place.of(SHAPES["llama"]))


def test_a_torn_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_weights(folder, Place.of(SHAPES["llama"]))


def test_a_folder_without_safetensors_says_what_it_wants(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="found none; other weight formats are not read"):
        load_weights(folder, Place.of(SHAPES["llama"]))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "weights.bin", 3])
def test_an_index_that_points_out_of_its_folder_is_refused(folder: Path, file: object) -> None:
    index = {"weight_map": dict.fromkeys(tensor_shapes(SHAPES["llama"]), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="same folder"):
        load_weights(folder, Place.of(SHAPES["llama"]))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_a_config_that_cannot_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_shape(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(folder)
