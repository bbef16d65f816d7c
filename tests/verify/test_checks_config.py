# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""verify() on edits of config.json, with a manifest that matches them."""

from typing import Any

import pytest

from .conftest import Copy
from .damage import ALGORITHMS, LAYOUTS, edited_json, failures, replace_file
from .qnemo_writer import write_manifest

# Key and new value; an ellipsis deletes the key.
Edits = tuple[tuple[str, Any], ...]

CONFIG_EDITS: Edits = (
    ("architecture", "MixtralForCausalLM"),
    ("architecture", "GPTForCausalLM"),
    ("decoder", "gpt"),
    ("decoder", "gemma"),
    ("decoder", "qwen"),
    ("dtype", "float16"),
    ("dtype", "float32"),
    ("dtype", "bf16"),
    ("logits_dtype", "bfloat16"),
    ("num_hidden_layers", 4),
    ("num_hidden_layers", 3),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -2),
    ("num_hidden_layers", "2"),
    ("num_attention_heads", 8),
    ("num_attention_heads", 5),
    ("num_attention_heads", True),
    ("num_key_value_heads", 4),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 0),
    ("hidden_size", 128),
    ("head_size", 32),
    ("intermediate_size", 511),
    ("intermediate_size", 1024),
    ("norm_epsilon", 1e-4),
    ("norm_epsilon", 0),
    ("vocab_size", 130),
    ("vocab_size", 133),
    ("vocab_size", 64),
    ("max_position_embeddings", 48),
    ("hidden_act", "gelu"),
    ("hidden_act", "swiglu"),
    ("hidden_act", "silu "),
    ("position_embedding_type", "learned_absolute"),
    ("position_embedding_type", "alibi"),
    ("rotary_pct", 0.5),
    ("rotary_base", 10000.0),
    ("rotary_base", "500"),
    ("rotary_scaling", None),
    ("rotary_scaling", {"type": "llama3"}),
    ("rotary_scaling", {"type": "yarn", "factor": 4.0}),
    ("rotary_scaling", {"rope_type": "llama3", "factor": 4.0}),
    ("rotary_scaling.factor", 8.0),
    ("rotary_scaling.low_freq_factor", 2.0),
    ("rotary_scaling.high_freq_factor", 0.5),
    ("rotary_scaling.original_max_position_embeddings", 8192),
    ("use_parallel_embedding", False),
    ("embedding_sharding_dim", 1),
    ("share_embedding_table", True),
    ("residual_mlp", True),
    ("bias", True),
    ("attn_bias", True),
    ("mlp_bias", True),
    ("lm_head_bias", True),
    ("qk_layernorm", True),
    ("rmsnorm", False),
    ("rank", 0),
    ("rank", "3"),
    ("unknown_key", 1),
    ("moe", {"num_experts": 8, "top_k": 2, "normalization_mode": 1}),
    ("mapping.world_size", 2),
    ("mapping.tp_size", 4),
    ("mapping.tp_size", 1),
    ("mapping.pp_size", 1),
    ("mapping.cp_size", 1),
    ("mapping.moe_ep_size", 2),
    ("mapping", None),
    ("mapping", [4]),
    ("quantization.unknown", 1),
    ("quantization.quantized_layers", {}),
    ("quantization.quant_algo", "W8A16"),
    ("quantization.quant_algo", "MIXED_PRECISION"),
    ("quantization.quant_algo", 8),
    ("quantization.kv_cache_quant_algo", None),
    ("quantization.kv_cache_quant_algo", "NVFP4"),
    ("quantization.exclude_modules", "lm_head"),
    ("quantization.smoothquant_val", 0.5),
    ("quantization", {}),
    ("quantization", "FP8"),
    ("producer", ...),
    ("num_key_value_heads", ...),
    ("head_size", ...),
    ("norm_epsilon", ...),
    ("rotary_base", ...),
    ("mapping", ...),
    ("quantization", ...),
)


AWQ_EDITS = (
    ("quantization.group_size", 64),
    ("quantization.group_size", 100),
    ("quantization.group_size", None),
    ("quantization.has_zero_point", True),
    ("quantization.pre_quant_scale", False),
    ("quantization.pre_quant_scale", ...),
)
QUANTIZED_EDITS = (
    ("quantization.quant_algo", None),
    ("quantization.exclude_modules", ...),
    ("quantization.exclude_modules", ["*router"]),
    ("quantization.exclude_modules", ["*lm_head", "*.mlp.fc"]),
    ("quantization.exclude_modules", ["*"]),
)
EXPERT_EDITS = (
    ("moe", None),
    ("moe.num_experts", 8),
    ("moe.top_k", 1),
    ("moe.top_k", 5),
    ("moe.top_k", ...),
    ("moe.normalization_mode", 0),
    ("moe.tp_mode", 1),
    ("mapping.moe_tp_size", 1),
    ("hidden_act", "silu"),
    ("quantization.exclude_modules", ["*lm_head"]),
    ("quantization.exclude_modules", ["*lm_head", "*router", "*.mlp"]),
    ("quantization.quant_algo", "W8A8_SQ_PER_CHANNEL"),
)
GPT_EDITS = (
    ("hidden_act", "swiglu"),
    ("hidden_act", "squared-relu"),
    ("hidden_act", "gegelu"),
    ("position_embedding_type", "rope_gpt_neox"),
    ("max_position_embeddings", 96),
    ("rmsnorm", True),
    ("bias", False),
    ("share_embedding_table", False),
    ("rotary_scaling", {"type": "linear", "factor": 2.0}),
    ("num_key_value_heads", 4),
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_edits_are_noticed(copy: Copy, algorithm: str) -> None:
    # Every edit meets every rule once; what algorithm it meets matters little, so the others take turns.
    edits = CONFIG_EDITS if algorithm == "fp8" else CONFIG_EDITS[ALGORITHMS.index(algorithm) :: 4]
    assert_each_is_noticed(copy(*LAYOUTS[algorithm]), edits)


@pytest.mark.parametrize(
    "layout, edits",
    [
        *((name, QUANTIZED_EDITS) for name in ALGORITHMS if name != "no_quant"),
        ("int4_awq", AWQ_EDITS),
        ("w4a8_awq", AWQ_EDITS),
        ("nvfp4", (("quantization.group_size", 32), ("quantization.group_size", ...))),
        ("experts", EXPERT_EDITS),
        ("starcoder", GPT_EDITS),
    ],
)
def test_edits_for_one_kind_of_directory_are_noticed(copy: Copy, layout: str, edits: Edits) -> None:
    assert_each_is_noticed(copy(*LAYOUTS[layout]), edits)


def assert_each_is_noticed(directory: Any, edits: Edits) -> None:
    path = directory / "config.json"
    original = path.read_bytes()
    for key, value in edits:
        with edited_json(path) as config:
            *outer, last = key.split(".")
            for name in outer:
                config = config[name]
            assert value is ... or last not in config or config[last] != value or type(config[last]) is not type(value)
            config[last] = value
            if value is ...:
                del config[last]
        write_manifest(directory)
        assert failures(directory), (key, value)
        replace_file(path, original)
    write_manifest(directory)
    assert failures(directory) == []
