# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2: LayerNorm, biases, grouped queries and a sliding window."""

from typing import Any

from nemo_ptq.models.hugging_face import (
    FIELDS,
    GELU,
    NEMO,
    HuggingFaceClass,
    Settings,
    gpt_like,
    sizes,
    sliding_window_fields,
    sliding_window_setting,
)
from nemo_ptq.models.mapping import EMBEDDING_RULE, LAYER, LAYER_NORMS, SPLIT_QKV, with_bias
from nemo_ptq.models.registry import Family


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    # NeMo's importer drops the window.
    return "Starcoder2Config", {} if hf["sliding_window"] is None else sliding_window_fields(hf)


STARCODER2 = HuggingFaceClass(
    architecture="Starcoder2ForCausalLM",
    config_class="Starcoder2Config",
    nemo_model=NEMO + "starcoder2.Starcoder2Model",
    nemo_config=_nemo_config,
    nemo_settings=sliding_window_setting,
    nemo_fixed=gpt_like("gelu", bias=True),
    defaults=sizes(49152, 3072, 12288, 30, 24, positions=4096, num_key_value_heads=2, norm_epsilon=1e-5, use_bias=True)
    | {"initializer_range": 0.018042, "hidden_act": GELU[0], "sliding_window": None, "tie_word_embeddings": True},
    fields=FIELDS | {"layernorm_epsilon": "norm_epsilon"},
    fixed={"hidden_act": GELU, "use_bias": (True,), "rope_scaling": (None,)},
    # Of the files that were published, and not read by transformers.
    harmless=("layer_norm_epsilon",),
    neutral={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    rules=(
        EMBEDDING_RULE,
        *with_bias("decoder.layers.self_attention.linear_qkv.", SPLIT_QKV),
        *with_bias("decoder.layers.self_attention.linear_proj.", LAYER + "self_attn.o_proj"),
        *with_bias("decoder.layers.mlp.linear_fc1.", LAYER + "mlp.c_fc"),
        *with_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.c_proj"),
        *LAYER_NORMS,
    ),
)

FAMILIES = (Family("StarCoder 2", "Starcoder2", "gpt", hugging_face=STARCODER2),)
