"""The shape of a decoder-only model: what its `config.json` says, and the numbers that follow from it.

Knows nothing of tensors or devices; a cost model and the runtime read the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}  # architecture -> Hugging Face's model_type
_MAX_DIMENSION: Final = 1 << 24  # a larger number in a config is a mistake or an attack, never a model


class ModelError(ValueError):
    """A model, a checkpoint or a parallel layout that cannot be served; the text says what is allowed."""


class RopeScaling(Struct, frozen=True):
    """Llama 3's stretching of the slow rotations; `original_max_position_embeddings` in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelShape(Struct, frozen=True):
    """A decoder-only transformer of the Llama family: RMS norms, rotary positions, grouped-query attention, SwiGLU.

    Each layer has the same KV heads and dtype. `sliding_window` in tokens, None for full attention.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k and v, as in Qwen2
    qk_norm: bool = False  # an RMS norm on each head of q and k, as in Qwen3
    sliding_window: int | None = None
    max_position_embeddings: int = 131_072
    dtype: str = "bfloat16"

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases included."""
        q_size = self.num_attention_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        matrices = self.hidden_size * (2 * q_size + 2 * kv_size + 3 * self.intermediate_size)
        biases = q_size + 2 * kv_size if self.attention_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        return matrices + biases + head_norms + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * self.num_layer_parameters + tables + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def linear_flops_per_token(self) -> int:
        """Floating-point operations of the layers' matrices for one token: two per weight, head excluded."""
        q_size = self.num_attention_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        return 2 * self.num_layers * self.hidden_size * (2 * q_size + 2 * kv_size + 3 * self.intermediate_size)

    @property
    def head_flops_per_token(self) -> int:
        """Floating-point operations of the output head, spent only on tokens from which one is sampled."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def attention_flops_per_kv_token(self) -> int:
        """Floating-point operations for one query token against one KV token, all layers: QK and PV, two each."""
        return 4 * self.num_layers * self.num_attention_heads * self.head_dim


_LLAMA31_ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)

# From the config.json that each model's publisher released.
PRESETS: Final[dict[str, ModelShape]] = {
    "llama-3.1-8b": ModelShape(
        "llama-3.1-8b", "LlamaForCausalLM", 32, 4096, 32, 8, 128, 14336, 128256, 1e-5, 5e5, _LLAMA31_ROPE
    ),
    "llama-3.1-70b": ModelShape(
        "llama-3.1-70b", "LlamaForCausalLM", 80, 8192, 64, 8, 128, 28672, 128256, 1e-5, 5e5, _LLAMA31_ROPE
    ),
    "qwen2.5-7b": ModelShape(
        "qwen2.5-7b", "Qwen2ForCausalLM", 28, 3584, 28, 4, 128, 18944, 152064, 1e-6, 1e6, attention_bias=True
    ),
    "qwen3-8b": ModelShape(
        "qwen3-8b",
        "Qwen3ForCausalLM",
        36,
        4096,
        32,
        8,
        128,
        12288,
        151936,
        1e-6,
        1e6,
        qk_norm=True,
        max_position_embeddings=40_960,
    ),
    "mistral-7b": ModelShape(
        "mistral-7b",
        "MistralForCausalLM",
        32,
        4096,
        32,
        8,
        128,
        14336,
        32768,
        1e-5,
        1e6,
        max_position_embeddings=32_768,
    ),
    "tiny-llama": ModelShape(
        "tiny-llama",
        "LlamaForCausalLM",
        4,
        128,
        8,
        4,
        16,
        352,
        512,
        max_position_embeddings=8192,
        dtype="float32",
    ),
}


def preset(name: str, dtype: str | None = None) -> ModelShape:
    """The preset `name`, in `dtype` if one is given. ModelError lists the presets, or the dtypes."""
    if name not in PRESETS:
        raise ModelError(f"unknown model {name!r}; presets: {', '.join(sorted(PRESETS))}")
    shape = PRESETS[name]
    return shape if dtype is None else replace(shape, dtype=check_dtype(dtype))


def check_dtype(dtype: object) -> str:
    """`dtype` itself if the runtime serves it; ModelError otherwise."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPE_BYTES)}")
    return dtype


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a Hugging Face checkpoint of this model, matrices as [out, in]."""
    hidden, q_size, kv_size = (
        shape.hidden_size,
        shape.num_attention_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = (size, hidden)
            if shape.attention_bias:
                tensors[f"{at}self_attn.{name}_proj.bias"] = (size,)
        if shape.qk_norm:
            tensors[at + "self_attn.q_norm.weight"] = (shape.head_dim,)
            tensors[at + "self_attn.k_norm.weight"] = (shape.head_dim,)
        tensors[at + "self_attn.o_proj.weight"] = (hidden, q_size)
        tensors[at + "post_attention_layernorm.weight"] = (hidden,)
        tensors[at + "mlp.gate_proj.weight"] = (shape.intermediate_size, hidden)
        tensors[at + "mlp.up_proj.weight"] = (shape.intermediate_size, hidden)
        tensors[at + "mlp.down_proj.weight"] = (hidden, shape.intermediate_size)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


def check_parallelism(
    shape: ModelShape, tp: int, pp: int = 1, layers_per_stage: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The number of layers in each pipeline stage, or ModelError with the layouts that are possible.

    Without `layers_per_stage` the layers are spread evenly, earlier stages taking one more where it does not divide.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_kv_heads
    if tp < 1 or pp < 1:
        raise ModelError(f"tensor and pipeline parallel sizes must be at least 1, not tp {tp} and pp {pp}")
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        allowed = [t for t in range(1, heads + 1) if heads % t == 0 and (kv_heads % t == 0 or t % kv_heads == 0)]
        raise ModelError(
            f"tensor_parallel_size {tp} does not fit {shape.name}: it must divide the {heads} attention heads, and "
            f"divide the {kv_heads} KV heads or be a multiple of them; allowed: {', '.join(map(str, allowed))}"
        )
    if layers_per_stage is None:
        if pp > shape.num_layers:
            raise ModelError(
                f"pipeline_parallel_size {pp} is more than the {shape.num_layers} layers of {shape.name}; "
                f"allowed: 1 to {shape.num_layers}"
            )
        each, extra = divmod(shape.num_layers, pp)
        return tuple(each + (stage < extra) for stage in range(pp))
    stages = tuple(layers_per_stage)
    if len(stages) != pp or min(stages, default=0) < 1 or sum(stages) != shape.num_layers:
        raise ModelError(
            f"layers_per_stage {list(stages)} does not fit {shape.name}: it needs {pp} numbers (one per pipeline "
            f"stage), each at least 1, that sum to {shape.num_layers}"
        )
    return stages


def shape_from_hf_config(config: Mapping[str, Any], name: str = "model", dtype: str | None = None) -> ModelShape:
    """Read a Hugging Face `config.json` (both the rope_theta and the rope_parameters form).

    `dtype` overrides the checkpoint's own. Raises ModelError for what cannot be served: encoder-decoder, another
    architecture, KV heads, windows or dtypes that differ between layers, quantised weights, a missing or absurd number.
    """
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder-only models can be served")
    architecture = _architecture(config, name)
    for key in ("quantization_config", "kv_cache_scheme", "compression_config"):
        if config.get(key):
            raise ModelError(f"{name}: {key} is not supported; allowed: unquantised {', '.join(DTYPE_BYTES)} weights")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{name}: hidden_act {config['hidden_act']!r} is not supported; allowed: silu")
    qwen2 = architecture == "Qwen2ForCausalLM"
    if (config.get("attention_bias") and not qwen2) or config.get("mlp_bias"):
        raise ModelError(f"{name}: attention_bias and mlp_bias are not supported; Qwen2's own q, k, v biases are")
    num_layers = _positive(config, "num_hidden_layers", name)
    hidden = _positive(config, "hidden_size", name)
    heads = _positive(config, "num_attention_heads", name)
    kv_heads = _kv_heads(config, heads, name)
    if heads % kv_heads:
        raise ModelError(f"{name}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"{name}: num_attention_heads {heads} does not divide hidden_size {hidden}, and no head_dim")
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // heads
    head_dim = _positive(config, "head_dim", name, default_head_dim)
    if head_dim % 2:
        raise ModelError(f"{name}: head_dim {head_dim} is odd; rotary positions need an even one")
    theta, scaling = _rope(config, name)
    # A published Llama, Mistral or Qwen config names its dtype; one that does not was saved in torch's default.
    return ModelShape(
        name=name,
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_positive(config, "intermediate_size", name),
        vocab_size=_positive(config, "vocab_size", name),
        rms_norm_eps=_number(config, "rms_norm_eps", name, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=qwen2,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(config, architecture, num_layers, name),
        max_position_embeddings=_positive(config, "max_position_embeddings", name, 131_072),
        dtype=_dtype(config, dtype, name),
    )


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The `config.json` of a checkpoint of this shape; `shape_from_hf_config` reads it back to the same shape."""
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": ARCHITECTURES[shape.architecture],
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "torch_dtype": shape.dtype,
        "sliding_window": shape.sliding_window,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        config["use_sliding_window"] = shape.sliding_window is not None
        config["max_window_layers"] = 0 if shape.sliding_window is not None else shape.num_layers
    if shape.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_position_embeddings,
        }
    return config


