# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Single rules of config.json at their borders; that edits are noticed at all is tested with whole directories."""

from typing import Any

import pytest

from nemo_ptq.verify.model_config import parse_config
from nemo_ptq.verify.trtllm.config_rules import LAYOUT_RULES, OTHER_RULES

# A Llama-3.1-8B without its vocabulary.
CONFIG: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "decoder": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_size": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "position_embedding_type": "rope_gpt_neox",
}


def problems(rule: str, quantization: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    tp, pp = changes.pop("tp", 1), changes.pop("pp", 1)
    raw = CONFIG | changes
    raw["mapping"] = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    raw["quantization"] = {"quant_algo": None, "kv_cache_quant_algo": None, **(quantization or {})}
    return {**LAYOUT_RULES, **OTHER_RULES}[rule](raw, parse_config(raw))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tp": 8, "pp": 4}, None),
        ({"tp": 16}, None),
        ({"tp": 64}, "num_attention_heads 32 does not divide by tp_size 64"),
        ({"tp": 3, "num_attention_heads": 24, "intermediate_size": 14337}, "num_key_value_heads 8 and tp_size 3"),
        ({"pp": 5}, "num_hidden_layers 32 does not divide by pp_size 5"),
        ({"tp": 4, "intermediate_size": 14338}, "intermediate_size 14338 does not divide by tp_size 4"),
        ({"num_attention_heads": 36}, "num_attention_heads 36 does not divide by num_key_value_heads 8"),
    ],
)
def test_divisibility(changes: dict[str, Any], said: str | None) -> None:
    assert_says(problems("divisibility", **changes), said)


AWQ = {"quant_algo": "W4A16_AWQ", "group_size": 128}


@pytest.mark.parametrize(
    "quantization, changes, said",
    [
        (AWQ, {}, None),
        (AWQ, {"tp": 16}, None),
        # The reader rounds up to 128 for each of the ranks: 14336 is 3.5 times 32 * 128.
        (AWQ, {"tp": 32}, "mlp.proj: in-features 14336 are no multiple of 4096, which W4A16_AWQ needs"),
        (AWQ | {"group_size": 64}, {"intermediate_size": 192, "tp": 2}, "mlp.fc: out-features 192"),
        (AWQ | {"group_size": 64}, {"intermediate_size": 14400}, None),
        (AWQ, {"intermediate_size": 14400}, "mlp.fc: out-features 14400 are no multiple of 128"),
        (AWQ | {"quant_algo": "W4A8_AWQ"}, {"head_size": 100}, "attention.qkv: out-features 4800"),
        (AWQ | {"exclude_modules": ["*router"]}, {"vocab_size": 128255}, "lm_head: out-features 128255"),
        ({"quant_algo": "NVFP4"}, {"tp": 8}, None),
        ({"quant_algo": "NVFP4"}, {"intermediate_size": 14400}, "mlp.fc: 14400 x 4096 weights of a rank"),
        ({"quant_algo": "NVFP4"}, {"intermediate_size": 64 * 30 * 4, "tp": 4}, None),
        ({"quant_algo": "FP8"}, {"intermediate_size": 14337}, None),
    ],
)
def test_quantized_shapes(quantization: dict[str, Any], changes: dict[str, Any], said: str | None) -> None:
    assert_says(problems("quantized shapes", quantization, **changes), said)


@pytest.mark.parametrize(
    "quantization, said",
    [
        (AWQ | {"has_zero_point": False, "pre_quant_scale": True}, None),
        (AWQ | {"has_zero_point": 0, "pre_quant_scale": True}, "quantization.has_zero_point is 0, expected False"),
        (
            {"quant_algo": "W4A8_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True},
            "quantization.group_size 64 with W4A8_AWQ is refused by the reader",
        ),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, None),
        ({"quantized_layers": {}}, "quantization.quantized_layers makes the directory unloadable"),
        ({"exclude_modules": ["lm_head"]}, "quantization.exclude_modules does not belong to quant_algo None"),
    ],
)
def test_quantization(quantization: dict[str, Any], said: str | None) -> None:
    assert_says(problems("quantization", quantization), said)


@pytest.mark.parametrize(
    "scaling, said",
    [
        (None, None),
        ({"type": "linear", "factor": 2.0}, None),
        ({"type": "linear", "rope_type": "linear", "factor": 2.0}, None),
        ({"type": "linear", "rope_type": "llama3", "factor": 2.0}, "rotary_scaling.rope_type is 'llama3'"),
        ({"type": "linear", "factor": 0.5}, "rotary_scaling.factor is 0.5, expected at least 1"),
        ({"type": "linear"}, "rotary_scaling.factor is missing"),
        ({"type": "llama3", "factor": 32.0}, "rotary_scaling.low_freq_factor is missing"),
        ({"type": "linear", "factor": 2.0, "beta": 1}, "rotary_scaling.beta is unknown"),
        ({"type": "dynamic", "factor": 2.0}, "rotary_scaling.type is 'dynamic', expected linear or llama3"),
    ],
)
def test_rotary_scaling(scaling: dict[str, Any] | None, said: str | None) -> None:
    assert_says(problems("rotary scaling", rotary_scaling=scaling), said)


def test_a_shared_embedding_needs_an_excluded_lm_head_only_where_lm_head_is_left_out() -> None:
    quantization = {"quant_algo": "FP8", "exclude_modules": ["*router"]}
    assert problems("exclude_modules", quantization, share_embedding_table=True)
    assert not problems("exclude_modules", quantization, share_embedding_table=True, pp=2)


def assert_says(found: list[str], said: str | None) -> None:
    if said is None:
        assert found == []
    else:
        assert any(problem.startswith(said) for problem in found), found
