# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Phi 3 and 4: Llama's layers, whose queries, keys and values are one tensor, and so are gate and up projection."""

from typing import Any

from nemo_ptq.models.hugging_face import (
    FIELDS,
    NEMO,
    HuggingFaceClass,
    Settings,
    llama_like,
    sizes,
    sliding_window_fields,
    sliding_window_setting,
)
from nemo_ptq.models.mapping import EMBEDDING_RULE, GATED, LAYER, QKV, RMS_NORMS, without_bias
from nemo_ptq.models.registry import Family


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    # NeMo's importer drops the window, the query groups and the share of a head that is rotated.
    return "Phi3Config", {} if hf["sliding_window"] is None else sliding_window_fields(hf)


PHI3 = HuggingFaceClass(
    architecture="Phi3ForCausalLM",
    config_class="Phi3Config",
    nemo_model=NEMO + "phi3mini.Phi3Model",
    nemo_config=_nemo_config,
    nemo_settings=sliding_window_setting,
    nemo_fixed=llama_like("silu"),
    defaults=sizes(32064, 3072, 8192, 32, 32, positions=4096, sliding_window=None)
    | {"rms_norm_eps": 1e-5, "hidden_act": "silu", "partial_rotary_factor": 1.0},
    fields=FIELDS | {"rotary_percent": "partial_rotary_factor"},
    # Models for more than some thousand tokens stretch their rotary embedding (longrope), which Megatron does not have.
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,)},
    rules=(
        EMBEDDING_RULE,
        *without_bias("decoder.layers.self_attention.linear_qkv.", dict.fromkeys(QKV, LAYER + "self_attn.qkv_proj")),
        *without_bias("decoder.layers.self_attention.linear_proj.", LAYER + "self_attn.o_proj"),
        *without_bias("decoder.layers.mlp.linear_fc1.", dict.fromkeys(GATED, LAYER + "mlp.gate_up_proj")),
        *without_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.down_proj"),
        *RMS_NORMS,
    ),
    can_tie=True,
    harmless=("original_max_position_embeddings",),
    # Of published files, and not read by transformers.
    neutral={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
)

FAMILIES = (Family("Phi 3", "Phi3", "llama", "silu", PHI3),)
