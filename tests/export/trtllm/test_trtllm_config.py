# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""config.json says of each family what its reader needs to hear, and nothing that a reader refuses."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from nemo_ptq.errors import PtqError
from nemo_ptq.export.trtllm.trtllm_config import check_exportable, qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import RotaryScaling
from nemo_ptq.verify.model_config import parse_config
from nemo_ptq.verify.trtllm.config_rules import LAYOUT_RULES, OTHER_RULES
from tests.export.shapes import FAMILIES, GPT, LLAMA, MIXTRAL, SHAPES, families_and_layouts, layout, scheme_named


def config_of(family: str, files: QnemoLayout) -> dict[str, Any]:
    """The configuration as a reader gets it."""
    return json.loads(json.dumps(qnemo_config(files, FAMILIES[family], "1.2.3")))


@settings(max_examples=200, deadline=None)
@given(families_and_layouts())
def test_readers_accept_it(drawn: tuple[Family, QnemoLayout]) -> None:
    family, files = drawn
    raw = json.loads(json.dumps(qnemo_config(files, family, "0")))
    # The drawn models are too small for the kernels that the shapes are for.
    rules = {name: rule for name, rule in (LAYOUT_RULES | OTHER_RULES).items() if name != "quantized shapes"}
    assert [problem for rule in rules.values() for problem in rule(raw, parse_config(raw))] == []


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            {
                "architecture": "LlamaForCausalLM",
                "decoder": "llama",
                "hidden_act": "silu",
                "rmsnorm": True,
                "position_embedding_type": "rope_gpt_neox",
                "attn_bias": False,
                "mlp_bias": False,
            },
        ),
        (
            "mixtral",
            {
                "architecture": "LlamaForCausalLM",
                "hidden_act": "swiglu",
                "moe": {"num_experts": 3, "top_k": 2, "normalization_mode": 1},
            },
        ),
        (
            "gemma",
            {
                "architecture": "GemmaForCausalLM",
                "hidden_act": "openai-gelu",
                "share_embedding_table": True,
                "head_size": 16,
            },
        ),
        ("gpt", {"architecture": "GPTForCausalLM", "hidden_act": "gelu", "rmsnorm": False, "bias": True}),
        (
            "qwen2",
            {
                "architecture": "Qwen2ForCausalLM",
                "qwen_type": "qwen2",
                "hidden_act": "silu",
                "attn_bias": True,
                "mlp_bias": False,
                "bias": False,
                "seq_length": 50,
            },
        ),
        ("qwen3", {"architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3", "attn_bias": False}),
        (
            "qwen3_moe",
            {"architecture": "Qwen3MoeForCausalLM", "qwen_type": "qwen3_moe", "moe_intermediate_size": 64}
            | {"hidden_act": "swiglu", "moe": {"num_experts": 3, "top_k": 2, "normalization_mode": 1}},
        ),
        (
            "gemma2",
            {"architecture": "Gemma2ForCausalLM", "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0}
            | {"final_logit_softcapping": 30.0, "share_embedding_table": True},
        ),
        (
            "gemma3",
            {"architecture": "Gemma3ForCausalLM", "query_pre_attn_scalar": 16, "_sliding_window_pattern": 6}
            | {"final_logit_softcapping": None, "sliding_window": 8, "rope_local_base_freq": 1e4, "rotary_base": 1e6},
        ),
        ("starcoder", {"position_embedding_type": "learned_absolute", "num_key_value_heads": 1}),
    ],
)
def test_families_are_described(family: str, expected: dict[str, Any]) -> None:
    config = config_of(family, layout(SHAPES[family]))
    assert {key: config.get(key) for key in expected} == expected


def test_sizes_are_those_of_the_whole_model() -> None:
    config = config_of("llama", layout(LLAMA, tp=4, pp=2))
    sizes = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "head_size": 16,
        "intermediate_size": 64,
        "vocab_size": 37,
        "max_position_embeddings": 50,
        "norm_epsilon": 1e-5,
        "rank": 7,
        "mapping": {"world_size": 8, "tp_size": 4, "pp_size": 2},
    }
    assert {key: config[key] for key in sizes} == sizes


def test_experts_are_mapped_to_tensor_parallelism() -> None:
    mapping = config_of("mixtral", layout(MIXTRAL, "FP8", tp=2))["mapping"]
    assert mapping == {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1}


@pytest.mark.parametrize(("dtype", "logits"), [(torch.bfloat16, "float16"), (torch.float16, "float16")])
def test_logits_have_a_dtype_that_readers_take(dtype: torch.dtype, logits: str) -> None:
    config = config_of("llama", replace(layout(LLAMA), dtype=dtype))
    assert (config["dtype"], config["logits_dtype"]) == (str(dtype).removeprefix("torch."), logits)


def test_llama_31_scaling_has_all_its_numbers() -> None:
    shape = replace(LLAMA, rotary_scaling=RotaryScaling(32.0, 1.5, 3.0, 64))
    scaling = config_of("llama", layout(shape))["rotary_scaling"]
    assert scaling.pop("rope_type") == scaling.pop("type") == "llama3"
    assert scaling == {
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    }


