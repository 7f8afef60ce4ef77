from __future__ import annotations

import math
from typing import Any

import pytest

from disagg.core.model_shapes import (
    PRESETS,
    ModelError,
    RopeScaling,
    check_parallelism,
    hf_config,
    preset,
    shape_from_hf_config,
    tensor_shapes,
)

LLAMA = hf_config(PRESETS["llama-3.1-8b"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_trip_through_a_config(name: str) -> None:
    assert shape_from_hf_config(hf_config(PRESETS[name]), name) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameter_count_is_the_sum_of_the_checkpoints_tensors(name: str) -> None:
    assert PRESETS[name].num_parameters == sum(math.prod(size) for size in tensor_shapes(PRESETS[name]).values())


def test_published_sizes_are_met() -> None:
    published = {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "mistral-7b": 7_248_023_552,
    }
    assert {name: PRESETS[name].num_parameters for name in published} == published


def test_costs_of_llama_8b_are_the_known_ones() -> None:
    shape = PRESETS["llama-3.1-8b"]
    assert shape.kv_bytes_per_token == 131_072  # 128 KiB
    assert shape.weight_bytes == 2 * 8_030_261_248
    matrices = shape.linear_flops_per_token + shape.head_flops_per_token
    norms_and_table = (2 * 32 + 1) * 4096 + 128_256 * 4096
    assert matrices == 2 * (shape.num_parameters - norms_and_table)
    assert shape.attention_flops_per_kv_token == 4 * 32 * 4096


def test_a_sliding_window_is_read() -> None:
    shape = shape_from_hf_config(hf_config(PRESETS["mistral-7b"]) | {"sliding_window": 4096})
    assert shape.sliding_window == 4096


def test_both_forms_of_rope_and_dtype_are_read() -> None:
    modern = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    modern["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    modern["dtype"] = "bfloat16"
    assert shape_from_hf_config(modern, "llama-3.1-8b") == PRESETS["llama-3.1-8b"]
    assert PRESETS["llama-3.1-8b"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "allowed: LlamaForCausalLM, Mistral"),
        ({"architectures": None, "model_type": "mixtral"}, "mixtral.*allowed"),
        ({"num_key_value_heads": [8] * 31 + [4]}, "KV heads differ between layers"),
        ({"block_configs": [{"attention": {}}]}, "each layer a shape of its own"),
        ({"kv_cache_dtype": ["fp8", "bfloat16"]}, "differs between"),
        ({"torch_dtype": "float8_e4m3fn"}, "allowed: float32, bfloat16"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 5}, "does not divide"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "allowed: default, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "allowed: silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 127}, "odd"),
        ({"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, "window differs between layers"),
        ({"layer_types": ["linear_attention"] * 32}, "allowed: full_attention"),
        ({"layer_types": [["full_attention"]] * 32}, "list of words"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            "window differs between layers",
        ),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_with_its_cause(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        shape_from_hf_config(LLAMA | change)


def test_kv_heads_listed_per_layer_are_accepted_where_all_are_the_same() -> None:
    assert shape_from_hf_config(LLAMA | {"num_key_value_heads": [8] * 32}).num_kv_heads == 8


def test_an_unknown_preset_or_dtype_lists_what_there_is() -> None:
    with pytest.raises(ModelError, match="tiny-llama"):
        preset("llama-9")
    with pytest.raises(ModelError, match="bfloat16"):
        preset("tiny-llama", "int4")
    assert preset("tiny-llama", "bfloat16").kv_bytes_per_token * 2 == PRESETS["tiny-llama"].kv_bytes_per_token


def test_layers_are_spread_evenly_or_as_told() -> None:
    shape = PRESETS["qwen2.5-7b"]  # 28 layers, 28 heads, 4 KV heads
    assert check_parallelism(shape, 2, 3) == (10, 9, 9)
    assert check_parallelism(shape, 4, 2, [20, 8]) == (20, 8)


@pytest.mark.parametrize(
    ("tp", "pp", "layers", "why"),
    [
        (3, 1, None, "allowed: 1, 2, 4, 28"),
        (7, 1, None, "allowed: 1, 2, 4, 28"),  # divides the heads, but 7 and 4 KV heads fit in no way
        (8, 1, None, "28 attention heads"),
        (0, 1, None, "at least 1"),
        (1, 29, None, "1 to 28"),
        (1, 2, [20, 9], "sum to 28"),
        (1, 2, [28], "2 numbers"),
        (1, 2, [28, 0], "at least 1"),
    ],
)
def test_a_parallelism_that_does_not_fit_is_refused_with_what_would(
    tp: int, pp: int, layers: list[int] | None, why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        check_parallelism(PRESETS["qwen2.5-7b"], tp, pp, layers)
