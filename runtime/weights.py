"""The weights of one rank: read from a Hugging Face folder of safetensors, or drawn at random.

Only this rank's slice of each tensor is kept. Safetensors alone are read: the other formats run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..core.kv_layout import Range
from ..core.model_shapes import ModelError, ModelShape, hf_config, shape_from_hf_config, tensor_shapes
from .kv_pages import TORCH_DTYPES
from .model_place import Place

_MAX_JSON_BYTES: Final = 64 << 20
_STORED_DTYPES: Final = {"F32", "BF16", "F16", "F64"}
_ROWS, _COLUMNS = 0, 1


@dataclass(slots=True)
class LayerWeights:
    """One layer's slice; matrices are [out, in]. q, k, v are stacked in one matrix, and so are gate and up."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(query heads + 2 · KV heads) · head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    o: Tensor  # [hidden, query heads · head_dim]
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 · intermediate slice, hidden]
    down: Tensor  # [hidden, intermediate slice]


@dataclass(slots=True)
class ModelWeights:
    """What one rank holds; the tables are there on the stages that use them, and one tensor where both are tied."""

    layers: list[LayerWeights]
    embedding: Tensor | None  # [place.vocab_rows, hidden]
    final_norm: Tensor | None  # [hidden]
    head: Tensor | None  # [place.vocab_rows, hidden]

    def tensors(self) -> Iterator[Tensor]:
        """Each tensor once."""
        tables = [self.embedding, self.final_norm, self.head if self.head is not self.embedding else None]
        for holder in self.layers:
            tables.extend(getattr(holder, each.name) for each in fields(holder))
        return (tensor for tensor in tables if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


class _Source(Protocol):
    def read(self, name: str, dim: int, part: Range | None) -> Tensor:
        """The tensor `name`, or its half-open `part` along `dim`."""


def read_shape(folder: str | Path, name: str | None = None, dtype: str | None = None) -> ModelShape:
    """The shape that `folder/config.json` declares. ModelError if there is none, or none that can be served."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    return shape_from_hf_config(config, name or folder.name or "model", dtype)


def load_weights(folder: str | Path, place: Place, device: str | torch.device = "cpu") -> ModelWeights:
    """This rank's weights from `folder`, in the shape's dtype on `device`.

    ModelError names the tensor, the shape expected and the shape found, for any tensor that is missing or differs:
    all of the model's tensors are checked, so that a bad checkpoint fails alike on all ranks.
    """
    with _Folder(Path(folder), place.shape) as source:
        return _build(place, source, torch.device(device))


def random_weights(place: Place, seed: int, device: str | torch.device = "cpu") -> ModelWeights:
    """This rank's slice of random weights that depend on (seed, tensor name) alone, so that layouts agree.

    They are drawn on `device`; devices of different kinds draw different numbers.
    """
    device = torch.device(device)
    return _build(place, _Random(place.shape, seed, device), device)


def write_random_checkpoint(folder: str | Path, shape: ModelShape, seed: int = 0) -> Path:
    """Write a Hugging Face folder with the weights of `random_weights(…, seed)` on the CPU; returns it.

    `config.json` is written last: a folder that has one is complete.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = _Random(shape, seed, torch.device("cpu"))
    tensors = {name: source.read(name, _ROWS, None) for name in tensor_shapes(shape)}
    partial = folder / ".model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    partial = folder / ".config.json.partial"
    partial.write_text(json.dumps(hf_config(shape), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
    return folder


def needed_weight_bytes(place: Place) -> int:
    """Bytes that this rank's weights will take."""
    shape, hidden = place.shape, place.shape.hidden_size
    query, kv, inner = (stop - start for start, stop in (place.query_heads, place.kv_heads, place.intermediate))
    layer = shape.head_dim * (2 * query + 2 * kv) * hidden + 3 * inner * hidden + 2 * hidden
    layer += shape.head_dim * (query + 2 * kv) if shape.attention_bias else 0
    layer += 2 * shape.head_dim if shape.qk_norm else 0
    tables = place.is_first_stage + place.is_last_stage
    if shape.tie_word_embeddings and tables == 2:
        tables = 1
    total = layer * (place.layers[1] - place.layers[0]) + tables * place.vocab_rows * hidden
    return (total + (hidden if place.is_last_stage else 0)) * shape.dtype_bytes


def _build(place: Place, source: _Source, device: torch.device) -> ModelWeights:
    shape, dim = place.shape, place.shape.head_dim
    dtype = TORCH_DTYPES[shape.dtype]

    def read(name: str, along: int = _ROWS, part: Range | None = None) -> Tensor:
        return source.read(name, along, part).to(device=device, dtype=dtype)

    def stack(names: list[tuple[str, Range]]) -> Tensor:
        return torch.cat([read(name, _ROWS, part) for name, part in names])

    def table(name: str) -> Tensor:
        rows = read(name, _ROWS, place.vocab)
        return torch.nn.functional.pad(rows, (0, 0, 0, place.vocab_rows - rows.shape[0])).contiguous()

    query, kv = (tuple(bound * dim for bound in heads) for heads in (place.query_heads, place.kv_heads))
    projections: list[tuple[str, Range]] = [("q", (query[0], query[1])), ("k", (kv[0], kv[1])), ("v", (kv[0], kv[1]))]
    layers = []
    for layer in range(*place.layers):
        at = f"model.layers.{layer}."
        layers.append(
            LayerWeights(
                input_norm=read(at + "input_layernorm.weight"),
                qkv=stack([(f"{at}self_attn.{p}_proj.weight", part) for p, part in projections]),
                qkv_bias=stack([(f"{at}self_attn.{p}_proj.bias", part) for p, part in projections])
                if shape.attention_bias
                else None,
                q_norm=read(at + "self_attn.q_norm.weight") if shape.qk_norm else None,
                k_norm=read(at + "self_attn.k_norm.weight") if shape.qk_norm else None,
                o=read(at + "self_attn.o_proj.weight", _COLUMNS, (query[0], query[1])),
                post_norm=read(at + "post_attention_layernorm.weight"),
                gate_up=stack([(f"{at}mlp.{p}_proj.weight", place.intermediate) for p in ("gate", "up")]),
                down=read(at + "mlp.down_proj.weight", _COLUMNS, place.intermediate),
            )
        )
    embedding = table("model.embed_tokens.weight") if place.is_first_stage else None
    head = final_norm = None
    if place.is_last_stage:
        final_norm = read("model.norm.weight")
        if not shape.tie_word_embeddings:
            head = table("lm_head.weight")
        else:
            head = embedding if embedding is not None else table("model.embed_tokens.weight")
    return ModelWeights(layers, embedding, final_norm, head)


class _Random:
    """Full tensors drawn one at a time and sliced; at most one full tensor is alive."""

    def __init__(self, shape: ModelShape, seed: int, device: torch.device) -> None:
        self._shapes = tensor_shapes(shape)
        self._tied = shape.tie_word_embeddings
        self._dtype = TORCH_DTYPES[shape.dtype]
        self._seed = seed
        self._device = device

    def read(self, name: str, dim: int, part: Range | None) -> Tensor:
        size = self._shapes[name]
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "big"))
        values = torch.randn(size, generator=generator, device=self._device)
        # Activations keep their size through the layers, and queries are sharp enough that attention is no mean of
        # everything: generated tokens then vary and depend on the context, which tests of the KV need.
        if len(size) == 2:
            values *= 1.0 if name.startswith("model.embed") and not self._tied else size[1] ** -0.5
            values *= 2.0 if name.endswith("q_proj.weight") else 1.0
        elif name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        else:
            values *= 0.1
        values = values.to(self._dtype)
        return values if part is None else values.narrow(dim, part[0], part[1] - part[0]).clone()


class _Folder:
    """The safetensors files of a folder, opened lazily and sliced without reading the rest."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._folder = folder
        self._expected = tensor_shapes(shape)
        self._open: dict[str, Any] = {}
        self._file_of = self._files()

    def __enter__(self) -> _Folder:
        try:
            for name, expected in self._expected.items():
                self._check(name, expected)
        except BaseException:
            self._open.clear()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.clear()

    def read(self, name: str, dim: int, part: Range | None) -> Tensor:
        piece = self._handle(self._file_of[name]).get_slice(name)
        if part is None:
            tensor = piece[:]
        elif dim == _ROWS:
            tensor = piece[part[0] : part[1]]
        else:
            tensor = piece[:, part[0] : part[1]]
        return torch.as_tensor(tensor).contiguous()

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name, from the index, or from the one file there is."""
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            mapping = _read_json(index).get("weight_map")
            if not isinstance(mapping, dict):
                raise ModelError(f"{index}: no weight_map")
            for file in mapping.values():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise ModelError(f"{index}: {file!r} is not the name of a safetensors file in the same folder")
            return mapping
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(
                f"{self._folder}: expected one *.safetensors file or model.safetensors.index.json, found "
                f"{', '.join(files) if files else 'none'}; other weight formats are not read"
            )
        return dict.fromkeys(self._handle(files[0]).keys(), files[0])

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._folder / file}: not a readable safetensors file: {error}") from None
        return self._open[file]

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        file = self._file_of.get(name)
        if file is None or name not in self._handle(file).keys():  # noqa: SIM118 - a handle is not iterable
            raise ModelError(f"{self._folder}: tensor {name} is missing; expected shape {list(expected)}")
        piece = self._handle(file).get_slice(name)
        if tuple(piece.get_shape()) != expected:
            raise ModelError(
                f"{self._folder / file}: tensor {name} has shape {list(piece.get_shape())}, expected {list(expected)}"
            )
        if piece.get_dtype() not in _STORED_DTYPES:
            raise ModelError(
                f"{self._folder / file}: tensor {name} is stored as {piece.get_dtype()}; "
                f"allowed: {', '.join(sorted(_STORED_DTYPES))}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