def _architecture(config: Mapping[str, Any], name: str) -> str:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if architecture is None and named is None:  # a bare config names only its model_type
        by_type = {model_type: known for known, model_type in ARCHITECTURES.items()}
        architecture = by_type.get(str(config.get("model_type")))
    if architecture not in ARCHITECTURES:
        found = named if named is not None else config.get("model_type")
        raise ModelError(f"{name}: architecture {found!r} is not supported; allowed: {', '.join(ARCHITECTURES)}")
    return str(architecture)


def _number(config: Mapping[str, Any], key: str, name: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"{name}: {key} must be a positive number, not {value!r}")
    return float(value)


def _positive(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_DIMENSION:
        raise ModelError(f"{name}: {key} must be a whole number from 1 to {_MAX_DIMENSION}, not {value!r}")
    return value


def _kv_heads(config: Mapping[str, Any], heads: int, name: str) -> int:
    value = config.get("num_key_value_heads")
    per_layer = value if isinstance(value, list | tuple) else config.get("num_key_value_heads_per_layer")
    if isinstance(per_layer, list | tuple):
        if len({repr(each) for each in per_layer}) != 1:
            raise ModelError(f"{name}: KV heads differ between layers ({list(per_layer)[:8]}…); they must be the same")
        return _positive({"num_key_value_heads": per_layer[0]}, "num_key_value_heads", name)
    if config.get("block_configs"):
        raise ModelError(f"{name}: block_configs gives each layer a shape of its own; KV heads must be the same in all")
    return _positive(config, "num_key_value_heads", name, heads)


def _dtype(config: Mapping[str, Any], dtype: str | None, name: str) -> str:
    for key in ("kv_cache_dtype", "torch_dtype", "dtype"):
        if isinstance(config.get(key), list | tuple | dict):
            raise ModelError(f"{name}: {key} differs between parts of the model; it must be the same in each layer")
    if dtype is not None:
        return check_dtype(dtype)
    found = config.get("torch_dtype") or config.get("dtype") or "float32"
    if not isinstance(found, str) or found.removeprefix("torch.") not in DTYPE_BYTES:
        raise ModelError(f"{name}: dtype {found!r} is not supported; allowed: {', '.join(DTYPE_BYTES)}")
    return found.removeprefix("torch.")


def _rope(config: Mapping[str, Any], name: str) -> tuple[float, RopeScaling | None]:
    modern = config.get("rope_parameters")
    scaling = config.get("rope_scaling") if modern is None else modern
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ModelError(f"{name}: rope_scaling must be an object, not {scaling!r}")
    theta_from = modern if isinstance(modern, Mapping) and "rope_theta" in modern else config
    theta = _number(theta_from, "rope_theta", name, 10_000.0)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or scaling is None:
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{name}: rope scaling {kind!r} is not supported; allowed: default, llama3")
    return theta, RopeScaling(
        _number(scaling, "factor", name),
        _number(scaling, "low_freq_factor", name),
        _number(scaling, "high_freq_factor", name),
        _positive(scaling, "original_max_position_embeddings", name),
    )


def _sliding_window(config: Mapping[str, Any], architecture: str, num_layers: int, name: str) -> int | None:
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple) or not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise ModelError(f"{name}: layer_types must be a list of words, one for each layer")
        unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
        if unknown:
            raise ModelError(
                f"{name}: layer_types {', '.join(unknown)}: not supported; allowed: full_attention, sliding_attention"
            )
        if len(set(kinds)) > 1:
            raise ModelError(f"{name}: the attention window differs between layers; it must be the same in each layer")
    if config.get("sliding_window") is None or architecture == "LlamaForCausalLM":
        return None
    if architecture != "MistralForCausalLM" and not config.get("use_sliding_window", False):
        return None
    window = _positive(config, "sliding_window", name)
    if kinds is None and architecture != "MistralForCausalLM":
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if kinds is None or set(kinds) == {"sliding_attention"}:
        return window
    if set(kinds) == {"full_attention"}:
        return None
    raise ModelError(f"{name}: the attention window differs between layers; it must be the same in each layer")