def test_interpolated_positions_are_told() -> None:
    scaling = config_of("llama", layout(replace(LLAMA, rotary_linear_factor=4.0)))["rotary_scaling"]
    assert (scaling["type"], scaling["factor"]) == ("linear", 4.0)
    assert config_of("llama", layout(LLAMA))["rotary_scaling"] is None


@pytest.mark.parametrize(
    ("activation", "gated", "expected"),
    [
        ("gelu", False, "gelu"),
        ("gelu", True, "geglu"),
        ("silu", True, "swiglu"),
        ("squared-relu", False, "squared-relu"),
    ],
)
def test_gated_activations_have_gated_names(activation: str, gated: bool, expected: str) -> None:
    shape = replace(GPT, activation=activation, gated_mlp=gated)
    assert config_of("gpt", layout(shape))["hidden_act"] == expected


def test_llama_biases_are_told_by_the_names_that_its_reader_knows() -> None:
    config = config_of("llama", layout(replace(LLAMA, linear_bias=True, qkv_bias=True)))
    assert config["attn_bias"] is config["mlp_bias"] is True


def test_norms_of_queries_and_keys_are_refused() -> None:
    with pytest.raises(PtqError, match="qk_layernorm=True"):
        check_exportable(replace(LLAMA, qk_norm=True), FAMILIES["llama"])


def test_biases_that_the_llama_reader_does_not_know_are_refused() -> None:
    with pytest.raises(PtqError, match="add_qkv_bias=True with add_bias_linear=False"):
        check_exportable(replace(LLAMA, qkv_bias=True), FAMILIES["llama"])
    check_exportable(replace(GPT, qkv_bias=True), FAMILIES["gpt"])


def test_biases_of_experts_are_refused() -> None:
    with pytest.raises(PtqError, match="add_bias_linear=True with 3 experts"):
        check_exportable(replace(MIXTRAL, linear_bias=True, qkv_bias=True), FAMILIES["mixtral"])
    check_exportable(MIXTRAL, FAMILIES["mixtral"])


def test_unquantized_exports_say_only_that() -> None:
    assert config_of("llama", layout(LLAMA))["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        ("FP8", {}),
        ("W8A8_SQ_PER_CHANNEL", {}),
        ("W4A16_AWQ", {"group_size": 16, "has_zero_point": False, "pre_quant_scale": True}),
        ("W4A8_AWQ", {"group_size": 16, "has_zero_point": False, "pre_quant_scale": True}),
        ("NVFP4", {"group_size": 16}),
    ],
)
@pytest.mark.parametrize("kv_cache", [True, False])
def test_quantization_is_told(algorithm: str, keys: dict[str, Any], kv_cache: bool) -> None:
    quantization = config_of("llama", layout(LLAMA, algorithm, kv_cache=kv_cache))["quantization"]
    patterns = quantization.pop("exclude_modules")
    assert quantization == {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if kv_cache else None, **keys}
    for module in ("lm_head", "transformer.vocab_embedding", "transformer.layers.3.mlp.router"):
        assert excludes(patterns, module)
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj", "mlp"):
        assert not excludes(patterns, f"transformer.layers.3.{module}")


def excludes(patterns: list[str], module: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def without(files: QnemoLayout, *modules: str) -> QnemoLayout:
    """A layout in which some modules are not quantized."""
    kept = {name: scheme for name, scheme in files.schemes.items() if not name.endswith(modules)}
    return replace(files, schemes=kept)


def test_layers_that_are_nowhere_quantized_are_excluded() -> None:
    files = without(layout(LLAMA, "FP8", pp=2), "mlp.linear_fc1")
    patterns = config_of("llama", files)["quantization"]["exclude_modules"]
    for layer in range(2):
        assert excludes(patterns, f"transformer.layers.{layer}.mlp.fc")
        assert excludes(patterns, f"transformer.layers.{layer}.mlp.gate")
        assert not excludes(patterns, f"transformer.layers.{layer}.mlp.proj")


def test_single_layers_are_excluded_by_name() -> None:
    files = without(layout(LLAMA, "FP8"), "layers.1.self_attention.linear_proj")
    patterns = config_of("llama", files)["quantization"]["exclude_modules"]
    assert [layer for layer in range(4) if excludes(patterns, f"transformer.layers.{layer}.attention.dense")] == [1]


def test_single_layers_cannot_be_told_to_pipeline_stages() -> None:
    files = without(layout(LLAMA, "FP8", pp=2), "layers.1.self_attention.linear_proj")
    with pytest.raises(PtqError, match=r"unquantized in some layers only \(\[1\]\).*use inference_pp=1"):
        config_of("llama", files)


def test_unquantized_experts_are_excluded() -> None:
    files = without(layout(MIXTRAL, "FP8"), "linear_fc1", "linear_fc2")
    patterns = config_of("mixtral", files)["quantization"]["exclude_modules"]
    assert excludes(patterns, "transformer.layers.0.mlp")
    assert not excludes(patterns, "transformer.layers.0.attention.qkv")


def test_mixed_precision_is_refused() -> None:
    files = layout(LLAMA, "FP8")
    mixed = {**files.schemes, "decoder.layers.0.mlp.linear_fc2": scheme_named("W4A16_AWQ")}
    with pytest.raises(PtqError, match=r"in 2 ways \(FP8, W4A16_AWQ\).*mixed precision cannot"):
        config_of("llama", replace(files, schemes=mixed))
