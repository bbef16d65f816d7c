# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What Gemma 2 and 3 have in config.json is held against the model's own description."""

import json
from typing import Any

import pytest

from nemo_ptq.export.trtllm.trtllm_config import qnemo_config
from nemo_ptq.verify.context import config_problems
from nemo_ptq.verify.model_config import Config, parse_config
from nemo_ptq.verify.trtllm.config_rules import LAYOUT_RULES, OTHER_RULES
from tests.export.shapes import FAMILIES, SHAPES, layout

MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {
        "interleaved_attn_pattern": [5, 1],
        "rotary_base": [1e4, 1e6],
        "softmax_scale": 0.25,
        "window_size": 8,
        "qk_layernorm": False,
    },
}


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(qnemo_config(layout(SHAPES[family]), FAMILIES[family], "0"))) | changes


def config_of(family: str, **changes: Any) -> Config:
    return parse_config(raw_config(family, **changes))


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("gemma2", "query_pre_attn_scalar", 16, "attention_scale"),
        ("gemma2", "attn_logit_softcapping", None, "attention_cap"),
        ("gemma2", "final_logit_softcapping", 20.0, "logit_cap"),
        ("gemma3", "query_pre_attn_scalar", 32, "attention_scale"),
        ("gemma3", "rope_local_base_freq", 1e5, "local_rotary_base"),
        ("gemma3", "rotary_base", 1e5, "rotary_base"),
        ("gemma3", "sliding_window", 9, "attention_window"),
        ("gemma3", "_sliding_window_pattern", 2, "global_layers"),
    ],
)
def test_a_contradiction_is_found(family: str, key: str, value: Any, said: str) -> None:
    assert config_problems(config_of(family), {"config": MODELS[family]}) == []
    (problem,) = config_problems(config_of(family, **{key: value}), {"config": MODELS[family]})
    assert problem.startswith(f"{said} is ")


@pytest.mark.parametrize("key", ["query_pre_attn_scalar", "_sliding_window_pattern", "rope_local_base_freq"])
def test_what_the_reader_needs_is_there(key: str) -> None:
    def problems(raw: dict[str, Any]) -> list[str]:
        rules = {name: rule for name, rule in (LAYOUT_RULES | OTHER_RULES).items() if name != "quantized shapes"}
        return [problem for rule in rules.values() for problem in rule(raw, parse_config(raw))]

    assert problems(raw_config("gemma3")) == []
    assert problems(raw_config("gemma3", **{key: None})) == [f"{key} is null; decoder gemma3 needs it"]
    without = raw_config("gemma3")
    del without[key]
    assert f"{key} is missing" in problems(without)


@pytest.mark.parametrize("key", ["qwen_type", "seq_length", "moe_intermediate_size"])
def test_qwens_keys_agree_with_the_others(key: str) -> None:
    raw = raw_config("qwen3_moe")
    assert LAYOUT_RULES["experts"](raw, parse_config(raw)) == OTHER_RULES["Qwen's keys"](raw, parse_config(raw)) == []
    (problem,) = OTHER_RULES["Qwen's keys"](raw | {key: "other"}, parse_config(raw))
    assert problem.startswith(f"{key} is 'other', expected ")
